"""Claims about the span collator."""

import copy
from collections.abc import Iterable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import processors
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerBase

from helpers.tiny_models import CORPUS, FAMILIES, tiny_tokenizer
from jepa_hf.errors import UsageError
from jepa_hf.masking.span_collator import DataCollatorForSpanJEPA

few = settings(max_examples=40, deadline=None)
BERT = tiny_tokenizer("bert")
CLS, SEP, UNK, MASK, PAD = BERT.convert_tokens_to_ids(["[CLS]", "[SEP]", "[UNK]", "[MASK]", "[PAD]"])
WORDS = range(50, 250)  # ordinary tokens

Batch = dict[str, torch.Tensor]


def rows_of(texts: Iterable[str], family: str = "bert", word_ids: bool = False) -> list[dict[str, list[int]]]:
    rows = []
    for text in texts:
        encoded = tiny_tokenizer(family)(text)
        row = {"input_ids": encoded["input_ids"]}
        if word_ids:
            row["word_ids"] = [-1 if word is None else word for word in encoded.word_ids()]
        rows.append(row)
    return rows


def row_of(length: int, seed: int = 0) -> dict[str, list[int]]:
    """A row of exactly `length` tokens, special ones included."""
    tokens = np.random.default_rng(seed).choice(WORDS, size=length - 2).tolist()
    return {"input_ids": [CLS, *tokens, SEP]}


def modified(family: str = "bert", **attributes: Any) -> PreTrainedTokenizerBase:
    tokenizer = copy.deepcopy(tiny_tokenizer(family))
    for name, value in attributes.items():
        setattr(tokenizer, name, value)
    return tokenizer


def flags(positions: torch.Tensor, valid: torch.Tensor, length: int) -> torch.Tensor:
    """`[B, M, K]` positions to `[B, M, length]` bool; fails if a position is listed twice."""
    counts = torch.zeros(*positions.shape[:2], length, dtype=torch.long)
    counts.scatter_add_(2, positions, valid.long())
    assert counts.max() <= 1
    return counts.bool()


def hidden(batch: Batch) -> torch.Tensor:
    return flags(batch["target_positions"], batch["target_valid"], batch["input_ids"].shape[1])


def masks_by_row(batches: Iterable[Batch]) -> dict[tuple[int, ...], list[list[int]]]:
    """For each row's clean tokens, the hidden places of each mask, counted from the row's first real token."""
    actual = {}
    for batch in batches:
        real = batch["attention_mask"].bool()
        for ids, attention, masks in zip(batch["input_ids"], real, hidden(batch), strict=True):
            actual[tuple(ids[attention].tolist())] = [mask[attention].nonzero().flatten().tolist() for mask in masks]
    return actual


@pytest.mark.parametrize("masked_tokens", ["mask_token", "drop"])
@pytest.mark.parametrize("num_masks", [1, 4])
def test_batch_keeps_the_contract(masked_tokens: str, num_masks: int) -> None:
    """Keys, shapes and dtypes are those of the design's table, for both modes, one mask and several."""
    rows = rows_of(CORPUS[:6])
    lengths = [len(row["input_ids"]) for row in rows]
    batch = DataCollatorForSpanJEPA(BERT, masked_tokens=masked_tokens, num_masks=num_masks)(rows)
    targets = max(round((length - 2) * 0.3) for length in lengths)
    visible = max(length - round((length - 2) * 0.3) for length in lengths)
    expected = {
        "input_ids": ((6, max(lengths)), torch.long),
        "attention_mask": ((6, max(lengths)), torch.long),
        "target_positions": ((6, num_masks, targets), torch.long),
        "target_valid": ((6, num_masks, targets), torch.bool),
    }
    if masked_tokens == "mask_token":
        shape = (6, max(lengths)) if num_masks == 1 else (6, num_masks, max(lengths))
        expected["context_input_ids"] = (shape, torch.long)
    else:
        expected["context_positions"] = ((6, num_masks, visible), torch.long)
        expected["context_valid"] = ((6, num_masks, visible), torch.bool)
    assert {name: (tuple(value.shape), value.dtype) for name, value in batch.items()} == expected
    for row, ids, attention in zip(rows, batch["input_ids"], batch["attention_mask"], strict=True):
        assert ids[attention.bool()].tolist() == row["input_ids"]
        assert (ids[attention == 0] == PAD).all()


def test_training_batches_go_without_masks_in_which_all_is_true() -> None:
    """Only there, and otherwise they are the same; under static shapes too, where rows are full."""
    rows, length = rows_of(CORPUS), 8
    alike = [{"input_ids": [*row["input_ids"][:7], BERT.sep_token_id]} for row in rows[20:23]]
    spared = {"attention_mask", "context_valid"}
    for batch, static, gone in (
        (alike, None, spared),
        (rows[:6], None, set()),
        (alike, length, spared),
        (alike, length + 1, set()),
    ):
        collator = DataCollatorForSpanJEPA(BERT, masked_tokens="drop", max_length=static)
        collator.epoch = 3
        full, training = collator(batch), collator.for_training()(batch)
        assert full.keys() - training.keys() == gone
        assert all(full[name].all() for name in gone)
        assert all(torch.equal(value, full[name]) for name, value in training.items())
        collator.epoch = 4
        later = {name: value for name, value in collator(batch).items() if name not in gone}
        assert all(torch.equal(value, later[name]) for name, value in collator.for_training()(batch).items())


COLLATORS = st.fixed_dictionaries(
    {
        "mask_ratio": st.floats(0.05, 0.95),
        "mean_span_length": st.floats(1, 12),
        "num_masks": st.integers(1, 4),
        "pad_to_multiple_of": st.sampled_from((None, 8)),
        "max_length": st.sampled_from((None, 48)),
        "seed": st.integers(0, 2**40),
    }
)
LENGTHS = st.lists(st.integers(4, 48), min_size=1, max_size=5)


@few
@given(COLLATORS, LENGTHS, st.sampled_from(("left", "right")))
def test_kept_view_differs_by_the_mask_token_at_the_targets_alone(
    settings: dict[str, Any], lengths: list[int], side: str
) -> None:
    """`context_input_ids` is `input_ids` with the mask token at exactly the valid target positions."""
    collator = DataCollatorForSpanJEPA(modified(padding_side=side), masked_tokens="mask_token", **settings)
    batch = collator([row_of(length, seed=length) for length in lengths])
    view = batch["context_input_ids"].reshape(len(lengths), settings["num_masks"], -1)
    clean = batch["input_ids"].unsqueeze(1)
    expected = torch.where(hidden(batch), MASK, clean)
    assert torch.equal(view, expected)
    assert torch.equal(view != clean, hidden(batch))


@few
@given(COLLATORS, LENGTHS, st.sampled_from(("left", "right")))
def test_visible_hidden_and_padding_make_up_the_row(settings: dict[str, Any], lengths: list[int], side: str) -> None:
    """Dropped: each position is visible, hidden or padding, and only one of these; padding is on the given side."""
    collator = DataCollatorForSpanJEPA(modified(padding_side=side), masked_tokens="drop", **settings)
    batch = collator([row_of(length, seed=length) for length in lengths])
    width = batch["input_ids"].shape[1]
    parts = hidden(batch).long() + flags(batch["context_positions"], batch["context_valid"], width).long()
    padding = (batch["attention_mask"] == 0).unsqueeze(1)
    assert (parts + padding == 1).all()
    for length, attention in zip(lengths, batch["attention_mask"].tolist(), strict=True):
        real, pad = [1] * length, [0] * (width - length)
        assert attention == (pad + real if side == "left" else real + pad)
    counts = hidden(batch).sum(dim=-1)
    for length, row in zip(lengths, counts.tolist(), strict=True):
        assert row == [min(max(round((length - 2) * settings["mask_ratio"]), 1), length - 3)] * settings["num_masks"]
    for name in ("target", "context"):
        # Positions are listed from left to right, then filled up.
        valid = batch[f"{name}_valid"]
        assert torch.equal(valid, valid.long().cummin(dim=-1).values.bool())
        rising = batch[f"{name}_positions"].diff(dim=-1) > 0
        assert rising[valid[..., 1:]].all()
        assert (batch[f"{name}_positions"][~valid] == 0).all()


def test_masks_of_one_sample_differ() -> None:
    """Four masks of each long row are four different masks, as different as those of strangers."""
    batch = DataCollatorForSpanJEPA(BERT, num_masks=4)([row_of(64, seed) for seed in range(50)])
    masks = hidden(batch)
    for i in range(4):
        for j in range(i):
            assert not (masks[:, i] == masks[:, j]).all(dim=-1).any()
            assert 0.2 < (masks[:, i] & masks[:, j]).sum() / masks[:, i].sum() < 0.4


def test_the_first_mask_does_not_depend_on_their_number() -> None:
    """More masks per sample are added to those that were there."""
    rows = rows_of(CORPUS[:8])
    one, four = (masks_by_row([DataCollatorForSpanJEPA(BERT, num_masks=number)(rows)]) for number in (1, 4))
    assert {row: masks[:1] for row, masks in four.items()} == one


@pytest.mark.parametrize("side", ["left", "right"])
def test_masks_depend_on_neither_batch_order_padding_nor_side(side: str) -> None:
    """Batches of 1, 7 and 50, shuffled, padded on either side and to a multiple: each row keeps its masks."""
    rows = rows_of(CORPUS[:50])
    expected = masks_by_row([DataCollatorForSpanJEPA(BERT, num_masks=2)(rows)])
    assert len(expected) == 50
    for size, multiple in ((1, None), (7, 16), (50, None)):
        collator = DataCollatorForSpanJEPA(modified(padding_side=side), num_masks=2, pad_to_multiple_of=multiple)
        assert masks_by_row(DataLoader(rows, size, shuffle=True, collate_fn=collator)) == expected


def test_workers_mask_as_the_main_process_and_see_each_new_epoch() -> None:
    """0 workers, 2, and 2 that live on: the same masks in each epoch, and other masks in the next one."""
    rows = rows_of(CORPUS[:40])
    epochs: dict[str, list[dict]] = {}
    for name, options in {
        "main": {},
        "workers": {"num_workers": 2},
        "persistent": {"num_workers": 2, "persistent_workers": True},
    }.items():
        collator = DataCollatorForSpanJEPA(BERT)
        loader = DataLoader(rows, batch_size=8, collate_fn=collator, **options)
        epochs[name] = []
        for epoch in range(2):
            collator.epoch = epoch
            epochs[name].append(masks_by_row(loader))
    assert epochs["main"] == epochs["workers"] == epochs["persistent"]
    first, second = epochs["main"]
    assert first.keys() == second.keys()
    long = [row for row in first if len(row) >= 20]
    assert len(long) >= 20
    assert sum(first[row] == second[row] for row in long) <= 1


def test_epoch_and_seed_change_the_masks_and_come_back() -> None:
    """The epoch can be read and set; the same epoch gives the same masks again, another seed others."""
    rows = [row_of(40, seed) for seed in range(20)]
    collator = DataCollatorForSpanJEPA(BERT)
    assert collator.epoch == 0
    first = masks_by_row([collator(rows)])
    collator.epoch = 3
    assert collator.epoch == 3
    third = masks_by_row([collator(rows)])
    collator.epoch = 0
    assert masks_by_row([collator(rows)]) == first
    other_seed = masks_by_row([DataCollatorForSpanJEPA(BERT, seed=43)(rows)])
    assert all(first[row] != third[row] != other_seed[row] != first[row] for row in first)


def test_evaluation_masks_stay_and_are_not_those_of_training() -> None:
    """The copy ignores the epoch of the original, which keeps its own, and differs from it in every epoch."""
    rows = [row_of(40, seed) for seed in range(20)]
    training = DataCollatorForSpanJEPA(BERT, mask_ratio=0.4, num_masks=2)
    evaluation = training.for_evaluation()
    fixed = masks_by_row([evaluation(rows)])
    for epoch in range(3):
        training.epoch = epoch
        assert masks_by_row([evaluation(rows)]) == fixed
        assert masks_by_row([training.for_evaluation()(rows)]) == fixed
        trained = masks_by_row([training(rows)])
        assert all(trained[row] != fixed[row] for row in fixed)
    assert evaluation.epoch == 0
    assert all(len(mask) == round(38 * 0.4) for masks in fixed.values() for mask in masks)


@pytest.mark.parametrize("tokens", [0, 1])
def test_a_short_row_is_an_error_that_names_it(tokens: int) -> None:
    """Fewer than two maskable tokens: the message holds the row's number, its text and the remedy."""
    short = {"input_ids": [CLS, *BERT.convert_tokens_to_ids(["a"] * tokens), SEP]}
    with pytest.raises(UsageError, match=r"Row 1 of the batch .*\[CLS\].*on_too_short.*skip"):
        DataCollatorForSpanJEPA(BERT)([row_of(9), short, short])


@pytest.mark.parametrize("masked_tokens", ["mask_token", "drop"])
def test_a_skipped_short_row_has_no_target_and_stays_visible(masked_tokens: str) -> None:
    """With "skip" it is in the batch, all visible, without a valid target; the other row is as it would be alone."""
    collator = DataCollatorForSpanJEPA(BERT, masked_tokens=masked_tokens, on_too_short="skip", num_masks=2)
    short = {"input_ids": [CLS, 60, SEP]}
    batch = collator([short, row_of(12)])
    assert not batch["target_valid"][0].any()
    assert batch["target_valid"][1].sum() == 2 * 3
    assert masks_by_row([batch])[tuple(row_of(12)["input_ids"])] == next(
        iter(masks_by_row([collator([row_of(12)])]).values())
    )
    if masked_tokens == "mask_token":
        assert (batch["context_input_ids"][0] == batch["input_ids"][0]).all()
    else:
        assert batch["context_positions"][0][batch["context_valid"][0]].tolist() == [0, 1, 2] * 2
    alone = collator([short])
    assert alone["target_positions"].shape == (1, 2, 1)
    assert not alone["target_valid"].any()


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("mask_ratio", 0.0),
        ("mask_ratio", 1.0),
        ("mask_ratio", -0.5),
        ("mask_ratio", float("nan")),
        ("mean_span_length", 0.5),
        ("mean_span_length", float("nan")),
        ("masked_tokens", "hidden"),
        ("on_too_short", "drop"),
        ("num_masks", 0),
    ],
)
def test_a_wrong_setting_is_refused_by_name(setting: str, value: Any) -> None:
    """A value outside a setting's range or choices: UsageError with the setting and the value."""
    with pytest.raises(UsageError, match=rf"{setting} .*{value}"):
        DataCollatorForSpanJEPA(BERT, **{setting: value})


def test_a_tokenizer_without_mask_token_serves_dropped_mode_only() -> None:
    """Kept mode refuses it and names the remedies; dropped mode masks as with the mask token."""
    tokenizer = modified(mask_token=None)
    with pytest.raises(UsageError, match=r"no mask token.*--add_tokens.*--masked_tokens drop"):
        DataCollatorForSpanJEPA(tokenizer, masked_tokens="mask_token")
    rows = rows_of(CORPUS[:5])
    with_mask = masks_by_row([DataCollatorForSpanJEPA(BERT)(rows)])
    assert masks_by_row([DataCollatorForSpanJEPA(tokenizer)(rows)]) == with_mask


def test_a_tokenizer_without_padding_token_is_refused() -> None:
    """UsageError that says what to set."""
    with pytest.raises(UsageError, match=r"no padding token\. Set tokenizer\.pad_token"):
        DataCollatorForSpanJEPA(modified(pad_token=None))


def test_whole_word_needs_word_ids() -> None:
    """Rows without them are refused with the call that makes them."""
    with pytest.raises(UsageError, match=r"word_ids.*tokenize_dataset\(.*word_ids=True\)"):
        DataCollatorForSpanJEPA(BERT, whole_word=True)(rows_of(CORPUS[:2]))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_whole_word_hides_whole_words(family: str, side: str) -> None:
    """Of each word all tokens are hidden or none, in every family; some words have several."""
    rows = rows_of((text for text in CORPUS if len(text.split()) > 7), family, word_ids=True)
    collator = DataCollatorForSpanJEPA(modified(family, padding_side=side), whole_word=True, num_masks=2)
    batch = collator(rows)
    several = 0
    for row, attention, masks in zip(rows, batch["attention_mask"].bool(), hidden(batch), strict=True):
        words = np.array(row["word_ids"])
        for mask in masks[:, attention].numpy():
            assert mask.any()
            assert not mask[words == -1].any()
            for word in set(words[mask].tolist()):
                assert mask[words == word].all()
                several += (words == word).sum() > 1
    assert several > 100


def test_without_whole_word_words_are_cut() -> None:
    """The claim above is not empty: spans of tokens do cut words of the same rows."""
    rows = rows_of(CORPUS[20:40], word_ids=True)
    batch = DataCollatorForSpanJEPA(BERT)([{"input_ids": row["input_ids"]} for row in rows])
    cut = 0
    for row, mask in zip(rows, hidden(batch)[:, 0].numpy(), strict=True):
        words = np.array(row["word_ids"])
        cut += sum(not mask[: len(words)][words == word].all() for word in set(words[mask[: len(words)]].tolist()))
    assert cut > 20


def test_a_single_word_is_short_under_whole_word() -> None:
    """A row of one word of several tokens has one unit: an error about words."""
    row = {"input_ids": [CLS, 60, 61, 62, SEP], "word_ids": [-1, 0, 0, 0, -1]}
    with pytest.raises(UsageError, match=r"Row 0 .*fewer than two words"):
        DataCollatorForSpanJEPA(BERT, whole_word=True)([row])
    assert DataCollatorForSpanJEPA(BERT)([row])["target_valid"].sum() == 1


@few
@given(LENGTHS, st.integers(1, 20))
def test_padding_to_a_multiple_is_the_least_that_holds(lengths: list[int], multiple: int) -> None:
    """The width is the first multiple that holds the longest row."""
    batch = DataCollatorForSpanJEPA(BERT, pad_to_multiple_of=multiple)([row_of(n) for n in lengths])
    width = batch["input_ids"].shape[1]
    assert width % multiple == 0
    assert max(lengths) <= width < max(lengths) + multiple


@pytest.mark.parametrize("masked_tokens", ["mask_token", "drop"])
@pytest.mark.parametrize("ratio", [0.15, 0.3, 0.6])
def test_max_length_gives_the_same_shapes_for_every_batch(masked_tokens: str, ratio: float) -> None:
    """Short rows, long rows, mixed rows: one set of shapes, below the full length, and the same masks as without."""
    static = DataCollatorForSpanJEPA(BERT, mask_ratio=ratio, masked_tokens=masked_tokens, max_length=64, num_masks=2)
    dynamic = DataCollatorForSpanJEPA(BERT, mask_ratio=ratio, masked_tokens=masked_tokens, num_masks=2)
    shapes = set()
    for lengths in ((64, 64, 64), (5, 6, 4), (64, 4, 30), (40, 41, 63)):
        rows = [row_of(length, seed) for seed, length in enumerate(lengths)]
        batch = static(rows)
        shapes.add(tuple((name, tuple(value.shape)) for name, value in batch.items()))
        assert masks_by_row([batch]) == masks_by_row([dynamic(rows)])
    assert len(shapes) == 1
    actual = dict(shapes.pop())
    assert actual["input_ids"] == (3, 64)
    hidden = round(62 * ratio)  # of a full row with two special tokens
    assert actual["target_positions"] == (3, 2, hidden)
    if masked_tokens == "drop":
        assert actual["context_positions"] == (3, 2, 64 - hidden)


def test_max_length_falls_back_to_the_full_length_for_rows_of_many_special_tokens() -> None:
    """A row of [UNK]s shows more than the capacities for usual rows and for those of several texts hold: then every
    position has a place, and none is lost."""
    collator = DataCollatorForSpanJEPA(BERT, max_length=64)
    strange = {"input_ids": [CLS, *[UNK] * 40, *range(100, 122), SEP]}
    assert collator([row_of(64)])["context_positions"].shape == (1, 1, 64 - 19)
    several = {"input_ids": [CLS, *range(100, 110), *[SEP, 100] * 4, *range(110, 154), SEP]}
    assert collator([several])["context_positions"].shape == (1, 1, 48)
    batch = collator([strange, row_of(64)])
    assert batch["context_positions"].shape == (2, 1, 64)
    visible = flags(batch["context_positions"], batch["context_valid"], 64)
    assert torch.equal(visible, ~hidden(batch))
    assert hidden(batch)[0, 0].sum() == round(22 * 0.3)
    assert not hidden(batch)[0, 0, :41].any()


def test_a_row_longer_than_max_length_is_refused() -> None:
    """The row, its length and the limit are named."""
    collator = DataCollatorForSpanJEPA(BERT, max_length=16)
    assert collator([row_of(16)])["input_ids"].shape == (1, 16)
    with pytest.raises(UsageError, match=r"Row 1 .*17 tokens.*max_length 16"):
        collator([row_of(9), row_of(17)])


# Literal special tokens are read as such by the tokenizers.
TEXTS = st.lists(
    st.one_of(
        st.text(max_size=60),
        st.lists(
            st.sampled_from(("[MASK]", "<mask>", "[SEP]", "</s>", "[UNK]", "the", "bridge", "ünïcode", "漢字", "🦊")),
            max_size=20,
        ).map(" ".join),
    ),
    min_size=1,
    max_size=4,
)


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=30, deadline=None)
@given(texts=TEXTS, num_masks=st.integers(1, 2), ratio=st.floats(0.1, 0.9))
def test_no_special_token_is_ever_hidden(family: str, texts: list[str], num_masks: int, ratio: float) -> None:
    """On any text, special tokens and padding stay as they are; a row of two other tokens gets a target."""
    tokenizer = tiny_tokenizer(family)
    collator = DataCollatorForSpanJEPA(
        tokenizer, mask_ratio=ratio, masked_tokens="mask_token", num_masks=num_masks, on_too_short="skip"
    )
    batch = collator(rows_of(texts, family))
    special = torch.isin(batch["input_ids"], torch.tensor(tokenizer.all_special_ids)).unsqueeze(1)
    assert not (hidden(batch) & special).any()
    assert not (hidden(batch) & (batch["attention_mask"] == 0).unsqueeze(1)).any()
    ordinary = (~special).sum(dim=-1).expand(-1, num_masks)
    assert torch.equal(batch["target_valid"].any(dim=-1), ordinary >= 2)


def test_rows_may_be_arrays_and_hold_other_columns() -> None:
    """Lists, arrays and tensors of ids give the same batch; further columns are left out."""
    row = row_of(20)["input_ids"]
    collator = DataCollatorForSpanJEPA(BERT)
    expected = collator([{"input_ids": row}])
    for ids in (np.array(row, dtype=np.int32), torch.tensor(row)):
        batch = collator([{"input_ids": ids, "text": "x", "word_ids": [0] * 20}])
        assert batch.keys() == expected.keys()
        assert all(torch.equal(batch[name], expected[name]) for name in batch)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("mask", [True, False])
@pytest.mark.parametrize("whole_word", [True, False])
def test_padding_of_rows_is_removed(side: str, mask: bool, whole_word: bool) -> None:
    """Rows that are padded already, with or without an attention mask, give the batch of their unpadded rows."""
    rows = rows_of(CORPUS[:6], word_ids=True)
    length = max(len(row["input_ids"]) for row in rows) + 3
    padded = []
    for row in rows:
        fill = length - len(row["input_ids"])
        columns = {"input_ids": (row["input_ids"], PAD), "word_ids": (row["word_ids"], -1)}
        if mask:
            columns["attention_mask"] = ([1] * len(row["input_ids"]), 0)
        padded.append(
            {
                name: [value] * fill + column if side == "left" else column + [value] * fill
                for name, (column, value) in columns.items()
            }
        )
    collator = DataCollatorForSpanJEPA(modified(padding_side=side), whole_word=whole_word)
    expected, batch = collator(rows), collator(padded)
    assert batch.keys() == expected.keys()
    assert all(torch.equal(batch[name], expected[name]) for name in batch)


def test_padding_that_ends_texts_stays() -> None:
    """A padding token that is also the sep token ends a row and is not padding; the attention mask decides."""
    tokenizer = modified(pad_token="[SEP]")
    row = row_of(9)["input_ids"]
    batch = DataCollatorForSpanJEPA(tokenizer)([{"input_ids": row}, {"input_ids": row_of(20)["input_ids"]}])
    assert batch["attention_mask"].sum(dim=1).tolist() == [9, 20]
    padded = {"input_ids": [*row, SEP, SEP], "attention_mask": [True] * 9 + [False] * 2}
    assert DataCollatorForSpanJEPA(tokenizer)([padded])["input_ids"].tolist() == [row]


def test_tokens_of_special_tokens_mask_are_never_masked() -> None:
    """A row's own `special_tokens_mask` excludes tokens in addition to the tokenizer's special ones."""
    row = row_of(40)["input_ids"]
    special = [1, *[1, 0] * 19, 1]
    collator = DataCollatorForSpanJEPA(BERT, mask_ratio=0.6)
    batch = collator([{"input_ids": row, "special_tokens_mask": special}])
    assert hidden(batch).any()
    assert not (hidden(batch) & torch.tensor(special).bool()).any()
    documents = [0] * 20 + [1] * 20
    packed = collator([{"input_ids": row, "special_tokens_mask": special, "document_ids": documents}])
    assert hidden(packed)[0, 0, :20].any()
    assert hidden(packed)[0, 0, 20:].any()
    assert not (hidden(packed) & torch.tensor(special).bool()).any()


@pytest.mark.parametrize(
    ("columns", "problem"),
    [
        ({"attention_mask": [1] * 8}, "8 attention_mask for 9 input_ids"),
        ({"attention_mask": [1, 1, 0, 1, 1, 1, 1, 1, 1]}, "zeros between its tokens"),
        ({"special_tokens_mask": [0.5] * 9}, "no list of integers in special_tokens_mask"),
        ({"document_ids": [0] * 8}, "8 document_ids for 9 input_ids"),
    ],
)
def test_columns_that_do_not_fit_are_refused(columns: dict[str, list], problem: str) -> None:
    """In a sentence that names the row and the column."""
    with pytest.raises(UsageError, match=f"Row 0 of the batch has .*{problem}"):
        DataCollatorForSpanJEPA(BERT)([{**row_of(9), **columns}])


@pytest.mark.parametrize("token", [-1, len(BERT)])
def test_tokens_of_another_tokenizer_are_refused(token: int) -> None:
    """Ids that the tokenizer does not have are named before they reach the embeddings."""
    with pytest.raises(
        UsageError, match=r"Row 1 of the batch has token ids from .*Tokenize with the model's tokenizer"
    ):
        DataCollatorForSpanJEPA(BERT)([row_of(9), {"input_ids": [CLS, 60, token, SEP]}])


@pytest.mark.parametrize("row", [{"text": "a"}, "a text", 1, {}])
def test_rows_without_tokens_are_refused(row: Any) -> None:
    """In a sentence that names the row, whatever its type."""
    with pytest.raises(UsageError, match=r"Row 1 of the batch has no input_ids\. Tokenize the texts"):
        DataCollatorForSpanJEPA(BERT)([row_of(9), row])


def test_tokens_of_the_template_are_never_masked() -> None:
    """Also where the tokenizer does not list them as special."""
    tokenizer = modified()
    backend = tokenizer.backend_tokenizer
    backend.post_processor = processors.TemplateProcessing(
        single="the $0 [SEP]", special_tokens=[("the", 99), ("[SEP]", SEP)]
    )
    row = [99, *WORDS[60:70], SEP]
    batch = DataCollatorForSpanJEPA(tokenizer, mask_ratio=0.9, num_masks=8)([{"input_ids": row}])
    assert not hidden(batch)[..., 0].any()
