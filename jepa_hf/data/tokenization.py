"""Rows of text to rows of token ids."""

import logging
import os
from functools import partial
from typing import Any

import pyarrow.compute as pc
from datasets import Dataset, Features, IterableDataset, Sequence, Value
from transformers import PreTrainedTokenizerBase

from ..errors import UsageError
from .packing import pack_dataset

logger = logging.getLogger(__name__)


# A forked process (a loader's worker, one of `num_proc`) has the locks of its parent's threads but not the threads:
# tokenizers that ran in parallel before and are told to do so again would wait for them forever.
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
    """Tokenize the text of `dataset`. Rows come out unpadded, inside the special tokens of `tokenizer`.

    By default each text gives one row, cut at `max_seq_length`; how much was cut is logged (map-style datasets only;
    as a warning when it is more than 20 %). Blank and null texts, and texts without a single token, give no row.

    Args:
        dataset: The texts, map-style or streaming.
        tokenizer: Fast or slow; `word_ids` needs a fast one.
        text_column_name: The column to read. The others are dropped.
        max_seq_length: Most tokens in a row, special tokens included.
        stride: Cut nothing: a long text gives several rows, each repeating the last `stride` tokens of the one before.
        concat: Cut nothing: join all texts of a map batch (1000 texts) with the sep (else eos) token between them and
            divide the result into rows of `max_seq_length`. The last row of a batch is shorter; it is left out if it
            would hold a single token.
        packed: Put several texts, whole and cut as by default, into each row, see `pack_dataset`.
        word_ids: Also give the number of the word each token belongs to.
        num_proc: Processes to tokenize with (map-style datasets only).
        load_from_cache_file: Take the result of an earlier equal call from the cache (map-style datasets only).

    Returns:
        A dataset of the same kind with the columns `input_ids` and, if asked for, `word_ids` and `sequence_ids`: int32
        lists of equal length per row. Word ids are -1 at special tokens and separators, and tell apart all words of a
        row, or of a text in a packed row.

    Raises:
        UsageError: The column is missing; `word_ids` with a slow tokenizer; `max_seq_length` leaves no room for text;
            `stride` is out of range; two of `stride`, `concat` and `packed` are given; `concat` with a tokenizer that
            has neither a sep nor an eos token; or no row of a map-style dataset holds text.
    """
    if dataset.column_names is not None and text_column_name not in dataset.column_names:
        raise UsageError(
            f"the dataset has no column '{text_column_name}' to tokenize; its columns are: "
            f"{', '.join(dataset.column_names)}"
        )
    if word_ids and not tokenizer.is_fast:
        raise UsageError(
            f"word ids need a fast tokenizer, which {type(tokenizer).__name__} is not; load the fast version of it"
        )
    prefix, suffix = _special_tokens(tokenizer)
    room = max_seq_length - len(prefix) - len(suffix)
    if room < 1:
        raise UsageError(
            f"max_seq_length {max_seq_length} leaves no room for text beside the tokenizer's "
            f"{len(prefix) + len(suffix)} special tokens; make it larger"
        )
    if stride is not None and concat:
        raise UsageError("stride does not go with concat, which cuts nothing; give only one of them")
    if packed and (concat or stride is not None):
        other = "concat" if concat else "stride"
        raise UsageError(f"packed keeps each text in one row and does not go with {other}; give only one of them")
    if stride is not None and not 0 <= stride < room:
        raise UsageError(
            f"stride {stride} is out of range; it must be from 0 to {room - 1}, less than the text tokens in a row of "
            f"max_seq_length {max_seq_length}"
        )
    separator = tokenizer.eos_token_id if tokenizer.sep_token_id is None else tokenizer.sep_token_id
    if concat and separator is None:
        raise UsageError(
            "concat needs a token to put between texts, and the tokenizer has neither a sep nor an eos token; set its "
            "sep_token"
        )

    streaming = isinstance(dataset, IterableDataset)
    counted = not (streaming or concat or stride is not None)
    features = Features({"input_ids": Sequence(Value("int32"))})
    if word_ids:
        features["word_ids"] = Sequence(Value("int32"))
    if counted:
        features["length"] = Value("int32")
    tokenize = partial(
        _tokenize_batch,
        tokenizer=tokenizer,
        text_column_name=text_column_name,
        prefix=prefix,
        suffix=suffix,
        room=room,
        overlap=0 if concat else stride,
        separator=separator if concat else None,
        columns=list(features),
    )
    mapping: dict[str, Any] = {"batched": True, "remove_columns": [text_column_name], "features": features}
    if not streaming:
        mapping |= {"num_proc": num_proc, "load_from_cache_file": load_from_cache_file, "desc": "Tokenizing"}
    texts = dataset.select_columns([text_column_name])
    # `map` gives an empty dataset back as it is, without the new columns.
    tokenized = texts.map(tokenize, **mapping) if streaming or len(texts) else texts
    if not streaming and len(tokenized) == 0:
        raise UsageError("the dataset holds no text to tokenize; give it rows that are not blank")
    if counted:
        _log_cuts(tokenized, max_seq_length, room)
        tokenized = tokenized.remove_columns("length")
    if packed:
        return pack_dataset(tokenized, max_seq_length, load_from_cache_file=load_from_cache_file)
    return tokenized


def _special_tokens(tokenizer: PreTrainedTokenizerBase) -> tuple[list[int], list[int]]:
    """The ids that `tokenizer` puts before and after a text."""
    wrapped = tokenizer("a")["input_ids"]
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    starts = range(len(wrapped) - len(bare) + 1)
    start = next(start for start in starts if wrapped[start : start + len(bare)] == bare)
    return wrapped[:start], wrapped[start + len(bare) :]


def _tokenize_batch(
    batch: dict[str, list[Any]],
    *,
    tokenizer: PreTrainedTokenizerBase,
    text_column_name: str,
    prefix: list[int],
    suffix: list[int],
    room: int,
    overlap: int | None,
    separator: int | None,
    columns: list[str],
) -> dict[str, list[Any]]:
    """One map batch of texts to token rows with the given `columns`.

    Args:
        room: Most tokens in a row, `prefix` and `suffix` not counted.
        overlap: Tokens that a row repeats of the row before; None keeps only the first row of each text.
        separator: The token id to join all texts with; None keeps texts apart.
        columns: Some of `input_ids`, `word_ids` and `length`, the number of tokens the text had before it was cut.
    """
    rows: dict[str, list[Any]] = {column: [] for column in columns}
    texts = [text for text in batch[text_column_name] if text and not text.isspace()]
    if not texts:
        return rows
    # Cutting is left to us, so the tokenizer has no reason to warn of long texts.
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
        starts = [0] if overlap is None else range(0, max(len(ids) - overlap, 1), room - overlap)
        for start in starts:
            window = slice(start, start + room)
            if separator is not None and len(ids[window]) < 2:
                continue
            rows["input_ids"].append(prefix + ids[window] + suffix)
            if "word_ids" in columns:
                rows["word_ids"].append([-1] * len(prefix) + words[window] + [-1] * len(suffix))
            if "length" in columns:
                rows["length"].append(len(ids))
    return rows


def _join(pairs: list[tuple[list[int], list[int]]], separator: int) -> tuple[list[int], list[int]]:
    """Join (token ids, word ids) pairs into one, counting the words on from pair to pair."""
    ids: list[int] = []
    words: list[int] = []
    first_word = 0
    for more_ids, more_words in pairs:
        if ids:
            ids.append(separator)
            words.append(-1)
        ids += more_ids
        words += [word if word == -1 else first_word + word for word in more_words]
        first_word += 1 + max(more_words, default=-1)
    return ids, words


def _log_cuts(tokenized: Dataset, max_seq_length: int, room: int) -> None:
    """Log how many tokens were cut, told from the column `length`, which the cache keeps too."""
    lengths = tokenized.data.column("length")
    cut_lengths = lengths.filter(pc.greater(lengths, room))
    if len(cut_lengths):
        cut = pc.sum(cut_lengths).as_py() - room * len(cut_lengths)
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
