"""Health metrics of a sample of targets, and the findings that follow from them."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch

from ..models.losses import prediction_loss
from ..utils.formatting import format_number, format_share
from .metrics import (
    constant_baseline_loss,
    effective_rank,
    group_baseline_loss,
    mean_pairwise_cosine,
    mean_pool_by_sample,
    normalized_std,
    top1_accuracy,
    top1_accuracy_in_sample,
    within_sample_variance_ratio,
)

# Maximum number of vectors for a rank, and of candidate targets for a top-1 accuracy.
MAX_RANK_VECTORS, MAX_TOP1_CANDIDATES = 2048, 512

REPRESENTATION_METRICS = (
    "rank",
    "pairwise_cosine",
    "normalized_std",
    "pooled_rank",
    "pooled_pairwise_cosine",
    "within_sample",
)

# A collapse leaves less than these fractions of the start's value: of the distance between directions (1 - cosine), of
# the rank (pooled vectors lose more of it during training), and of the share of variance within samples. Values of
# healthy and collapsed runs: benchmarks/RESULTS.md, section 8.
COSINE_COLLAPSE_RATIO, RANK_COLLAPSE_RATIO, POOLED_RANK_COLLAPSE_RATIO, TOKEN_COLLAPSE_RATIO = 0.05, 0.25, 0.1, 0.1
# A position collapse leaves less than this fraction of the start's ratio of two losses, those of
# the position and of the constant.
POSITION_COLLAPSE_RATIO = 0.25
# A divergence leaves less than `SKILL_DROP_RATIO` of the best skill, if that was at least `MIN_GOOD_SKILL`.
# Skill is 0 at a top-1 accuracy of chance and 1 at a perfect one.
SKILL_DROP_RATIO, MIN_GOOD_SKILL = 0.2, 0.1
# Samples are the same if their positions' means leave no more than this fraction of the other losses at the start.
IDENTICAL_SAMPLES_RATIO = 1e-4
# A prediction loss above this fraction of its best baseline's has learned nothing beyond the baseline.
MAX_LOSS_VS_BASELINE = 0.98
# A loss of tokens below this fraction of the start's has fallen.
FALLEN_RATIO = 0.99
# Relative change of a loss that is rounding: no weight has moved.
UNCHANGED = 1e-5
# Fewer entries of the training's log do not show whether a loss fell.
_MIN_LOG_ENTRIES = 8
# What helps against each kind of finding.
REMEDIES = {
    "divergence": "lower --learning_rate, or raise --warmup_steps.",
    "total": "lower --learning_rate, leave out --ema_decay, or set --target_norm instance.",
    "dimensional": "lower --learning_rate, or set --variance_weight 1 --covariance_weight 0.04.",
    "token": "leave out --pool_targets, or set --target_norm instance.",
    "position": "lower --learning_rate, or start from a pretrained encoder or one with rotary positions.",
    "identical_samples": "check the data, and which of its columns is read.",
    "nothing_learned": "raise --learning_rate, or train longer.",
    "predictions_at_baseline": "train longer, or raise --learning_rate or --prediction_weight.",
}
# Findings with which a command exits with code 1, and those whose sentence says how little was learned.
UNSUCCESSFUL = {"identical_samples", "nothing_learned"}
LEARNED_LITTLE = {*UNSUCCESSFUL, "predictions_at_baseline", "views_at_chance"}
# Baselines that read no context, with their descriptions.
BASELINES = {
    "constant_baseline_loss": "the best constant",
    "position_baseline_loss": "the position alone",
    "sample_baseline_loss": "the sample alone",
}


def representation_health(vectors: torch.Tensor, samples: torch.Tensor) -> dict[str, float]:
    """Measure the health of one encoder's representations.

    Args:
        vectors: Of all positions of a batch, `[N, D]`, in the order of the samples.
        samples: Sample of each vector, long `[N]`.

    Returns:
        `rank`, `pairwise_cosine` and `normalized_std` (see `metrics`) of at most `MAX_RANK_VECTORS` positions, evenly
        distributed over the batch; `pooled_rank` and `pooled_pairwise_cosine` of the samples' means; `within_sample`,
        the share of variance within samples. All NaN if a vector is not finite.
    """
    if not vectors.isfinite().all():
        return dict.fromkeys(REPRESENTATION_METRICS, math.nan)
    vectors = vectors.float()
    pooled = mean_pool_by_sample(vectors, samples)
    subset = vectors[:: -(-len(vectors) // MAX_RANK_VECTORS)]
    values = (
        effective_rank(subset),
        mean_pairwise_cosine(subset),
        normalized_std(subset),
        effective_rank(pooled),
        mean_pairwise_cosine(pooled),
        within_sample_variance_ratio(vectors, samples),
    )
    return {name: value.item() for name, value in zip(REPRESENTATION_METRICS, values, strict=True)}


def prediction_health(
    predictions: torch.Tensor | None,
    targets: torch.Tensor,
    loss: str,
    smooth_l1_beta: float = 1.0,
    samples: torch.Tensor | None = None,
    masks: torch.Tensor | None = None,
    positions: torch.Tensor | None = None,
) -> dict[str, float]:
    """Measure the predictions: their loss, the losses of three baselines, top-1 accuracies.

    `top1_accuracy` chooses among at most `MAX_TOP1_CANDIDATES` targets, evenly distributed over the batch,
    so that its scale stays the same during a run. `top1_accuracy_in_sample` chooses among the targets of
    one mask of one sample. A position that several masks of a sample hide has one target, which
    counts once as a candidate and once for the baselines.

    Args:
        predictions: `[N, D]`; None for an untrained predictor: then only the baselines' losses are returned.
        targets: `[N, D]`.
        loss: As in `JepaConfig`.
        smooth_l1_beta: As in `JepaConfig`.
        samples: Sample of each target, long `[N]`.
        masks: Mask of each target in its sample, long `[N]`.
        positions: Position of each target in its sample, long `[N]`. None if a target stands for
            all positions of a mask; then `samples` and `masks` are not used.

    Returns:
        `prediction_loss`, `constant_baseline_loss`, `top1_accuracy` and `top1_accuracy_chance`. If any two targets have
        the same position or the same sample, `position_baseline_loss` and `sample_baseline_loss`. If any two have the
        same mask, `top1_accuracy_in_sample` and `top1_accuracy_in_sample_chance`.
    """
    distinct = torch.arange(len(targets), device=targets.device)
    mask_of_sample, groups = None, {}
    if positions is not None and samples is not None and masks is not None:
        distinct = _first_of_each(_pairs(samples, positions))
        groups = {"position": positions[distinct], "sample": samples[distinct]}
        mask_of_sample = _pairs(samples, masks)
    candidates = targets[distinct]
    values = {"constant_baseline_loss": constant_baseline_loss(candidates, loss, smooth_l1_beta)}
    for name, group in groups.items():
        if len(group.unique()) < len(group):
            values[f"{name}_baseline_loss"] = group_baseline_loss(candidates, group, loss, smooth_l1_beta)
    if predictions is not None:
        chosen = distinct[:: -(-len(distinct) // MAX_TOP1_CANDIDATES)]
        values["prediction_loss"] = prediction_loss(loss, predictions, targets, smooth_l1_beta).mean()
        values["top1_accuracy"] = top1_accuracy(predictions[chosen], targets[chosen])
        values["top1_accuracy_chance"] = targets.new_tensor(1 / len(chosen), dtype=torch.float32)
        if mask_of_sample is not None and len(mask_of_sample.unique()) < len(mask_of_sample):
            accuracy, chance = top1_accuracy_in_sample(predictions, targets, mask_of_sample)
            values |= {"top1_accuracy_in_sample": accuracy, "top1_accuracy_in_sample_chance": chance}
    return {name: value.item() for name, value in values.items()}


def _pairs(first: torch.Tensor, second: torch.Tensor) -> torch.Tensor:
    """Number the pairs of two numbers: long `[N]`, `[N]` -> long `[N]`."""
    return first * (second.max() + 1) + second


def _first_of_each(keys: torch.Tensor) -> torch.Tensor:
    """Return each key's first index, in order: long `[N]` -> long `[number of keys]`."""
    unique, owner = keys.unique(return_inverse=True)
    indices = torch.arange(len(keys), device=keys.device)
    return indices.new_full(unique.shape, len(keys)).scatter_reduce(0, owner, indices, "amin").sort().values


def best_baseline(measured: Mapping[str, float]) -> tuple[str, float]:
    """Return description and loss of the baseline with the lowest loss.

    >>> best_baseline({"constant_baseline_loss": 0.43, "position_baseline_loss": 0.31})
    ('the position alone', 0.31)
    """
    name = min((baseline for baseline in BASELINES if baseline in measured), key=lambda baseline: measured[baseline])
    return BASELINES[name], measured[name]


def diagnose(measured: Sequence[Mapping[str, float]], finished: bool = False) -> dict[str, str]:
    """Judge the last of a run's measurements: a sentence for each kind of finding.

    The kinds of collapse are "total" (all samples get the same vector), "dimensional" (vectors differ along few
    directions), "token" (all positions of a sample get the same vector) and "position" (all samples get the same
    sequence of vectors). "divergence" means that predictions were good and no longer are. Each number is compared with
    the run's start (divergence: with its best), because encoders differ widely before any training. In a finished run,
    "predictions_at_baseline" means that the prediction loss is not 2 % below its best baseline's, and "nothing_learned"
    that it is not below its start either, and that no other term of the loss was learned. "identical_samples" means
    that there was nothing to learn.

    Args:
        measured: Log entries of `HealthCallback`, with names such as `health_target_rank`; the
            first is the run's start.
        finished: Whether the last one was made after the run's last step.

    >>> measured = [{"health_target_rank": 200.0}, {"health_target_rank": 10.0}]
    >>> diagnose(measured)["dimensional"]
    "dimensional collapse: the target encoder's representations use 10 directions, 200 at the start"
    >>> diagnose(measured[:1])
    {}
    """
    return _diagnose_each(measured, finished)[-1]


def _diagnose_each(
    measured: Sequence[Mapping[str, float]], finished: bool, log: Sequence[Mapping[str, Any]] = ()
) -> list[dict[str, str]]:
    """Return the findings of each measurement, see `diagnose`."""
    each = list(_diagnoses(measured))
    if finished and "health_prediction_loss" in measured[-1] and "identical_samples" not in each[-1]:
        each[-1] |= _nothing_learned(measured, log)
    return each


def _diagnoses(measured: Sequence[Mapping[str, float]]) -> Iterator[dict[str, str]]:
    """Yield the findings of each measurement, compared with those before it, but whether anything was learned."""
    start, is_finite = measured[0], True
    best: dict[str, float] = {}  # by the name of a top-1 accuracy
    for now in measured:
        kinds: dict[str, str] = {}
        if _are_identical(start):  # what else would be compared with the start is rounding
            yield {
                "identical_samples": "nothing to learn: all samples have the same target at each position, as equal "
                "rows have"
            }
            continue
        for encoder in ("target", "context"):
            for kind, sentence in _encoder_collapses(encoder, start, now):
                kinds.setdefault(kind, sentence)
        if "total" not in kinds:  # otherwise the ratio of the two losses is rounding
            kinds |= _position_collapse(start, now)
        is_finite = is_finite and all(map(math.isfinite, now.values()))  # a run does not recover from that
        kinds |= (
            _divergence(now, best)
            if is_finite
            else {"divergence": "divergence: representations are not finite any more"}
        )
        yield kinds


def _encoder_collapses(encoder: str, start: Mapping[str, float], now: Mapping[str, float]) -> Iterator[tuple[str, str]]:
    """Yield the total, dimensional and token collapses of an encoder."""
    for pooled, vectors, left in (
        ("", "representations", RANK_COLLAPSE_RATIO),
        ("pooled_", "pooled representations", POOLED_RANK_COLLAPSE_RATIO),
    ):
        name = f"health_{encoder}_{pooled}pairwise_cosine"
        if name in now and name in start and 1 - now[name] < COSINE_COLLAPSE_RATIO * (1 - start[name]):
            yield (
                "total",
                f"total collapse: the {encoder} encoder's {vectors} all point the same way (mean cosine "
                f"{now[name]:.4f}, {start[name]:.4f} at the start)",
            )
        name = f"health_{encoder}_{pooled}rank"
        if name in now and name in start and now[name] < left * start[name]:
            yield (
                "dimensional",
                f"dimensional collapse: the {encoder} encoder's {vectors} use {now[name]:.3g} directions, "
                f"{start[name]:.3g} at the start",
            )
    name = f"health_{encoder}_within_sample"
    if name in now and name in start and now[name] < TOKEN_COLLAPSE_RATIO * start[name]:
        yield (
            "token",
            f"token collapse: the {encoder} encoder gives all positions of a sample nearly the same vector "
            f"({format_share(now[name])} of the variance is within samples, {format_share(start[name])} at the start)",
        )


def _position_collapse(start: Mapping[str, float], now: Mapping[str, float]) -> dict[str, str]:
    position, constant = "health_position_baseline_loss", "health_constant_baseline_loss"
    if not all(name in entry for name in (position, constant) for entry in (start, now)):
        return {}
    if not now[position] * start[constant] < POSITION_COLLAPSE_RATIO * start[position] * now[constant]:  # also for NaN
        return {}
    return {
        "position": (
            "position collapse: the target encoder gives all samples nearly the same sequence of vectors (the position "
            f"alone leaves {_ratio(now[position], now[constant])} of the best constant's loss, "
            f"{_ratio(start[position], start[constant])} at the start)"
        )
    }


def _divergence(now: Mapping[str, float], best: dict[str, float]) -> dict[str, str]:
    """Compare the top-1 accuracy with the best one so far, and keep the better one in `best`."""
    name = next((name for name in ("health_top1_accuracy_in_sample", "health_top1_accuracy") if name in now), None)
    chance = now.get(f"{name}_chance", 1.0)
    if name is None or chance == 1:
        return {}
    skill, best_skill = (_skill(accuracy, chance) for accuracy in (now[name], best.get(name, now[name])))
    if skill >= best_skill:
        best[name] = now[name]
    if not (best_skill > MIN_GOOD_SKILL and skill < SKILL_DROP_RATIO * best_skill):
        return {}
    return {
        "divergence": (
            f"divergence: the predictor finds {format_share(now[name])} of its targets and found "
            f"{format_share(best[name])} before"
        )
    }


def _are_identical(start: Mapping[str, float]) -> bool:
    """Return whether nothing is left to predict where the position is known, at the start of a run."""
    baselines = [
        start[name] for name in ("health_constant_baseline_loss", "health_position_baseline_loss") if name in start
    ]
    scale = max((*baselines, start.get("health_prediction_loss", 0.0)))
    return bool(baselines) and math.isfinite(scale) and min(baselines) <= IDENTICAL_SAMPLES_RATIO * scale


def _nothing_learned(measured: Sequence[Mapping[str, float]], log: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Compare the last prediction loss with its baselines and its start; `log` has the other terms of the loss."""
    start, now = measured[0], measured[-1]
    baselines = {key: now[f"health_{key}"] for key in BASELINES if f"health_{key}" in now}
    if not baselines:
        return {}
    loss, (name, baseline) = now["health_prediction_loss"], best_baseline(baselines)
    if not loss > MAX_LOSS_VS_BASELINE * baseline:
        return {}
    ends = f"the prediction loss ends at {loss:.4g}, where {name} gives {baseline:.4g}"
    learned = " and ".join(_learned_otherwise(now, log))
    begins = start.get("health_prediction_loss", math.inf)
    # A warm-up begins at a learning rate of 0, so a run of one step changes nothing.
    is_unchanged = len(measured) > 1 and now.get("step", 0) != 1 and math.isclose(loss, begins, rel_tol=UNCHANGED)
    # The loss may rise by chance in a few steps, after which it is measured once.
    has_risen = loss > begins and len(measured) > 2
    if is_unchanged or (has_risen and not learned):
        return {"nothing_learned": f"nothing learned: {ends}, and it was {begins:.4g} at the start"}
    but = f"; but {learned}" if learned else ""
    return {"predictions_at_baseline": f"nothing learned about single targets: {ends}{but}"}


def _learned_otherwise(now: Mapping[str, float], log: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yield a clause for each other term of the loss that was learned."""
    found, chance = (now.get(f"health_sample_top1_accuracy{suffix}", 0.0) for suffix in ("", "_chance"))
    if found > 2 * chance:
        yield f"the context identifies {format_share(found)} of the samples (chance {format_share(chance)})"
    change = loss_change(log, "mlm_loss")
    if change is not None and change[1] < FALLEN_RATIO * change[0]:
        yield f"the loss of masked tokens fell from {format_number(change[0])} to {format_number(change[1])}"


def loss_change(entries: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float, bool] | None:
    """Return start and end of a loss, and whether they are those of evaluations; None if they were not logged.

    They are those of evaluations if there is one before the first step, else means over the first and the last quarter
    of the training's log, because single batches vary.
    """
    evaluated = [(entry["step"], entry[f"eval_{name}"]) for entry in entries if f"eval_{name}" in entry]
    if evaluated and evaluated[0][0] == 0 < evaluated[-1][0]:
        return evaluated[0][1], evaluated[-1][1], True
    trained = [entry[name] for entry in entries if name in entry]
    if len(trained) < _MIN_LOG_ENTRIES:
        return None
    quarter = len(trained) // 4
    return fmean(trained[:quarter]), fmean(trained[-quarter:]), False


def _ratio(part: float, total: float) -> str:
    return format_share(part / total if total else 0.0)


def _skill(accuracy: float, chance: float) -> float:
    """Rescale a top-1 accuracy: 0 is chance, 1 is perfect."""
    return (accuracy - chance) / (1 - chance)


def is_measurement(entry: Mapping[str, Any]) -> bool:
    """Return whether an entry of a run's log is a measurement of `HealthCallback`."""
    return any(name.startswith("health_") for name in entry)


def measurements(history: Iterable[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return the measurements of `HealthCallback` in a log; without any, those of evaluations under the same names."""
    entries = [entry for entry in history if "step" in entry]
    watched = [entry for entry in entries if is_measurement(entry)]
    if watched:
        return [{name: value for name, value in entry.items() if is_number(value)} for entry in watched]
    found = []
    for entry in entries:
        values = {
            f"health_{name.removeprefix('eval_')}": value
            for name, value in entry.items()
            if name.startswith("eval_") and is_number(value)
        }
        if "health_top1_accuracy" not in values:  # of a predictor that is not trained
            values.pop("health_prediction_loss", None)
        if values:
            found.append({"step": entry["step"], **values})
    return found


def is_number(value: Any) -> bool:
    """Return whether a value is a number and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def is_finished(history: Iterable[Mapping[str, Any]], max_steps: int | None) -> bool:
    """Return whether the training in a log has ended: at its last step, or by a callback with a last measurement.

    False if that is unknown.
    """
    if max_steps is None:
        return False
    entries = [entry for entry in history if "step" in entry]
    last_step = max((entry["step"] for entry in entries), default=0)
    last = [entry for entry in entries if entry["step"] == last_step]
    return last_step >= max_steps or (any("train_runtime" in entry for entry in last) and bool(measurements(last)))


def findings(history: Iterable[Mapping[str, Any]], max_steps: int | None = None) -> dict[str, tuple[int, str]]:
    """Return the findings that hold at the end of a run's log: the step since which, and the sentence, by kind.

    Args:
        history: `trainer.state.log_history`, or `history` in `metrics.json`.
        max_steps: The run's length in steps, to know whether it has finished, which is when it is
            judged whether anything was learned; None for no such judgment.
    """
    history = list(history)
    measured = measurements(history)
    if not measured:
        return {}
    log = [entry for entry in history if "step" in entry]
    found, each = {}, _diagnose_each(measured, is_finished(history, max_steps), log)
    for kind, sentence in each[-1].items():
        since = len(each) - 1
        while since > 0 and kind in each[since - 1]:
            since -= 1
        found[kind] = int(measured[since]["step"]), sentence
    return found


def first_finding(history: Iterable[Mapping[str, Any]]) -> int | None:
    """Return the step of the first finding in a log, which may have passed since."""
    measured = measurements(history)
    each = _diagnoses(measured) if measured else iter(())
    return next((int(entry["step"]) for entry, kinds in zip(measured, each, strict=False) if kinds), None)
