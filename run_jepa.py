"""Pretrain an encoder with JEPA: `accelerate launch run_jepa.py --model_name_or_path NAME --train_file data.txt`.

`python run_jepa.py --help` lists all flags; `python run_jepa.py configs/quickstart.yaml` needs neither model nor data.
"""

import gc

if __name__ == "__main__":
    # Imports make half a million objects and no garbage; to look for some among them again and again, while they are
    # imported, in training and at the end, took a third of the time that `--help` takes.
    gc.disable()
    from jepa_hf.cli.main import exit_process
    from jepa_hf.cli.train import main

    gc.freeze()
    gc.enable()
    exit_process(main())
