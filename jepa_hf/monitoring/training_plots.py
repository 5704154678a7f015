"""Plots of a run's curves: loss and health over its steps."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from .assessment import (
    MEASURED_PREFIX,
    Assessor,
    Curves,
    assess_change,
    assess_cosine,
    assess_loss,
    assess_normalized_std,
    assess_pooled_rank,
    assess_rank,
    assess_sample_top1_accuracy,
    assess_top1_accuracy,
    assess_within_sample,
    metric_series,
)


@dataclass(frozen=True)
class Panel:
    """Curves that share their axes.

    Args:
        title: Title of the panel.
        curves: Name in the log and label of each curve.
        assess: Assesses the curves in a sentence.
        must_include: Values that the vertical axis always includes, so that small changes look small.
    """

    title: str
    curves: Curves
    assess: Assessor = assess_change
    must_include: tuple[float, ...] = ()


_ENCODERS = (("target", "targets"), ("context", "context outputs"))


def _target_and_context_curves(metric: str) -> Curves:
    """Return the curves of a metric of targets and context outputs, or of their means."""
    pooled = "pooled " if metric.startswith("pooled_") else ""
    return tuple((f"{MEASURED_PREFIX}{encoder}_{metric}", f"{pooled}{label}") for encoder, label in _ENCODERS)


# The first four panels that have curves are drawn to `training.png`.
PANELS: tuple[Panel, ...] = (
    Panel(
        "Prediction loss",
        (
            ("prediction_loss", "training"),
            (f"{MEASURED_PREFIX}prediction_loss", "fixed samples"),
            (f"{MEASURED_PREFIX}constant_baseline_loss", "constant predictor"),
            (f"{MEASURED_PREFIX}position_baseline_loss", "the position alone"),
            (f"{MEASURED_PREFIX}sample_baseline_loss", "the sample alone"),
        ),
        assess_loss,
    ),
    Panel(
        "Top-1 accuracy: is the right target the nearest?",
        (
            (f"{MEASURED_PREFIX}top1_accuracy_in_sample", "among its sample's targets"),
            (f"{MEASURED_PREFIX}top1_accuracy_in_sample_chance", "chance there"),
            (f"{MEASURED_PREFIX}top1_accuracy", "among the batch's targets"),
            (f"{MEASURED_PREFIX}top1_accuracy_chance", "chance there"),
        ),
        assess_top1_accuracy,
        (0.0,),
    ),
    Panel("Effective rank", _target_and_context_curves("rank"), assess_rank, (0.0,)),
    Panel(
        "Mean pairwise cosine (1: collapsed)", _target_and_context_curves("pairwise_cosine"), assess_cosine, (0.0, 1.0)
    ),
    Panel(
        "Normalized standard deviation (0: collapsed)",
        _target_and_context_curves("normalized_std"),
        assess_normalized_std,
        (0.0, 1.0),
    ),
    Panel("Effective rank of pooled samples", _target_and_context_curves("pooled_rank"), assess_pooled_rank, (0.0,)),
    Panel(
        "Mean cosine between pooled samples (1: collapsed)",
        _target_and_context_curves("pooled_pairwise_cosine"),
        assess_cosine,
        (0.0, 1.0),
    ),
    Panel(
        "Variance within samples (0: token collapse)",
        _target_and_context_curves("within_sample"),
        assess_within_sample,
        (0.0, 1.0),
    ),
    Panel(
        "Distance between the encoders",
        ((f"{MEASURED_PREFIX}encoder_distance", "the relative distance between their weights"),),
        must_include=(0.0,),
    ),
    Panel(
        "Probe of the frozen encoder",
        (("eval_probe_linear", "the linear probe's accuracy"), ("eval_probe_knn", "the nearest neighbours' accuracy")),
        must_include=(0.0, 1.0),
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
        (
            (f"{MEASURED_PREFIX}sample_top1_accuracy", "fixed samples"),
            (f"{MEASURED_PREFIX}sample_top1_accuracy_chance", "chance"),
        ),
        assess_sample_top1_accuracy,
        (0.0,),
    ),
    Panel(
        "Contrastive term: which sample of the batch it is",
        (("contrastive_loss", "the loss in training"), ("eval_contrastive_loss", "the loss in evaluation")),
    ),
    Panel("Norm of the gradient", (("grad_norm", "the norm of the gradient"),), must_include=(0.0,)),
    Panel("EMA decay of the target encoder", (("ema_decay", "the decay"),)),
    Panel("Learning rate", (("learning_rate", "the learning rate"),), must_include=(0.0,)),
)

# Panels of a language model with paired views.
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
        must_include=(0.0, 1.0),
    ),
    Panel(
        "Is a row's own second view the nearest to its first?",
        (("eval_view_top1_accuracy", "evaluation"), ("eval_view_top1_accuracy_chance", "chance")),
        must_include=(0.0,),
    ),
    Panel(
        "Cosine between rows' second views (1: collapsed)",
        (("eval_view_pairwise_cosine", "evaluation"),),
        must_include=(0.0, 1.0),
    ),
    Panel("Effective rank of the second views", (("eval_view_rank", "evaluation"),), must_include=(0.0,)),
    Panel(
        "Cosine of the two views",
        (("view_cosine", "training"), ("eval_view_cosine", "evaluation")),
        must_include=(1.0,),
    ),
    Panel("Turns of the paths (STP)", (("stp_loss", "training"), ("eval_stp_loss", "evaluation"))),
    Panel("Norm of the gradient", (("grad_norm", "the norm of the gradient"),), must_include=(0.0,)),
    Panel("Learning rate", (("learning_rate", "the learning rate"),), must_include=(0.0,)),
)

# Maximum number of points per curve: more exceed a screen's resolution, and make the HTML page slow.
_MAX_POINTS = 1000


def draw_panel(axis: Axes, panel: Panel, log_history: list[dict[str, Any]]) -> None:
    """Draw those curves of a panel that the log holds, with a legend but without a title."""
    for number, (name, label) in enumerate(panel.curves):
        points = metric_series(log_history, name)
        if not points:
            continue
        every = -(-len(points) // _MAX_POINTS)
        steps, values = zip(*points[(len(points) - 1) % every :: every], strict=True)
        is_sparse = name.startswith((MEASURED_PREFIX, "eval_"))
        style: dict[str, Any] = {"marker": "o", "markersize": 4} if is_sparse or len(points) == 1 else {"alpha": 0.6}
        axis.plot(steps, values, label=label, color=f"C{number}", **style)
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    if axis.has_data():
        axis.update_datalim([(axis.dataLim.x0, value) for value in panel.must_include])
        axis.autoscale_view()
        axis.legend(fontsize=8)


def plot_training(log_history: list[dict[str, Any]], path: str | Path) -> None:
    """Draw the first four panels that the log of a JEPA or a language model has curves for to a PNG."""
    panels = LLM_PANELS if any("lm_loss" in entry or "eval_lm_loss" in entry for entry in log_history) else PANELS
    drawn = [panel for panel in panels if any(metric_series(log_history, name) for name, _ in panel.curves)][:4]
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = list(figure.subplots(2, 2).flat)
    for axis, panel in zip(axes, drawn, strict=False):
        draw_panel(axis, panel, log_history)
        axis.set_title(panel.title, fontsize=10)
    for axis in axes[len(drawn) :]:
        axis.set_axis_off()
    figure.savefig(path, dpi=110)
