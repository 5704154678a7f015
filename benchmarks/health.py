"""How often does the watchdog speak on healthy runs, and how near to its thresholds do they come?

    python benchmarks/health.py configs/quickstart.yaml --seeds 5 [--flag value ...]

Runs a recipe once per seed and prints, per seed, the least that is left of what each threshold of `jepa_hf.health`
looks at, as a share of its value at the start, over both encoders and all measurements; and what the watchdog found.
"""

import argparse
import tempfile
from collections.abc import Callable
from pathlib import Path

from jepa_hf.cli.arguments import parse_command, quiet_libraries
from jepa_hf.cli.train import run
from jepa_hf.health import (
    DIMENSIONS_LEFT,
    DIRECTIONS_LEFT,
    POOLED_DIMENSIONS_LEFT,
    TOKENS_LEFT,
    findings,
    is_measurement,
)

_LEFT: tuple[tuple[str, str, float, Callable[[float], float]], ...] = (
    ("directions", "pairwise_cosine", DIRECTIONS_LEFT, lambda cosine: 1 - cosine),
    ("pooled directions", "pooled_pairwise_cosine", DIRECTIONS_LEFT, lambda cosine: 1 - cosine),
    ("rank", "rank", DIMENSIONS_LEFT, float),
    ("pooled rank", "pooled_rank", POOLED_DIMENSIONS_LEFT, float),
    ("within samples", "within_sample", TOKENS_LEFT, float),
)


def lowest(history: list[dict[str, float]]) -> list[str]:
    """For each row of `_LEFT` the least that a measurement leaves of the start."""
    cells = []
    for _, name, _, kept in _LEFT:
        names = (f"health_target_{name}", f"health_context_{name}")
        shares = [kept(entry[n]) / kept(history[0][n]) for n in names for entry in history if kept(history[0][n]) > 0]
        cells.append(f"{min(shares):.2f}" if shares else "-")
    return cells


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--seeds", type=int, default=5)
    options, flags = parser.parse_known_args()
    quiet_libraries()
    columns = [f"{label} (alarm {threshold})" for label, _, threshold, _ in _LEFT]
    print(f"| recipe | seed | {' | '.join(columns)} | hit rate / chance at the end | found |")
    print("|" + " --- |" * (len(columns) + 4))
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            own = ["--output_dir", f"{folder}/out", "--seed", str(seed), "--report_to", "none", "--disable_tqdm"]
            trainer = run(parse_command([options.recipe, *own, *flags]))
        history = [entry for entry in trainer.state.log_history if is_measurement(entry)]
        found = ", ".join(f"{kind} at {step}" for kind, (step, _) in findings(history).items()) or "nothing"
        hits = history[-1]["health_hit_rate"] / history[-1]["health_hit_rate_chance"]
        print(
            f"| {Path(options.recipe).stem} | {seed} | {' | '.join(lowest(history))} | {hits:.0f} | {found} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
