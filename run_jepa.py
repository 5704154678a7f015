"""Pretrain an encoder with JEPA: `accelerate launch run_jepa.py --model_name_or_path NAME --train_file data.txt`.

`python run_jepa.py --help` lists all flags; `python run_jepa.py configs/quickstart.yaml` needs neither model nor data.
"""

from jepa_hf.cli.main import leave
from jepa_hf.cli.train import main

if __name__ == "__main__":
    leave(main())
