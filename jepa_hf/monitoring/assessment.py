"""The verdict on a run, and a sentence about each of its curves."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from ..utils.counts import counted
from ..utils.formatting import format_number
from .health import (
    BASELINES,
    COSINE_COLLAPSE_RATIO,
    LEARNED_LITTLE,
    MAX_LOSS_VS_BASELINE,
    POOLED_RANK_COLLAPSE_RATIO,
    RANK_COLLAPSE_RATIO,
    REMEDIES,
    TOKEN_COLLAPSE_RATIO,
    best_baseline,
    findings,
    first_finding,
    is_finished,
    is_measurement,
    is_number,
    measurements,
)
from .view_health import VIEW_REMEDIES, view_findings

History = list[dict[str, Any]]
# Prefix of metrics that are measured on a fixed batch, else in evaluations.
MEASURED_PREFIX = "measured_"
# Step and value of each entry of a curve.
Points = list[tuple[int, float]]
# Curves of a panel: name in the log (see `metric_series`), and label.
Curves = tuple[tuple[str, str], ...]


class Severity(IntEnum):
    """Severity of a verdict or of a reading."""

    NOT_ASSESSED = 0
    HEALTHY = 1
    WARNING = 2
    NOTHING_LEARNED = 3
    COLLAPSED = 4
    DIVERGED = 5


@dataclass(frozen=True)
class Assessment:
    """A sentence about a curve, and its severity."""

    sentence: str
    severity: Severity = Severity.NOT_ASSESSED


@dataclass(frozen=True)
class Verdict:
    """The verdict on a run: the same on the console, in `metrics.json`, and in the report.

    Args:
        severity: Of the worst finding.
        reasons: One sentence for each finding, the worst first; or one that says that there is none.
        skill: Sentence about the prediction loss and its best baseline; empty if it was not measured.
        advice: What to do next.
        findings: First step and sentence of each finding by its kind.
        is_final: False while the run has steps to go.
    """

    severity: Severity
    reasons: tuple[str, ...]
    skill: str
    advice: str
    findings: dict[str, tuple[int, str]]
    is_final: bool = True

    @property
    def title(self) -> str:
        """The severity in words."""
        healthy = "Healthy" if self.is_final else "Healthy so far"
        return {Severity.HEALTHY: healthy, Severity.NOT_ASSESSED: "Not assessed"}.get(self.severity, "Not healthy")

    @property
    def lines(self) -> list[str]:
        """The verdict in two lines: the worst finding and the skill, then advice."""
        more = f"{counted(len(self.reasons) - 1, 'more finding')}." if len(self.reasons) > 1 else ""
        return [" ".join(filter(None, (f"{self.title}.", self.reasons[0], more, self.skill))), f"Next: {self.advice}"]


# Thresholds of warnings about curves. A collapse has those of the watchdog, see `health`.
# Below this multiple of chance, a top-1 accuracy counts as chance; among a sample's own targets, below
# this fraction of the way from chance to 1.
_MIN_CHANCE_MULTIPLE, _MIN_SKILL = 2.0, 0.05
# A rank below this fraction of the start's, or of random weights'.
_LOW_RANK_RATIO = 0.5
# A mean pairwise cosine that has risen above, a normalized standard deviation that has fallen below this.
_HIGH_COSINE, _LOW_STD = 0.9, 0.3

Assessor = Callable[[History, Curves, int | None], Assessment]


def metric_series(history: History, name: str) -> Points:
    """Return step and value of every entry with this name.

    The prefix `MEASURED_PREFIX` stands for `health_` (the fixed batch), or in a run without it for
    `eval_`.
    """
    if name.startswith(MEASURED_PREFIX):
        source = "health_" if any(map(is_measurement, history)) else "eval_"
        name = source + name.removeprefix(MEASURED_PREFIX)
    return [(entry["step"], float(entry[name])) for entry in history if "step" in entry and is_number(entry.get(name))]


def assess_loss(history: History, curves: Curves, width: int | None = None) -> Assessment:
    """Assess the prediction loss against baselines: a constant, the position, the sample."""
    measured = metric_series(history, "measured_prediction_loss")
    points = measured or metric_series(history, "prediction_loss")
    source = "" if measured else " in training"
    if (step := _not_finite(points)) is not None:
        sentence = f"The prediction loss{source} is not a finite number at step {step}: the run has diverged."
        return Assessment(sentence, Severity.DIVERGED)
    change = f"The prediction loss{source} {_describe_change(points)}"
    constant = metric_series(history, "measured_constant_baseline_loss")
    if constant and not metric_series(history, "measured_top1_accuracy"):  # measured only for a trained predictor
        return Assessment(f"{change}; its weight is 0, so it is not compared with its baselines.")
    if not measured:
        return Assessment(f"{change}; without a measurement there is no constant predictor to compare it with.")
    if not constant:
        return Assessment(f"{change}; that of a constant predictor was not logged.")
    if not constant[-1][1] > 0:
        baseline = f"that of a constant predictor {_describe_change(constant)}"
        return Assessment(f"{change}, but {baseline}: all targets have become the same.", Severity.WARNING)
    name, baseline_loss = _best_baseline(history)
    loss = points[-1][1]
    if loss < MAX_LOSS_VS_BASELINE * baseline_loss:
        margin = (
            f"{format_percent(1 - loss / baseline_loss)} below that of {name}, the best baseline that reads no context"
        )
        return Assessment(f"{change} and ends {margin}: the predictions depend on the context.", Severity.HEALTHY)
    comparison = f"ends at {format_number(loss)}, where {name} gives {format_number(baseline_loss)} without any context"
    mismatch = ", nor do the predictions match their targets" if _at_chance(history) else ""
    return Assessment(f"{change} and {comparison}: nothing is learned beyond that{mismatch}.", Severity.WARNING)


def assess_top1_accuracy(history: History, curves: Curves, width: int | None = None) -> Assessment:
    """Assess the top-1 accuracy against chance, in the sample if that was measured."""
    name = _top1_accuracy(history)
    points, by_chance = _with_chance(history, name)
    in_sample = name == "top1_accuracy_in_sample"
    change = f"The top-1 accuracy among {'a sample' if in_sample else 'the batch'}'s targets {_describe_change(points)}"
    if by_chance is None:
        return Assessment(f"{change}.")
    if not _at_chance(history):
        ratio = f"{format_number(points[-1][1] / by_chance)} times chance"
        loss = metric_series(history, f"{MEASURED_PREFIX}prediction_loss")
        if loss and not loss[-1][1] < MAX_LOSS_VS_BASELINE * _best_baseline(history)[1]:
            return Assessment(f"{change}, {ratio}, which the position alone can give.")
        return Assessment(f"{change}, {ratio}: predictions distinguish the targets.", Severity.HEALTHY)
    sentence = (
        f"{change}, where chance gives {format_number(by_chance)}: the correct target is not nearer than any other"
    )
    batch = metric_series(history, f"{MEASURED_PREFIX}top1_accuracy")
    if in_sample and batch:
        sentence += f" (the {format_number(batch[-1][1])} among the batch's targets comes from distinguishing samples)"
    return Assessment(f"{sentence}.", Severity.WARNING)


def assess_sample_top1_accuracy(history: History, curves: Curves, width: int | None = None) -> Assessment:
    """Assess whether a sample's context identifies it among the others."""
    points, by_chance = _with_chance(history, "sample_top1_accuracy")
    change = f"The share of samples that their context identifies {_describe_change(points)}"
    if by_chance is None:
        return Assessment(f"{change}.")
    ratio = points[-1][1] / by_chance
    if ratio >= _MIN_CHANCE_MULTIPLE:
        return Assessment(f"{change}, {format_number(ratio)} times chance.", Severity.HEALTHY)
    return Assessment(
        f"{change}, where chance gives {format_number(by_chance)}: contexts do not distinguish samples.",
        Severity.WARNING,
    )


def assess_rank(
    history: History, curves: Curves, width: int | None = None, left: float = RANK_COLLAPSE_RATIO
) -> Assessment:
    """Assess the effective rank; below `left` of the start is collapse."""

    def outcome(points: Points) -> tuple[str, Severity]:
        start, end = points[0][1], points[-1][1]
        directions = f"{'' if width is None else f' of {width}'} directions"
        if end < left * start:
            return f"{directions}: the representation has collapsed", Severity.COLLAPSED
        if end < _LOW_RANK_RATIO * start:
            return f"{directions}: more than half of the directions are lost", Severity.WARNING
        return f"{directions}{': the directions are kept' if points[1:] else ''}", Severity.HEALTHY

    return _worst_assessment(history, curves, "The effective rank of the {}", outcome, format_number)


def assess_pooled_rank(history: History, curves: Curves, width: int | None = None) -> Assessment:
    """Assess the effective rank of pooled samples, which lose more directions during training."""
    return assess_rank(history, curves, width, POOLED_RANK_COLLAPSE_RATIO)


def assess_cosine(history: History, curves: Curves, width: int | None = None) -> Assessment:
    """Assess the mean pairwise cosine."""

    def outcome(points: Points) -> tuple[str, Severity]:
        start, end = points[0][1], points[-1][1]
        if 1 - end < COSINE_COLLAPSE_RATIO * (1 - start):
            return ": all of them are nearly the same, the representation has collapsed", Severity.COLLAPSED
        if end > _HIGH_COSINE >= start:
            return ": they have become very similar", Severity.WARNING
        similarity = "they were as similar at the start" if end > _HIGH_COSINE else "they differ"
        return f", where 1 is collapse: {similarity}", Severity.HEALTHY

    return _worst_assessment(history, curves, "The mean cosine between {}", outcome)


def assess_normalized_std(history: History, curves: Curves, width: int | None = None) -> Assessment:
    """Assess the normalized standard deviation."""

    def outcome(points: Points) -> tuple[str, Severity]:
        if points[-1][1] < _LOW_STD <= points[0][1]:
            return ", where about 1 is healthy: they nearly point the same way", Severity.WARNING
        return ", where about 1 is healthy", Severity.HEALTHY

    return _worst_assessment(history, curves, "The normalized standard deviation of the {}", outcome)


def assess_within_sample(history: History, curves: Curves, width: int | None = None) -> Assessment:
    """Assess whether the positions of a sample still differ from each other."""

    def outcome(points: Points) -> tuple[str, Severity]:
        if points[-1][1] < TOKEN_COLLAPSE_RATIO * points[0][1]:
            return ": all positions of a sample are nearly the same, token collapse", Severity.COLLAPSED
        return "", Severity.HEALTHY

    return _worst_assessment(history, curves, "The share of the variance of the {} that is within samples", outcome)


def assess_change(history: History, curves: Curves, width: int | None = None) -> Assessment:
    """Describe the change of the curves from start to end, without a judgment."""
    logged = [(label, points) for name, label in curves if (points := metric_series(history, name))]
    description = "; ".join(f"{label} {_describe_change(points)}" for label, points in logged)
    return Assessment(f"{description[:1].upper()}{description[1:]}.")


def assess_samples(ranks: dict[str, float], cosines: dict[str, float], width: int) -> Assessment:
    """Compare the pooled samples of the trained encoders with those of random weights."""
    description = (
        f"Over pooled samples the context encoder uses {format_number(ranks['context'])} of {width} directions, the "
        f"target encoder {format_number(ranks['target'])}, the same network with random weights "
        f"{format_number(ranks['random'])}"
    )
    if 1 - cosines["context"] < COSINE_COLLAPSE_RATIO * (1 - cosines["random"]):
        cosine = f"the mean cosine between samples is {cosines['context']:.4f}"
        return Assessment(
            f"{description}, but {cosine}: they are nearly the same, the representation has collapsed.",
            Severity.COLLAPSED,
        )
    if ranks["context"] < POOLED_RANK_COLLAPSE_RATIO * ranks["random"]:
        return Assessment(
            f"{description}: samples are hardly distinguished, the representation has collapsed.", Severity.COLLAPSED
        )
    if ranks["context"] < _LOW_RANK_RATIO * ranks["random"]:
        return Assessment(f"{description}: training has cost more than half of them.", Severity.WARNING)
    return Assessment(f"{description}.", Severity.HEALTHY)


def judge(
    history: History,
    max_steps: int | None = None,
    output_dir: str = "out",
    samples: Assessment | None = None,
    weights: Mapping[str, float] | None = None,
) -> Verdict:
    """Judge a run by its findings.

    Args:
        history: `trainer.state.log_history`, or `history` in `metrics.json`.
        max_steps: The run's length in steps; None if it is unknown, and so whether the run finished.
        output_dir: Of the run, for the advice.
        samples: Assessment of the representations of samples, if there is one.
        weights: Of the terms of the loss of LLM-JEPA (see `view_findings`); None for a JEPA.
    """
    if history and max_steps is not None and not any(entry.get("step") for entry in history):
        return Verdict(Severity.NOT_ASSESSED, ("Nothing was trained.",), "", "add --do_train to train.", {})
    if weights is None:
        found, remedies, skill = findings(history, max_steps), REMEDIES, _describe_skill(history)
        next_step = f"jepa-hf evaluate {output_dir} --tasks FILE, or jepa-hf report {output_dir} for all curves."
        unmeasured = (
            f"jepa-hf evaluate {output_dir} --tasks FILE, or start over with --overwrite_output_dir and --health_steps "
            "above 0."
        )
    else:
        (found, skill), remedies = view_findings(history, weights, max_steps), VIEW_REMEDIES
        next_step = f"jepa-hf generate {output_dir} --data_file FILE for answers to new rows."
        unmeasured = (
            f"jepa-hf generate {output_dir} --data_file FILE, or start over with --overwrite_output_dir, "
            "--do_train and --do_eval."
        )
    is_final = max_steps is None or is_finished(history, max_steps)
    if not is_final:
        next_step = unmeasured = "the command that started the run continues it."
    kinds = sorted(found, key=_severity_of, reverse=True)
    reasons = [f"Step {found[kind][0]}: {found[kind][1]}." for kind in kinds]
    severity = _severity_of(kinds[0]) if kinds else Severity.HEALTHY
    advice = remedies[kinds[0]] if kinds else next_step
    if samples is not None and samples.severity == Severity.COLLAPSED:
        severity, reasons = max(severity, Severity.COLLAPSED), [*reasons, samples.sentence]
        advice = advice if kinds else REMEDIES["total"]
    if not reasons and not skill and not measurements(history):
        return Verdict(Severity.NOT_ASSESSED, ("Health was not measured.",), "", unmeasured, {})
    if not reasons:
        step = first_finding(history)
        reasons = [
            "No collapse and no divergence" + ("." if step is None else f" any more; there was one at step {step}.")
        ]
    skill = "" if LEARNED_LITTLE.intersection(found) else skill
    return Verdict(severity, tuple(reasons), skill, advice, found, is_final)


def _severity_of(kind: str) -> Severity:
    if kind in LEARNED_LITTLE:
        return Severity.NOTHING_LEARNED
    return Severity.DIVERGED if kind == "divergence" else Severity.COLLAPSED


def _describe_skill(history: History) -> str:
    """Describe how much more than the best baseline the predictor explains."""
    loss = metric_series(history, f"{MEASURED_PREFIX}prediction_loss")
    name, baseline_loss = _best_baseline(history)
    if not loss or not metric_series(history, f"{MEASURED_PREFIX}top1_accuracy") or not baseline_loss > 0:
        return ""
    share = 1 - loss[-1][1] / baseline_loss
    if not 0 < share < 1:
        return ""
    return f"The prediction loss is {format_percent(share)} below that of {name}, the best guess without context."


def _fixed(value: float) -> str:
    """Format a value between -1 and 1.

    >>> _fixed(-0.00004), _fixed(0.99949)
    ('0.000', '0.999')
    """
    return f"{value:.3f}".removeprefix("-") if abs(value) < 0.0005 else f"{value:.3f}"


def _worst_assessment(
    history: History,
    curves: Curves,
    subject: str,
    outcome: Callable[[Points], tuple[str, Severity]],
    render: Callable[[float], str] = _fixed,
) -> Assessment:
    """Return the reading of the worst curve: its subject, its change and the outcome."""
    readings = []
    for name, label in curves:
        points, label = metric_series(history, name), label.partition(",")[0]
        if not points:
            continue
        if (step := _not_finite(points)) is not None:
            sentence = f"The curve of the {label} is not a finite number at step {step}: the run has diverged."
            readings.append(Assessment(sentence, Severity.DIVERGED))
            continue
        ending, severity = outcome(points)
        change = _describe_change(points, render)
        readings.append(Assessment(f"{subject.format(label)} {change}{ending}.", severity))
    return max(readings, key=lambda reading: reading.severity)


def _best_baseline(history: History) -> tuple[str, float]:
    """Return description and final loss of the best baseline; infinity without any."""
    losses = {
        name: values[-1][1] for name in BASELINES if (values := metric_series(history, f"{MEASURED_PREFIX}{name}"))
    }
    return best_baseline(losses) if losses else ("", math.inf)


def _top1_accuracy(history: History) -> str:
    """Return the name of the judged top-1 accuracy: in the sample if that was measured."""
    return (
        "top1_accuracy_in_sample"
        if metric_series(history, f"{MEASURED_PREFIX}top1_accuracy_in_sample")
        else "top1_accuracy"
    )


def _with_chance(history: History, name: str) -> tuple[Points, float | None]:
    """Return the points of an accuracy, and its last chance; None if one of them was not measured."""
    points, chances = (metric_series(history, f"{MEASURED_PREFIX}{name}{suffix}") for suffix in ("", "_chance"))
    return points, chances[-1][1] if points and chances and chances[-1][1] > 0 else None


def _at_chance(history: History) -> bool:
    """Return whether the last top-1 accuracy is that of chance; False if it is unknown."""
    name = _top1_accuracy(history)
    points, chance = _with_chance(history, name)
    if chance is None:
        return False
    minimum = _MIN_CHANCE_MULTIPLE * chance if name == "top1_accuracy" else chance + _MIN_SKILL * (1 - chance)
    return not points[-1][1] >= minimum


def _not_finite(points: Points) -> int | None:
    """Return the first step whose value is not finite."""
    return next((step for step, value in points if not math.isfinite(value)), None)


def _describe_change(points: Points, render: Callable[[float], str] = format_number) -> str:
    """Describe the change from the first to the last point, as a predicate."""
    if not points:
        return "was not logged"
    start, end = points[0][1], points[-1][1]
    if len(points) == 1:
        return f"is {render(end)}"
    if render(start) == render(end):
        return f"stayed at {render(end)}"
    return f"{'fell' if end < start else 'rose'} from {render(start)} to {render(end)}"


def format_percent(share: float) -> str:
    """Format a fraction as a percentage."""
    return f"{100 * share:.0f} %"
