"""A run under DeepSpeed's ZeRO on two CPU ranks, started by `torchrun`; `test_zero.py` calls `run` too.

torchrun --nproc_per_node 2 zero_two_ranks.py STAGE FOLDER [CHECKPOINT]
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))

from jepa_batches import rows, tiny_jepa  # noqa: E402
from jepa_runs import trainer  # noqa: E402
from train_ranks import five_steps  # noqa: E402

from jepa_hf.cli.main import leave  # noqa: E402
from jepa_hf.pretrained import whole_weights  # noqa: E402

CONFIGURATIONS = HERE.parents[1] / "configs" / "accelerate"


def configuration(stage: int) -> dict[str, Any]:
    """The one that is shipped, in float32."""
    config = json.loads((CONFIGURATIONS / f"zero{stage}.json").read_text(encoding="utf-8"))
    config["torch_autocast"]["enabled"] = False
    return config


def run(folder: Path, processes: int, checkpoint: Path | None = None, **overrides: Any) -> None:
    """Five steps over batches of 8 samples in all, a checkpoint after two of them, and what is left at the end."""
    settings = five_steps(processes) | {"save_strategy": "steps", "save_steps": 2, "health_steps": 2}
    weights = {"mlm_weight": 0.5, "contrastive_weight": 1.0}
    with whole_weights():
        model = tiny_jepa("bert", "dropped", strong=False, initializer_range=0.1, **weights)
    made = trainer(folder, model, data=rows("bert", 40, longest=40), **(settings | overrides))
    made.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    made.save_model()
    made.save_state()


if __name__ == "__main__":
    # accelerate starts DeepSpeed on GPUs only.
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    PartialState()
    stage, output, *given = sys.argv[1:]
    run(Path(output), 2, Path(given[0]) if given else None, deepspeed=configuration(int(stage)))
    leave(0)
