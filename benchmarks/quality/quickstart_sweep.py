"""Variants of the quickstart side by side: which settings keep a short run from a random start healthy.

python benchmarks/quality/quickstart_sweep.py [--jobs 6] [--output table.jsonl]

Each variant is one run of `run_jepa.py configs/quickstart.yaml` with other flags, in a process of its own.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
# What all share, and then one lever at a time against `target_norm layer, learning_rate 1e-3`.
COMMON = {"target_norm": "layer", "learning_rate": "1e-3", "max_steps": 300, "warmup_steps": 30, "eval_steps": 100}
VARIANTS: list[dict[str, Any]] = [
    *({"learning_rate": rate, "mlm_weight": weight} for rate in ("5e-4", "1e-3", "2e-3") for weight in (0, 0.5)),
    {"variance_weight": 1},
    {"variance_weight": 1, "covariance_weight": 0.04},
    {"sigreg_weight": 0.001},
    {"mlm_weight": 1},
    {"average_top_k_layers": 1},
    {"average_top_k_layers": 4},
    {"target_norm": "instance"},
    {"ema_decay": 0.98, "ema_decay_end": 0.9995},
    {"ema_decay": 0.99, "ema_decay_end": 0.999},
    {"mask_ratio": 0.5},
    {"pred_num_hidden_layers": 4},
    {"loss": "cosine"},
    {"loss": "l2"},
    {"masked_tokens": "mask_token"},
    {"masked_tokens": "mask_token", "predictor_type": "mlp"},
    {"learning_rate": "2e-3", "mlm_weight": 1, "target_norm": "instance"},
    {"learning_rate": "2e-3", "mlm_weight": 0.2},
    {"learning_rate": "2e-3", "mlm_weight": 0.5, "ema_decay": 0.99, "ema_decay_end": 0.999},
]


def run(variant: dict[str, Any]) -> dict[str, Any]:
    """Train one variant; its row of the table."""
    with tempfile.TemporaryDirectory() as folder:
        flags = {**COMMON, **variant, "output_dir": folder, "disable_tqdm": True, "save_strategy": "no"}
        command = [sys.executable, str(ROOT / "run_jepa.py"), str(ROOT / "configs/quickstart.yaml")]
        command += [str(part) for name, value in flags.items() for part in (f"--{name}", value)]
        begin = time.perf_counter()
        completed = subprocess.run(command, capture_output=True, text=True)
        if completed.returncode:
            raise RuntimeError(f"{variant}: {completed.stderr[-2000:]}")
        seconds = time.perf_counter() - begin
        history = json.loads((Path(folder) / "metrics.json").read_text())["history"]
    first, *_, last = [entry for entry in history if "eval_loss" in entry]
    return {
        "variant": variant,
        "seconds": round(seconds),
        "prediction_loss": last["eval_prediction_loss"],
        "constant": last["eval_constant_baseline_loss"],
        "top1_accuracy_over_chance": last["eval_top1_accuracy"] / last["eval_top1_accuracy_chance"],
        "target_rank_ratio": last["eval_target_rank"] / first["eval_target_rank"],
        "context_rank_ratio": last["eval_context_rank"] / first["eval_context_rank"],
        "context_pairwise_cosine": last["eval_context_pairwise_cosine"],
    }


def main() -> None:
    """Run all variants, a few at a time."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=6, help="runs at a time")
    parser.add_argument("--output", default="quickstart_sweep.jsonl")
    options = parser.parse_args()
    with ThreadPoolExecutor(options.jobs) as pool, open(options.output, "w", encoding="utf-8") as file:
        for row in pool.map(run, VARIANTS):
            file.write(json.dumps(row) + "\n")
            print(row, flush=True)


if __name__ == "__main__":
    main()
