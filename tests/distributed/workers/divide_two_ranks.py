"""A run whose parameters two CPU ranks divide: by accelerate's FSDP2, or by DeepSpeed's ZeRO.

accelerate launch --config_file configs/accelerate/LAUNCH.yaml divide_two_ranks.py LAUNCH PRECISION:FOLDER:[CHECKPOINT]

Of several folders one run after the other, each in fp32 or bf16, from the beginning or from a checkpoint.
`test_fsdp.py` and `test_zero.py` start it by `start`, and call `run` for what one process leaves.
"""

import json
import os
import sys
from collections.abc import Container, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

from train_ranks import five_steps  # noqa: E402

from helpers.batches import rows, tiny_jepa  # noqa: E402
from helpers.processes import forked_python, run_python  # noqa: E402
from helpers.runs import trainer  # noqa: E402
from jepa_hf.cli.main import exit_process  # noqa: E402
from jepa_hf.distributed.deepspeed_state import zero3_init_disabled  # noqa: E402

CONFIGURATIONS = HERE.parents[2] / "configs" / "accelerate"


def run(folder: Path, processes: int, checkpoint: Path | None = None, **overrides: Any) -> None:
    """Five steps over batches of 8 samples in all, with checkpoints after two and four, and what is left at the end.

    Then checkpoint-4 is loaded as the best one, and left in the folder "best".
    """
    settings = five_steps(processes) | {"save_strategy": "steps", "save_steps": 2, "health_steps": 2}
    weights = {"mlm_weight": 0.5, "contrastive_weight": 1.0}
    with zero3_init_disabled():
        odd = {"vocab_size": 257}  # of its biases the two ranks have parts of differing sizes
        model = tiny_jepa("bert", "drop", strong=False, encoder=odd, initializer_range=0.1, **weights)
    run = trainer(folder, model, data=rows("bert", 40, longest=40), **(settings | overrides))
    actual: list[torch.dtype] = []
    given = run.compute_loss

    def compute_loss(*args: Any, **kwargs: Any) -> torch.Tensor:
        loss = given(*args, **kwargs)
        actual.append(loss.dtype)
        return loss

    run.compute_loss = compute_loss
    run.train(resume_from_checkpoint=checkpoint and str(checkpoint))
    run.save_model()
    run.save_state()
    run.state.best_model_checkpoint = str(folder / "checkpoint-4")
    run._load_best_model()
    run.save_model(str(folder / "best"))
    facts = {"launch": run.accelerator.distributed_type.value, "loss": str(actual[0])}
    (folder / "facts.json").write_text(json.dumps(facts), encoding="utf-8")


def precision_of(launch: str, bf16: bool) -> dict[str, Any]:
    """The training arguments: DeepSpeed's file, which is shipped with bfloat16, says it itself."""
    if not launch.startswith("zero"):
        return {"bf16": bf16}
    config = json.loads((CONFIGURATIONS / f"{launch}.json").read_text(encoding="utf-8"))
    config["torch_autocast"]["enabled"] = bf16
    return {"deepspeed": config}


def start(launch: str, runs: Mapping[Path, Path | None], bf16: Container[Path] = ()) -> None:
    """Run on two ranks, for each folder from the checkpoint that is given with it, and see that they did not fail.

    Args:
        bf16: the folders whose runs compute in bfloat16.
    """
    paths = os.pathsep.join(filter(None, [str(HERE.parents[2]), os.environ.get("PYTHONPATH", "")]))
    wanted = {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    command = ["-m", "accelerate.commands.launch", "--main_process_port", "0", "--config_file"]
    command += [str(CONFIGURATIONS / f"{launch}.yaml"), str(HERE / "divide_two_ranks.py"), launch]
    for folder, checkpoint in runs.items():
        command.append(f"{'bf16' if folder in bf16 else 'fp32'}:{folder}:{checkpoint or ''}")
    with forked_python():
        code, _, errors = run_python(command, os.environ | wanted, HERE.parents[2], timeout=400)
    assert code == 0, errors[-4000:]


def model_of(folder: Path) -> dict[str, torch.Tensor]:
    """The weights at the end, of both encoders and all else."""
    return load_file(folder / "jepa" / "model.safetensors")


def facts(folder: Path) -> dict[str, str]:
    """What accelerate took the launch for, and the type of a step's loss."""
    return json.loads((folder / "facts.json").read_text(encoding="utf-8"))


def logged(folder: Path, name: str) -> list[float]:
    """What was logged under a name, step by step."""
    history = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    return [entry[name] for entry in history if name in entry]


if __name__ == "__main__":
    # accelerate starts both on GPUs only.
    PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    PartialState.set_device = lambda self: setattr(self, "device", torch.device("cpu"))
    PartialState()
    launch, *runs = sys.argv[1:]
    for precision, folder, checkpoint in (given.split(":") for given in runs):
        run(Path(folder), 2, Path(checkpoint) if checkpoint else None, **precision_of(launch, precision == "bf16"))
    exit_process(0)
