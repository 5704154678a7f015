"""Claims about packed rows: each document is masked, read and predicted as in a row of its own."""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny_tokenizer
from transformers import PreTrainedTokenizerBase

from jepa_hf import DataCollatorForSpanJEPA, UsageError

Batch = dict[str, torch.Tensor]
Row = dict[str, list[int]]

few = settings(max_examples=25, deadline=None)
LENGTHS = st.lists(st.integers(4, 14), min_size=1, max_size=8)
MAX_LENGTH = 32


def documents(lengths: Sequence[int], family: str = "bert", seed: int = 0) -> list[Row]:
    """Texts of so many tokens, two special ones included, in words of about two tokens."""
    tokenizer = tiny_tokenizer(family)
    wrapped = tokenizer("a")["input_ids"]
    ordinary = np.setdiff1d(np.arange(len(tokenizer)), tokenizer.all_special_ids)
    random = np.random.default_rng([seed, *lengths])
    rows = []
    for length in lengths:
        words = np.cumsum(random.random(length - 2) < 0.5)
        ids = [wrapped[0], *random.choice(ordinary, length - 2).tolist(), wrapped[-1]]
        rows.append({"input_ids": ids, "word_ids": [-1, *words.tolist(), -1]})
    return rows


def pack(texts: Sequence[Row], max_length: int = MAX_LENGTH) -> tuple[list[Row], list[tuple[int, int]]]:
    """Rows of as many documents as fit, in order, and each document's row and number there."""
    rows: list[Row] = []
    places = []
    for text in texts:
        if not rows or len(rows[-1]["input_ids"]) + len(text["input_ids"]) > max_length:
            rows.append({"input_ids": [], "word_ids": [], "sequence_ids": []})
        number = (rows[-1]["sequence_ids"] or [-1])[-1] + 1
        for name in ("input_ids", "word_ids"):
            rows[-1][name] = rows[-1][name] + text[name]
        rows[-1]["sequence_ids"] += [number] * len(text["input_ids"])
        places.append((len(rows) - 1, number))
    return rows, places


def on_side(side: str) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(tiny_tokenizer("bert"))
    tokenizer.padding_side = side
    return tokenizer


def listed(positions: torch.Tensor, valid: torch.Tensor, length: int) -> torch.Tensor:
    """`[B, M, K]` positions to `[B, M, length]` bool."""
    counts = torch.zeros(*positions.shape[:2], length, dtype=torch.long)
    return counts.scatter_add_(2, positions, valid.long()).bool()


def views(batch: Batch) -> dict[str, torch.Tensor]:
    """By name `[B, M, L]`: what is hidden, what is visible, and the view with mask tokens, as far as they are there."""
    length = batch["input_ids"].shape[1]
    found = {"hidden": listed(batch["target_positions"], batch["target_valid"], length)}
    if "context_positions" in batch:
        found["visible"] = listed(batch["context_positions"], batch["context_valid"], length)
    else:
        found["view"] = batch["context_input_ids"].reshape(found["hidden"].shape)
    return found


# ---- the collator


COLLATORS = st.fixed_dictionaries(
    {
        "context_mode": st.sampled_from(("kept", "dropped")),
        "mask_ratio": st.floats(0.05, 0.95),
        "mean_span_length": st.floats(1, 8),
        "num_masks": st.integers(1, 3),
        "whole_word": st.booleans(),
        "pad_to_multiple_of": st.sampled_from((None, 8)),
        "max_length": st.sampled_from((None, 40)),
        "seed": st.integers(0, 2**40),
    }
)


@few
@given(COLLATORS, LENGTHS, st.sampled_from(("left", "right")))
def test_a_document_is_masked_as_in_a_row_of_its_own(settings: dict[str, Any], lengths: list[int], side: str) -> None:
    """Token by token, with any masks; and `sequence_ids` says where it stands."""
    collator = DataCollatorForSpanJEPA(on_side(side), on_short="skip", **settings)
    texts = documents(lengths)
    rows, places = pack(texts)
    packed, alone = collator(rows), collator(texts)
    assert packed["sequence_ids"].shape == packed["input_ids"].shape
    assert torch.equal(packed["sequence_ids"] >= 0, packed["attention_mask"].bool())
    in_rows, by_itself = views(packed), views(alone)
    for text, (row, number) in enumerate(places):
        its = packed["sequence_ids"][row] == number
        real = alone["attention_mask"][text].bool()
        assert packed["input_ids"][row, its].tolist() == texts[text]["input_ids"]
        for name in in_rows:
            assert torch.equal(in_rows[name][row][:, its], by_itself[name][text][:, real]), name
    padding = packed["attention_mask"] == 0
    assert not in_rows["hidden"].transpose(1, 2)[padding].any()


@few
@given(LENGTHS, st.sampled_from((None, 40)))
def test_sequence_valid_counts_the_documents_of_each_row(lengths: list[int], max_length: int | None) -> None:
    """As many as there are; with static shapes filled up to one of two widths."""
    rows, places = pack(documents(lengths))
    batch = DataCollatorForSpanJEPA(on_side("right"), max_length=max_length)(rows)
    counts = [sum(row == place for place, _ in places) for row in range(len(rows))]
    assert batch["sequence_valid"].sum(dim=1).tolist() == counts
    assert batch["sequence_valid"].shape[1] == (max(counts) if max_length is None else 5)
    numbers = torch.arange(batch["sequence_valid"].shape[1])
    assert torch.equal(batch["sequence_valid"], numbers < torch.tensor(counts)[:, None])


@pytest.mark.parametrize("numbers", [[1, 1, 1, 2, 2], [0, 0, 2, 2, 2], [0, 0, 1, 1, 0], [0, 0, 1, 1], [0, 0, 1, 1, -1]])
def test_documents_that_are_not_numbered_in_order_are_refused(numbers: list[int]) -> None:
    """In a sentence that names the row."""
    row = documents([5])[0]
    with pytest.raises(UsageError, match="row 1 of the batch has sequence_ids that do not number its 5 tokens"):
        DataCollatorForSpanJEPA(on_side("right"))([{**row, "sequence_ids": [0] * 5}, {**row, "sequence_ids": numbers}])


def test_packed_and_plain_rows_do_not_mix() -> None:
    row = documents([5])[0]
    with pytest.raises(UsageError, match="some rows of the batch have sequence_ids and some have none"):
        DataCollatorForSpanJEPA(on_side("right"))([row, {**row, "sequence_ids": [0] * 5}])


def test_a_document_that_is_too_short_is_refused_or_has_no_target() -> None:
    """Like a row of its own, whatever else is in the row."""
    rows, _ = pack(documents([3, 9]))
    with pytest.raises(UsageError, match="has fewer than two tokens that may be masked"):
        DataCollatorForSpanJEPA(on_side("right"))(rows)
    batch = DataCollatorForSpanJEPA(on_side("right"), on_short="skip")(rows)
    hidden = views(batch)["hidden"][0, 0]
    assert not hidden[batch["sequence_ids"][0] == 0].any()
    assert hidden[batch["sequence_ids"][0] == 1].any()
