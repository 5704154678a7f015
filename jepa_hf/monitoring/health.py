"""Measures of a run's health on a sample of its targets, and the verdicts that follow from them."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from ..models.losses import prediction_loss
from .metrics import (
    constant_predictor_loss,
    effective_rank,
    group_predictor_loss,
    hit_rate,
    hit_rate_in_sample,
    mean_pairwise_cosine,
    normalized_spread,
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
# What is left of the start's ratio of two losses, that of the position alone and the constant's, when we speak of a
# position collapse.
POSITIONS_LEFT = 0.25
# What is left of the best skill, where that was at least `GOOD_SKILL`, when we speak of a divergence. Skill is 0 at a
# hit rate of chance and 1 where every target is found.
SKILL_LEFT, GOOD_SKILL = 0.2, 0.1
# A prediction loss above this share of its best rival's has learned nothing that the rival does not know.
NO_BETTER = 0.98
# Guesses that read no context, and what each is in a sentence.
RIVALS = {
    "constant_prediction_loss": "the best constant",
    "position_prediction_loss": "the position alone",
    "sample_prediction_loss": "the sample alone",
}


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
    predictions: torch.Tensor | None,
    targets: torch.Tensor,
    loss: str,
    smooth_l1_beta: float = 1.0,
    samples: torch.Tensor | None = None,
    masks: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> dict[str, float]:
    """Health of the predictions: their loss, the losses of three rivals that read no context, and hit rates.

    `hit_rate` chooses among `MOST_CANDIDATES` targets (fewer, if there are fewer), evenly spread over the batch, so
    that its scale stays the same over a run. `hit_rate_in_sample` chooses among the targets of one mask of one sample.
    A position that several masks of a sample hide has one target. It is a candidate once, and counts for rivals once.

    Args:
        predictions: `[N, D]`; None where the predictor is not trained: then there are the rivals' losses alone.
        targets: `[N, D]`.
        loss, smooth_l1_beta: as in `JepaConfig`.
        samples, masks, positions: the sample of each target, the number of its mask there, and its place in its sample,
            long `[N]`. No `positions` where a target stands for all positions of a mask: the others are not read then.

    Returns:
        `prediction_loss`, `constant_prediction_loss`, `hit_rate` and `hit_rate_chance`. Where any two targets are of
        one position or of one sample, `position_prediction_loss` and `sample_prediction_loss`. Where any two are of
        one mask, `hit_rate_in_sample` and `hit_rate_in_sample_chance`.
    """
    distinct = torch.arange(len(targets), device=targets.device)
    if positions is not None:
        distinct = _first_of_each(_pairs(samples, positions))
    of_rivals = targets[distinct]
    values = {"constant_prediction_loss": constant_predictor_loss(of_rivals, loss, smooth_l1_beta)}
    for name, groups in (("position", positions), ("sample", samples)) if positions is not None else ():
        groups = groups[distinct]
        if len(groups.unique()) < len(groups):
            values[f"{name}_prediction_loss"] = group_predictor_loss(of_rivals, groups, loss, smooth_l1_beta)
    if predictions is not None:
        chosen = distinct[:: -(-len(distinct) // MOST_CANDIDATES)]
        values["prediction_loss"] = prediction_loss(loss, predictions, targets, smooth_l1_beta).mean()
        values["hit_rate"] = hit_rate(predictions[chosen], targets[chosen])
        values["hit_rate_chance"] = targets.new_tensor(1 / len(chosen), dtype=torch.float32)
        views = None if positions is None else _pairs(samples, masks)
        if views is not None and len(views.unique()) < len(views):
            hits, chance = hit_rate_in_sample(predictions, targets, views)
            values |= {"hit_rate_in_sample": hits, "hit_rate_in_sample_chance": chance}
    return {name: value.item() for name, value in values.items()}


def _pairs(one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    """A number for each pair of numbers, long `[N]`, `[N]` -> long `[N]`."""
    return one * (other.max() + 1) + other


def _first_of_each(keys: torch.Tensor) -> torch.Tensor:
    """Where each key stands first, in order, long `[N]` -> long `[number of keys]`."""
    found, owner = keys.unique(return_inverse=True)
    places = torch.arange(len(keys), device=keys.device)
    return places.new_full(found.shape, len(keys)).scatter_reduce(0, owner, places, "amin").sort().values


def best_rival(measured: Mapping[str, float]) -> tuple[str, float]:
    """The rival of least loss, in words, and its loss.

    Args:
        measured: what `prediction_health` gives.

    >>> best_rival({"constant_prediction_loss": 0.43, "position_prediction_loss": 0.31})
    ('the position alone', 0.31)
    """
    name = min((rival for rival in RIVALS if rival in measured), key=lambda rival: measured[rival])
    return RIVALS[name], measured[name]


def diagnose(measured: Sequence[Mapping[str, float]], finished: bool = False) -> dict[str, str]:
    """Judge the last of a run's measurements: a sentence for each kind of finding, empty where there is none.

    The kinds of collapse are "total" (all samples get the same vector), "dimensional" (vectors differ along few
    directions), "token" (all positions of a sample get the same vector) and "position" (all samples get the same
    sequence of vectors). "divergence" means that predictions were good and are not. Each number is compared with
    the run's start (divergence: with its best), because encoders differ widely before any training.
    "nothing_learned" means that the prediction loss is not 2 % below its best rival's; only a finished run is judged
    so.

    Args:
        measured: entries of the log with the names that `HealthCallback` gives, `health_target_rank` and so on; the
            first is the run's start.
        finished: whether the last one was made after the run's last step.

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
    position, constant = "health_position_prediction_loss", "health_constant_prediction_loss"
    # Where all vectors are the same, the ratio of the two losses is rounding.
    compared = position in now and "total" not in found
    if compared and now[position] * start[constant] < POSITIONS_LEFT * start[position] * now[constant]:
        found["position"] = (
            "position collapse: the target encoder gives all samples nearly the same sequence of vectors (the position "
            f"alone leaves {_share(now[position], now[constant])} of the best constant's loss, "
            f"{_share(start[position], start[constant])} at the start)"
        )
    hits = next((name for name in ("health_hit_rate_in_sample", "health_hit_rate") if name in now), None)
    if not all(map(math.isfinite, now.values())):
        found["divergence"] = "divergence: representations are no finite numbers any more; lower the learning rate"
    elif hits is not None:
        best = max(measured, key=lambda entry: _skill(entry, hits))
        if _skill(best, hits) > GOOD_SKILL and _skill(now, hits) < SKILL_LEFT * _skill(best, hits):
            found["divergence"] = (
                f"divergence: the predictor finds {100 * now[hits]:.2g} % of its targets and found "
                f"{100 * best[hits]:.2g} % before; lower the learning rate"
            )
    if finished and "health_prediction_loss" in now:
        loss = now["health_prediction_loss"]
        rival, best_loss = best_rival({name: now[f"health_{name}"] for name in RIVALS if f"health_{name}" in now})
        if loss > NO_BETTER * best_loss:
            # After a collapse or a divergence the remedy is theirs.
            remedy = "" if found else "; try more steps, or a larger prediction_weight"
            found["nothing_learned"] = (
                f"nothing learned about single targets: the prediction loss ends at {loss:.4g}, where {rival} gives "
                f"{best_loss:.4g}{remedy}"
            )
    return found


def _share(part: float, whole: float) -> str:
    return f"{100 * part / whole:.2g} %"


def _skill(entry: Mapping[str, float], hits: str) -> float:
    chance = entry[f"{hits}_chance"]
    return (entry[hits] - chance) / (1 - chance)


def is_measurement(entry: Mapping[str, Any]) -> bool:
    """Whether an entry of a run's log is one of `HealthCallback`'s."""
    return any(name.startswith("health_") for name in entry)


def findings(history: Iterable[Mapping[str, Any]], max_steps: int | None = None) -> dict[str, tuple[int, str]]:
    """Over a run's log: for each kind that `diagnose` ever found, the first step of it and the sentence.

    Args:
        history: `trainer.state.log_history`, or `history` in `metrics.json`.
        max_steps: the run's length in steps, at which it is judged whether anything was learned; None judges no run so.
    """
    measured = list(filter(is_measurement, history))
    first: dict[str, tuple[int, str]] = {}
    for count, entry in enumerate(measured, start=1):
        finished = max_steps is not None and entry["step"] >= max_steps
        for kind, sentence in diagnose(measured[:count], finished).items():
            first.setdefault(kind, (entry["step"], sentence))
    return first
