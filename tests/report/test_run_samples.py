"""Tests of a run's samples: held-out samples come first, and each has its label."""

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Value
from PIL import Image

from helpers.tiny_models import CORPUS
from jepa_hf import UsageError
from jepa_hf.data.arguments import PASSED_DATASET, DataArguments
from jepa_hf.data.text_datasets import load_text_datasets
from jepa_hf.report.run_samples import load_run_samples


def write_table(path: Path, rows: list[dict[str, Any]]) -> str:
    """Write csv or jsonl, by the file's ending."""
    with path.open("w", newline="", encoding="utf-8") as file:
        if path.suffix == ".csv":
            writer = csv.DictWriter(file, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        else:
            file.writelines(f"{json.dumps(row)}\n" for row in rows)
    return str(path)


TEXTS = [{"text": text, "label": f"length {len(text)}"} for text in CORPUS[:40]]
BLANK = {"text": "  ", "label": "blank"}


@pytest.mark.parametrize("ending", [".csv", ".jsonl"])
@pytest.mark.parametrize("limits", [{}, {"max_train_samples": 20, "max_eval_samples": 3}])
@pytest.mark.parametrize("do_eval", [False, True])
def test_labels_stay_with_their_texts(ending: str, limits: dict[str, int], do_eval: bool, tmp_path: Path) -> None:
    """Through blank rows, which the loader drops, the split and the limits."""
    path = write_table(tmp_path / f"data{ending}", [BLANK, *TEXTS[:20], BLANK, *TEXTS[20:]])
    settings = {"train_file": path, "do_eval": do_eval, "seed": 3, "validation_split_percentage": 20, **limits}
    actual = load_run_samples(settings, "text", 100)
    assert actual.labels == [f"length {len(text)}" for text in actual.samples]
    assert actual.held_out == (min(8, limits.get("max_eval_samples", 8)) if do_eval else 0)
    assert len(set(actual.samples)) == len(actual.samples) == len(actual.rows)


def test_features_are_read_in_the_order_of_the_run_s_encoder(tmp_path: Path) -> None:
    """A run that went on from another one, with columns in another order; the label is left out as in training."""
    path = write_table(tmp_path / "data.csv", [{"c": row, "a": -row, "target": row % 2} for row in range(12)])
    found = load_run_samples({"train_file": path}, "features", 100, ["a", "c"])
    assert [sample.tolist() for sample in found.samples] == [[-row, row] for row in range(12)]
    assert found.labels == [str(row % 2) for row in range(12)]


def test_held_out_samples_come_first_and_are_those_of_the_run(tmp_path: Path) -> None:
    path = write_table(tmp_path / "data.csv", TEXTS)
    settings = {"train_file": path, "do_eval": True, "seed": 5, "validation_split_percentage": 25}
    _, validation = load_text_datasets(
        DataArguments(train_file=path, validation_split_percentage=25), seed=5, need_validation=True
    )
    few = load_run_samples(settings, "text", 6)
    assert set(few.samples) < set(validation["text"])
    many = load_run_samples(settings, "text", 15)
    assert many.samples[:10] == validation["text"][:]
    assert (many.held_out, len(many.samples)) == (10, 15)
    assert many.rows[0] == "validation row 1"
    assert many.rows[10].startswith("training row ")
    assert load_run_samples(settings, "text", 15) == many


def test_classes_of_a_data_set_go_by_their_names(tmp_path: Path) -> None:
    features = Features({"text": Value("string"), "label": ClassLabel(names=["short", "long"])})
    texts = [None, *CORPUS[:20]]
    rows = {"text": texts, "label": [int(len(text or "") > 60) for text in texts]}
    splits = DatasetDict(train=Dataset.from_dict(rows, features), validation=Dataset.from_dict(rows, features))
    for name, split in splits.items():
        (tmp_path / "set").mkdir(exist_ok=True)
        split.to_parquet(tmp_path / "set" / f"{name}.parquet")
    actual = load_run_samples({"dataset_name": str(tmp_path / "set"), "do_eval": True}, "text", 100)
    assert actual.held_out == 20
    assert actual.labels == ["long" if len(text) > 60 else "short" for text in actual.samples]


def test_feature_rows_and_their_labels(tmp_path: Path) -> None:
    rows = [{"a": number, "b": -number, "label": f"class {number % 3}"} for number in range(30)]
    settings = {"train_file": write_table(tmp_path / "data.csv", rows), "label_column_name": "label", "do_eval": True}
    actual = load_run_samples(settings, "features", 30)
    assert actual.labels == [f"class {int(vector[0]) % 3}" for vector in actual.samples]
    np.save(tmp_path / "data.npy", np.ones((5, 2), dtype=np.float32))
    plain = load_run_samples({"train_file": str(tmp_path / "data.npy")}, "features", 3)
    assert (len(plain.samples), plain.labels, plain.held_out) == (3, None, 0)


def test_images_have_their_folders_for_labels_and_damaged_ones_are_counted(tmp_path: Path) -> None:
    for number in range(12):
        folder = tmp_path / "pictures" / f"class {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (number, 0, 0)).save(folder / f"{number}.png")
    (tmp_path / "pictures" / "class 0" / "damaged.png").write_bytes(b"nothing")
    actual = load_run_samples({"train_file": str(tmp_path / "pictures")}, "images", 100)
    assert actual.labels == [Path(sample["path"]).parent.name for sample in actual.samples]
    assert (len(actual.samples), actual.damaged) == (12, 1)
    alone = load_run_samples({"train_file": str(tmp_path / "pictures" / "class 1")}, "images", 100)
    assert alone.labels is None


def test_without_data_of_its_own_the_run_read_the_embedded_corpus() -> None:
    actual = load_run_samples({"do_eval": True, "seed": 42}, "text", 10)
    assert (len(actual.samples), actual.labels) == (10, None)


def test_missing_data_is_reported(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="does not exist"):
        load_run_samples({"train_file": str(tmp_path / "gone.txt")}, "text", 10)


def test_labels_of_a_validation_file_beside_a_data_set_are_the_files(tmp_path: Path) -> None:
    """Although the data set has a validation split of its own, with as many rows."""
    splits = {
        "train": {"text": ["one", "two"], "label": ["a", "a"]},
        "validation": {"text": ["three", "four"], "label": ["b", "b"]},
    }
    for name, columns in splits.items():
        (tmp_path / "set").mkdir(exist_ok=True)
        Dataset.from_dict(columns).to_parquet(tmp_path / "set" / f"{name}.parquet")
    file = tmp_path / "held_out.jsonl"
    file.write_text('{"text": "five", "label": "c"}\n{"text": "six", "label": "d"}\n')
    settings = {"dataset_name": str(tmp_path / "set"), "validation_file": str(file), "do_eval": True}
    found = load_run_samples(settings, "text", 10)
    assert dict(zip(found.samples, found.labels or (), strict=True)) == {
        "five": "c",
        "six": "d",
        "one": "a",
        "two": "a",
    }


def test_data_passed_from_python_cannot_be_read_again() -> None:
    with pytest.raises(UsageError, match="passed to pretrain from Python"):
        load_run_samples({"dataset_name": PASSED_DATASET}, "text", 10)
