"""The picture of a run: loss and health over its steps."""

from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

# Title; values that the vertical axis reaches in any case, so that small changes look small; curves: name in the log
# and label.
_PANELS: tuple[tuple[str, tuple[float, ...], tuple[tuple[str, str], ...]], ...] = (
    (
        "Prediction loss",
        (),
        (
            ("prediction_loss", "training"),
            ("eval_prediction_loss", "evaluation"),
            ("eval_constant_prediction_loss", "constant predictor"),
        ),
    ),
    (
        "Hit rate: is the right target the nearest of its batch?",
        (0.0,),
        (
            ("hit_rate", "training, in its batches"),
            ("eval_hit_rate", "evaluation, in its batches"),
            ("eval_hit_rate_chance", "chance in evaluation"),
        ),
    ),
    (
        "Effective rank",
        (0.0,),
        (
            ("target_rank", "targets, training"),
            ("eval_target_rank", "targets, evaluation"),
            ("eval_context_rank", "context encoder, evaluation"),
        ),
    ),
    (
        "Mean pairwise cosine (1: collapsed)",
        (0.0, 1.0),
        (
            ("target_pairwise_cosine", "targets, training"),
            ("eval_target_pairwise_cosine", "targets, evaluation"),
            ("eval_context_pairwise_cosine", "context encoder, evaluation"),
        ),
    ),
)


def plot_training(log_history: list[dict[str, Any]], path: str | Path) -> None:
    """Draw the curves of a run's log to a PNG.

    Args:
        log_history: `trainer.state.log_history`.
        path: the file to write.
    """
    figure = Figure(figsize=(10, 7), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 2)
    for axis, (title, reached, curves) in zip(axes.flat, _PANELS, strict=True):
        for number, (name, label) in enumerate(curves):
            points = [(entry["step"], entry[name]) for entry in log_history if name in entry and "step" in entry]
            if not points:
                continue
            steps, values = zip(*points, strict=True)
            evaluated = name.startswith("eval_")
            style = {"marker": "o", "markersize": 4} if evaluated or len(points) == 1 else {"alpha": 0.6}
            axis.plot(steps, values, label=label, color=f"C{number}", **style)
        axis.set_title(title, fontsize=10)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.has_data():
            axis.update_datalim([(axis.dataLim.x0, value) for value in reached])
            axis.autoscale_view()
            axis.legend(fontsize=8)
    figure.savefig(path, dpi=110)
