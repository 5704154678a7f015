"""`DataCollatorForSpanJEPA`: two views and target positions of rows of token ids."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, Self

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from ..data.arguments import check_at_least_one
from ..data.tokenization import num_token_ids, special_ids
from ..errors import UsageError
from .base_collator import SpanMaskingCollator, derive_mask_keys, padded_positions, to_tensors, without_padding
from .counter_rng import row_keys
from .span_sampling import sample_span_mask, unit_ids


class DataCollatorForSpanJEPA(SpanMaskingCollator):
    """Pad a batch of token rows and mask contiguous spans of it.

    A row may bring padding of its own, which is removed: an `attention_mask`, or padding tokens at its
    ends. Tokens that its `special_tokens_mask` marks are never masked.

    A row may hold several documents, which the column `document_ids` then numbers 0, 1 and so on.
    Each document is masked as in a row of its own.

    A call returns, for B rows of length L, M masks, at most T targets, C visible positions and S documents:
    `input_ids`, `attention_mask` long `[B, L]`; `target_positions` long and `target_valid` bool `[B, M, T]`.
    "mask_token" adds `context_input_ids` long `[B, L]` (`[B, M, L]` if M > 1). "drop" adds `context_positions` long and
    `context_valid` bool `[B, M, C]`. Packed rows add `document_ids` long `[B, L]`, -1 on padding, and `document_valid`
    bool `[B, S]`, True for numbers that stand for a document.

    Args:
        tokenizer: Defines the special tokens, which are never masked, the padding token and side.
        mask_ratio: Share of the maskable tokens that is masked, in (0, 1).
        mean_span_length: Mean of the geometric distribution of span lengths, in tokens (in words
            with `whole_word`). 1 masks single tokens independently.
        masked_tokens: "mask_token": masked positions stay as [MASK] tokens; "drop": the context lists
            the visible positions. Default: that of the model, once a `JepaTrainer` has the collator, until then "drop".
        num_masks: Masks per sample. They share one pass of the target encoder.
        whole_word: Mask complete words. Rows then need `word_ids`.
        on_too_short: Treatment of a row, or a document, of fewer than two maskable units: "error", or
            "skip" for a row without targets.
        pad_to_multiple_of: Round the padded length up to a multiple of this.
        max_length: Pad every batch to this length, and targets, visible positions and documents to
            one of a few sizes: static shapes for torch.compile.
        seed: Seed of the masks.

    Raises:
        UsageError: The tokenizer has no mask or padding token, or an option is out of range. In a call: a row has
            nothing to mask or is not a list of integers, or documents are not numbered in order.
    """

    extra_columns = ("word_ids", "special_tokens_mask")

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        mask_ratio: float = 0.3,
        mean_span_length: float = 5.0,
        masked_tokens: str | None = None,
        num_masks: int = 1,
        whole_word: bool = False,
        on_too_short: str = "error",
        pad_to_multiple_of: int | None = None,
        max_length: int | None = None,
        seed: int = 42,
    ):
        _check_mask_token(tokenizer, masked_tokens)
        if tokenizer.pad_token_id is None:
            raise UsageError(
                f"The tokenizer ({type(tokenizer).__name__}) has no padding token. Set tokenizer.pad_token."
            )
        super().__init__(mask_ratio, mean_span_length, masked_tokens, num_masks, on_too_short, max_length, seed)
        self.tokenizer = tokenizer
        self.whole_word = whole_word
        self.pad_to_multiple_of = pad_to_multiple_of
        check_at_least_one(self, "pad_to_multiple_of", "max_length")
        self._special_ids = np.array(special_ids(tokenizer), dtype=np.int64)
        self._num_token_ids = num_token_ids(tokenizer)
        # A padding token that ends texts, too, says nothing about padding.
        others = (tokenizer.eos_token_id, tokenizer.sep_token_id, tokenizer.cls_token_id, tokenizer.unk_token_id)
        self._padding_id = None if tokenizer.pad_token_id in others else tokenizer.pad_token_id
        self._omit_if_all_true: tuple[str, ...] = ()

    def for_model(self, masked_tokens: str) -> Self:
        """Return the collator for a model's `masked_tokens`, which it takes over if it has none of its own.

        Raises:
            UsageError: It has another, or the tokenizer has no mask token.
        """
        _check_mask_token(self.tokenizer, masked_tokens)
        return super().for_model(masked_tokens)

    def for_training(self) -> Self:
        """Return a copy that omits `attention_mask` and `context_valid` if they are all True.

        Attention without a mask has faster kernels, and the check costs no synchronization with the device here. Packed
        rows need masks in any case. A compiled model is compiled once more for batches without padding.
        """
        training = copy.copy(self)
        training._omit_if_all_true = ("attention_mask", "context_valid")
        return training

    @property
    def target_requirement(self) -> str:
        """Condition of a row that has targets, and the remedy for data without such rows."""
        units = "words" if self.whole_word else "tokens"
        return (
            f"Only rows of at least two {units} have one, apart from special and unknown tokens. Provide longer texts, "
            f"{'leave out whole_word, ' if self.whole_word else ''}increase max_seq_length, or use a tokenizer that "
            "contains the characters of the texts."
        )

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """Pad and mask the rows of a batch."""
        columns = self._read_columns(features)
        rows = columns["input_ids"]
        input_ids, attention = self._pad(rows, self._length(rows))
        shape = (len(features), self.num_masks)
        if "document_ids" in columns:
            document_ids = columns.pop("document_ids")
            _check_document_ids(document_ids)
            documents = {name: _split_documents(column, document_ids) for name, column in columns.items()}
            document_tokens, is_token = self._pad(documents["input_ids"])
            document_masks = self._sample_masks(document_tokens, is_token, documents)
            # Rows and documents list the same tokens in the same order.
            masks = np.zeros((*shape, attention.shape[1]), dtype=bool)
            masks.swapaxes(0, 1)[:, attention] = document_masks.swapaxes(0, 1)[:, is_token]
            packed = self._packing_fields(document_ids, attention.shape[1])
        else:
            masks = self._sample_masks(input_ids, attention, columns)
            packed = {}

        target_capacities, visible_capacities = self._static_sizes(bool(packed))
        batch = {
            "input_ids": input_ids,
            "attention_mask": attention.astype(np.int64),
            **padded_positions("target", masks, target_capacities),
            **packed,
            **self._context(
                "input_ids",
                masks,
                attention,
                lambda: np.where(masks, self.tokenizer.mask_token_id, input_ids[:, None, :]),
                visible_capacities,
            ),
        }
        omitted = () if packed else self._omit_if_all_true
        return to_tensors({name: array for name, array in batch.items() if not (name in omitted and array.all())})

    def _read_columns(self, features: Sequence[dict[str, Any]]) -> dict[str, list[np.ndarray]]:
        """Return the columns of a batch, one int64 `[length]` per row, without padding that rows bring."""
        columns = {"input_ids": _integer_rows(features, "input_ids")}
        names = ["attention_mask", "special_tokens_mask", "document_ids", *(["word_ids"] if self.whole_word else [])]
        names = [name for name in names if any(name in feature for feature in features)]
        if self.whole_word and "word_ids" not in names:
            raise UsageError("whole_word needs a column word_ids. Tokenize with tokenize_dataset(..., word_ids=True).")
        columns |= {name: _integer_rows(features, name) for name in names}
        for number, ids in enumerate(columns["input_ids"]):
            for name in names:
                if len(columns[name][number]) != len(ids):
                    raise UsageError(
                        f"Row {number} of the batch has {len(columns[name][number])} {name} for {len(ids)} input_ids. "
                        "Provide one for each token."
                    )
            if "attention_mask" in names:
                own = without_padding(columns["attention_mask"][number], number, "tokens")
            else:
                own = without_padding(ids != self._padding_id, number, None)
            if len(ids) and not 0 <= ids.min() <= ids.max() < self._num_token_ids:
                raise UsageError(
                    f"Row {number} of the batch has token ids from {ids.min()} to {ids.max()}, but the tokenizer has "
                    f"{self._num_token_ids} tokens. Tokenize with the model's tokenizer."
                )
            for column in columns.values():
                column[number] = column[number][own]
        columns.pop("attention_mask", None)
        return columns

    def _sample_masks(
        self, input_ids: np.ndarray, is_token: np.ndarray, columns: dict[str, list[np.ndarray]]
    ) -> np.ndarray:
        """Sample the masks of N documents, bool `[N, M, L]`; `is_token` is False on padding."""
        length = is_token.shape[1]
        word_ids = self._pad(columns["word_ids"], length, fill=-1)[0] if self.whole_word else None
        maskable = is_token & ~np.isin(input_ids, self._special_ids)
        if "special_tokens_mask" in columns:
            maskable &= self._pad(columns["special_tokens_mask"], length, fill=1)[0] == 0
        if word_ids is None:
            num_units = np.count_nonzero(maskable, axis=1)
        else:
            num_units = unit_ids(maskable, word_ids).max(axis=1, initial=-1) + 1
        short = np.flatnonzero(num_units < 2)
        if short.size and self.on_too_short == "error":
            row = int(short[0])
            text = self.tokenizer.decode(input_ids[row][is_token[row]])
            raise UsageError(
                f"Row {row} of the batch ({text[:60]!r}) has fewer than two {'words' if self.whole_word else 'tokens'} "
                'that may be masked. Remove such rows or set on_too_short to "skip".'
            )
        keys = derive_mask_keys(row_keys(input_ids, is_token, self.seed, self.epoch), self.num_masks)
        if self.num_masks > 1:
            maskable = np.repeat(maskable, self.num_masks, axis=0)
            word_ids = None if word_ids is None else np.repeat(word_ids, self.num_masks, axis=0)
        masks = sample_span_mask(maskable, keys, self.mask_ratio, self.mean_span_length, word_ids=word_ids)
        return masks.reshape(len(input_ids), self.num_masks, *input_ids.shape[1:])

    def _packing_fields(self, document_ids: list[np.ndarray], length: int) -> dict[str, np.ndarray]:
        """Return the additional entries of a packed batch: `document_ids` and `document_valid`."""
        counts = np.array([row[-1] + 1 for row in document_ids])
        capacities = () if self.max_length is None else (max(length // 8, 1), length)
        max_documents = int(counts.max())
        max_documents = next((capacity for capacity in capacities if capacity >= max_documents), max_documents)
        return {
            "document_ids": self._pad(document_ids, length, fill=-1)[0],
            "document_valid": np.arange(max_documents) < counts[:, None],
        }

    def _length(self, rows: list[np.ndarray]) -> int:
        """Return the length to which the rows of a batch are padded."""
        lengths = [len(row) for row in rows]
        length = max(lengths)
        if self.max_length is not None:
            if length > self.max_length:
                raise UsageError(
                    f"Row {lengths.index(length)} of the batch has {length} tokens, more than max_length "
                    f"{self.max_length}. Tokenize with max_seq_length {self.max_length}."
                )
            length = self.max_length
        if self.pad_to_multiple_of is not None:
            length = -(-length // self.pad_to_multiple_of) * self.pad_to_multiple_of
        return length

    def _pad(
        self, rows: list[np.ndarray], length: int | None = None, fill: int | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Pad to a length, by default the longest row: `[B, length]` ids and bool validity."""
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

    def _static_sizes(self, packed: bool) -> tuple[tuple[int, ...], tuple[int, ...]]:
        """Allowed numbers of targets and of visible positions; none without static shapes.

        The first is exact for full rows with two special tokens, the second suffices for nearly all
        rows, the last for all.
        """
        if self.max_length is None:
            return (), ()
        length = self.max_length
        # Special tokens are never masked, so more than 1 - ratio of a row's tokens are visible: a margin of an eighth.
        sizes = [(max(round(length * self.mask_ratio), 1), length - int(length * self.mask_ratio * 7 / 8))]
        if not packed:  # rows of several documents have more special tokens, and masks in any case
            usual = round((length - 2) * self.mask_ratio)
            sizes.insert(0, (max(usual, 1), length - usual))
        targets, visible = zip(*sizes, (length, length), strict=True)
        return targets, visible


def _check_mask_token(tokenizer: PreTrainedTokenizerBase, masked_tokens: str | None) -> None:
    if masked_tokens == "mask_token" and tokenizer.mask_token_id is None:
        raise UsageError(
            f"The tokenizer ({type(tokenizer).__name__}) has no mask token. Use the tokenizer of a masked language "
            "model, add one with --add_tokens, or drop masked positions with --masked_tokens drop."
        )


def _integer_rows(features: Sequence[dict[str, Any]], name: str) -> list[np.ndarray]:
    """Return a column of the batch as one int64 `[length]` per row."""
    rows = []
    for number, feature in enumerate(features):
        if name == "input_ids" and not (isinstance(feature, Mapping) and name in feature):
            raise UsageError(f"Row {number} of the batch has no input_ids. Tokenize the texts.")
        if name not in feature:
            raise UsageError(f"Only some rows of the batch have {name}. Provide it in all rows, or in none.")
        try:
            row = np.asarray(feature[name])
        except ValueError:  # ragged
            row = np.array(None)
        if row.ndim != 1 or (row.size and row.dtype.kind not in "iub"):
            raise UsageError(f"Row {number} of the batch has no list of integers in {name}. Tokenize the texts.")
        rows.append(row.astype(np.int64, copy=False))
    return rows


def _check_document_ids(document_ids: list[np.ndarray]) -> None:
    """Check that the documents of each packed row are numbered from 0 in order."""
    for number, documents in enumerate(document_ids):
        steps = np.diff(documents, prepend=-1)
        if not len(documents) or steps[0] != 1 or not np.isin(steps, (0, 1)).all():
            raise UsageError(
                f"Row {number} of the batch has document_ids that do not number the documents of its {len(documents)} "
                "tokens 0, 1, 2 and so on. Pack with pack_dataset."
            )


def _split_documents(rows: list[np.ndarray], document_ids: list[np.ndarray]) -> list[np.ndarray]:
    """Split packed rows into their documents."""
    return [
        document
        for row, documents in zip(rows, document_ids, strict=True)
        for document in np.split(row, np.flatnonzero(np.diff(documents)) + 1)
    ]
