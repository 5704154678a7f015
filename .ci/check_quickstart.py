"""What the quickstart must have reached, and the four ways in which its encoder must load."""

import json
import sys
from pathlib import Path

from transformers import AutoModel, AutoModelForSequenceClassification, pipeline

from jepa_hf.monitoring.assessment import Severity, judge

folder = Path(sys.argv[1])
history = json.loads((folder / "metrics.json").read_text())["history"]
evaluations = [entry for entry in history if "eval_loss" in entry]
first, last = evaluations[0], evaluations[-1]
health = [entry for entry in history if "health_sample_top1_accuracy" in entry][-1]
baselines = [last[f"eval_{baseline}_baseline_loss"] for baseline in ("constant", "position", "sample")]
checks = {
    "evaluation loss / best baseline's (at most 0.9)": (
        last["eval_prediction_loss"] / min(baselines),
        lambda ratio: ratio <= 0.9,
    ),
    "top-1 accuracy in a sample / chance (at least 2)": (
        last["eval_top1_accuracy_in_sample"] / last["eval_top1_accuracy_in_sample_chance"],
        lambda ratio: ratio >= 2,
    ),
    "texts recognized by their context / chance (at least 20)": (
        health["health_sample_top1_accuracy"] / health["health_sample_top1_accuracy_chance"],
        lambda ratio: ratio >= 20,
    ),
    "target rank, end / start (at least 0.75)": (
        last["eval_target_rank"] / first["eval_target_rank"],
        lambda ratio: ratio >= 0.75,
    ),
    "context rank, end / start (at least 0.75)": (
        last["eval_context_rank"] / first["eval_context_rank"],
        lambda ratio: ratio >= 0.75,
    ),
}
for name, (value, holds) in checks.items():
    print(f"{name}: {value:.3f}")
    assert holds(value), name

verdict = judge(history, max_steps=last["step"])
print("\n".join(verdict.lines))
assert verdict.severity == Severity.HEALTHY

assert AutoModel.from_pretrained(folder).config.model_type == "modernbert"
assert AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).num_labels == 2
assert len(pipeline("feature-extraction", model=str(folder))("A text.")[0][0]) == 96
for name in ("README.md", "training.png", "metrics.json", "jepa/model.safetensors", "modules.json"):
    assert (folder / name).stat().st_size > 0, name
# sentence-transformers is an extra of the tests; the suite loads it there.
