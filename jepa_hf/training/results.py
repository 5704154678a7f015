"""Files about a run in its directory: `metrics.json` and `masks.png`."""

import json
from pathlib import Path
from typing import Any

from transformers import TrainerState

from ..masking.base_collator import MaskingCollator
from ..utils.atomic_files import atomic_write, atomic_write_text
from .callbacks import unwrap_jepa

METRICS_FILE = "metrics.json"


def write_metrics(trainer: Any) -> None:
    """Write the metrics of training and of the last evaluation, the verdict, the findings and the full log."""
    state, verdict, findings = trainer.state, trainer.verdict(), trainer.health_findings
    train = [entry for entry in state.log_history if "train_loss" in entry]
    evaluations = [entry for entry in state.log_history if any(name.startswith("eval_") for name in entry)]
    # Several data sets are evaluated one after the other in the same step.
    last = [entry for entry in evaluations if entry["step"] == evaluations[-1]["step"]]
    content: dict[str, Any] = {}
    if train:
        content["train"] = {name: value for name, value in train[-1].items() if name != "step"}
    if last:
        content["eval"] = {name: value for entry in last for name, value in entry.items() if name != "step"}
    content |= {
        "verdict": None if verdict is None else verdict.lines,
        "health_findings": {kind: {"step": step, "sentence": sentence} for kind, (step, sentence) in findings.items()},
        "max_steps": state.max_steps,
        "history": state.log_history,
    }
    atomic_write_text(Path(trainer.args.output_dir) / METRICS_FILE, json.dumps(content, indent=1) + "\n")


def read_state(path: Path) -> TrainerState:
    """Read the state at the end of a run from its `metrics.json`."""
    content = json.loads(path.read_text(encoding="utf-8"))
    history = content["history"]
    counted = [entry["num_input_tokens_seen"] for entry in history if "num_input_tokens_seen" in entry]
    return TrainerState(
        epoch=history[-1].get("epoch", 0.0),
        global_step=history[-1]["step"],
        max_steps=content["max_steps"],
        num_input_tokens_seen=max(counted, default=0),
        log_history=history,
    )


def write_masks(trainer: Any) -> None:
    """Draw views of the first training rows of a `JepaTrainer` to `masks.png`."""
    from ..monitoring.mask_plots import write_masks  # late, because matplotlib loads slowly

    if not trainer.args.should_save or not isinstance(trainer.data_collator, MaskingCollator):
        return
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_write(folder / "masks.png") as staging:
        model = unwrap_jepa(trainer.model)
        write_masks(model, trainer.data_collator, trainer.train_dataset, staging, trainer.processing_class)
