"""Draw the pictures of these pages into docs/images.

python docs/draw_pictures.py           # the drawings: seconds
python docs/draw_pictures.py --runs    # the runs too: two minutes
"""

import argparse
import shutil
import tempfile
from pathlib import Path

import matplotlib
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_svg import FigureCanvasSVG
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch, Rectangle

from jepa_hf.cli.console import quiet_libraries
from jepa_hf.cli.parsing import parse_command
from jepa_hf.cli.train import run
from jepa_hf.monitoring.health import representation_health
from jepa_hf.training.ema import default_decay_range, interpolate_schedule

DOCS = Path(__file__).parent
IMAGES = DOCS / "images"
BLUE, ORANGE, GREEN, GREY = "#2f6db5", "#d9822b", "#3a8f5c", "#8a8f98"
PALE_BLUE, PALE_ORANGE, PALE_GREEN, PALE_GREY = "#e4eefa", "#fbecd9", "#e3f3e9", "#eef0f2"

# The same picture for the same code: no date, and names that do not change.
matplotlib.rcParams.update({"svg.hashsalt": "jepa_hf", "font.size": 10})

# A run that collapses: no slow target, and a learning rate that is too high.
_COLLAPSED = (
    *("--model_type", "bert", "--tokenizer_vocab_size", "4096", "--max_seq_length", "128"),
    *("--config_overrides", "hidden_size=64,num_hidden_layers=2,num_attention_heads=2,intermediate_size=256"),
    *("--max_steps", "300", "--per_device_train_batch_size", "16", "--warmup_steps", "30", "--logging_steps", "10"),
    *("--lr_scheduler_type", "cosine", "--seed", "42", "--report_to", "none", "--use_cpu", "--disable_tqdm"),
    *("--learning_rate", "1e-2", "--ema_decay", "0"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", action="store_true", help="train the runs that are shown")
    options = parser.parse_args()
    IMAGES.mkdir(exist_ok=True)
    _save(draw_views(), "views")
    _save(draw_ema(), "ema")
    _save(draw_collapse(), "collapse")
    if options.runs:
        quiet_libraries()
        with tempfile.TemporaryDirectory() as folder:
            run(parse_command([*_COLLAPSED, "--output_dir", f"{folder}/collapsed"]))
            run(parse_command([str(DOCS.parent / "configs/quickstart.yaml"), "--output_dir", f"{folder}/quickstart"]))
            shutil.copy(f"{folder}/collapsed/training.png", IMAGES / "collapsed.png")
            shutil.copy(f"{folder}/quickstart/training.png", DOCS / "quickstart.png")
            shutil.copy(f"{folder}/quickstart/masks.png", DOCS / "masks.png")


def _save(figure: Figure, name: str) -> None:
    FigureCanvasSVG(figure)
    figure.savefig(IMAGES / f"{name}.svg", metadata={"Date": None})


# ---- the two views


def draw_views() -> Figure:
    """Draw a sentence, the part of it that each encoder reads, and the vectors that the loss compares."""
    words = ["the", "cat", "sat", "on", "the", "warm", "stone", "wall"]
    hidden = (2, 3, 6)
    figure = Figure(figsize=(11, 4.6))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 110), ylim=(4, 50))
    axis.axis("off")
    columns = [86 + 2.6 * index for index in range(len(words))]  # of the vectors

    for y, color, title, subtitle in (
        (44, BLUE, "Context view", "some words are hidden"),
        (9.4, ORANGE, "Target view", "the full sentence"),
    ):
        axis.text(2, y, title, weight="bold", va="center", color=color)
        axis.text(14.5, y, subtitle, va="center", fontsize=9, color="#444")
    for index, word in enumerate(words):
        x = 2 + 4.7 * index
        _box(axis, x, 13, 4.4, 4.4, word, PALE_ORANGE, ORANGE, fontsize=7.5)
        if index in hidden:
            _box(axis, x, 36, 4.4, 4.4, "?", "white", GREY, dashed=True, fontsize=7.5)
        else:
            _box(axis, x, 36, 4.4, 4.4, word, PALE_BLUE, BLUE, fontsize=7.5)
        if index in hidden:
            _vector(axis, columns[index], 35, GREEN)
        _vector(axis, columns[index], 11.8, ORANGE, faint=index not in hidden)

    _box(axis, 45, 34.2, 16, 8, "context encoder", PALE_BLUE, BLUE)
    _box(axis, 45, 11.2, 16, 8, "target encoder", PALE_ORANGE, ORANGE)
    _box(axis, 67, 34.2, 12.5, 8, "predictor", PALE_GREEN, GREEN)
    axis.text(53, 44, "trained; this is the result", fontsize=9, color="#444", ha="center", va="center")
    axis.text(53, 8.8, "no gradient", fontsize=9, color="#444", ha="center", va="center")
    axis.text(73.2, 44, "trained", fontsize=9, color="#444", ha="center", va="center")
    _arrow(axis, (40.2, 38.2), (44.6, 38.2), BLUE)
    _arrow(axis, (61.4, 38.2), (66.6, 38.2), BLUE)
    _arrow(axis, (79.9, 38.2), (84.8, 38.2), GREEN)
    _arrow(axis, (40.2, 15.2), (44.6, 15.2), ORANGE)
    _arrow(axis, (61.4, 15.2), (84.8, 15.2), ORANGE)
    _arrow(axis, (53, 33.6), (53, 19.8), GREY, dashed=True)
    axis.text(52, 26.8, "moving average\nof the weights (EMA)", fontsize=9, color="#444", ha="right", va="center")
    _arrow(axis, (73.2, 28.6), (73.2, 33.6), GREY)
    axis.text(73.2, 26.6, "positions of the\nhidden words", fontsize=9, color="#444", ha="center", va="center")

    for x in (columns[index] + 0.8 for index in hidden):
        _arrow(axis, (x, 34.6), (x, 29.4), GREEN)
        _arrow(axis, (x, 18.6), (x, 23.8), ORANGE)
    _box(axis, 84.6, 24, 23, 5.2, "loss: distance per hidden word", PALE_GREY, "#555", fontsize=8.5)
    axis.text(96, 44, "predicted vectors", fontsize=9, color=GREEN, ha="center", va="center")
    axis.text(96, 8.8, "target vectors", fontsize=9, color=ORANGE, ha="center", va="center")
    return figure


def _vector(axis: Axes, x: float, y: float, color: str, faint: bool = False) -> None:
    """Draw a column of four cells, which stands for one vector."""
    for cell in range(4):
        shape = Rectangle(
            (x, y + 1.6 * cell),
            1.6,
            1.6,
            facecolor=color,
            edgecolor="white",
            alpha=0.2 if faint else (1.0, 0.6, 0.85, 0.45)[(cell + int(x)) % 4],
        )
        axis.add_patch(shape)


def _box(
    axis: Axes,
    x: float,
    y: float,
    width: float,
    height: float,
    text: str,
    fill: str,
    edge: str,
    dashed: bool = False,
    fontsize: float = 10,
) -> None:
    shape = FancyBboxPatch(
        (x, y),
        width,
        height,
        boxstyle="round,pad=0,rounding_size=0.8",
        facecolor=fill,
        edgecolor=edge,
        linestyle="--" if dashed else "-",
    )
    axis.add_patch(shape)
    axis.text(x + width / 2, y + height / 2, text, ha="center", va="center", fontsize=fontsize)


def _arrow(
    axis: Axes,
    start: tuple[float, float],
    end: tuple[float, float],
    color: str,
    dashed: bool = False,
    bend: float = 0.0,
) -> None:
    arrow = FancyArrowPatch(
        start,
        end,
        arrowstyle="-|>",
        mutation_scale=14,
        color=color,
        linewidth=1.6,
        linestyle="--" if dashed else "-",
        connectionstyle=f"arc3,rad={bend}",
    )
    axis.add_patch(arrow)


# ---- the moving average


def draw_ema() -> Figure:
    """What a target is made of, and how much of the start is left in it."""
    figure = Figure(figsize=(10, 3.9), layout="constrained")
    ages, shares = figure.subplots(1, 2)

    for decay, color in ((0.9, BLUE), (0.99, ORANGE), (0.996, GREEN)):
        age = torch.arange(0, 601)
        ages.plot(age, decay**age, color=color, label=f"decay {decay}: horizon {1 / (1 - decay):.0f} steps")
    ages.axhline(0.37, color=GREY, linewidth=1, linestyle=":")
    ages.set(title="Weight of the encoder of N steps ago", xlabel="age in steps", ylabel="weight, the newest is 1")
    ages.legend(fontsize=9)
    ages.grid(alpha=0.3)

    steps = 2000
    random, pretrained = default_decay_range(steps, pretrained=False), default_decay_range(steps, pretrained=True)
    for (first, last), label, color in (
        (random, "random start: the default", BLUE),
        (pretrained, "pretrained start: the default", ORANGE),
        ((0.999, 0.9999), "0.999 to 0.9999: too slow for a random start", GREY),
    ):
        left, points = 1.0, [1.0]
        for step in range(1, steps + 1):
            left *= interpolate_schedule(step, steps, first, last)
            points.append(left)
        shares.plot(points, color=color, label=label)
    shares.set(
        title=f"How much of its start the target still is ({steps:,} steps)",
        xlabel="step",
        ylabel="share of the start",
        ylim=(0, 1.02),
    )
    shares.legend(fontsize=9, loc="lower right", bbox_to_anchor=(1, 0.06))
    shares.grid(alpha=0.3)
    return figure


# ---- collapse


def draw_collapse() -> Figure:
    """Vectors of six samples, eight positions each, in two dimensions; the numbers are those of the health curves."""
    random = torch.Generator().manual_seed(0)
    centres = torch.tensor([[0.8, 0.5], [-0.7, 0.8], [0.2, -0.9], [-0.9, -0.4], [0.9, -0.5], [-0.1, 0.9]])
    samples = torch.arange(6).repeat_interleave(8)
    noise = 0.28 * torch.randn(48, 2, generator=random)
    healthy = centres[samples] + noise
    kinds = {
        "healthy": healthy,
        "total collapse": torch.tensor([0.75, 0.55]) + 0.02 * noise,
        "dimensional collapse": torch.outer(healthy @ torch.tensor([0.8, 0.6]), torch.tensor([0.8, 0.6])),
        "token collapse": centres[samples] + 0.02 * noise,
    }
    figure = Figure(figsize=(10, 3.5), layout="constrained")
    for axis, (kind, vectors) in zip(figure.subplots(1, 4), kinds.items(), strict=True):
        axis.axhline(0, color=GREY, linewidth=0.6)
        axis.axvline(0, color=GREY, linewidth=0.6)
        axis.scatter(*vectors.T, c=[f"C{sample}" for sample in samples.tolist()], s=22, alpha=0.75, linewidths=0)
        axis.set(xlim=(-1.8, 1.8), ylim=(-1.8, 1.8), xticks=[], yticks=[], aspect="equal")
        axis.set_title(kind, fontsize=11, weight="bold")
        measured = representation_health(vectors, samples)
        measures = f"pairwise cosine {measured['pairwise_cosine']:.2f}\nrank {measured['rank']:.2f} of 2\n"
        measures += f"within samples {measured['within_sample']:.2f}"
        axis.set_xlabel(measures.replace("-0.00", "0.00"), fontsize=10)
    return figure


if __name__ == "__main__":
    main()
