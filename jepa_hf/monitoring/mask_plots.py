"""The picture of the masks: of real samples, what the context encoder reads and what is to be predicted."""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import MaxNLocator
from transformers import BaseImageProcessor, PreTrainedTokenizerBase

from ..errors import UsageError
from ..masking.base_collator import MaskingCollator
from ..models.modeling_jepa import JepaForRepresentationPrediction
from ..utils.types import ProcessingClass

Batch = dict[str, np.ndarray]

_DPI = 110
_WIDTH = 10  # inches, of text and features
_MOST_MASKS = 4  # of a sample; more would be too small to read
_NO_TARGETS = "too short to be masked, skipped"
_TO_PREDICT = "hidden from the context, to be predicted"

_TARGET_COLOR = "#ffcb7d"
_FRAME_COLOR = "#e07b00"
_GREY = 0.82  # of patches that are not shown
_PADDING_COLOR = "0.9"
_SHADE = {"facecolor": (0.75, 0.75, 0.75, 0.8), "edgecolor": (0.25, 0.25, 0.25), "hatch": "////", "linewidth": 0}

# Pixels of the picture of texts.
_FONT = FontProperties(size=9)
_LINE, _MARGIN, _TOP = 20, 16, 40
_MOST_LINES = 6  # of a sample, shared by its masks


def write_masks(
    model: JepaForRepresentationPrediction,
    collator: MaskingCollator,
    dataset: Iterable[dict[str, Any]],
    path: str | Path,
    processing_class: ProcessingClass | None = None,
    rows: int = 6,
) -> None:
    """Draw the first rows of a data set as the collator masks them in its present epoch.

    Args:
        model: the JEPA.
        collator: the run's.
        dataset: what the collator reads; only the first `rows` are taken.
        path, processing_class, rows: as in `plot_masks`.

    Raises:
        UsageError: as `plot_masks`, or as the collator.
    """
    plot_masks(model, collator(list(islice(dataset, rows))), path, processing_class, rows)


def plot_masks(
    model: JepaForRepresentationPrediction,
    batch: Mapping[str, torch.Tensor],
    path: str | Path,
    processing_class: ProcessingClass | None = None,
    rows: int = 6,
) -> None:
    """Draw the masks of a collated batch to a PNG: of each sample at most four masks.

    Images: the image, its context, and each target block alone. Texts: their tokens, targets marked, and where masked
    tokens are kept also the view with them; of packed rows each text by itself. Features: a heat map of the
    standardised values, hidden ones shaded.
    Characters that matplotlib's font lacks are drawn as boxes.

    Args:
        model: says what it reads, and how it standardises features.
        batch: what a collator gives for this model.
        path: the file to write.
        processing_class: tokenizer or image processor; not read for features.
        rows: of the batch, the first so many samples are drawn.

    Raises:
        UsageError: no tokenizer for texts, or no image processor for images.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing from")
        _draw(model, batch, processing_class, rows).savefig(path, dpi=_DPI, format="png")


def _draw(
    model: JepaForRepresentationPrediction,
    batch: Mapping[str, torch.Tensor],
    processing_class: ProcessingClass | None,
    rows: int,
) -> Figure:
    shown = {name: tensor[:rows].numpy(force=True) for name, tensor in batch.items()}
    modality = model.backbone.modality
    if modality == "images":
        if not isinstance(processing_class, BaseImageProcessor):
            raise UsageError("a picture of masked images needs their image processor: give it as processing_class")
        return _draw_images(shown, model.backbone.grid, processing_class)
    if modality == "text":
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            raise UsageError("a picture of masked texts needs their tokenizer: give it as processing_class")
        return _draw_texts(shown, processing_class, rows)
    encoder = model.context_encoder
    mean, std = encoder.feature_mean.numpy(force=True), encoder.feature_std.numpy(force=True)
    values = (shown["features"] - mean) / std
    if encoder.config.mode == "time":
        return _draw_series(shown, values)
    return _draw_vectors(shown, values, encoder.config.mode, encoder.config.patch_size)


def _figure(width: float, height: float, layout: str | None = "constrained") -> Figure:
    figure = Figure(figsize=(width, height), dpi=_DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _flags(positions: np.ndarray, valid: np.ndarray, length: int) -> np.ndarray:
    """Which positions are listed: long and bool `[..., K]` -> bool `[..., length]`."""
    flags = np.zeros((*positions.shape[:-1], length + 1), dtype=bool)
    # What is only filled up falls into a place of its own.
    np.put_along_axis(flags, np.where(valid, positions, length), True, axis=-1)
    return flags[..., :length]


def _mask_title(number: int, masks: int) -> str:
    return f"mask {number + 1} of {masks}" if masks > 1 else ""


# ---- images


def _draw_images(batch: Batch, grid: tuple[int, ...], processor: BaseImageProcessor) -> Figure:
    """A row per image: the image, the context, and a column per target block."""
    images = _displayable(batch["pixel_values"], processor)
    patches = grid[0] * grid[1]
    context = _flags(batch["context_positions"], batch["context_valid"], patches)[:, 0]
    targets = _flags(batch["target_positions"], batch["target_valid"], patches)
    masks = targets.shape[1]
    titles = ["image", "context", *(f"target {number + 1} of {masks}" for number in range(min(masks, _MOST_MASKS)))]

    size = 1.7
    figure = _figure(size * len(titles), size * len(images) + 0.3)
    axes = figure.subplots(len(images), len(titles), squeeze=False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for row, image in enumerate(images):
        if not context[row].any():
            # The collator's sign for a damaged image.
            for axis in axes[row]:
                axis.imshow(np.full_like(image, _GREY))
            axes[row, 0].text(
                0.5, 0.5, "cannot be\ndecoded,\nskipped", ha="center", va="center", transform=axes[row, 0].transAxes
            )
            continue
        axes[row, 0].imshow(image)
        axes[row, 1].imshow(_only(image, context[row].reshape(grid)))
        for axis, target in zip(axes[row, 2:], targets[row], strict=False):
            block = target.reshape(grid)
            axis.imshow(_only(image, block))
            if block.any():  # on a small plane the context may have taken all of it
                axis.add_patch(_frame(block, image.shape[0] // grid[0], image.shape[1] // grid[1]))
    return figure


def _displayable(pixel_values: np.ndarray, processor: BaseImageProcessor) -> np.ndarray:
    """What the processor made of images, undone: `[B, C, H, W]` -> RGB in 0..1 `[B, H, W, 3]`."""
    images = pixel_values.transpose(0, 2, 3, 1)
    if processor.do_normalize:
        images = images * np.asarray(processor.image_std) + np.asarray(processor.image_mean)
    images = images / (255 * (processor.rescale_factor if processor.do_rescale else 1))
    return np.broadcast_to(images.clip(0, 1), (*images.shape[:3], 3))


def _only(image: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """The image `[H, W, 3]` where `patches`, bool `[rows, columns]`, is True; grey elsewhere."""
    visible = patches.repeat(image.shape[0] // patches.shape[0], 0).repeat(image.shape[1] // patches.shape[1], 1)
    return np.where(visible[..., None], image, _GREY)


def _frame(block: np.ndarray, height: int, width: int) -> Rectangle:
    """The outline of a block, bool `[rows, columns]`, of patches of so many pixels."""
    (top, left), (bottom, right) = (limit(np.argwhere(block), axis=0) for limit in (np.min, np.max))
    corner = (left * width - 0.5, top * height - 0.5)  # imshow's pixels have their centres on whole numbers
    size = ((right - left + 1) * width, (bottom - top + 1) * height)
    return Rectangle(corner, *size, fill=False, edgecolor=_FRAME_COLOR, linewidth=2)


# ---- texts


def _draw_texts(batch: Batch, tokenizer: PreTrainedTokenizerBase, most: int) -> Figure:
    """A block per text, mask and view: a heading and lines of words."""
    figure = _figure(_WIDTH, 1, layout=None)
    renderer = figure.canvas.get_renderer()

    def measure(text: str) -> float:
        return renderer.get_text_width_height_descent(text, _FONT, False)[0]

    length = batch["input_ids"].shape[1]
    targets = _flags(batch["target_positions"], batch["target_valid"], length)
    masks = targets.shape[1]
    kept = batch["context_input_ids"].reshape(-1, masks, length) if "context_input_ids" in batch else None
    shown_masks = min(masks, _MOST_MASKS)
    most_lines = max(_MOST_LINES // (shown_masks * (1 if kept is None else 2)), 2)

    blocks: list[list[tuple[str, list[list[_Piece]]]]] = []
    for name, row, real in islice(_texts(batch), most):
        for mask in range(shown_masks):
            marked = targets[row, mask] & real
            count = f"{marked.sum()} of {real.sum()} tokens hidden" if marked.any() else _NO_TARGETS
            parts = (name, _mask_title(mask, masks), count)
            views = {", ".join(filter(None, parts)): batch["input_ids"]}
            if kept is not None and marked.any():
                views["what the context encoder reads"] = kept[:, mask]
            blocks.append([])
            for heading, ids in views.items():
                pieces = _pieces(ids[row][real], marked[real], tokenizer, measure)
                blocks[-1].append((heading, _wrapped(pieces, _WIDTH * _DPI - 2 * _MARGIN, most_lines, measure)))

    height = _TOP + _LINE * sum(0.6 + sum(1 + len(lines) for _, lines in block) for block in blocks)
    figure.set_size_inches(_WIDTH, height / _DPI)
    axis = figure.add_axes((0, 0, 1, 1))
    axis.set(xlim=(0, _WIDTH * _DPI), ylim=(height, 0))  # pixels, from the upper left corner
    axis.set_axis_off()
    axis.legend(
        handles=[
            Patch(facecolor=_TARGET_COLOR, label=_TO_PREDICT),
            Patch(facecolor="white", edgecolor="0.6", label="read by the context encoder"),
        ],
        loc="upper left",
        bbox_to_anchor=(_MARGIN, 4),
        bbox_transform=axis.transData,
        borderaxespad=0,
        borderpad=0.3,
        ncols=2,
        fontsize=9,
        frameon=False,
    )
    top = float(_TOP)
    for block in blocks:
        for heading, lines in block:
            axis.text(_MARGIN, top + _LINE / 2, heading, fontsize=8, color="0.45", va="center")
            top += _LINE
            for line in lines:
                _draw_line(axis, line, top)
                top += _LINE
        top += 0.6 * _LINE
    return figure


def _texts(batch: Batch) -> Iterator[tuple[str, int, np.ndarray]]:
    """The texts of a batch: what to call each, its row, and which places there are its own, bool `[L]`."""
    for row, real in enumerate(batch["attention_mask"].astype(bool)):
        if "sequence_ids" not in batch:
            yield f"text {row + 1}", row, real
            continue
        numbers = batch["sequence_ids"][row]
        for number in range(numbers.max() + 1):
            yield f"row {row + 1}, text {number + 1} of {numbers.max() + 1}", row, numbers == number


# Text of a token, or of several that only together make a character; its width in pixels; whether it is a target.
_Piece = tuple[str, float, bool]


def _pieces(
    ids: np.ndarray, targets: np.ndarray, tokenizer: PreTrainedTokenizerBase, measure: Callable[[str], float]
) -> Iterator[_Piece]:
    """Tokens as readers know them: what each adds to the decoded text. Spaces before words are pieces of their own."""
    text, start = "", 0
    for end in range(1, len(ids) + 1):
        longer = tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        if longer.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            continue
        piece = re.sub(r"\s+", " ", longer[len(text) :])
        word = piece.lstrip()
        if word and word != piece:
            yield " ", measure(" "), False
        yield word or piece, measure(word or piece), bool(targets[start:end].any())
        text, start = longer, end


def _wrapped(
    pieces: Iterable[_Piece], width: float, most_lines: int, measure: Callable[[str], float]
) -> list[list[_Piece]]:
    """Lines that are at most so many pixels wide, broken between words where that is possible; what does not fit into
    `most_lines` becomes an ellipsis."""
    lines: list[list[_Piece]] = [[]]
    for piece in pieces:
        lines[-1].append(piece)
        if _width(lines[-1]) <= width:
            continue
        if len(lines) == most_lines:
            ellipsis = ("…", measure("…"), False)
            while lines[-1] and _width([*lines[-1], ellipsis]) > width:
                lines[-1].pop()
            lines[-1].append(ellipsis)
            break
        line = lines[-1]
        word = max((number + 1 for number, (text, _, _) in enumerate(line) if text == " "), default=0)
        if word == 0 or _width(line[word:]) > width:
            word = max(len(line) - 1, 1)  # the word has no space before it on this line, or fits into none
        lines[-1:] = [line[:word], line[word:]]
    return [line for line in lines if line]


def _width(line: list[_Piece]) -> float:
    return sum(width for _, width, _ in line)


def _draw_line(axis: Axes, line: list[_Piece], top: float) -> None:
    left = float(_MARGIN)
    for text, width, is_target in line:
        if is_target:
            # A gap of a pixel tells neighbouring tokens apart.
            axis.add_patch(Rectangle((left, top + 1), width - 1, _LINE - 2, facecolor=_TARGET_COLOR, linewidth=0))
        # A dollar sign is a dollar sign, not the start of a formula.
        axis.text(left, top + 0.72 * _LINE, text, fontproperties=_FONT, parse_math=False)
        left += width


# ---- features


def _draw_vectors(batch: Batch, values: np.ndarray, mode: str, patch_size: int) -> Figure:
    """A heat map per mask, samples by features `[B, F]`."""
    samples, width = values.shape
    masks = batch["target_positions"].shape[1]
    groups = np.arange(width) // patch_size
    if mode == "flat":
        # The one position is always the target: what was hidden shows in the values filled in.
        filled = batch["context_features"].reshape(samples, masks, width) != batch["features"][:, None]
        hidden = np.zeros((samples, masks, groups[-1] + 1), dtype=bool)
        np.logical_or.at(hidden, (slice(None), slice(None), groups), filled)
    else:
        hidden = _flags(batch["target_positions"], batch["target_valid"], groups[-1] + 1)

    shown = min(masks, _MOST_MASKS)
    figure = _figure(_WIDTH, 0.9 + shown * (0.6 + 0.3 * samples))
    axes = figure.subplots(shown, 1, squeeze=False, sharex=True)
    for mask, axis in enumerate(axes[:, 0]):
        _heat_map(axis, values)
        for sample in range(samples):
            for start, end in _runs(hidden[sample, mask][groups]):
                axis.add_patch(Rectangle((start - 0.5, sample - 0.5), end - start, 1, **_SHADE))
        axis.set_title(_mask_title(mask, masks), fontsize=9)
        axis.set_yticks(range(samples), [f"sample {number + 1}" for number in range(samples)], fontsize=8)
    axes[-1, 0].set_xlabel("feature")
    whole = "hidden from the context; the target is the whole vector"
    _add_keys(figure, axes, whole if mode == "flat" else _TO_PREDICT)
    return figure


def _draw_series(batch: Batch, values: np.ndarray) -> Figure:
    """A heat map per sample and mask, features by steps, of values `[B, T, F]`."""
    samples, steps, _ = values.shape
    masks = batch["target_positions"].shape[1]
    shown = min(masks, _MOST_MASKS)
    hidden = _flags(batch["target_positions"], batch["target_valid"], steps)
    real = batch["attention_mask"].astype(bool)
    values = np.where(real[..., None], values, np.nan)  # not drawn

    figure = _figure(_WIDTH, 1.0 + 1.3 * samples)
    axes = figure.subplots(samples, shown, squeeze=False, sharex=True, sharey=True)
    for sample, row in enumerate(axes):
        for mask, axis in enumerate(row):
            _heat_map(axis, values[sample].T)
            for start, end in _runs(hidden[sample, mask]):
                axis.axvspan(start - 0.5, end - 0.5, **_SHADE)
            if sample == 0:
                axis.set_title(_mask_title(mask, masks), fontsize=9)
            if not hidden[sample, mask].any():
                axis.text(0.5, 0.5, _NO_TARGETS, ha="center", va="center", fontsize=9, transform=axis.transAxes)
            axis.set_facecolor(_PADDING_COLOR)
        row[0].set_ylabel(f"sample {sample + 1}\nfeature", fontsize=8)
    for axis in axes[-1]:
        axis.set_xlabel("step")
    _add_keys(figure, axes, _TO_PREDICT, *(() if real.all() else (Patch(color=_PADDING_COLOR, label="padding"),)))
    return figure


def _heat_map(axis: Axes, values: np.ndarray) -> None:
    axis.imshow(values, cmap="RdBu_r", vmin=-3, vmax=3, aspect="auto", interpolation="nearest")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axis.tick_params(labelsize=8)


def _add_keys(figure: Figure, axes: np.ndarray, hidden: str, *others: Patch) -> None:
    """What colours and shades mean."""
    bar = figure.colorbar(axes[0, 0].images[0], ax=axes, extend="both", aspect=30, pad=0.01)
    bar.set_label("standardised value", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    handles = [Patch(**_SHADE, label=hidden), *others]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), fontsize=9, frameon=False)


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Start and end of each run of True of a bool `[L]`."""
    edges = np.flatnonzero(np.diff(np.pad(flags.astype(np.int8), 1)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]
