"""What the quickstart must have reached, and the four ways in which its encoder must load."""

import json
import sys
from pathlib import Path

from transformers import AutoModel, AutoModelForSequenceClassification, pipeline

folder = Path(sys.argv[1])
history = json.loads((folder / "metrics.json").read_text())["history"]
evaluations = [entry for entry in history if "eval_loss" in entry]
first, last = evaluations[0], evaluations[-1]
health = [entry for entry in history if "health_sample_hit_rate" in entry][-1]
checks = {
    "evaluation loss / constant predictor's (below 1)": (
        last["eval_prediction_loss"] / last["eval_constant_prediction_loss"],
        lambda ratio: ratio < 1,
    ),
    "hit rate / chance (at least 5)": (last["eval_hit_rate"] / last["eval_hit_rate_chance"], lambda ratio: ratio >= 5),
    "texts found by their context / chance (at least 20)": (
        health["health_sample_hit_rate"] / health["health_sample_hit_rate_chance"],
        lambda ratio: ratio >= 20,
    ),
    "target rank, end / start (at least 0.8)": (
        last["eval_target_rank"] / first["eval_target_rank"],
        lambda ratio: ratio >= 0.8,
    ),
    "context rank, end / start (at least 0.8)": (
        last["eval_context_rank"] / first["eval_context_rank"],
        lambda ratio: ratio >= 0.8,
    ),
}
for name, (value, holds) in checks.items():
    print(f"{name}: {value:.3f}")
    assert holds(value), name

assert AutoModel.from_pretrained(folder).config.model_type == "bert"
assert AutoModelForSequenceClassification.from_pretrained(folder, num_labels=2).num_labels == 2
assert len(pipeline("feature-extraction", model=str(folder))("A text.")[0][0]) == 128
for name in ("README.md", "training.png", "metrics.json", "jepa/model.safetensors", "modules.json"):
    assert (folder / name).stat().st_size > 0, name
# sentence-transformers is an extra of the tests; the suite loads it there.
