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
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from jepa_hf.cli.console import quiet_libraries
from jepa_hf.cli.parsing import parse_command
from jepa_hf.cli.train import run
from jepa_hf.monitoring.health import representation_health
from jepa_hf.training.ema import decay_at, default_decay_range

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
    """A sentence, what each encoder reads of it, and what is compared."""
    words = ["the", "cat", "sat", "on", "the", "warm", "stone", "wall"]
    hidden = {2, 3, 6}
    figure = Figure(figsize=(10, 5.2))
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, 100), ylim=(2, 54))
    axis.axis("off")

    for y, name, told in ((48, "context view", "hidden words are left out"), (8, "target view", "all words are read")):
        axis.text(2, y, name, weight="bold", va="center", color=BLUE if y > 30 else ORANGE)
        axis.text(2, y - 3.2, told, va="center", fontsize=8.5, color="#444")
    for index, word in enumerate(words):
        x = 23 + 4.9 * index
        _box(axis, x, 6.4, 4.6, 3.6, word, PALE_ORANGE, ORANGE, fontsize=7.5)
        if index not in hidden:
            _box(axis, x, 46.4, 4.6, 3.6, word, PALE_BLUE, BLUE, fontsize=7.5)
        else:
            _box(axis, x, 46.4, 4.6, 3.6, "", "white", GREY, dashed=True)

    _box(axis, 27, 33, 31, 7, "context encoder\n(trained)", PALE_BLUE, BLUE)
    _box(axis, 27, 16, 31, 7, "target encoder\n(no gradient)", PALE_ORANGE, ORANGE)
    _box(axis, 67, 33, 14, 7, "predictor\n(trained)", PALE_GREEN, GREEN)
    _box(axis, 86, 24.5, 12, 7, "loss", PALE_GREY, "#555")
    _arrow(axis, (42.5, 46), (42.5, 40.6), BLUE)
    _arrow(axis, (42.5, 10.6), (42.5, 15.5), ORANGE)
    _arrow(axis, (58.6, 36.5), (66.4, 36.5), BLUE)
    _arrow(axis, (81.6, 36.5), (92, 32.2), GREEN, bend=-0.25)
    _arrow(axis, (58.6, 19.5), (92, 24), ORANGE, bend=0.2)
    _arrow(axis, (35, 32.4), (35, 23.6), GREY, dashed=True)
    axis.text(33.8, 28, "moving average\nof the weights", fontsize=8.5, color="#444", ha="right", va="center")
    _arrow(axis, (74, 43), (74, 40.6), GREY)
    axis.text(74, 45.6, "where the hidden\nwords are", fontsize=8.5, color="#444", ha="center", va="center")
    axis.text(92, 38, "guesses", fontsize=9, color=GREEN, ha="center")
    axis.text(74.5, 13.2, "representations of the hidden words,\nnormalised", fontsize=9, color=ORANGE, ha="center")
    return figure


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
    ages.set(
        title="How much an encoder of so many steps ago counts", xlabel="age in steps", ylabel="weight, the newest is 1"
    )
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
            left *= decay_at(step, steps, first, last)
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
        told = f"pairwise cosine {measured['pairwise_cosine']:.2f}\nrank {measured['rank']:.2f} of 2\n"
        told += f"within samples {measured['within_sample']:.2f}"
        axis.set_xlabel(told.replace("-0.00", "0.00"), fontsize=10)
    return figure


if __name__ == "__main__":
    main()
