"""run_jepa.py on two CPU ranks that divide the weights, for `test_llm.py`.

accelerate launch --config_file configs/accelerate/fsdp2.yaml llm_two_shards.py FLAGS
"""

import sys

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

from jepa_hf.cli.main import exit_process
from jepa_hf.cli.train import main

if __name__ == "__main__":
    # accelerate starts both on GPUs only.
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    PartialState()
    exit_process(main(sys.argv[1:]))
