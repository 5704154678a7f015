"""Tokenization of rows of text into rows of token ids."""

import logging
import os
from collections.abc import Callable
from functools import partial
from itertools import count
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, Sequence, Value
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerBase

from ..errors import UsageError
from ..utils.counts import describe_counts
from .arguments import check_row_modes
from .dropped_rows import DroppedRows, reason_to_drop
from .packing import pack_dataset
from .text_columns import check_text_type, feature_type, not_text_error

logger = logging.getLogger(__name__)

# Stands for a text among special tokens; no token has this id.
_TEXT = -1

# A forked process (a data-loader worker, one of `num_proc`) inherits the locks of its parent's threads but not the
# threads. A tokenizer that ran in parallel in the parent would deadlock if it did so again.
if hasattr(os, "register_at_fork"):  # Windows forks no processes
    os.register_at_fork(after_in_child=lambda: os.environ.update(TOKENIZERS_PARALLELISM="false"))


def tokenize_dataset(
    dataset: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    *,
    text_column_name: str = "text",
    max_seq_length: int,
    stride: int | None = None,
    concat: bool = False,
    packed: bool = False,
    word_ids: bool = False,
    num_proc: int | None = None,
    load_from_cache_file: bool = True,
) -> Dataset | IterableDataset:
    """Tokenize the text of `dataset` into unpadded rows, within the special tokens of `tokenizer`.

    By default each text gives one row, truncated at `max_seq_length` on the tokenizer's side: the ids of
    `tokenizer(text, truncation=True)`. Blank and null texts, and texts without any token, give no row. They are counted
    in the log by reason, with the rows of fewer than two tokens (with `word_ids`: words) to mask, which give no target.
    So is for map-style datasets the share of truncated tokens, as a warning above 20 %.

    Args:
        dataset: The texts, map-style or streaming.
        tokenizer: Fast or slow; `word_ids` requires a fast one.
        text_column_name: The column to read. All others are dropped.
        max_seq_length: Maximum tokens per row, special tokens included.
        stride: Split a long text into several rows instead of truncating it; each repeats the last
            `stride` tokens of the previous one.
        concat: Concatenate all texts of a map batch (1000 texts), separated by the sep (else eos)
            token, and split the result into rows of `max_seq_length`. The last row of a batch is
            shorter, and is dropped if it would hold a single token.
        packed: Pack several texts, truncated as by default, into each row, see `pack_dataset`.
        word_ids: Also return the number of each token's word.
        num_proc: Processes for tokenization (map-style datasets only).
        load_from_cache_file: Reuse the cached result of an earlier equal call (map-style datasets only).

    Returns:
        A dataset of the same kind with the column `input_ids` and, if requested, `word_ids` and
        `document_ids`: int32 lists of equal length per row. Word ids are -1 at special tokens and
        separators, and otherwise unique to a word of the row, or of a document in a packed row.

    Raises:
        UsageError: The column is missing or does not hold strings; `word_ids` with a slow tokenizer; `max_seq_length`
            leaves no room for text; `stride` is out of range; two of `stride`, `concat` and `packed` are set; `concat`
            with a tokenizer that has neither a sep nor an eos token; or no row of a map-style dataset holds text.
    """
    check_row_modes(stride, concat, packed)
    _check_source(dataset, tokenizer, text_column_name, word_ids)
    prefix, suffix = special_tokens(tokenizer)
    room = _text_room(max_seq_length, len(prefix) + len(suffix), stride)
    separator = _separator(tokenizer) if concat else None

    features = Features({"input_ids": Sequence(Value("int32"))})
    if word_ids:
        features["word_ids"] = Sequence(Value("int32"))
    is_counted = not concat and stride is None
    counts = Features(length=Value("int32"), maskable=Value("bool")) if is_counted else Features()
    tokenize = partial(
        _tokenize_batch,
        tokenizer=tokenizer,
        text_column_name=text_column_name,
        prefix=prefix,
        suffix=suffix,
        max_text_tokens=room,
        overlap=0 if concat else stride,
        separator=separator,
        columns=[*features, *counts],
        special=frozenset(special_ids(tokenizer)),
    )
    dropped = DroppedRows("the texts", running=isinstance(dataset, IterableDataset))
    too_short = f"with fewer than two {'words' if word_ids else 'tokens'} to mask" if is_counted else None
    texts = dataset.select_columns([text_column_name])
    mapping: dict[str, Any] = {"batched": True, "remove_columns": [text_column_name]}
    if isinstance(texts, IterableDataset):
        stream = partial(
            _tokenize_stream,
            dropped=dropped,
            tokenize=tokenize,
            text_column_name=text_column_name,
            too_short=too_short,
        )
        tokenized = texts.map(stream, with_indices=True, features=features, **mapping)
        return pack_dataset(tokenized, max_seq_length) if packed else tokenized

    dropped.add_texts(texts, text_column_name)
    mapping |= {"num_proc": num_proc, "load_from_cache_file": load_from_cache_file, "desc": "Tokenizing"}
    # `map` returns an empty dataset unchanged, without the new columns.
    tokenized = texts and texts.map(tokenize, features=Features({**features, **counts}), **mapping)
    tokenized = _log_counts(tokenized, dropped, too_short, max_seq_length, room)
    if packed:
        return pack_dataset(tokenized, max_seq_length, load_from_cache_file=load_from_cache_file)
    return tokenized


def _log_counts(
    tokenized: Dataset, dropped: DroppedRows, too_short: str | None, max_seq_length: int, room: int
) -> Dataset:
    """Log texts that give no row or, with `too_short`, no target, and what was cut; remove the columns of counts.

    Raises:
        UsageError: There are no rows.
    """
    if too_short is not None or len(tokenized) == 0:
        dropped.drop("without tokens", dropped.kept - len(tokenized))
    if len(tokenized) == 0:
        raise UsageError(
            f"The dataset holds no text to tokenize ({describe_counts(dropped.reasons) or 'no rows'}). Provide rows "
            "that are not blank, or a tokenizer that contains their characters."
        )
    if too_short is not None:
        _log_truncation(tokenized.data.column("length"), max_seq_length, room)
        dropped.drop(too_short, len(tokenized) - pc.sum(tokenized.data.column("maskable")).as_py())
        tokenized = tokenized.remove_columns(["length", "maskable"])
    dropped.log()
    return tokenized


def _check_source(
    dataset: Dataset | IterableDataset, tokenizer: PreTrainedTokenizerBase, text_column_name: str, word_ids: bool
) -> None:
    if dataset.column_names is not None and text_column_name not in dataset.column_names:
        raise UsageError(
            f"The dataset has no column '{text_column_name}' to tokenize. Its columns are: "
            f"{', '.join(dataset.column_names)}."
        )
    if isinstance(dataset, Dataset):
        types = {name: feature_type(kind) for name, kind in dataset.features.items()}
        check_text_type(types, text_column_name, "the dataset", dataset)
    if word_ids and not tokenizer.is_fast:
        raise UsageError(
            f"Word ids need a fast tokenizer, which {type(tokenizer).__name__} is not. Load its fast version."
        )


def _text_room(max_seq_length: int, num_special: int, stride: int | None) -> int:
    """Return the maximum number of text tokens per row, at least 1 and above `stride`."""
    room = max_seq_length - num_special
    if room < 1:
        raise UsageError(
            f"max_seq_length {max_seq_length} leaves no room for text after the tokenizer's {num_special} special "
            "tokens. Increase it."
        )
    if stride is not None and not 0 <= stride < room:
        raise UsageError(
            f"stride {stride} is out of range. It must be from 0 to {room - 1}, less than the text tokens in a row of "
            f"max_seq_length {max_seq_length}."
        )
    return room


def _separator(tokenizer: PreTrainedTokenizerBase) -> int:
    separator = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
    if separator is None:
        raise UsageError(
            "concat needs a token between texts, but the tokenizer has neither a sep nor an eos token. Set its "
            "sep_token."
        )
    return separator


def special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """Return the ids that `tokenizer` adds before and after a text, whatever its vocabulary."""
    if not tokenizer.is_fast:
        ids = tokenizer.build_inputs_with_special_tokens([_TEXT])
        return ids[: ids.index(_TEXT)], ids[ids.index(_TEXT) + 1 :]
    processor = tokenizer.backend_tokenizer.post_processor
    if processor is None:
        return [], []
    text = Tokenizer(models.WordLevel({"x": 0}, unk_token="x")).encode("x", add_special_tokens=False)
    encoding = processor.process(text)
    start = encoding.special_tokens_mask.index(0)
    return encoding.ids[:start], encoding.ids[start + 1 :]


def special_ids(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the ids of all special tokens, in ascending order."""
    prefix, suffix = special_tokens(tokenizer)
    return sorted({*tokenizer.all_special_ids, *prefix, *suffix})


def num_token_ids(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the number of embeddings that `tokenizer` needs: its largest token id plus one."""
    return max(tokenizer.get_vocab().values(), default=-1) + 1


def _tokenize_stream(
    batch: dict[str, list[Any]],
    indices: list[int],
    *,
    dropped: DroppedRows,
    tokenize: Callable[[dict[str, list[Any]]], dict[str, list[Any]]],
    text_column_name: str,
    too_short: str | None,
) -> dict[str, list[Any]]:
    """Tokenize a batch of a stream, and count the texts that give no row or, with `too_short`, no target."""
    if indices[0] == 0:
        dropped.restart()
    texts = batch[text_column_name]
    for index, text in zip(indices, texts, strict=True):
        if text is not None and not isinstance(text, str):
            raise not_text_error(f"Row {index + 1} of the dataset", text_column_name, text)
        dropped.add(reason_to_drop(text))
    rows = tokenize(batch)
    if too_short is not None:
        maskable = rows.pop("maskable")
        dropped.drop("without tokens", sum(reason_to_drop(text) is None for text in texts) - len(maskable))
        dropped.drop(too_short, maskable.count(False))
        del rows["length"]
    return rows


def _tokenize_batch(
    batch: dict[str, list[Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    text_column_name: str,
    prefix: list[int],
    suffix: list[int],
    max_text_tokens: int,
    overlap: int | None,
    separator: int | None,
    columns: list[str],
    special: frozenset[int],
) -> dict[str, list[Any]]:
    """Tokenize a map batch of texts into rows with the given `columns`.

    They are some of `input_ids`, `word_ids`, `length`, the number of tokens of the text before truncation, and
    `maskable`, whether a row has two tokens (words) that may be masked. A row is `prefix`, at most `max_text_tokens`
    and `suffix`. It repeats `overlap` tokens of the previous one; with None only the first row of a text is kept.
    Texts are joined with the token id `separator`, if there is one.
    """
    rows: dict[str, list[Any]] = {column: [] for column in columns}
    texts = [text for text in batch[text_column_name] if text and not text.isspace()]
    if not texts:
        return rows
    # Truncation follows below, so suppress the tokenizer's warning of long texts.
    encoded = tokenizer(
        texts, add_special_tokens=False, return_attention_mask=False, return_token_type_ids=False, verbose=False
    )
    pairs = [
        (ids, [-1 if word is None else word for word in encoded.word_ids(i)] if "word_ids" in columns else [])
        for i, ids in enumerate(encoded["input_ids"])
        if ids
    ]
    if separator is not None:
        pairs = [_join(pairs, separator)]
    for ids, words in pairs:
        kept = max(len(ids) - max_text_tokens, 0) if tokenizer.truncation_side == "left" else 0
        starts = [kept] if overlap is None else range(0, max(len(ids) - overlap, 1), max_text_tokens - overlap)
        for start in starts:
            window = slice(start, start + max_text_tokens)
            if separator is not None and len(ids[window]) < 2:
                continue
            rows["input_ids"].append(prefix + ids[window] + suffix)
            if "word_ids" in columns:
                rows["word_ids"].append([-1] * len(prefix) + words[window] + [-1] * len(suffix))
            if "length" in columns:
                rows["length"].append(len(ids))
            if "maskable" in columns:
                rows["maskable"].append(_is_maskable(ids[window], words[window], special))
    return rows


def _is_maskable(ids: list[int], words: list[int], special: frozenset[int]) -> bool:
    """Return whether two tokens, with `words` of two words, may be masked."""
    units = (unit for unit, token in zip(words or count(), ids, strict=False) if token not in special)
    first = next(units, None)
    return any(unit != first for unit in units)


def _join(pairs: list[tuple[list[int], list[int]]], separator: int) -> tuple[list[int], list[int]]:
    """Join (token ids, word ids) pairs into one, with words numbered consecutively."""
    ids: list[int] = []
    words: list[int] = []
    first_word = 0
    for text_ids, text_words in pairs:
        if ids:
            ids.append(separator)
            words.append(-1)
        ids += text_ids
        words += [word if word == -1 else first_word + word for word in text_words]
        first_word += 1 + max(text_words, default=-1)
    return ids, words


def _log_truncation(lengths: pa.ChunkedArray, max_seq_length: int, max_text_tokens: int) -> None:
    """Log how many tokens of texts of these lengths are cut, a warning if they are more than a fifth."""
    cut_lengths = lengths.filter(pc.greater(lengths, max_text_tokens))
    if len(cut_lengths):
        cut = pc.sum(cut_lengths).as_py() - max_text_tokens * len(cut_lengths)
        percentage = 100 * cut / pc.sum(lengths).as_py()
        logger.log(
            logging.WARNING if percentage > 20 else logging.INFO,
            "%d of %d rows were longer than %d tokens; %d tokens (%.1f %%) were cut",
            len(cut_lengths),
            len(lengths),
            max_seq_length,
            cut,
            percentage,
        )
