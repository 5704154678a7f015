"""Pretrain an encoder with JEPA: `accelerate launch run_jepa.py --model_name_or_path NAME --train_file data.txt`.

`python run_jepa.py --help` lists the main flags; `python run_jepa.py configs/quickstart.yaml` needs neither model nor
data.
"""

import gc
import sys

if __name__ == "__main__":
    # Imports make half a million objects and no garbage; searching for garbage among them takes a third of their time.
    gc.disable()
    from jepa_hf.cli.main import run_process, train

    run_process(train, sys.argv[1:], "run_jepa.py")
