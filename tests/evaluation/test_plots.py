"""Tests of the plots of an evaluation: they show all values and all labels."""

from pathlib import Path

import numpy as np
import pytest
from matplotlib.container import BarContainer
from matplotlib.figure import Figure
from PIL import Image

from helpers.evaluation import fake_evaluation
from jepa_hf.evaluation.plots import plot_embeddings, plot_scores, plot_spectrum

pytestmark = pytest.mark.usefixtures("rendered_pictures")


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, which are saved all the same."""
    figures: list[Figure] = []
    save = Figure.savefig

    def keep(self: Figure, *args: object, **kwargs: object) -> None:
        figures.append(self)
        save(self, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", keep)
    return figures


def texts(figure: Figure) -> list[str]:
    """The texts of all legends."""
    legends = [*figure.legends, *(axis.get_legend() for axis in figure.axes if axis.get_legend())]
    return [text.get_text() for legend in legends for text in legend.get_texts()]


def test_each_score_has_its_bar_and_its_interval(tmp_path: Path, drawn: list[Figure]) -> None:
    found = fake_evaluation(pooling=("mean", "cls"))
    plot_scores(found, tmp_path / "scores.png")
    axes = drawn[0].axes
    bars = [item for axis in axes for item in axis.containers if isinstance(item, BarContainer)]
    heights = sorted(bar.get_height() for item in bars for bar in item)
    assert heights == pytest.approx(sorted(100 * score.score.value for score in found.scores))
    segments = [
        segment
        for axis in axes
        for item in axis.containers
        if not isinstance(item, BarContainer)
        for segment in item[2][0].get_segments()
    ]
    np.testing.assert_allclose(
        sorted((low, high) for (_, low), (_, high) in segments),
        sorted((100 * score.score.low, 100 * score.score.high) for score in found.scores),
    )
    assert len({bar.get_facecolor() for item in bars for bar in item}) == 2
    assert len({bar.get_hatch() for item in bars for bar in item}) == 2
    assert texts(drawn[0]) == ["a", "b", "mean pooling", "cls pooling"]
    labels = [label.get_text() for axis in axes for label in axis.get_xticklabels()]
    assert labels[:3] == ["topics\nlinear probe", "topics\nkNN", "pairs\nSpearman"]
    assert len(labels) == 8


def test_the_legend_of_the_scores_covers_nothing(tmp_path: Path, drawn: list[Figure]) -> None:
    plot_scores(fake_evaluation(models=("runs/" + "a" * 30, "runs/b", "runs/c")), tmp_path / "scores.png")
    figure = drawn[0]
    renderer = figure.canvas.get_renderer()
    legend = figure.legends[0].get_window_extent(renderer)
    others = [axis.get_tightbbox(renderer) for axis in figure.axes] + [figure._suptitle.get_window_extent(renderer)]
    assert not [box for box in others if legend.overlaps(box)]
    assert figure.bbox.contains(legend.x0, legend.y0)
    assert figure.bbox.contains(legend.x1, legend.y1)


def test_each_spectrum_has_its_curve_without_zeros(tmp_path: Path, drawn: list[Figure]) -> None:
    found = fake_evaluation()
    plot_spectrum(found, tmp_path / "spectrum.png")
    axes = [axis for axis in drawn[0].axes if axis.lines]
    assert [axis.get_title() for axis in axes] == ["topics", "pairs", "answers"]
    for axis in axes:
        np.testing.assert_allclose(axis.lines[0].get_ydata(), [1.0, 0.5])
        np.testing.assert_allclose(axis.lines[1].get_ydata(), 0.9 ** np.arange(8))
        assert axis.get_yscale() == "log"
    assert texts(drawn[0])[:2] == ["a (rank 4)", "b (rank 4)"]


@pytest.mark.parametrize(("count", "classes"), [(10, 3), (60, 3), (120, 20), (120, 26)])
def test_a_map_has_every_sample_and_names_its_classes(
    count: int, classes: int, tmp_path: Path, drawn: list[Figure]
) -> None:
    """Beyond 20 classes the others share a color and a legend entry with their number."""
    plot_embeddings(fake_evaluation(count=count, classes=classes), tmp_path / "map.png")
    for axis in drawn[0].axes:
        assert sum(len(points.get_offsets()) for points in axis.collections) == count
    shown = texts(drawn[0])
    assert len(shown) == min(classes, 21)
    assert (f"{classes - 20} other classes" in shown) == (classes > 20)
    assert len(drawn[0].axes) == 2
    if classes == 20:
        colours = {tuple(points.get_facecolor()[0]) for points in drawn[0].axes[0].collections}
        assert len(colours) == 20


def test_a_map_keeps_clouds_apart(tmp_path: Path, drawn: list[Figure]) -> None:
    """Of the second model, whose classes lie in clouds; a class's points are nearer to one another than to others."""
    plot_embeddings(fake_evaluation(count=150, gap=0.2), tmp_path / "map.png")
    clouds = [np.asarray(points.get_offsets()) for points in drawn[0].axes[1].collections]
    centres = np.stack([cloud.mean(axis=0) for cloud in clouds])
    for number, cloud in enumerate(clouds):
        distances = np.linalg.norm(cloud[:, None] - centres, axis=2)
        assert (distances.argmin(axis=1) == number).mean() > 0.8


def test_without_labels_there_is_no_map(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="No task has labels"):
        plot_embeddings(fake_evaluation(tasks=("pairs", "answers")), tmp_path / "map.png")
    assert list(tmp_path.iterdir()) == []


def test_pictures_are_pngs_of_a_readable_size(tmp_path: Path) -> None:
    """Also of one model and one task, and of a name that matplotlib would take for a formula."""
    for found in (
        fake_evaluation(),
        fake_evaluation(models=("$x_",), tasks=("pairs",)),
        fake_evaluation(models=("a", "b", "c", "d")),
    ):
        plot_scores(found, tmp_path / "scores.png")
        plot_spectrum(found, tmp_path / "spectrum.png")
        for name in ("scores.png", "spectrum.png"):
            with Image.open(tmp_path / name) as picture:
                assert picture.format == "PNG"
                assert min(picture.size) > 300
