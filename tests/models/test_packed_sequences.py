"""Claims about packed rows: each document is masked, read and predicted as in a row of its own."""

import copy
import logging
from collections.abc import Iterable, Iterator, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from datasets import Dataset, IterableDataset
from hypothesis import example, given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import AutoConfig, PreTrainedTokenizerBase

from helpers.batches import ATTENTION_IMPLEMENTATIONS, Row, pack, rows, tiny_jepa
from helpers.runs import largest_difference, trainer, weights
from helpers.tiny_models import CORPUS, tiny_tokenizer
from jepa_hf import DataCollatorForSpanJEPA, JepaConfig, JepaForRepresentationPrediction, UsageError
from jepa_hf.data.packing import PACKING_WINDOW, best_fit_decreasing, pack_dataset
from jepa_hf.data.tokenization import tokenize_dataset
from jepa_hf.models.packed_sequences import (
    block_diagonal_mask,
    document_counts,
    document_position_ids,
    instance_normalize,
    mean_pool_by_document,
)

Batch = dict[str, torch.Tensor]

few = settings(max_examples=25, deadline=None)
LENGTHS = st.lists(st.integers(4, 14), min_size=1, max_size=8)


def documents(lengths: Sequence[int], family: str = "bert", seed: int = 0) -> list[Row]:
    """Texts of the given numbers of tokens, two special ones included, in words of about two tokens."""
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


def on_side(side: str, family: str = "bert") -> PreTrainedTokenizerBase:
    """The family's tokenizer, padding on that side."""
    tokenizer = copy.deepcopy(tiny_tokenizer(family))
    tokenizer.padding_side = side
    return tokenizer


def listed(positions: torch.Tensor, valid: torch.Tensor, length: int) -> torch.Tensor:
    """`[B, M, K]` positions to `[B, M, length]` bool."""
    counts = torch.zeros(*positions.shape[:2], length, dtype=torch.long)
    return counts.scatter_add_(2, positions, valid.long()).bool()


def views(batch: Batch) -> dict[str, torch.Tensor]:
    """By name `[B, M, L]`: what is hidden, what is visible, and the view with mask tokens, as far as they are there."""
    length = batch["input_ids"].shape[1]
    actual = {"hidden": listed(batch["target_positions"], batch["target_valid"], length)}
    if "context_positions" in batch:
        actual["visible"] = listed(batch["context_positions"], batch["context_valid"], length)
    else:
        actual["view"] = batch["context_input_ids"].reshape(actual["hidden"].shape)
    return actual


# ---- numbers of documents

NUMBERS = torch.tensor([[-1, 0, 0, 0, 1, 1, 2, 2], [0, 1, 1, 1, 1, -1, -1, -1]])


def test_positions_are_counted_in_each_document() -> None:
    """From 0, on either side of padding; where only some tokens count, as many of these as precede."""
    actual = document_position_ids(NUMBERS)
    assert torch.where(NUMBERS >= 0, actual, -1).tolist() == [[-1, 0, 1, 2, 0, 1, 0, 1], [0, 0, 1, 2, 3, -1, -1, -1]]
    counted = torch.tensor([[0, 1, 0, 1, 0, 1, 1, 1], [1, 1, 0, 1, 1, 0, 0, 0]], dtype=torch.bool)
    actual = document_position_ids(NUMBERS, counted)
    assert torch.where(NUMBERS >= 0, actual, -1).tolist() == [[-1, 0, 1, 1, 0, 0, 0, 1], [0, 0, 1, 1, 2, -1, -1, -1]]


def test_attention_is_a_block_for_each_document_and_one_for_padding() -> None:
    allowed = block_diagonal_mask(NUMBERS[1:])[0, 0]
    assert torch.equal(allowed, torch.block_diag(torch.ones(1, 1), torch.ones(4, 4), torch.ones(3, 3)).bool())


@pytest.mark.parametrize("spoiled", [0.0, float("inf"), float("nan")])
def test_means_and_counts_are_of_each_document(spoiled: float) -> None:
    """0 without any, whatever the padding contains; in float32 under autocast too."""
    values = torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0))
    values[NUMBERS < 0] = spoiled
    expected = torch.zeros(2, 4, 5)
    for row, number in ((0, 0), (0, 1), (0, 2), (1, 0), (1, 1)):
        expected[row, number] = values[row][NUMBERS[row] == number].mean(dim=0)
    torch.testing.assert_close(mean_pool_by_document(values, NUMBERS, 4), expected)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(mean_pool_by_document(values, NUMBERS, 4), expected)
    assert document_counts(NUMBERS, 4).tolist() == [[3, 2, 2, 0], [1, 4, 0, 0]]
    rows = torch.where(NUMBERS >= 0, 0, -1)
    expected = torch.stack([value[number >= 0].mean(dim=0) for value, number in zip(values, NUMBERS, strict=True)])
    torch.testing.assert_close(mean_pool_by_document(values, rows, 1)[:, 0], expected)


@pytest.mark.parametrize("spoiled", [0.0, 1e30, float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("several", [False, True])
def test_instance_normalize_gives_each_feature_mean_0_and_variance_1_over_a_document(
    several: bool, spoiled: float
) -> None:
    """Whatever stands on padding, which gets 0."""
    numbers = NUMBERS if several else torch.where(NUMBERS >= 0, 0, -1)
    states = 3 * torch.randn(2, 8, 5, generator=torch.Generator().manual_seed(0)) + 7
    states[numbers < 0] = spoiled
    normal = instance_normalize(states, numbers, 3 if several else 1)
    assert (normal[numbers < 0] == 0).all()
    for row in range(2):
        for number in range(int(numbers[row].max()) + 1):
            kept = states[row][numbers[row] == number]
            expected = (kept - kept.mean(dim=0)) / (kept.var(dim=0, correction=0) + 1e-5).sqrt()
            torch.testing.assert_close(normal[row][numbers[row] == number], expected, rtol=1e-4, atol=1e-5)


# ---- the collator


COLLATORS = st.fixed_dictionaries(
    {
        "masked_tokens": st.sampled_from(("mask_token", "drop")),
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
    """Token by token, with any masks; and `document_ids` says where it stands."""
    collator = DataCollatorForSpanJEPA(on_side(side), on_too_short="skip", **settings)
    texts = documents(lengths)
    rows, places = pack(texts)
    packed, alone = collator(rows), collator(texts)
    assert packed["document_ids"].shape == packed["input_ids"].shape
    assert torch.equal(packed["document_ids"] >= 0, packed["attention_mask"].bool())
    in_rows, by_itself = views(packed), views(alone)
    for text, (row, number) in enumerate(places):
        its = packed["document_ids"][row] == number
        real = alone["attention_mask"][text].bool()
        assert packed["input_ids"][row, its].tolist() == texts[text]["input_ids"]
        for name in in_rows:
            assert torch.equal(in_rows[name][row][:, its], by_itself[name][text][:, real]), name
    padding = packed["attention_mask"] == 0
    assert not in_rows["hidden"].transpose(1, 2)[padding].any()


@few
@given(LENGTHS, st.sampled_from((None, 40)))
@example([4] * 6, 40)
def test_document_valid_counts_the_documents_of_each_row(lengths: list[int], max_length: int | None) -> None:
    """As many as there are; static shapes have an eighth of the length, or the length where a row holds more."""
    rows, places = pack(documents(lengths))
    batch = DataCollatorForSpanJEPA(on_side("right"), max_length=max_length)(rows)
    counts = [sum(row == place for place, _ in places) for row in range(len(rows))]
    assert batch["document_valid"].sum(dim=1).tolist() == counts
    columns = max(counts) if max_length is None else 5 if max(counts) <= 5 else 40
    assert batch["document_valid"].shape[1] == columns
    numbers = torch.arange(batch["document_valid"].shape[1])
    assert torch.equal(batch["document_valid"], numbers < torch.tensor(counts)[:, None])


@pytest.mark.parametrize("numbers", [[1, 1, 1, 2, 2], [0, 0, 2, 2, 2], [0, 0, 1, 1, 0], [0, 0, 1, 1, -1]])
def test_documents_that_are_not_numbered_in_order_are_refused(numbers: list[int]) -> None:
    """In a sentence that names the row."""
    row = documents([5])[0]
    with pytest.raises(UsageError, match=r"Row 1 .* do not number the documents of its 5 tokens"):
        DataCollatorForSpanJEPA(on_side("right"))([{**row, "document_ids": [0] * 5}, {**row, "document_ids": numbers}])


def test_packed_and_plain_rows_do_not_mix() -> None:
    row = documents([5])[0]
    with pytest.raises(UsageError, match="Only some rows of the batch have document_ids"):
        DataCollatorForSpanJEPA(on_side("right"))([row, {**row, "document_ids": [0] * 5}])


def test_a_document_that_is_too_short_is_refused_or_has_no_target() -> None:
    """Like a row of its own, whatever else is in the row."""
    rows, _ = pack(documents([3, 9]))
    with pytest.raises(UsageError, match="has fewer than two tokens that may be masked"):
        DataCollatorForSpanJEPA(on_side("right"))(rows)
    batch = DataCollatorForSpanJEPA(on_side("right"), on_too_short="skip")(rows)
    hidden = views(batch)["hidden"][0, 0]
    assert not hidden[batch["document_ids"][0] == 0].any()
    assert hidden[batch["document_ids"][0] == 1].any()


# ---- the model


FAMILIES = ("bert", "distilbert", "roberta", "electra", "modernbert")
# Everything that a loss can have, in addition to the predictions.
TERMS: dict[str, dict[str, Any]] = {
    "layer": {},
    "instance": {"target_norm": "instance"},
    "mlm": {"mlm_weight": 0.5},
    "contrastive": {"contrastive_weight": 0.5},
    "statistics": {"variance_weight": 0.2, "covariance_weight": 0.1, "sigreg_weight": 0.1},
    "pooled": {"pool_targets": True, "target_norm": "instance", "contrastive_weight": 0.5},
}


def actual(model: JepaForRepresentationPrediction, batch: Batch) -> dict[str, Any]:
    """The loss and its parts, each document's guesses and targets, and the gradients."""
    model.zero_grad()
    output = model(**batch)
    output.loss.backward()
    valid = output.target_valid
    # Which document each target is of: `[B, M, T]`.
    if "document_ids" not in batch:
        owners, there = torch.zeros_like(valid, dtype=torch.long), torch.ones(len(valid), 1, dtype=torch.bool)
    else:
        there = batch["document_valid"]
        numbers = batch["document_ids"][:, None].expand(-1, valid.shape[1], -1)
        owners = numbers.gather(2, batch["target_positions"])
        if model.config.pool_targets:
            owners = torch.arange(there.shape[1]).expand_as(valid)
    result: dict[str, Any] = {
        "parts": {name: value for name, value in output.items() if name.endswith("loss")} | {"n": output.num_targets},
        "gradients": {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None},
    }
    for name in ("predictions", "targets"):
        result[name] = [
            output[name][row][(owners[row] == number) & valid[row]].detach() for row, number in there.nonzero().tolist()
        ]
    return result


def assert_same(one: dict[str, Any], other: dict[str, Any], tolerance: float = 1e-5) -> None:
    """Relative to the largest entry of each kind."""
    for name, value in one["parts"].items():
        assert abs(value - other["parts"][name]) <= tolerance * abs(value).clamp_min(1), name
    for name in ("predictions", "targets"):
        largest = max(values.abs().max() for values in one[name] if values.numel())
        for values, others in zip(one[name], other[name], strict=True):
            torch.testing.assert_close(values, others, rtol=0, atol=tolerance * largest.item())
    assert one["gradients"].keys() == other["gradients"].keys()
    largest = max(gradient.abs().max() for gradient in one["gradients"].values())
    for name, gradient in one["gradients"].items():
        assert (gradient - other["gradients"][name]).abs().max() <= tolerance * largest, name


def both(
    model: JepaForRepresentationPrediction, family: str, lengths: Sequence[int], side: str = "right", **settings: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What a model gives for packed documents, and for the same ones in rows of their own, masked alike."""
    settings = {"mask_ratio": 0.4, "mean_span_length": 2} | settings
    mode = model.config.masked_tokens
    texts = documents(lengths, family)
    rows, _ = pack(texts)
    packed = DataCollatorForSpanJEPA(on_side(side, family), masked_tokens=mode, **settings)(rows)
    alone = DataCollatorForSpanJEPA(tiny_tokenizer(family), masked_tokens=mode, **settings)(texts)
    return actual(model, packed), actual(model, alone)


PACKED = [case for case in ATTENTION_IMPLEMENTATIONS if case[0] != "deberta-v2"]
SOME = [9, 5, 12, 7, 14, 4, 11, 6]


@pytest.mark.parametrize("terms", TERMS)
@pytest.mark.parametrize(("family", "masked_tokens", "predictor"), PACKED)
def test_packed_documents_give_what_they_give_in_rows_of_their_own(
    family: str, masked_tokens: str, predictor: str, terms: str
) -> None:
    """Loss, each part of it, guesses, targets and gradients, with weights wide enough to tell positions apart."""
    model = tiny_jepa(family, masked_tokens, predictor, **TERMS[terms])
    assert_same(*both(model, family, SOME))


@pytest.mark.parametrize(("family", "masked_tokens", "predictor"), PACKED)
def test_they_do_under_eager_attention_too(family: str, masked_tokens: str, predictor: str) -> None:
    """Which adds its mask instead of choosing by it; with every term at once."""
    model = tiny_jepa(family, masked_tokens, predictor, **TERMS["instance"], **TERMS["mlm"], **TERMS["contrastive"])
    model.set_attn_implementation("eager")
    assert model.context_encoder.config._attn_implementation == "eager"
    assert_same(*both(model, family, SOME))


@settings(max_examples=30, deadline=None)
@given(
    st.sampled_from(PACKED),
    LENGTHS,
    st.integers(1, 3),
    st.sampled_from(("left", "right")),
    st.sampled_from((None, 40)),
    st.sampled_from(tuple(TERMS)),
)
@pytest.mark.slow
def test_they_do_for_any_lengths_masks_and_padding(
    case: tuple[str, str, str], lengths: list[int], masks: int, side: str, max_length: int | None, terms: str
) -> None:
    """With several masks, padding on either side, and the fixed shapes that torch.compile wants."""
    model = tiny_jepa(*case, **TERMS[terms])
    one, other = both(model, case[0], lengths, side, num_masks=masks, max_length=max_length)

    # Over four tokens instance normalisation makes much of rounding.
    assert_same(one, other, tolerance=1e-4)


@pytest.mark.parametrize(("family", "masked_tokens", "predictor"), PACKED)
@torch.no_grad()
def test_rows_whose_documents_see_each_other_are_far_from_that(family: str, masked_tokens: str, predictor: str) -> None:
    # The proof that the tests above can fail: the same batch, as one text per row.
    model = tiny_jepa(family, masked_tokens, predictor)
    collator = DataCollatorForSpanJEPA(tiny_tokenizer(family), masked_tokens=masked_tokens, mask_ratio=0.4)
    batch = collator(pack(documents(SOME, family))[0])
    exact = model(**batch)
    mixed = model(**{name: value for name, value in batch.items() if not name.startswith("document")})
    for name in ("predictions", "targets"):
        apart = (exact[name] - mixed[name])[batch["target_valid"]].abs().max()
        assert apart > 0.1 * exact[name][batch["target_valid"]].abs().max(), name


@pytest.mark.slow
def test_compiled_it_is_the_same_and_compiled_once() -> None:
    """Under static shapes, whatever the number of documents in a row."""
    model = tiny_jepa(encoder={"num_hidden_layers": 1}, **TERMS["instance"], **TERMS["contrastive"])
    collator = DataCollatorForSpanJEPA(tiny_tokenizer("bert"), max_length=32)
    few_documents, more_documents = [14, 14, 12, 13], [14, 7, 7, 12, 5, 8]
    counter = CompileCounterWithBackend("aot_eager")
    torch.compiler.reset()
    compiled = torch.compile(model, backend=counter)
    graphs = []
    for lengths in (few_documents, more_documents):
        batch = collator(pack(documents(lengths))[0])
        assert {name: value.shape[-1] for name, value in batch.items()} == {
            "input_ids": 32, "attention_mask": 32, "target_positions": 10, "target_valid": 10, "document_ids": 32,
            "document_valid": 4, "context_positions": 24, "context_valid": 24,
        }  # fmt: skip
        torch.testing.assert_close(compiled(**batch).loss, model(**batch).loss)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1] > 0
    torch.compiler.reset()


@pytest.mark.parametrize("name", ["document_ids", "document_valid"])
def test_one_of_the_two_tensors_alone_is_refused(name: str) -> None:
    batch = DataCollatorForSpanJEPA(tiny_tokenizer("bert"))(pack(documents(SOME))[0])
    del batch[name]
    with pytest.raises(ValueError, match="Packed rows need both document_ids and document_valid"):
        tiny_jepa()(**batch)


@pytest.mark.parametrize("family", ["deberta-v2", "mpnet"])
def test_other_encoders_refuse_packed_rows(family: str) -> None:
    """Those whose attention or positions we cannot confine to a document, with the remedy."""
    config = AutoConfig.for_model(
        family, vocab_size=300, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64
    )
    model = JepaForRepresentationPrediction(JepaConfig(config))
    batch = DataCollatorForSpanJEPA(tiny_tokenizer("bert"), masked_tokens="mask_token")(pack(documents(SOME))[0])
    with pytest.raises(UsageError, match=rf"Packed rows are not exact for {family} encoders.*Leave out --packed"):
        model(**batch)


@pytest.mark.parametrize("family", FAMILIES)
def test_an_attention_that_takes_no_dense_mask_is_refused(family: str) -> None:
    """In a sentence that names it and what to use."""
    model = tiny_jepa(family)
    for encoder in (model.context_encoder, model.target_encoder):
        encoder.config._attn_implementation = "flash_attention_2"
    batch = DataCollatorForSpanJEPA(tiny_tokenizer(family))(pack(documents(SOME, family))[0])
    with pytest.raises(
        UsageError, match=r"Packed rows need an attention mask .*flash_attention_2.* Use sdpa, or leave out"
    ):
        model(**batch)


# ---- the data


def texts_of(texts: Sequence[str | None], streaming: bool = False) -> Dataset | IterableDataset:
    dataset = Dataset.from_dict({"text": list(texts)})
    return dataset.to_iterable_dataset() if streaming else dataset


def split(rows: Iterable[Row], column: str = "input_ids") -> list[list[int]]:
    """The documents of packed rows, each with what `column` has of it."""
    return [
        [value for value, number in zip(row[column], row["document_ids"], strict=True) if number == wanted]
        for row in rows
        for wanted in range(row["document_ids"][-1] + 1)
    ]


@few
@given(st.lists(st.integers(1, 20), min_size=1, max_size=40), st.integers(20, 60))
def test_every_item_is_in_one_bin_and_no_bin_overflows(sizes: list[int], capacity: int) -> None:
    """And bins are filled: no two of them could be one, as best fit leaves none that would take another's items."""
    bins = best_fit_decreasing(sizes, capacity)
    assert sorted(item for items in bins for item in items) == list(range(len(sizes)))
    filled = sorted(sum(sizes[item] for item in items) for items in bins)
    assert filled[-1] <= capacity
    assert all(one + other > capacity for one, other in pairwise(filled))
    assert all(items == sorted(items) for items in bins)
    assert [items[0] for items in bins] == sorted(items[0] for items in bins)


@pytest.mark.parametrize("word_ids", [False, True])
@pytest.mark.parametrize("streaming", [False, True])
def test_packing_loses_no_text_and_cuts_none_more_than_without(streaming: bool, word_ids: bool) -> None:
    """The documents of all rows are the rows without packing, special tokens included, short texts too."""
    texts = [*CORPUS, "a", "", None, "b"]
    tokenizer, settings = tiny_tokenizer("bert"), {"max_seq_length": 96, "word_ids": word_ids}
    alone = list(tokenize_dataset(texts_of(texts), tokenizer, **settings))
    rows = list(tokenize_dataset(texts_of(texts, streaming), tokenizer, packed=True, **settings))
    assert len(rows) < len(alone) / 1.5
    assert all(len(row["input_ids"]) <= 96 for row in rows)
    for column in ("input_ids", "word_ids")[: 1 + word_ids]:
        assert sorted(split(rows, column)) == sorted(row[column] for row in alone)
    assert rows == list(tokenize_dataset(texts_of(texts), tokenizer, packed=True, **settings))


def test_a_stream_is_packed_in_windows() -> None:
    """The first row is there before the second window is read; no text crosses from one window to the next."""
    read = 0

    def endless() -> Iterator[dict[str, str]]:
        nonlocal read
        while True:
            read += 1
            yield {"text": "the old dog sleeps"}

    stream = tokenize_dataset(
        IterableDataset.from_generator(endless), tiny_tokenizer("bert"), max_seq_length=64, packed=True
    )
    row = next(iter(stream))
    assert len(split([row])) > 1
    assert read < 2 * PACKING_WINDOW


def test_what_packing_did_is_logged_once(caplog: pytest.LogCaptureFixture) -> None:
    """Rows before and after, and the share of padding."""
    caplog.set_level(logging.INFO, logger="jepa_hf")
    rows = Dataset.from_dict({"input_ids": [[1] * 6, [2] * 5, [3] * 4, [4] * 3]})
    assert len(pack_dataset(rows, 10)) == 2
    assert caplog.messages == ["Packed 4 texts into 2 rows of at most 10 tokens; 10.0 % of their positions are padding"]


def test_a_row_that_fits_nowhere_is_refused() -> None:
    with pytest.raises(UsageError, match="A row of 6 tokens does not fit into max_seq_length 5"):
        pack_dataset(Dataset.from_dict({"input_ids": [[1] * 6]}), 5)


@pytest.mark.parametrize("other", [{"concat": True}, {"stride": 2}])
def test_other_modes_do_not_go_with_packing(other: dict[str, Any]) -> None:
    with pytest.raises(UsageError, match=r"packed.* exclude each other"):
        tokenize_dataset(texts_of(["a"]), tiny_tokenizer("bert"), max_seq_length=8, packed=True, **other)


# ---- training


@pytest.mark.usefixtures("full_health_batch")
@pytest.mark.parametrize("terms", ["layer", "contrastive", "pooled"])
def test_a_run_on_packed_rows_is_the_run_on_their_texts(terms: str, tmp_path: Path) -> None:
    """All texts in each update: weights, losses, health, counts of targets and of tokens are those without packing."""
    common = {"learning_rate": 1e-3, "health_steps": 1, "max_steps": 3, "weight_decay": 0.01}
    mask = {"mask_ratio": 0.4, "num_masks": 2, "on_too_short": "skip"}
    texts, packed = rows("bert", 30), pack(rows("bert", 30), 48)[0]
    texts.append({"input_ids": texts[0]["input_ids"][:1] + texts[0]["input_ids"][-1:]})  # too short to be masked
    packed.append({**texts[-1], "document_ids": [0, 0]})
    runs = []
    for data in (texts, packed):
        model = tiny_jepa(strong=False, **TERMS[terms])
        size = {"per_device_train_batch_size": len(data)}
        run = trainer(tmp_path / str(len(data)), model, data, data, mask=mask, **size, **common)
        assert run.train_dataset is data
        run.train()
        runs.append((run, run.evaluate()))
    (one, measured), (other, remeasured) = runs
    assert largest_difference(weights(one.model), weights(other.model)) < 1e-5
    timed = ("runtime", "per_second", "total_flos")
    for ours, theirs in [*zip(one.state.log_history, other.state.log_history, strict=True), (measured, remeasured)]:
        assert ours.keys() == theirs.keys()
        for name, value in ours.items():
            if not name.endswith(timed):
                assert theirs[name] == pytest.approx(value, rel=2e-3, abs=1e-5), name
    assert one.state.num_input_tokens_seen == other.state.num_input_tokens_seen > 0
    assert [log["rows_without_targets"] for log in other.state.log_history if "rows_without_targets" in log] == [1] * 3


def test_a_batch_of_one_row_is_enough_for_the_contrastive_term(tmp_path: Path) -> None:
    """Its texts are compared with each other; and the card counts rows, not samples."""
    model = tiny_jepa(contrastive_weight=0.5)
    data = pack(rows("bert", 12), 48)[0]
    run = trainer(tmp_path, model, data, per_device_train_batch_size=1, max_steps=1)
    run.train()
    assert run.state.log_history[-2]["contrastive_loss"] > 0
    assert run.model_card_info("me/x").training["packed rows per step"] == 1
    with pytest.raises(UsageError, match="a batch here has one"):
        trainer(tmp_path, model, rows("bert", 12), per_device_train_batch_size=1)
