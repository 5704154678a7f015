"""What the curves of a run say: one sentence for each, computed from the log, and one for the run."""

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import IntEnum
from typing import Any

from .health import (
    DIMENSIONS_LEFT,
    DIRECTIONS_LEFT,
    NO_BETTER,
    POOLED_DIMENSIONS_LEFT,
    RIVALS,
    TOKENS_LEFT,
    best_rival,
    findings,
    is_measurement,
)

History = list[dict[str, Any]]
# Stands before the name of what is measured on a fixed batch, or else in evaluations.
MEASURED = "measured_"
# Of a panel: name in the log (see `curve`), and label.
Curves = tuple[tuple[str, str], ...]


class Level(IntEnum):
    """How bad a reading is; the worst one is the run's."""

    UNJUDGED = 0
    HEALTHY = 1
    WARNING = 2
    NOTHING_LEARNED = 3
    COLLAPSED = 4
    DIVERGED = 5


@dataclass(frozen=True)
class Reading:
    """A sentence, and how bad it is."""

    sentence: str
    level: Level = Level.UNJUDGED


@dataclass(frozen=True)
class Rules:
    """The thresholds of this file that are not the watchdog's (see `health`).

    Args:
        constant_lost: a constant predictor whose loss is below this share of its start predicts targets that are all
            alike.
        chance: a hit rate below this multiple of chance is chance,
        skill: and so is one among a sample's own targets with less than this share of the way from chance to 1.
        kept: a rank below this share of its start, or of the random start's, is a warning, and below the watchdog's
            share the representation has collapsed;
        rank_least: so has one of fewer directions than this, whatever the start.
        alike: a mean pairwise cosine above this is a warning,
        same: and above this, where the start is not known, all vectors are the same for practical purposes.
        spread_low: a spread below this is a warning,
        spread_lost: and below this all vectors point the same way: √(1 − `same`).
        few_steps: in a shorter run, guesses without skill have had no time to become better.
    """

    constant_lost: float = 0.01
    chance: float = 2.0
    skill: float = 0.05
    kept: float = 0.5
    rank_least: float = 2.0
    alike: float = 0.9
    same: float = 0.99
    spread_low: float = 0.3
    spread_lost: float = 0.1
    few_steps: int = 100


RULES = Rules()

Reader = Callable[[History, Curves, int | None], Reading]


def curve(history: History, name: str) -> list[tuple[int, float]]:
    """Step and value of every entry that has the name.

    A name that begins with `MEASURED` is that of the fixed batch, `health_...`, or in a run without these measurements
    that of its evaluations, `eval_...`.
    """
    if name.startswith(MEASURED):
        source = "health_" if any(map(is_measurement, history)) else "eval_"
        name = source + name.removeprefix(MEASURED)
    return [(entry["step"], float(entry[name])) for entry in history if "step" in entry and _is_number(entry.get(name))]


def read_loss(history: History, curves: Curves, width: int | None = None) -> Reading:
    """Whether the predictions beat those of rivals that read no context: a constant, the position, the sample."""
    measured = curve(history, "measured_prediction_loss")
    points = measured or curve(history, "prediction_loss")
    where = "" if measured else " in training"
    if (step := _not_finite(points)) is not None:
        sentence = f"The prediction loss{where} is not a finite number at step {step}: the run has diverged."
        return Reading(sentence, Level.DIVERGED)
    told = f"The prediction loss{where} {_change(points)}"
    constant = curve(history, "measured_constant_prediction_loss")
    if constant and not curve(history, "measured_hit_rate"):  # which is measured of a predictor that is trained
        return Reading(f"{told}; its weight is 0, so it is not compared with its rivals.")
    if not measured:
        return Reading(f"{told}; without a measurement there is no constant predictor to compare it with.")
    if not constant:
        return Reading(f"{told}; that of a constant predictor was not logged.")
    if not constant[-1][1] > max(RULES.constant_lost * constant[0][1], 0.0):
        ends = f"that of a constant predictor {_change(constant)}"
        return Reading(f"{told}, but {ends}: all targets have become alike.", Level.COLLAPSED)
    rival, least = _best_rival(history)
    loss = points[-1][1]
    if least > 0 and loss < NO_BETTER * least:
        ends = f"ends {percent(1 - loss / least)} below what {rival} gives, its best rival that reads no context"
        return Reading(f"{told} and {ends}: the predictions depend on the context.", Level.HEALTHY)
    ends = f"ends at {number(loss)}, where {rival} gives {number(least)} without any context"
    sentence = f"{told} and {ends}: nothing is learned beyond that"
    if loss < NO_BETTER * constant[-1][1] or not _by_chance(history):
        return Reading(f"{sentence}.", Level.WARNING)
    if points[-1][0] < RULES.few_steps:
        return Reading(f"{sentence}; {points[-1][0]} steps are too few to tell why.", Level.WARNING)
    within = curve(history, "measured_target_within_sample")
    if within and within[-1][1] >= TOKENS_LEFT * within[0][1]:
        return Reading(f"{sentence}, nor do the predictions find their targets.", Level.WARNING)
    return Reading(f"{sentence}, nor do the predictions find their targets: token collapse.", Level.COLLAPSED)


def read_hit_rate(history: History, curves: Curves, width: int | None = None) -> Reading:
    """Whether the right target is found more often than by chance, among its sample's where that was measured."""
    name = _hits(history)
    points, chance = curve(history, f"{MEASURED}{name}"), curve(history, f"{MEASURED}{name}_chance")
    in_sample = name == "hit_rate_in_sample"
    told = f"The hit rate among {'a sample' if in_sample else 'the batch'}'s targets {_change(points)}"
    if not points or not chance or not chance[-1][1] > 0:
        return Reading(f"{told}.")
    end, by_chance = points[-1][1], chance[-1][1]
    if not _by_chance(history):
        times = f"{number(end / by_chance)} times what chance gives"
        loss = curve(history, f"{MEASURED}prediction_loss")
        if loss and not loss[-1][1] < NO_BETTER * _best_rival(history)[1]:
            return Reading(f"{told}, {times}, which knowing the position alone can give.")
        return Reading(f"{told}, {times}: predictions tell the targets apart.", Level.HEALTHY)
    sentence = f"{told}, where chance gives {number(by_chance)}: the right target is found no more often than any other"
    batch = curve(history, f"{MEASURED}hit_rate")
    if in_sample and batch:
        sentence += f" (the {number(batch[-1][1])} among the batch's targets tells samples apart)"
    return Reading(f"{sentence}.", Level.WARNING)


def read_sample_hit_rate(history: History, curves: Curves, width: int | None = None) -> Reading:
    """Whether a sample is found by its context among the others."""
    points, chance = curve(history, "measured_sample_hit_rate"), curve(history, "measured_sample_hit_rate_chance")
    told = f"The share of samples that their context finds {_change(points)}"
    if not points or not chance or not chance[-1][1] > 0:
        return Reading(f"{told}.")
    end, by_chance = points[-1][1], chance[-1][1]
    if end >= RULES.chance * by_chance:
        return Reading(f"{told}, {number(end / by_chance)} times what chance gives.", Level.HEALTHY)
    return Reading(
        f"{told}, where chance gives {number(by_chance)}: contexts do not tell samples apart.", Level.WARNING
    )


def read_rank(history: History, curves: Curves, width: int | None = None, left: float = DIMENSIONS_LEFT) -> Reading:
    """How many directions the representations have kept, the worst curve; below `left` of the start is collapse."""
    of = "" if width is None else f" of {width}"

    def told(label: str, points: list[tuple[int, float]]) -> Reading:
        start, end = points[0][1], points[-1][1]
        change = f"The effective rank of the {label} {_change(points)}{of} directions"
        if end < RULES.rank_least or end < left * start:
            return Reading(f"{change}: the representation has collapsed.", Level.COLLAPSED)
        if end < RULES.kept * start:
            return Reading(f"{change}: more than half of the directions are lost.", Level.WARNING)
        kept = "" if len(points) == 1 else ": the directions are kept"
        return Reading(f"{change}{kept}.", Level.HEALTHY)

    return _worst(history, curves, told)


def read_pooled_rank(history: History, curves: Curves, width: int | None = None) -> Reading:
    """The same of whole samples, which lose more directions while they learn."""
    return read_rank(history, curves, width, POOLED_DIMENSIONS_LEFT)


def read_cosine(history: History, curves: Curves, width: int | None = None) -> Reading:
    """Whether the representations still differ; the worst curve is told."""

    def told(label: str, points: list[tuple[int, float]]) -> Reading:
        start, end = points[0][1], points[-1][1]
        change = f"The mean cosine between {label} {_change(points, _fixed)}"
        lost = end > RULES.same if len(points) == 1 else 1 - end < DIRECTIONS_LEFT * (1 - start)
        if lost:
            return Reading(f"{change}: all of them are alike, the representation has collapsed.", Level.COLLAPSED)
        if end > RULES.alike and start > RULES.alike:
            return Reading(f"{change}: they are much alike, but were so at the start.", Level.WARNING)
        if end > RULES.alike:
            return Reading(f"{change}: they have become much alike.", Level.WARNING)
        return Reading(f"{change}, where 1 is collapse: they differ.", Level.HEALTHY)

    return _worst(history, curves, told)


def read_spread(history: History, curves: Curves, width: int | None = None) -> Reading:
    """Whether the representations point in many directions; the worst curve is told."""

    def told(label: str, points: list[tuple[int, float]]) -> Reading:
        start, end = points[0][1], points[-1][1]
        change = f"The spread of the {label} {_change(points, _fixed)}, where about 1 is healthy"
        if end < RULES.spread_lost <= start:
            return Reading(f"{change}: all point the same way.", Level.COLLAPSED)
        if end < RULES.spread_low:
            return Reading(f"{change}: they nearly point the same way.", Level.WARNING)
        return Reading(f"{change}.", Level.HEALTHY)

    return _worst(history, curves, told)


def read_within_sample(history: History, curves: Curves, width: int | None = None) -> Reading:
    """Whether the positions of a sample still differ from each other; the worst curve is told."""

    def told(label: str, points: list[tuple[int, float]]) -> Reading:
        start, end = points[0][1], points[-1][1]
        change = f"The share of the variance of the {label} that is within samples {_change(points, _fixed)}"
        if end < TOKENS_LEFT * start:
            return Reading(f"{change}: all positions of a sample have become alike, token collapse.", Level.COLLAPSED)
        return Reading(f"{change}.", Level.HEALTHY)

    return _worst(history, curves, told)


def read_findings(history: History, max_steps: int | None = None) -> list[Reading]:
    """What the watchdog found in a run of `max_steps` steps, see `health.findings`."""
    levels = {"divergence": Level.DIVERGED, "nothing_learned": Level.NOTHING_LEARNED}
    return [
        Reading(f"The watchdog at step {step}: {sentence}.", levels.get(kind, Level.COLLAPSED))
        for kind, (step, sentence) in findings(history, max_steps).items()
    ]


def read_change(history: History, curves: Curves, width: int | None = None) -> Reading:
    """How the curves went from start to end, unjudged."""
    known = [(label, points) for name, label in curves if (points := curve(history, name))]
    told = "; ".join(f"{label} {_change(points)}" for label, points in known)
    return Reading(f"{told[:1].upper()}{told[1:]}.")


def read_samples(ranks: dict[str, float], cosines: dict[str, float], width: int) -> Reading:
    """What whole samples, one vector each, say of the trained encoders beside the same network with random weights.

    Args:
        ranks: effective rank of the vectors by encoder: "context", "target" and "random".
        cosines: their mean pairwise cosine, by encoder too.
        width: of the vectors.
    """
    told = (
        f"Over whole samples the context encoder uses {number(ranks['context'])} of {width} directions, the target "
        f"encoder {number(ranks['target'])}, the same network with random weights {number(ranks['random'])}"
    )
    apart, apart_at_random = 1 - cosines["context"], 1 - cosines["random"]
    if cosines["context"] > RULES.same and apart < DIRECTIONS_LEFT * apart_at_random:
        alike = f"the mean cosine between samples is {cosines['context']:.4f}"
        return Reading(f"{told}, but {alike}: they are all alike, the representation has collapsed.", Level.COLLAPSED)
    if ranks["context"] < RULES.rank_least or ranks["context"] < POOLED_DIMENSIONS_LEFT * ranks["random"]:
        return Reading(f"{told}: samples are hardly told apart, the representation has collapsed.", Level.COLLAPSED)
    if ranks["context"] < RULES.kept * ranks["random"]:
        return Reading(f"{told}: training has cost more than half of them.", Level.WARNING)
    return Reading(f"{told}.", Level.HEALTHY)


def verdict(readings: Iterable[Reading], measured: bool) -> Reading:
    """One sentence for the run: its worst level. The reasons are the readings of that level."""
    judged = [reading for reading in readings if reading.level > Level.UNJUDGED]
    if not judged:
        return Reading("Nothing was logged that tells whether this run is healthy.")
    worst = max(reading.level for reading in judged)
    if worst == Level.HEALTHY and not measured:
        return Reading("Not judged: health was not measured. Training alone shows no sign of collapse.")
    basis = "" if measured else ", as far as training tells, for nothing was measured beside it"
    said = sum(reading.level == worst for reading in judged)
    match worst:
        case Level.HEALTHY:
            what = "Healthy: none of the curves that are judged shows a sign of collapse"
        case Level.WARNING:
            what = f"Warning: {said} of {len(judged)} readings {'ask' if said > 1 else 'asks'} for a closer look"
        case Level.NOTHING_LEARNED:
            what = "Nothing learned about single targets: the predictions are no better than without any context"
        case Level.COLLAPSED:
            what = f"Collapsed: {said} of {len(judged)} readings {'say' if said > 1 else 'says'} so"
        case _:
            what = f"Diverged: {said} of {len(judged)} readings {'say' if said > 1 else 'says'} so"
    return Reading(f"{what}{basis}.", worst)


def reasons(readings: Iterable[Reading]) -> list[str]:
    """The sentences behind a verdict: those of its level and, where that is bad, of the warnings too."""
    judged = sorted((reading for reading in readings if reading.level), key=lambda reading: -reading.level)
    least = Level.WARNING if judged and judged[0].level > Level.HEALTHY else Level.HEALTHY
    return [reading.sentence for reading in judged if reading.level >= least]


def _worst(
    history: History,
    curves: Curves,
    told: Callable[[str, list[tuple[int, float]]], Reading],
) -> Reading:
    """The reading of the worst curve."""
    spoken = [name for name, _ in curves if curve(history, name)]
    labels = {name: label.partition(",")[0] for name, label in curves}
    readings = []
    for name in spoken:
        points = curve(history, name)
        if (step := _not_finite(points)) is not None:
            sentence = f"The curve of the {labels[name]} is not a finite number at step {step}: the run has diverged."
            readings.append(Reading(sentence, Level.DIVERGED))
        else:
            readings.append(told(labels[name], points))
    return max(readings, key=lambda reading: reading.level)


def _best_rival(history: History) -> tuple[str, float]:
    """The best rival at the end, in words, and its loss; infinity where none was measured."""
    lost = {name: values[-1][1] for name in RIVALS if (values := curve(history, f"{MEASURED}{name}"))}
    return best_rival(lost) if lost else ("", math.inf)


def _hits(history: History) -> str:
    """The hit rate that is judged: among a sample's own targets, where that was measured."""
    return "hit_rate_in_sample" if curve(history, f"{MEASURED}hit_rate_in_sample") else "hit_rate"


def _by_chance(history: History) -> bool:
    """Whether the last measurement's hit rate is that of chance; unknown is taken for no."""
    name = _hits(history)
    hits, chances = curve(history, f"{MEASURED}{name}"), curve(history, f"{MEASURED}{name}_chance")
    if not hits or not chances:
        return False
    rate, chance = hits[-1][1], chances[-1][1]
    least = RULES.chance * chance if name == "hit_rate" else chance + RULES.skill * (1 - chance)
    return not rate >= least


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _not_finite(points: list[tuple[int, float]]) -> int | None:
    """The first step whose value is no finite number."""
    return next((step for step, value in points if not math.isfinite(value)), None)


def _change(points: list[tuple[int, float]], shown: Callable[[float], str] | None = None) -> str:
    if not points:
        return "was not logged"
    shown = shown or number
    start, end = points[0][1], points[-1][1]
    if len(points) == 1:
        return f"is {shown(end)} at step {points[0][0]}"
    if shown(start) == shown(end):
        return f"stayed at {shown(end)}"
    return f"{'fell' if end < start else 'rose'} from {shown(start)} to {shown(end)}"


def _fixed(value: float) -> str:
    """For what lies between -1 and 1.

    >>> _fixed(-0.00004), _fixed(0.99949)
    ('0.000', '0.999')
    """
    return f"{value:.3f}".removeprefix("-") if abs(value) < 0.0005 else f"{value:.3f}"


def number(value: float) -> str:
    """Three digits that count: 0.00123, 12.3, 1,230.

    >>> [number(value) for value in (0.0012345, 0.5, 12.345, 384.0, 12345.0, 1e-7)]
    ['0.00123', '0.5', '12.3', '384', '12,345', '1e-07']
    """
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"


def percent(share: float) -> str:
    return f"{100 * share:.0f} %"
