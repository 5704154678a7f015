"""What `test_stopping.py` looks at: two ranks, one of which is asked to go, or meets numbers that are not finite.

    accelerate launch --config_file configs/accelerate/cpu2.yaml stop_two_ranks.py FOLDER

Each rank writes what it ends with to FOLDER/rank-N.pt.
"""

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from helpers.batches import rows, tiny_jepa
from helpers.runs import RecordingTrainer, RunAtStep, trainer, weights
from jepa_hf.cli.main import exit_process
from jepa_hf.errors import RunError
from jepa_hf.training.signals import GracefulShutdownCallback

DATA = rows("bert", 40)


def start(folder: Path, **overrides: Any) -> Any:
    model = tiny_jepa(encoder={"hidden_dropout_prob": 0.1}, strong=False)
    return trainer(folder, model, DATA, max_steps=6, per_device_train_batch_size=2, **overrides)


class NonFiniteLossTrainer(RecordingTrainer):
    """The loss of rank 1 is NaN in step 3; its gradient is zero."""

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        if PartialState().process_index == 1 and self.state.global_step == 2:
            loss = loss * 0.0 + float("nan")
        return loss


if __name__ == "__main__":
    folder, rank = Path(sys.argv[1]), PartialState(cpu=True).process_index
    results: dict[str, Any] = {}

    undisturbed = start(folder / "whole")
    undisturbed.train()
    results["whole"] = weights(undisturbed.model)

    def ask(model: Any, state: Any) -> None:
        if rank == 1 and state.global_step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    interruption = GracefulShutdownCallback()
    stopped = start(folder / "stopped", callbacks=[RunAtStep(on_step_end=ask), interruption])
    with interruption.handle_signals():
        stopped.train()
    results["stopped"] = {"step": stopped.state.global_step, "code": interruption.exit_code}
    again = start(folder / "stopped")
    again.train(resume_from_checkpoint=True)
    results["resumed"] = weights(again.model)

    spoilt = start(folder / "spoilt", cls=NonFiniteLossTrainer, logging_steps=100)
    try:
        spoilt.train()
    except RunError as error:
        results["error"] = str(error)
    read = spoilt.batches[2]["input_ids"]
    results["read"] = [DATA.index({"input_ids": row[row != 0].tolist()}) for row in read]
    torch.save(results, folder / f"rank-{rank}.pt")
    PartialState().destroy_process_group()
    exit_process(0)
