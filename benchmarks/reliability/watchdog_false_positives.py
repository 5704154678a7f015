"""How often does the watchdog speak on healthy runs, and how near to its thresholds do they come?

    python benchmarks/reliability/watchdog_false_positives.py configs/quickstart.yaml --seeds 5 [--flag value ...]

Runs a recipe once per seed and prints, per seed, the least that is left of what each threshold of
`jepa_hf.monitoring.health` looks at, as a share of its value at the start, over both encoders and all measurements. Of
the last measurement it prints the top-1 accuracy in a sample and the prediction loss over its best baseline's. It also
prints the findings of the watchdog.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from jepa_hf.cli.console import quiet_libraries
from jepa_hf.cli.parsing import parse_command
from jepa_hf.cli.train import run
from jepa_hf.monitoring.health import (
    BASELINES,
    COSINE_COLLAPSE_RATIO,
    POOLED_RANK_COLLAPSE_RATIO,
    POSITION_COLLAPSE_RATIO,
    RANK_COLLAPSE_RATIO,
    TOKEN_COLLAPSE_RATIO,
    best_baseline,
    is_measurement,
)

_LEFT: tuple[tuple[str, str, float, Callable[[float], float]], ...] = (
    ("directions", "pairwise_cosine", COSINE_COLLAPSE_RATIO, lambda cosine: 1 - cosine),
    ("pooled directions", "pooled_pairwise_cosine", COSINE_COLLAPSE_RATIO, lambda cosine: 1 - cosine),
    ("rank", "rank", RANK_COLLAPSE_RATIO, float),
    ("pooled rank", "pooled_rank", POOLED_RANK_COLLAPSE_RATIO, float),
    ("within samples", "within_sample", TOKEN_COLLAPSE_RATIO, float),
)


def lowest(history: list[dict[str, float]]) -> list[str]:
    """For each row of `_LEFT` the least that a measurement leaves of the start."""
    cells = []
    for _, name, _, kept in _LEFT:
        names = (f"health_target_{name}", f"health_context_{name}")
        shares = [kept(entry[n]) / kept(history[0][n]) for n in names for entry in history if kept(history[0][n]) > 0]
        cells.append(f"{min(shares):.2f}" if shares else "-")
    return cells


def position_share(entry: dict[str, float]) -> float:
    """The position alone's loss over the best constant's; 1 without positions."""
    constant = entry["health_constant_baseline_loss"]
    return entry.get("health_position_baseline_loss", constant) / constant


def at_the_end(entry: dict[str, float]) -> list[str]:
    """Top-1 accuracy in a sample next to chance, and the prediction loss over its best baseline's."""
    hits = "-"
    if "health_top1_accuracy_in_sample" in entry:
        hits = f"{entry['health_top1_accuracy_in_sample']:.3f} ({entry['health_top1_accuracy_in_sample_chance']:.3f})"
    baseline, least = best_baseline({name: entry[f"health_{name}"] for name in BASELINES if f"health_{name}" in entry})
    return [hits, f"{entry['health_prediction_loss'] / least:.3f} ({baseline})"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, default=5)
    options, flags = parser.parse_known_args()
    quiet_libraries()
    columns = [f"{label} (alarm {threshold})" for label, _, threshold, _ in _LEFT]
    columns += [f"position / constant, start, least of it (alarm {POSITION_COLLAPSE_RATIO})"]
    columns += ["top-1 accuracy in sample (chance)", "loss / best baseline"]
    print(f"| recipe | seed | {' | '.join(columns)} | found |")
    print("|" + " --- |" * (len(columns) + 3))
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            own = ["--output_dir", f"{folder}/out", "--seed", str(seed), "--report_to", "none", "--disable_tqdm"]
            trainer = run(parse_command([options.recipe, *own, *flags]))
        history = [entry for entry in trainer.state.log_history if is_measurement(entry)]
        results = ", ".join(
            f"{kind.replace('_', ' ')} at {step}" for kind, (step, _) in trainer.health_findings.items()
        )
        start = position_share(history[0])
        least = min(position_share(entry) / start for entry in history)
        cells = [*lowest(history), f"{start:.2f}, {least:.2f}", *at_the_end(history[-1])]
        print(f"| {Path(options.recipe).stem} | {seed} | {' | '.join(cells)} | {results or 'nothing'} |", flush=True)


if __name__ == "__main__":
    main()
