"""Sources and splits of rows with two views, and the tokenizer that is trained on them."""

import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.llm import conversations
from jepa_hf import UsageError
from jepa_hf.data.tokenizer_training import train_bpe_tokenizer
from jepa_hf.llm_jepa.paired_data import PairedDataArguments, builtin_rows, load_paired_rows


def write(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def test_rows_carry_file_and_number(tmp_path: Path) -> None:
    """Rows of several files carry their file and their number in it."""
    files = [write(tmp_path / f"{name}.jsonl", [{"text": name, "code": str(n)} for n in range(2)]) for name in "ab"]
    train, validation = load_paired_rows(PairedDataArguments(train_file=",".join(files)), seed=0, need_validation=False)
    assert validation is None
    assert [(row.content["text"], row.number) for row in train] == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]
    assert [row.source for row in train[1:3]] == [f"train_file '{path}'" for path in files]


@pytest.mark.parametrize("seed", [0, 1])
def test_held_out_rows_are_disjoint(seed: int, tmp_path: Path) -> None:
    """A fifth is held out, the same rows for the same seed; both parts keep their order."""
    path = write(tmp_path / "rows.jsonl", conversations(20))
    args = PairedDataArguments(train_file=path, validation_split_percentage=20)
    train, validation = load_paired_rows(args, seed=seed, need_validation=True)
    numbers = [[row.number for row in part] for part in (train, validation)]
    assert sorted(numbers[0] + numbers[1]) == list(range(20))
    assert all(part == sorted(part) for part in numbers)
    assert len(validation) == 4
    assert load_paired_rows(args, seed=seed, need_validation=True) == (train, validation)
    assert load_paired_rows(args, seed=seed + 7, need_validation=True) != (train, validation)


def test_lone_surrogates_are_replaced(tmp_path: Path) -> None:
    """In all texts of a row; other columns stay as they are."""
    path = write(tmp_path / "rows.jsonl", [{"messages": [{"role": "user", "content": "a \ud800"}], "n": 1}])
    (row,), _ = load_paired_rows(PairedDataArguments(train_file=path), seed=0, need_validation=False)
    assert row.content == {"messages": [{"role": "user", "content": "a \ufffd"}], "n": 1}


def test_embedded_rows_have_two_texts() -> None:
    """Each built-in row has two non-empty texts."""
    rows = builtin_rows()
    assert len(rows) > 500
    assert all(row.content["text"].strip() and row.content["code"].strip() for row in rows)


TEXTS = [row["messages"][1]["content"] for row in conversations(10)]


@settings(max_examples=30, deadline=None)
@given(st.text())
def test_trained_tokenizer_is_lossless(text: str) -> None:
    """Every text is decoded as it was, with unseen bytes too; training is deterministic."""
    words = train_bpe_tokenizer(TEXTS, 300, 64)
    assert words.decode(words(text)["input_ids"]) == text
    assert words.get_vocab() == train_bpe_tokenizer(TEXTS, 300, 64).get_vocab()


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        ({"validation_split_percentage": 0}, "validation_split_percentage must be from 1 to 99"),
        ({"max_train_samples": 0}, "max_train_samples must be at least 1"),
    ],
)
def test_numbers_out_of_range_are_refused(arguments: dict[str, int], sentence: str) -> None:
    """A percentage or a number of samples out of range is a usage error."""
    with pytest.raises(UsageError, match=sentence):
        PairedDataArguments(**arguments)
