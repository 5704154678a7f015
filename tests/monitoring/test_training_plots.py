"""Claims about the picture: it is a PNG, it shows the log's content, and it works with short logs."""

from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from jepa_hf.monitoring.training_plots import plot_training

LOG: list[dict[str, Any]] = [
    {"eval_loss": 1.2, "eval_prediction_loss": 1.2, "eval_top1_accuracy": 0.1, "eval_target_rank": 20.0, "step": 0},
    *(
        {
            "loss": 1.0 / step,
            "prediction_loss": 1.0 / step,
            "top1_accuracy": 0.1 * step,
            "target_rank": 20.0,
            "step": step,
        }
        for step in range(1, 6)
    ),
    {"eval_loss": 0.4, "eval_prediction_loss": 0.4, "eval_top1_accuracy": 0.5, "eval_target_rank": 19.0, "step": 5},
    {"train_runtime": 3.0, "train_loss": 0.5, "step": 5},
]

pytestmark = pytest.mark.usefixtures("rendered_pictures")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved."""
    figures: list[Figure] = []
    save = Figure.savefig

    def remember(self: Figure, *args: Any, **kwargs: Any) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", remember)
    return figures


def curves(figure: Figure) -> dict[tuple[str, str], list[tuple[float, float]]]:
    return {
        (axis.get_title(), str(line.get_label())): [tuple(point) for point in line.get_xydata().tolist()]
        for axis in figure.axes
        for line in axis.get_lines()
    }


def test_a_run_gives_a_png_with_something_on_it(tmp_path: Path) -> None:
    plot_training(LOG, tmp_path / "training.png")
    assert (tmp_path / "training.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")
    pixels = imread(tmp_path / "training.png")
    assert min(pixels.shape[:2]) > 500
    assert pixels.std() > 0.05


def test_every_curve_shows_the_logged_points(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_training(LOG, tmp_path / "training.png")
    actual = curves(drawn[0])
    loss = {label: points for (title, label), points in actual.items() if title == "Prediction loss"}
    assert loss["training"] == [(step, 1.0 / step) for step in range(1, 6)]
    assert loss["fixed samples"] == [(0, 1.2), (5, 0.4)]
    assert "constant predictor" not in loss  # the log has none: no empty entry in the legend
    rank = {label: points for (title, label), points in actual.items() if title == "Effective rank"}
    assert rank["targets"] == [(0, 20.0), (5, 19.0)]


def test_a_long_curve_is_thinned_and_reaches_its_last_point(tmp_path: Path, drawn: list[Figure]) -> None:
    log = [{"step": step, "prediction_loss": float(step)} for step in range(1, 2502)]
    plot_training(log, tmp_path / "training.png")
    points = curves(drawn[0])["Prediction loss", "training"]
    assert 500 < len(points) <= 1000
    assert points[-1] == (2501, 2501.0)


def test_curves_have_axes_a_legend_and_colours_of_their_own(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_training(LOG, tmp_path / "training.png")
    for axis in drawn[0].axes:
        lines = axis.get_lines()
        if lines:
            assert axis.get_title()
            assert axis.get_xlabel() == "step"
            assert [text.get_text() for text in axis.get_legend().get_texts()] == [line.get_label() for line in lines]
            assert len({line.get_color() for line in lines}) == len(lines)


@pytest.mark.parametrize(
    "log",
    [
        [],
        [{"train_runtime": 3.0, "step": 5}],
        [{"loss": float("nan"), "prediction_loss": float("nan"), "step": 1}],
        [{"prediction_loss": 1.0, "step": 1}],
    ],
    ids=["empty", "nothing to draw", "nan", "one point"],
)
def test_little_to_draw_is_no_error(log: list[dict[str, Any]], tmp_path: Path) -> None:
    plot_training(log, tmp_path / "training.png")
    assert imread(tmp_path / "training.png").shape[2] in (3, 4)


def test_a_single_training_point_is_visible(tmp_path: Path, drawn: list[Figure]) -> None:
    # A line through one point is nothing.
    plot_training([{"prediction_loss": 1.0, "step": 1}], tmp_path / "training.png")
    (line,) = drawn[0].axes[0].get_lines()
    assert line.get_marker() not in (None, "None", "")


def test_small_changes_look_small(tmp_path: Path, drawn: list[Figure]) -> None:
    # A rank of 20 that falls to 19 has not collapsed.
    plot_training(LOG, tmp_path / "training.png")
    axes = {axis.get_title(): axis for axis in drawn[0].axes}
    bottom, top = axes["Effective rank"].get_ylim()
    assert bottom <= 0
    assert 20 < top < 30


def test_panels_without_curves_are_left_out(tmp_path: Path, drawn: list[Figure]) -> None:
    """A run whose prediction has no weight measures no hits: the next panel takes the place."""
    health = {
        "constant_baseline_loss": 0.4,
        "target_rank": 9.0,
        "target_pairwise_cosine": 0.1,
        "target_normalized_std": 1.0,
    }
    entry = {f"health_{name}": value for name, value in health.items()}
    plot_training([{"step": step, **entry} for step in (0, 9)], tmp_path / "training.png")
    assert [bool(axis.get_lines()) for axis in drawn[0].axes] == [True] * 4
    assert not any("Top-1" in axis.get_title() for axis in drawn[0].axes)
