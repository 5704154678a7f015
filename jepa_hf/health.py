"""Is a run healthy? Numbers from a fixed batch, and what they say beside those of the start.

Three ways to collapse are told apart: total (all samples get the same vector), dimensional (vectors differ along a few
directions only) and token (all positions of a sample get the same vector); and a run that diverges.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from .losses import prediction_loss
from .metrics import (
    constant_predictor_loss,
    effective_rank,
    hit_rate,
    mean_pairwise_cosine,
    normalized_spread,
    position_predictor_loss,
    sample_means,
    within_sample_share,
)

# Vectors that a rank is computed from, and targets that a hit rate chooses among.
MOST_VECTORS, MOST_CANDIDATES = 2048, 512

_REPRESENTATION = ("rank", "pairwise_cosine", "spread", "pooled_rank", "pooled_pairwise_cosine", "within_sample")

# What is left of the start's value when we speak of a collapse: of the distance between directions (1 - cosine), of the
# rank (pooled vectors lose more of it while they learn) and of the share of variance within samples. What healthy and
# collapsed runs keep of them: benchmarks/RESULTS.md, section 8.
DIRECTIONS_LEFT, DIMENSIONS_LEFT, POOLED_DIMENSIONS_LEFT, TOKENS_LEFT = 0.05, 0.25, 0.1, 0.1
# What is left of the best hit rate, where that was so many times chance, when we speak of a divergence.
HITS_LEFT, WELL_ABOVE_CHANCE = 0.2, 20


def representation_health(vectors: torch.Tensor, samples: torch.Tensor) -> dict[str, float]:
    """Health of one encoder's representations.

    Args:
        vectors: of all positions of a batch, `[N, D]`, in the order of the samples.
        samples: the sample of each, long `[N]`.

    Returns:
        `rank`, `pairwise_cosine` and `spread` (see `metrics`) of at most `MOST_VECTORS` positions, evenly spread over
        the batch; `pooled_rank` and `pooled_pairwise_cosine` of the samples' means; `within_sample`, the share of
        variance that lies within samples. All NaN where a vector is not finite.
    """
    if not vectors.isfinite().all():
        return dict.fromkeys(_REPRESENTATION, math.nan)
    vectors = vectors.float()
    pooled = sample_means(vectors, samples)
    some = vectors[:: -(-len(vectors) // MOST_VECTORS)]
    values = (
        effective_rank(some),
        mean_pairwise_cosine(some),
        normalized_spread(some),
        effective_rank(pooled),
        mean_pairwise_cosine(pooled),
        within_sample_share(vectors, samples),
    )
    return {name: value.item() for name, value in zip(_REPRESENTATION, values, strict=True)}


def prediction_health(
    predictions: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor, loss: str, smooth_l1_beta: float = 1.0
) -> dict[str, float]:
    """Health of the guesses: losses of the predictor, of the best constant and of the position alone, and hit rates.

    The hit rate chooses among `MOST_CANDIDATES` targets (fewer, if there are fewer), evenly spread over the batch, so
    that its scale stays the same over a run; `hit_rate_chance` is what guessing gives.

    Args:
        predictions, targets: `[N, D]`.
        positions: where each target stands in its sample, long `[N]`.
        loss, smooth_l1_beta: as in `JepaConfig`.

    Returns:
        `prediction_loss`, `constant_prediction_loss`, `hit_rate`, `hit_rate_chance`, and where any two targets stand at
        the same position `position_prediction_loss`.
    """
    step = -(-len(targets) // MOST_CANDIDATES)
    values = {
        "prediction_loss": prediction_loss(loss, predictions, targets, smooth_l1_beta).mean(),
        "constant_prediction_loss": constant_predictor_loss(targets, loss, smooth_l1_beta),
        "position_prediction_loss": position_predictor_loss(targets, positions, loss, smooth_l1_beta),
        "hit_rate": hit_rate(predictions[::step], targets[::step]),
    }
    if len(positions.unique()) == len(positions):
        del values["position_prediction_loss"]
    return {name: value.item() for name, value in values.items()} | {"hit_rate_chance": 1 / len(targets[::step])}


def diagnose(measured: Sequence[Mapping[str, float]]) -> dict[str, str]:
    """What is wrong with the last of a run's measurements, in words, by kind; empty where nothing is.

    The kinds are "total", "dimensional" and "token" collapse, and "divergence": guesses were good and are not. Every
    number is judged beside the same number at the run's start (divergence: at its best), because encoders differ
    widely in them before any training.

    Args:
        measured: entries of the log with the names that `HealthCallback` gives, `health_target_rank` and so on; the
            first is the run's start.

    >>> measured = [{"health_target_rank": 200.0}, {"health_target_rank": 10.0}]
    >>> diagnose(measured)["dimensional"]
    "dimensional collapse: the target encoder's representations use 10 directions, 200 at the start"
    >>> diagnose(measured[:1])
    {}
    """
    start, now = measured[0], measured[-1]
    found: dict[str, str] = {}
    for encoder in ("target", "context"):
        for pooled, what, left in (
            ("", "representations", DIMENSIONS_LEFT),
            ("pooled_", "pooled representations", POOLED_DIMENSIONS_LEFT),
        ):
            name = f"health_{encoder}_{pooled}pairwise_cosine"
            if name in now and 1 - now[name] < DIRECTIONS_LEFT * (1 - start[name]):
                found.setdefault(
                    "total",
                    f"total collapse: the {encoder} encoder's {what} all point the same way (mean cosine "
                    f"{now[name]:.4f}, {start[name]:.4f} at the start)",
                )
            name = f"health_{encoder}_{pooled}rank"
            if name in now and now[name] < left * start[name]:
                found.setdefault(
                    "dimensional",
                    f"dimensional collapse: the {encoder} encoder's {what} use {now[name]:.3g} directions, "
                    f"{start[name]:.3g} at the start",
                )
        name = f"health_{encoder}_within_sample"
        if name in now and now[name] < TOKENS_LEFT * start[name]:
            found.setdefault(
                "token",
                f"token collapse: the {encoder} encoder gives all positions of a sample nearly the same vector "
                f"({100 * now[name]:.2g} % of the variance is within samples, {100 * start[name]:.2g} % at the start)",
            )
    if not all(map(math.isfinite, now.values())):
        found["divergence"] = "divergence: representations are no finite numbers any more; lower the learning rate"
    elif "health_hit_rate" in now:
        rate, best = now["health_hit_rate"], max(entry["health_hit_rate"] for entry in measured)
        if best > WELL_ABOVE_CHANCE * now["health_hit_rate_chance"] and rate < HITS_LEFT * best:
            found["divergence"] = (
                f"divergence: the predictor finds {100 * rate:.2g} % of its targets and found {100 * best:.2g} % "
                "before; lower the learning rate"
            )
    return found


def is_measurement(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of a run's log is one of `HealthCallback`'s."""
    return any(name.startswith("health_") for name in entry)


def findings(history: Iterable[Mapping[str, Any]]) -> dict[str, tuple[int, str]]:
    """Over a run's log: for each kind that `diagnose` ever found, the first step of it and the sentence."""
    measured = list(filter(is_measurement, history))
    first: dict[str, tuple[int, str]] = {}
    for count, entry in enumerate(measured, start=1):
        for kind, sentence in diagnose(measured[:count]).items():
            first.setdefault(kind, (entry["step"], sentence))
    return first
