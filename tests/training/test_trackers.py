"""What `report_to` sends to a tracker: every number that the run logs, the health of its representations included."""

import json
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from jepa_hf.cli.train import main

# `Trainer`'s own summary, which trackers get under other names.
_SUMMARY = {"train_runtime", "train_samples_per_second", "train_steps_per_second", "train_loss"}


@pytest.mark.slow
def test_tensorboard_gets_every_number_of_the_log_at_its_step(tmp_path: Path) -> None:
    flags = ("--smoke_test", "--max_steps", "4", "--logging_steps", "2", "--use_cpu", "--do_eval")
    flags += ("--eval_strategy", "steps", "--eval_steps", "2", "--report_to", "tensorboard")
    assert main([*flags, "--output_dir", str(tmp_path / "out")]) == 0
    (events,) = (tmp_path / "out" / "runs").rglob("events.out.tfevents.*")
    written = EventAccumulator(str(events.parent))
    written.Reload()
    tags = written.Tags()["scalars"]
    assert {"train/loss", "train/ema_decay", "train/health_target_rank", "eval/top1_accuracy", "eval/target_rank"} <= {
        *tags
    }
    history = json.loads((tmp_path / "out" / "metrics.json").read_text())["history"]
    for entry in history:
        for name, value in entry.items():
            if name in ("step", "epoch") or name in _SUMMARY or not isinstance(value, (int, float)):
                continue
            tag = f"eval/{name.removeprefix('eval_')}" if name.startswith("eval_") else f"train/{name}"
            actual = {event.step: event.value for event in written.Scalars(tag)}
            assert abs(actual[entry["step"]] - value) <= 1e-6 * max(abs(value), 1.0), (tag, entry["step"])
