"""The collator for text: from rows of token ids to two views and target positions."""

import copy
from collections.abc import Sequence
from typing import Any, Self

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..errors import UsageError
from .base_collator import MaskingCollator, check_span_settings, chosen_positions, mask_keys
from .counter_rng import row_keys
from .span_sampling import maskable_units, sample_span_mask


class DataCollatorForSpanJEPA(MaskingCollator):
    """Pads a batch of token rows and hides contiguous spans of it.

    A row may hold several documents: `sequence_ids` beside its `input_ids` then number them, 0, 1, and so on. Each is
    masked as it would be in a row of its own.

    Args:
        tokenizer: gives the special tokens, which are never hidden, the padding token and side.
        mask_ratio: share of the maskable tokens that is hidden, in (0, 1).
        mean_span_length: mean of the geometric distribution of span lengths, in tokens (in words with `whole_word`);
            1 hides single tokens independently of their neighbours.
        context_mode: "kept": hidden positions stay as [MASK] tokens; "dropped": the view lists the visible positions.
        num_masks: masks per sample, which share one pass of the target encoder.
        whole_word: hide whole words; rows then need `word_ids`.
        on_short: what happens to a row, or a document, of fewer than two maskable tokens: "error", or "skip" to give
            it no target.
        pad_to_multiple_of: round the length up.
        max_length: pad every batch to this length, and targets, visible positions and documents to one of a few numbers
            each: static shapes for torch.compile.
        seed: seed of the masks.

    Returns of a call (B rows, length L, M masks; T targets, C visible positions and S documents at most):
        `input_ids`, `attention_mask` long `[B, L]`; `target_positions` long and `target_valid` bool `[B, M, T]`;
        with "kept" `context_input_ids` long `[B, L]` (`[B, M, L]` where M > 1); with "dropped" `context_positions` long
        and `context_valid` bool `[B, M, C]`; of packed rows also `sequence_ids` long `[B, L]`, -1 on padding, and
        `sequence_valid` bool `[B, S]`, which numbers stand for a document.

    Raises:
        UsageError: a tokenizer without a mask or padding token, a ratio outside (0, 1), a mean below 1, a row
            without anything to mask, one that is no list of whole numbers, or documents that are not numbered in order.
    """

    columns = ("word_ids",)

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mask_ratio: float = 0.3,
        mean_span_length: float = 5.0,
        context_mode: str = "dropped",
        num_masks: int = 1,
        whole_word: bool = False,
        on_short: str = "error",
        pad_to_multiple_of: int | None = None,
        max_length: int | None = None,
        seed: int = 42,
    ):
        if context_mode == "kept" and tokenizer.mask_token_id is None:
            raise UsageError(
                f"the tokenizer ({type(tokenizer).__name__}) has no mask token: use the tokenizer of a masked language "
                "model, add one with --add_tokens, or leave hidden positions out with --context_mode dropped"
            )
        if tokenizer.pad_token_id is None:
            raise UsageError(
                f"the tokenizer ({type(tokenizer).__name__}) has no padding token: set tokenizer.pad_token"
            )
        check_span_settings(mask_ratio, mean_span_length, context_mode, on_short)
        for name, value in (("pad_to_multiple_of", pad_to_multiple_of), ("max_length", max_length)):
            if value is not None and value < 1:
                raise UsageError(f"{name} must be at least 1, not {value}; leave it out for no limit")
        super().__init__(num_masks, seed)
        self.tokenizer = tokenizer
        self.mask_ratio = mask_ratio
        self.mean_span_length = mean_span_length
        self.context_mode = context_mode
        self.whole_word = whole_word
        self.on_short = on_short
        self.pad_to_multiple_of = pad_to_multiple_of
        self.max_length = max_length
        self._special_ids = np.array(sorted(set(tokenizer.all_special_ids)), dtype=np.int64)
        self._leaves_out: tuple[str, ...] = ()

    def for_training(self) -> Self:
        """A copy that leaves `attention_mask` and `context_valid` out of a batch in which they are True throughout.

        Attention without a mask has faster kernels, and it is here, not on the device, that one can look without
        waiting. Packed rows need masks in any case. A compiled model is compiled once more for batches in which no row
        is padded.
        """
        training = copy.copy(self)
        training._leaves_out = ("attention_mask", "context_valid")
        return training

    @property
    def summary(self) -> dict[str, Any]:
        return {"mask ratio": self.mask_ratio, "mean span length": self.mean_span_length}

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        rows = _whole_numbers(features, "input_ids")
        words = self._words(features, rows) if self.whole_word else None
        input_ids, attention = self._pad(rows, self._length(rows))
        shape = (len(features), self.num_masks)
        if any("sequence_ids" in feature for feature in features):
            numbers = _document_numbers(features, rows)
            documents, real = self._pad(_documents(rows, numbers))
            of_documents = self._hidden(documents, real, None if words is None else _documents(words, numbers))
            # Row by row, both list the same tokens in the same order.
            hidden = np.zeros((*shape, attention.shape[1]), dtype=bool)
            hidden.swapaxes(0, 1)[:, attention] = of_documents.swapaxes(0, 1)[:, real]
            packed = self._packed(numbers, attention.shape[1])
        else:
            hidden = self._hidden(input_ids, attention, words)
            packed = {}
        hidden = hidden.reshape(len(features) * self.num_masks, -1)

        target_capacities, visible_capacities = self._capacities(bool(packed))
        targets, target_valid = chosen_positions(hidden, target_capacities)
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention.astype(np.int64),
            "target_positions": targets.reshape(*shape, -1),
            "target_valid": target_valid.reshape(*shape, -1),
            **packed,
        }
        if self.context_mode == "kept":
            view = np.where(hidden.reshape(*shape, -1), self.tokenizer.mask_token_id, input_ids[:, None, :])
            batch["context_input_ids"] = view[:, 0] if self.num_masks == 1 else view
        else:
            visible = np.repeat(attention, self.num_masks, axis=0) & ~hidden
            positions, valid = chosen_positions(visible, visible_capacities)
            batch["context_positions"] = positions.reshape(*shape, -1)
            batch["context_valid"] = valid.reshape(*shape, -1)
        left_out = () if packed else self._leaves_out
        batch = {name: array for name, array in batch.items() if not (name in left_out and array.all())}
        return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in batch.items()}

    def _words(self, features: Sequence[dict[str, Any]], rows: list[np.ndarray]) -> list[np.ndarray]:
        if not all("word_ids" in feature for feature in features):
            raise UsageError("whole_word needs a column word_ids: tokenise with tokenize_dataset(..., word_ids=True)")
        words = _whole_numbers(features, "word_ids")
        for number, (row, ids) in enumerate(zip(words, rows, strict=True)):
            if len(row) != len(ids):
                raise UsageError(
                    f"row {number} of the batch has {len(row)} word_ids for {len(ids)} input_ids: tokenise with "
                    "tokenize_dataset(..., word_ids=True)"
                )
        return words

    def _hidden(self, input_ids: np.ndarray, real: np.ndarray, words: list[np.ndarray] | None) -> np.ndarray:
        """What is hidden of each of N texts, `[N, L]`: bool `[N, M, L]`."""
        word_ids = None if words is None else self._pad(words, real.shape[1], fill=-1)[0]
        maskable = real & ~np.isin(input_ids, self._special_ids)
        if word_ids is None:
            units = np.count_nonzero(maskable, axis=1)
        else:
            units = maskable_units(maskable, word_ids).max(axis=1, initial=-1) + 1
        short = np.flatnonzero(units < 2)
        if short.size and self.on_short == "error":
            row = int(short[0])
            text = self.tokenizer.decode(input_ids[row][real[row]])
            raise UsageError(
                f"row {row} of the batch ({text[:60]!r}) has fewer than two {'words' if self.whole_word else 'tokens'} "
                'that may be masked: leave such rows out or set on_short to "skip"'
            )
        keys = mask_keys(row_keys(input_ids, real, self.seed, self.epoch), self.num_masks)
        if self.num_masks > 1:
            maskable = np.repeat(maskable, self.num_masks, axis=0)
            word_ids = None if word_ids is None else np.repeat(word_ids, self.num_masks, axis=0)
        hidden = sample_span_mask(maskable, keys, self.mask_ratio, self.mean_span_length, word_ids=word_ids)
        return hidden.reshape(len(real), self.num_masks, -1)

    def _packed(self, numbers: list[np.ndarray], length: int) -> dict[str, np.ndarray]:
        """What a batch of packed rows has beside the others: `sequence_ids` and `sequence_valid`."""
        counts = np.array([row[-1] + 1 for row in numbers])
        capacities = () if self.max_length is None else (max(length // 8, 1), length)
        most = int(counts.max())
        most = next((capacity for capacity in capacities if capacity >= most), most)
        return {
            "sequence_ids": self._pad(numbers, length, fill=-1)[0],
            "sequence_valid": np.arange(most) < counts[:, None],
        }

    def _length(self, rows: list[np.ndarray]) -> int:
        """What the rows of a batch are padded to."""
        lengths = [len(row) for row in rows]
        length = max(lengths)
        if self.max_length is not None:
            if length > self.max_length:
                raise UsageError(
                    f"row {lengths.index(length)} of the batch has {length} tokens, more than max_length "
                    f"{self.max_length}: tokenise with max_seq_length {self.max_length}"
                )
            length = self.max_length
        if self.pad_to_multiple_of is not None:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        return length

    def _pad(
        self, rows: list[np.ndarray], length: int | None = None, fill: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """`[B, length]` ids and bool validity, padded on the tokenizer's side; by default to the longest."""
        lengths = np.array([len(row) for row in rows])
        length = int(lengths.max()) if length is None else length
        column = np.arange(length)
        if self.tokenizer.padding_side == "left":
            valid = column >= length - lengths[:, None]
        else:
            valid = column < lengths[:, None]
        ids = np.full(valid.shape, self.tokenizer.pad_token_id if fill is None else fill, dtype=np.int64)
        ids[valid] = np.concatenate(rows)
        return ids, valid

    def _capacities(self, packed: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Sizes to choose from for targets and for visible positions, under static shapes: what full rows with two
        special tokens need exactly, one that nearly always fits, and one that always does. Without static shapes, none.
        """
        if self.max_length is None:
            return (), ()
        length = self.max_length
        # A row's special tokens are never hidden, so it shows more than 1 - ratio of its tokens: up to an eighth here.
        sizes = [(max(round(length * self.mask_ratio), 1), length - int(length * self.mask_ratio * 7 / 8))]
        if not packed:  # rows of several documents have more special tokens, and masks in any case
            usual = round((length - 2) * self.mask_ratio)
            sizes.insert(0, (max(usual, 1), length - usual))
        targets, visible = zip(*sizes, (length, length), strict=True)
        return targets, visible


def _whole_numbers(features: Sequence[dict[str, Any]], column: str) -> list[np.ndarray]:
    """A column of the rows of a batch, each an int64 `[length]`."""
    rows = []
    for number, feature in enumerate(features):
        try:
            row = np.asarray(feature[column])
        except ValueError:  # ragged
            row = np.array(None)
        if row.ndim != 1 or (row.size and row.dtype.kind not in "iu"):
            raise UsageError(f"row {number} of the batch has no list of whole numbers in {column}: tokenise the texts")
        rows.append(row.astype(np.int64, copy=False))
    return rows


def _document_numbers(features: Sequence[dict[str, Any]], rows: list[np.ndarray]) -> list[np.ndarray]:
    """Which document each token of packed rows is of, counted from 0 in each row."""
    if not all("sequence_ids" in feature for feature in features):
        raise UsageError("some rows of the batch have sequence_ids and some have none: pack all of them, or none")
    numbers = _whole_numbers(features, "sequence_ids")
    for number, (documents, ids) in enumerate(zip(numbers, rows, strict=True)):
        steps = np.diff(documents, prepend=-1)
        if len(documents) != len(ids) or not len(ids) or steps[0] != 1 or not np.isin(steps, (0, 1)).all():
            raise UsageError(
                f"row {number} of the batch has sequence_ids that do not number its {len(ids)} tokens' documents 0, 1, "
                "2 and so on: pack with pack_dataset"
            )
    return numbers


def _documents(rows: list[np.ndarray], numbers: list[np.ndarray]) -> list[np.ndarray]:
    """The documents of packed rows, each by itself."""
    return [
        document
        for row, documents in zip(rows, numbers, strict=True)
        for document in np.split(row, np.flatnonzero(np.diff(documents)) + 1)
    ]
