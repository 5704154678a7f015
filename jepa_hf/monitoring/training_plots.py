"""The curves of a run: loss and health over its steps."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .assessment import (
    MEASURED,
    Curves,
    Reader,
    curve,
    read_change,
    read_cosine,
    read_hit_rate,
    read_loss,
    read_pooled_rank,
    read_rank,
    read_sample_hit_rate,
    read_spread,
    read_within_sample,
)


@dataclass(frozen=True)
class Panel:
    """Curves that share their axes.

    Args:
        title: of the panel.
        curves: name in the log and label of each.
        read: makes a sentence of them.
        reached: values that the vertical axis reaches in any case, so that small changes look small.
    """

    title: str
    curves: Curves
    read: Reader = read_change
    reached: tuple[float, ...] = ()


_ENCODERS = (("target", "targets"), ("context", "context outputs"))


def _of_both(metric: str) -> Curves:
    """A number that is measured for the targets and for the context encoder's outputs, or for their means."""
    pooled = "pooled " if metric.startswith("pooled_") else ""
    return tuple((f"{MEASURED}{encoder}_{metric}", f"{pooled}{label}") for encoder, label in _ENCODERS)


# A panel more is a line more. The first four are `training.png`.
PANELS: tuple[Panel, ...] = (
    Panel(
        "Prediction loss",
        (
            ("prediction_loss", "training"),
            (f"{MEASURED}prediction_loss", "fixed samples"),
            (f"{MEASURED}constant_prediction_loss", "constant predictor"),
            (f"{MEASURED}position_prediction_loss", "the position alone"),
            (f"{MEASURED}sample_prediction_loss", "the sample alone"),
        ),
        read_loss,
    ),
    Panel(
        "Hit rate: is the right target the nearest?",
        (
            (f"{MEASURED}hit_rate_in_sample", "among its sample's targets"),
            (f"{MEASURED}hit_rate_in_sample_chance", "chance there"),
            (f"{MEASURED}hit_rate", "among the batch's targets"),
            (f"{MEASURED}hit_rate_chance", "chance there"),
        ),
        read_hit_rate,
        (0.0,),
    ),
    Panel("Effective rank", _of_both("rank"), read_rank, (0.0,)),
    Panel("Mean pairwise cosine (1: collapsed)", _of_both("pairwise_cosine"), read_cosine, (0.0, 1.0)),
    Panel("Spread of directions (0: collapsed)", _of_both("spread"), read_spread, (0.0, 1.0)),
    Panel("Effective rank of whole samples", _of_both("pooled_rank"), read_pooled_rank, (0.0,)),
    Panel(
        "Mean cosine between whole samples (1: collapsed)", _of_both("pooled_pairwise_cosine"), read_cosine, (0.0, 1.0)
    ),
    Panel("Variance within samples (0: token collapse)", _of_both("within_sample"), read_within_sample, (0.0, 1.0)),
    Panel(
        "Distance between the encoders",
        ((f"{MEASURED}encoder_distance", "the relative distance between their weights"),),
        reached=(0.0,),
    ),
    Panel(
        "Probe of the frozen encoder",
        (("eval_probe_linear", "the linear probe's accuracy"), ("eval_probe_knn", "the nearest neighbours' accuracy")),
        reached=(0.0, 1.0),
    ),
    Panel(
        "Masked-language-model loss",
        (("mlm_loss", "the loss in training"), ("eval_mlm_loss", "the loss in evaluation")),
    ),
    Panel(
        "Variance, covariance and SIGReg terms",
        (
            ("variance_loss", "the variance term"),
            ("covariance_loss", "the covariance term"),
            ("sigreg_loss", "the SIGReg term"),
        ),
    ),
    Panel(
        "Samples found by their context",
        ((f"{MEASURED}sample_hit_rate", "fixed samples"), (f"{MEASURED}sample_hit_rate_chance", "chance")),
        read_sample_hit_rate,
        (0.0,),
    ),
    Panel(
        "Contrastive term: which sample of the batch it is",
        (("contrastive_loss", "the loss in training"), ("eval_contrastive_loss", "the loss in evaluation")),
    ),
    Panel("Norm of the gradient", (("grad_norm", "the norm of the gradient"),), reached=(0.0,)),
    Panel("EMA decay of the target encoder", (("ema_decay", "the decay"),)),
    Panel("Learning rate", (("learning_rate", "the learning rate"),), reached=(0.0,)),
)

# Of a language model with paired views.
LLM_PANELS: tuple[Panel, ...] = (
    Panel("Next-token loss", (("lm_loss", "training"), ("eval_lm_loss", "evaluation"))),
    Panel("Distance between the views", (("pair_loss", "training"), ("eval_pair_loss", "evaluation"))),
    Panel(
        "Right answers",
        (
            ("eval_exact_match", "exactly the same"),
            ("eval_prefix_match", "it begins with the right one"),
            ("eval_gsm8k", "the same final number"),
            ("eval_sql", "the same rows of the database"),
        ),
        reached=(0.0, 1.0),
    ),
    Panel(
        "Is a row's own second view the nearest to its first?",
        (("eval_view_hit_rate", "evaluation"), ("eval_view_hit_rate_chance", "chance")),
        reached=(0.0,),
    ),
    Panel(
        "Cosine between rows' second views (1: collapsed)",
        (("eval_view_pairwise_cosine", "evaluation"),),
        reached=(0.0, 1.0),
    ),
    Panel("Effective rank of the second views", (("eval_view_rank", "evaluation"),), reached=(0.0,)),
    Panel("Cosine of the two views", (("view_cosine", "training"), ("eval_view_cosine", "evaluation")), reached=(1.0,)),
    Panel("Turns of the paths (STP)", (("tube_loss", "training"), ("eval_tube_loss", "evaluation"))),
    Panel("Norm of the gradient", (("grad_norm", "the norm of the gradient"),), reached=(0.0,)),
    Panel("Learning rate", (("learning_rate", "the learning rate"),), reached=(0.0,)),
)

# Points of a curve that are drawn at most: more are finer than a screen, and make a page heavy.
_MOST_POINTS = 1000


def draw_panel(axis: Axes, panel: Panel, log_history: list[dict[str, Any]]) -> None:
    """Draw those curves of a panel that the log holds, with a legend; the title is left to the caller."""
    for number, (name, label) in enumerate(panel.curves):
        points = curve(log_history, name)
        if not points:
            continue
        every = -(-len(points) // _MOST_POINTS)
        steps, values = zip(*points[(len(points) - 1) % every :: every], strict=True)
        sparse = name.startswith((MEASURED, "eval_"))
        style = {"marker": "o", "markersize": 4} if sparse or len(points) == 1 else {"alpha": 0.6}
        axis.plot(steps, values, label=label, color=f"C{number}", **style)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    if axis.has_data():
        axis.update_datalim([(axis.dataLim.x0, value) for value in panel.reached])
        axis.autoscale_view()
        axis.legend(fontsize=8)


def plot_training(log_history: list[dict[str, Any]], path: str | Path) -> None:
    """Draw the first four panels of a run's log to a PNG.

    Args:
        log_history: `trainer.state.log_history`.
        path: the file to write.
    """
    _plot(PANELS[:4], log_history, path)


def plot_language_model(log_history: list[dict[str, Any]], path: str | Path) -> None:
    """The same of a language model's log: the first four panels of `LLM_PANELS` that it has curves for."""
    there = [panel for panel in LLM_PANELS if any(curve(log_history, name) for name, _ in panel.curves)]
    _plot(there[:4], log_history, path)


def _plot(panels: Sequence[Panel], log_history: list[dict[str, Any]], path: str | Path) -> None:
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(2, 2).flat)
    for axis, panel in zip(axes, panels, strict=False):
        draw_panel(axis, panel, log_history)
        axis.set_title(panel.title, fontsize=10)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    figure.savefig(path, dpi=110)
