"""Pictures of masks: the context encoder's view of real samples, and the targets to predict."""

import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any, Literal, cast

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
_WIDTH = 10  # inches, for text and features
_MAX_MASKS = 4  # per sample; more would be too small to read
_NO_TARGETS = "too short to be masked, skipped"
_TO_PREDICT = "hidden from the context, to be predicted"

_TARGET_COLOR = "#ffcb7d"
_FRAME_COLOR = "#e07b00"
_GREY = 0.82  # brightness of hidden patches
_PADDING_COLOR = "0.9"
_SHADE: dict[str, Any] = {
    "facecolor": (0.75, 0.75, 0.75, 0.8),
    "edgecolor": (0.25, 0.25, 0.25),
    "hatch": "////",
    "linewidth": 0,
}

# Layout of texts, in pixels.
_FONT = FontProperties(size=9)
_LINE, _MARGIN, _TOP = 20, 16, 40
_MAX_LINES = 6  # per sample, shared by its masks


def write_masks(
    model: JepaForRepresentationPrediction,
    collator: MaskingCollator,
    dataset: Iterable[dict[str, Any]],
    path: str | Path,
    processing_class: ProcessingClass | None = None,
    rows: int = 6,
) -> None:
    """Draw the first rows of a data set as the collator masks them in its current epoch."""
    plot_masks(model, collator(list(islice(dataset, rows))), path, processing_class, rows)


def plot_masks(
    model: JepaForRepresentationPrediction,
    batch: Mapping[str, torch.Tensor],
    path: str | Path,
    processing_class: ProcessingClass | None = None,
    rows: int = 6,
) -> None:
    """Draw the masks of a collated batch to a PNG, at most four masks per sample.

    Images: the image, its context, and each target block alone. Texts: their tokens with marked targets, and with mask
    tokens also the masked view; documents of packed rows separately. Features: a heat map of the standardized values,
    with hidden ones shaded. Characters that matplotlib's font lacks are drawn as boxes.

    Args:
        model: Defines the modality, and the standardization of features.
        batch: A batch of the model's collator.
        path: File to write.
        processing_class: Tokenizer or image processor; not used for features.
        rows: Number of samples to draw, from the first on.

    Raises:
        UsageError: No tokenizer for texts, or no image processor for images.
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
    arrays = {name: tensor[:rows].numpy(force=True) for name, tensor in batch.items()}
    modality = model.encoder_adapter.modality
    if modality == "images":
        if not isinstance(processing_class, BaseImageProcessor):
            raise UsageError("A picture of masked images needs their image processor. Pass it as processing_class.")
        return _draw_images(arrays, model.encoder_adapter.grid, processing_class)
    if modality == "text":
        if not isinstance(processing_class, PreTrainedTokenizerBase):
            raise UsageError("A picture of masked texts needs their tokenizer. Pass it as processing_class.")
        return _draw_texts(arrays, processing_class, rows)
    encoder = cast(Any, model.context_encoder)
    mean, std = encoder.feature_mean.numpy(force=True), encoder.feature_std.numpy(force=True)
    values = (arrays["features"] - mean) / std
    if encoder.config.mode == "time":
        return _draw_series(arrays, values)
    return _draw_vectors(arrays, values, encoder.config.mode, encoder.config.patch_size)


def _figure(width: float, height: float, layout: Literal["constrained"] | None = "constrained") -> Figure:
    figure = Figure(figsize=(width, height), dpi=_DPI, layout=layout)
    FigureCanvasAgg(figure)
    return figure


def _to_boolean_mask(positions: np.ndarray, valid: np.ndarray, length: int) -> np.ndarray:
    """Convert lists of positions to flags: long and bool `[..., K]` -> bool `[..., length]`."""
    flags = np.zeros((*positions.shape[:-1], length + 1), dtype=bool)
    # Padding is written to an additional column.
    np.put_along_axis(flags, np.where(valid, positions, length), True, axis=-1)
    return flags[..., :length]


def _mask_title(number: int, masks: int) -> str:
    return f"mask {number + 1} of {masks}" if masks > 1 else ""


# ---- images


def _draw_images(batch: Batch, grid: tuple[int, ...], processor: BaseImageProcessor) -> Figure:
    """Draw a row per image: the image, the context, and a column per target block."""
    images = _unnormalize(batch["pixel_values"], processor)
    patches = grid[0] * grid[1]
    context = _to_boolean_mask(batch["context_positions"], batch["context_valid"], patches)[:, 0]
    targets = _to_boolean_mask(batch["target_positions"], batch["target_valid"], patches)
    masks = targets.shape[1]
    titles = ["image", "context", *(f"target {number + 1} of {masks}" for number in range(min(masks, _MAX_MASKS)))]

    size = 1.7
    figure = _figure(size * len(titles), size * len(images) + 0.3)
    axes = figure.subplots(len(images), len(titles), squeeze=False)
    for axis, title in zip(axes[0], titles, strict=True):
        axis.set_title(title, fontsize=10)
    for axis in axes.flat:
        axis.set(xticks=[], yticks=[])
    for row, image in enumerate(images):
        if not context[row].any():
            # The collator marks a damaged image by an empty context.
            for axis in axes[row]:
                axis.imshow(np.full_like(image, _GREY))
            axes[row, 0].text(
                0.5, 0.5, "cannot be\ndecoded,\nskipped", ha="center", va="center", transform=axes[row, 0].transAxes
            )
            continue
        axes[row, 0].imshow(image)
        axes[row, 1].imshow(_grey_out_rest(image, context[row].reshape(grid)))
        for axis, target in zip(axes[row, 2:], targets[row], strict=False):
            block = target.reshape(grid)
            axis.imshow(_grey_out_rest(image, block))
            if block.any():  # on a small grid the context may contain all of it
                axis.add_patch(_frame(block, image.shape[0] // grid[0], image.shape[1] // grid[1]))
    return figure


def _unnormalize(pixel_values: np.ndarray, processor: BaseImageProcessor) -> np.ndarray:
    """Invert the processor's normalization: `[B, C, H, W]` -> RGB in 0..1 `[B, H, W, 3]`."""
    settings = cast(Any, processor)
    images = pixel_values.transpose(0, 2, 3, 1)
    if settings.do_normalize:
        images = images * np.asarray(settings.image_std) + np.asarray(settings.image_mean)
    images = images / (255 * (settings.rescale_factor if settings.do_rescale else 1))
    return np.broadcast_to(images.clip(0, 1), (*images.shape[:3], 3))


def _grey_out_rest(image: np.ndarray, patches: np.ndarray) -> np.ndarray:
    """Grey out an image `[H, W, 3]` where `patches`, bool `[rows, columns]`, is False."""
    visible = patches.repeat(image.shape[0] // patches.shape[0], 0).repeat(image.shape[1] // patches.shape[1], 1)
    return np.where(visible[..., None], image, _GREY)


def _frame(block: np.ndarray, height: int, width: int) -> Rectangle:
    """Return the outline of a block, bool `[rows, columns]`, of `height` x `width` patches."""
    (top, left), (bottom, right) = (limit(np.argwhere(block), axis=0) for limit in (np.min, np.max))
    corner = (left * width - 0.5, top * height - 0.5)  # imshow centres pixels on integers
    size = ((right - left + 1) * width, (bottom - top + 1) * height)
    return Rectangle(corner, *size, fill=False, edgecolor=_FRAME_COLOR, linewidth=2)


# ---- texts

# Text of a token (or of several tokens that form one character), its width in pixels, whether it is a target.
_Piece = tuple[str, float, bool]


def _draw_texts(batch: Batch, tokenizer: PreTrainedTokenizerBase, max_texts: int) -> Figure:
    """Draw a block per text, mask and view: a heading and lines of words."""
    figure = _figure(_WIDTH, 1, layout=None)
    renderer = cast(FigureCanvasAgg, figure.canvas).get_renderer()

    def measure(text: str) -> float:
        return renderer.get_text_width_height_descent(text, _FONT, False)[0]

    blocks = _text_blocks(batch, tokenizer, max_texts, measure)
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


def _text_blocks(
    batch: Batch, tokenizer: PreTrainedTokenizerBase, max_texts: int, measure: Callable[[str], float]
) -> list[list[tuple[str, list[list[_Piece]]]]]:
    """Lay out a block per text and mask: heading and lines of each view."""
    length = batch["input_ids"].shape[1]
    targets = _to_boolean_mask(batch["target_positions"], batch["target_valid"], length)
    masks = targets.shape[1]
    masked_ids = batch["context_input_ids"].reshape(-1, masks, length) if "context_input_ids" in batch else None
    num_masks = min(masks, _MAX_MASKS)
    max_lines = max(_MAX_LINES // (num_masks * (1 if masked_ids is None else 2)), 2)

    blocks = []
    for name, row, valid in islice(_texts(batch), max_texts):
        for mask in range(num_masks):
            is_target = targets[row, mask] & valid
            count = f"{is_target.sum()} of {valid.sum()} tokens hidden" if is_target.any() else _NO_TARGETS
            views = {", ".join(filter(None, (name, _mask_title(mask, masks), count))): batch["input_ids"]}
            if masked_ids is not None and is_target.any():
                views["what the context encoder reads"] = masked_ids[:, mask]
            block = []
            for heading, ids in views.items():
                pieces = _pieces(ids[row][valid], is_target[valid], tokenizer, measure)
                block.append((heading, _wrap_lines(pieces, _WIDTH * _DPI - 2 * _MARGIN, max_lines, measure)))
            blocks.append(block)
    return blocks


def _texts(batch: Batch) -> Iterator[tuple[str, int, np.ndarray]]:
    """Yield name, row and positions, bool `[L]`, of the texts of a batch."""
    for row, valid in enumerate(batch["attention_mask"].astype(bool)):
        if "document_ids" not in batch:
            yield f"text {row + 1}", row, valid
            continue
        documents = batch["document_ids"][row]
        for document in range(documents.max() + 1):
            yield f"row {row + 1}, text {document + 1} of {documents.max() + 1}", row, documents == document


def _pieces(
    ids: np.ndarray, targets: np.ndarray, tokenizer: PreTrainedTokenizerBase, measure: Callable[[str], float]
) -> Iterator[_Piece]:
    """Yield the text that each token adds; spaces before words are separate pieces."""
    text, start = "", 0
    for end in range(1, len(ids) + 1):
        longer = cast(str, tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False))
        if longer.endswith("\N{REPLACEMENT CHARACTER}") and end < len(ids):
            continue
        piece = re.sub(r"\s+", " ", longer[len(text) :])
        word = piece.lstrip()
        if word and word != piece:
            yield " ", measure(" "), False
        yield word or piece, measure(word or piece), bool(targets[start:end].any())
        text, start = longer, end


def _wrap_lines(
    pieces: Iterable[_Piece], width: float, max_lines: int, measure: Callable[[str], float]
) -> list[list[_Piece]]:
    """Break pieces into at most `max_lines` lines of at most `width` pixels.

    An ellipsis replaces the rest.
    """
    lines: list[list[_Piece]] = [[]]
    for piece in pieces:
        lines[-1].append(piece)
        if _width(lines[-1]) <= width:
            continue
        if len(lines) == max_lines:
            ellipsis = ("…", measure("…"), False)
            while lines[-1] and _width([*lines[-1], ellipsis]) > width:
                lines[-1].pop()
            lines[-1].append(ellipsis)
            break
        line = lines[-1]
        word = max((number + 1 for number, (text, _, _) in enumerate(line) if text == " "), default=0)
        if word == 0 or _width(line[word:]) > width:
            word = max(len(line) - 1, 1)  # the word follows no space on this line, or is longer than a line
        lines[-1:] = [line[:word], line[word:]]
    return [line for line in lines if line]


def _width(line: list[_Piece]) -> float:
    return sum(width for _, width, _ in line)


def _draw_line(axis: Axes, line: list[_Piece], top: float) -> None:
    left = float(_MARGIN)
    for text, width, is_target in line:
        if is_target:
            # A gap of one pixel separates adjacent tokens.
            axis.add_patch(Rectangle((left, top + 1), width - 1, _LINE - 2, facecolor=_TARGET_COLOR, linewidth=0))
        # Otherwise a dollar sign starts a formula.
        axis.text(left, top + 0.72 * _LINE, text, fontproperties=_FONT, parse_math=False)
        left += width


# ---- features


def _draw_vectors(batch: Batch, values: np.ndarray, mode: str, patch_size: int) -> Figure:
    """Draw a heat map per mask, samples by features `[B, F]`."""
    samples, width = values.shape
    masks = batch["target_positions"].shape[1]
    groups = np.arange(width) // patch_size
    if mode == "flat":
        # The only position is always the target; hidden features are those with other values.
        is_filled = batch["context_features"].reshape(samples, masks, width) != batch["features"][:, None]
        hidden = np.logical_or.reduceat(is_filled, np.arange(0, width, patch_size), axis=-1)
    else:
        hidden = _to_boolean_mask(batch["target_positions"], batch["target_valid"], groups[-1] + 1)

    num_masks = min(masks, _MAX_MASKS)
    figure = _figure(_WIDTH, 0.9 + num_masks * (0.6 + 0.3 * samples))
    axes = figure.subplots(num_masks, 1, squeeze=False, sharex=True)
    for mask, axis in enumerate(axes[:, 0]):
        _heat_map(axis, values)
        for sample in range(samples):
            for start, end in _runs(hidden[sample, mask][groups]):
                axis.add_patch(Rectangle((start - 0.5, sample - 0.5), end - start, 1, **_SHADE))
        axis.set_title(_mask_title(mask, masks), fontsize=9)
        axis.set_yticks(range(samples), [f"sample {number + 1}" for number in range(samples)], fontsize=8)
    axes[-1, 0].set_xlabel("feature")
    flat_label = "hidden from the context; the target is the full vector"
    _add_legend(figure, axes, flat_label if mode == "flat" else _TO_PREDICT)
    return figure


def _draw_series(batch: Batch, values: np.ndarray) -> Figure:
    """Draw a heat map per sample and mask, features by steps, of values `[B, T, F]`."""
    samples, steps, _ = values.shape
    masks = batch["target_positions"].shape[1]
    num_masks = min(masks, _MAX_MASKS)
    hidden = _to_boolean_mask(batch["target_positions"], batch["target_valid"], steps)
    valid = batch["attention_mask"].astype(bool)
    values = np.where(valid[..., None], values, np.nan)  # not drawn

    figure = _figure(_WIDTH, 1.0 + 1.3 * samples)
    axes = figure.subplots(samples, num_masks, squeeze=False, sharex=True, sharey=True)
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
    _add_legend(figure, axes, _TO_PREDICT, *(() if valid.all() else (Patch(color=_PADDING_COLOR, label="padding"),)))
    return figure


def _heat_map(axis: Axes, values: np.ndarray) -> None:
    axis.imshow(values, cmap="RdBu_r", vmin=-3, vmax=3, aspect="auto", interpolation="nearest")
    for side in (axis.xaxis, axis.yaxis):
        side.set_major_locator(MaxNLocator("auto", integer=True, min_n_ticks=1))
    axis.tick_params(labelsize=8)


def _add_legend(figure: Figure, axes: np.ndarray, hidden: str, *others: Patch) -> None:
    """Add a legend of colours and shades."""
    bar = figure.colorbar(axes[0, 0].images[0], ax=axes, extend="both", aspect=30, pad=0.01)
    bar.set_label("standardized value", fontsize=8)
    bar.ax.tick_params(labelsize=8)
    handles = [Patch(**_SHADE, label=hidden), *others]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(handles), fontsize=9, frameon=False)


def _runs(flags: np.ndarray) -> list[tuple[int, int]]:
    """Return start and end of each run of True in a bool `[L]`."""
    edges = np.flatnonzero(np.diff(np.pad(flags.astype(np.int8), 1)))
    return [(int(start), int(end)) for start, end in edges.reshape(-1, 2)]
