"""Claims about `jepa_hf/data/splits.py`: one order of sources for datasets and for lists of rows."""

from typing import Any

import numpy as np
import pytest
from datasets import Dataset

from jepa_hf.data import splits
from jepa_hf.data.arguments import BaseDataArguments
from jepa_hf.data.splits import resolve_splits, train_validation_split
from jepa_hf.errors import UsageError

DATASET = {"train": list(range(10)), "validation": [10], "dev": [11]}


@pytest.fixture(autouse=True)
def _dataset_of_lists(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(splits, "load_hub_dataset", lambda args, streaming: DATASET)


def resolve(need_validation: bool = True, **arguments: Any) -> tuple[Any, Any]:
    return resolve_splits(
        BaseDataArguments(**arguments),
        seed=0,
        need_validation=need_validation,
        load_files=lambda argument: [argument] * 10,
        load_split=lambda rows, name: rows,
    )


@pytest.mark.parametrize(
    ("arguments", "validation"),
    [
        ({"validation_file": "x", "dataset_validation_split": "dev"}, ["validation_file"] * 10),
        ({"dataset_validation_split": "dev"}, [11]),
        ({}, [10]),
    ],
)
def test_validation_files_precede_splits(arguments: dict[str, Any], validation: list[Any]) -> None:
    assert resolve(dataset_name="x", **arguments) == (DATASET["train"], validation)


def test_rows_of_a_list_are_held_out_and_cut() -> None:
    """The same rows as of a dataset of this length; limits apply after the split."""
    train, validation = train_validation_split(list(range(10)), 20, seed=0)
    dataset = Dataset.from_dict({"row": range(10)})
    assert [train, validation] == [part["row"][:] for part in train_validation_split(dataset, 20, seed=0)]
    assert sorted(train + validation) == list(range(10))
    train, validation = resolve(train_file="x", validation_split_percentage=50, max_train_samples=2, max_eval_samples=9)
    assert (len(train), len(validation)) == (2, 5)


def test_validation_sources_are_ignored_unless_needed() -> None:
    assert resolve(False, dataset_name="x", dataset_validation_split="none") == (DATASET["train"], None)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "no training data"),
        ({"dataset_name": "x", "train_file": "y"}, "exclude each other"),
        ({"dataset_name": "x", "dataset_train_split": "test"}, "no split 'test'.*train, validation, dev"),
        ({"dataset_name": "x", "dataset_validation_split": "test"}, "no split 'test'"),
    ],
)
def test_sources_that_do_not_exist_are_usage_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        resolve(**arguments)


def test_the_choice_depends_only_on_length_and_seed() -> None:
    parts = [train_validation_split(np.arange(30).tolist(), 10, seed) for seed in (0, 0, 1)]
    assert parts[0] == parts[1] != parts[2]
