"""Tests of tasks: kinds inferred from columns, reproducible draws, error messages for bad data."""

import csv
import gzip
import io
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from jepa_hf import UsageError
from jepa_hf.evaluation.task import Task, TaskArguments, require_targets
from jepa_hf.evaluation.tasks import load_tasks

Rows = list[dict[str, Any]]


def write(path: Path, rows: Iterable[dict[str, Any]]) -> str:
    """Write rows in the format of the file's ending."""
    rows = list(rows)
    path.parent.mkdir(parents=True, exist_ok=True)
    kind = path.name.removesuffix(".gz").rpartition(".")[2]
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
        return str(path)
    text = io.StringIO()
    if kind in ("csv", "tsv"):
        writer = csv.DictWriter(text, list(rows[0]), delimiter="," if kind == "csv" else "\t")
        writer.writeheader()
        writer.writerows(rows)
    elif kind == "json":
        json.dump(rows, text)
    else:
        text.writelines(json.dumps(row) + "\n" for row in rows)
    content = text.getvalue().encode()
    path.write_bytes(gzip.compress(content) if path.name.endswith(".gz") else content)
    return str(path)


def labelled(count: int = 40, classes: int = 2) -> Rows:
    return [{"text": f"text {row}", "label": row % classes} for row in range(count)]


def load(source: str, **args: Any) -> Task:
    return load_tasks([source], TaskArguments(**args))[0]


def picture(value: int) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (4, 4), (value, 0, 0)).save(file, "PNG")
    return file.getvalue()


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.parquet", "a.jsonl.gz", "a.csv.gz"])
def test_every_format_gives_the_same_task(name: str, tmp_path: Path) -> None:
    task = load(write(tmp_path / name, labelled()))
    assert (task.name, task.kind, task.modality) == ("a", "labels", "text")
    assert sorted(task.train.samples[0] + task.test.samples[0]) == sorted(row["text"] for row in labelled())
    assert set(task.train.targets) == {"0", "1"}
    assert (len(task.train), len(task.test)) == (30, 10)


@pytest.mark.parametrize(
    ("rows", "kind", "modality"),
    [
        ([{"sentence": "a", "label": "x"}, {"sentence": "b", "label": "y"}] * 4, "labels", "text"),
        ([{"review": "a", "class": "x"}, {"review": "b", "class": "y"}] * 4, "labels", "text"),
        ([{"f1": 0.5, "f2": 1.0, "label": "x"}, {"f1": 1.5, "f2": 2.0, "label": "y"}] * 4, "labels", "features"),
        ([{"series": [[0.5], [1.0]], "label": 1}, {"series": [[2.0]], "label": 2}] * 4, "labels", "features"),
        ([{"image": "a.png", "label": 1}, {"image": "b.png", "label": 2}] * 4, "labels", "images"),
        ([{"sentence1": "a", "sentence2": "b", "score": value} for value in range(4)], "similarity", "text"),
        ([{"query": "a", "document": "b"}] * 3, "retrieval", "text"),
        ([{"question": "a", "answer": "b"}] * 3, "retrieval", "text"),
        ([{"title": "a", "text": "b"}] * 3, "retrieval", "text"),
        ([{"text": "a", "code": "b"}] * 3, "retrieval", "text"),
        ([{"anchor": "a", "positive": "b"}] * 3, "retrieval", "text"),
        ([{"sentence1": "a", "sentence2": "b"}] * 3, "retrieval", "text"),
    ],
)
def test_kind_is_inferred_from_columns(rows: Rows, kind: str, modality: str, tmp_path: Path) -> None:
    task = load(write(tmp_path / "data.jsonl", rows))
    assert (task.kind, task.modality) == (kind, modality)
    assert len(task.test.samples) == (1 if kind == "labels" else 2)
    assert (task.train is not None) == (kind == "labels")
    assert len(task.test) == (2 if kind == "labels" else len(rows))


def test_columns_may_be_named(tmp_path: Path) -> None:
    rows = [{"text": "t", "body": f"b{row}", "label": "l", "kind": row % 2} for row in range(16)]
    source = write(tmp_path / "data.jsonl", rows)
    task = load(source, text_column_name="body", label_column_name="kind")
    assert task.train.samples[0][0].startswith("b")
    assert set(task.train.targets) == {"0", "1"}
    task = load(source, text_column_name="body,text")
    assert (task.kind, task.test.samples[1][0]) == ("retrieval", "t")


def test_features_keep_their_columns_and_rows(tmp_path: Path) -> None:
    rows = [{"a": row, "b": -row, "name": f"n{row}", "label": row % 2} for row in range(16)]
    task = load(write(tmp_path / "data.csv", rows))
    for features, label in zip(task.train.samples[0], task.train.targets, strict=True):
        assert features.tolist() == [features[0], -features[0]]
        assert str(int(features[0]) % 2) == label


@pytest.mark.parametrize("name", ["data.npz", "DATA.NPZ"])
def test_arrays_may_hold_features_and_labels(name: str, tmp_path: Path) -> None:
    series = np.arange(48, dtype=np.float32).reshape(8, 3, 2)
    np.savez(tmp_path / "data.npz", features=series, lengths=np.array([3, 2] * 4), label=np.array([0, 1] * 4))
    task = load(str((tmp_path / "data.npz").rename(tmp_path / name)))
    assert (task.kind, task.modality) == ("labels", "features")
    assert {(len(row), label) for row, label in zip(task.train.samples[0], task.train.targets, strict=True)} == {
        (3, "0"),
        (2, "1"),
    }


def test_images_may_be_bytes_or_files_next_to_the_table(tmp_path: Path) -> None:
    rows = [{"img": {"bytes": picture(row), "path": None}, "label": row % 2} for row in range(8)]
    task = load(write(tmp_path / "data.parquet", rows))
    assert task.modality == "images"
    assert task.test.samples[0][0]["bytes"].startswith(b"\x89PNG")
    (tmp_path / "0.png").write_bytes(picture(0))
    task = load(write(tmp_path / "data.csv", [{"image": "0.png", "label": row % 2} for row in range(8)]))
    assert Path(task.test.samples[0][0]["path"]).read_bytes() == picture(0)


def test_the_only_column_of_images_is_read(tmp_path: Path) -> None:
    """Under any name, as in training; among several, one must be called image or img."""
    rows = [{"picture": picture(row), "size": row % 3, "label": row % 2} for row in range(8)]
    task = load(write(tmp_path / "data.parquet", rows))
    assert task.modality == "images"
    assert task.test.samples[0][0]["bytes"].startswith(b"\x89PNG")
    path = write(tmp_path / "two.parquet", [{**row, "mask": row["picture"]} for row in rows])
    with pytest.raises(UsageError, match=r"has several columns of images: picture, mask\. Rename one to image"):
        load(path)
    assert (
        load(write(tmp_path / "named.parquet", [{**row, "img": row["picture"]} for row in rows])).modality == "images"
    )
    assert load(write(tmp_path / "text.parquet", [{**row, "text": "x"} for row in rows])).modality == "text"


def test_folders_of_images_are_classes(tmp_path: Path) -> None:
    """In one folder, or below train and test."""
    for part in ("all", "parts/train", "parts/test"):
        for row in range(8):
            path = tmp_path / part / ["cat", "dog"][row % 2] / f"{row}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(picture(row))
    task = load(str(tmp_path / "all"))
    assert (task.name, task.modality, len(task.train), len(task.test)) == ("all", "images", 6, 2)
    assert set(task.test.targets) == {"cat", "dog"}
    for stored, target in zip(task.train.samples[0], task.train.targets, strict=True):
        assert Path(stored["path"]).parent.name == target
    task = load(str(tmp_path / "parts"))
    assert (len(task.train), task.validation, len(task.test)) == (8, None, 8)


def test_a_folder_has_splits(tmp_path: Path) -> None:
    write(tmp_path / "news" / "train.jsonl", labelled(20))
    write(tmp_path / "news" / "test.csv", labelled(6))
    task = load(str(tmp_path / "news"))
    assert (task.name, len(task.train), task.validation, len(task.test)) == ("news", 20, None, 6)
    write(tmp_path / "news" / "dev.jsonl", labelled(8))
    assert len(load(str(tmp_path / "news")).validation) == 8
    (tmp_path / "news" / "test.csv").unlink()
    task = load(str(tmp_path / "news"))
    assert (len(task.train), task.validation, len(task.test)) == (20, None, 8)
    (tmp_path / "news" / "dev.jsonl").unlink()
    assert (len(load(str(tmp_path / "news")).train), len(load(str(tmp_path / "news")).test)) == (15, 5)


def vectors(names: str, count: int, seed: int) -> Rows:
    values = np.random.default_rng(seed).normal(size=(count, len(names)))
    return [dict(zip(names, row, strict=True)) | {"label": int(row[0] > 0)} for row in values.tolist()]


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
def test_columns_of_features_are_the_same_in_all_splits(kind: str, tmp_path: Path) -> None:
    """By name, whatever their order; unnamed ones and other labels are left out, and more than in training."""
    rows = vectors("abc", 20, 0)
    reordered = [{"label": row["label"], "c": row["c"], "extra": 1, "a": row["a"], "b": row["b"]} for row in rows]
    write(tmp_path / f"train.{kind}", [{"Unnamed: 0": at, **row, "target": 3} for at, row in enumerate(rows)])
    write(tmp_path / f"test.{kind}", reordered)
    task = load(str(tmp_path))
    assert task.feature_column_names == ("a", "b", "c")
    np.testing.assert_array_equal(task.train.samples[0], task.test.samples[0])
    (task,) = load_tasks([str(tmp_path)], feature_column_names=["c", "a"])
    np.testing.assert_allclose(task.test.samples[0][3], [rows[3]["c"], rows[3]["a"]], rtol=1e-6)
    with pytest.raises(UsageError, match=r"Column 'label' of .* holds the labels, but an encoder reads it"):
        load_tasks([str(tmp_path)], feature_column_names=["a", "label"])


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_named_row_numbers_are_not_samples(kind: str, tmp_path: Path) -> None:
    """A column that counts the rows does not make features of a table of texts."""
    rows = [{"index": row, "review": f"review {row}", "label": row % 2} for row in range(20)]
    task = load(write(tmp_path / f"a.{kind}", rows))
    assert (task.modality, task.test.samples[0][0][:6]) == ("text", "review")


def test_row_numbers_are_not_texts(tmp_path: Path) -> None:
    """A table as pandas writes it by default."""
    write(tmp_path / "data.csv", [{"": at, "review": f"a {at}", "class": at % 2} for at in range(20)])
    assert load(str(tmp_path / "data.csv")).modality == "text"


def test_a_data_set_has_splits_and_names_of_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["bad", "good"])}
    )
    splits = {
        name: datasets.Dataset.from_list(labelled(count), features=features)
        for name, count in (("train", 20), ("test", 6))
    }
    monkeypatch.setattr("jepa_hf.evaluation.task_tables.load_hub_dataset", lambda args: splits)
    task = load("me/reviews")
    assert (task.name, len(task.train), len(task.test), set(task.test.targets)) == ("reviews", 20, 6, {"bad", "good"})


@pytest.mark.parametrize("files", [("data.csv", "data.jsonl"), ("a/data.csv", "b/data.csv")])
def test_tasks_of_one_name_are_told_apart_without_the_path_to_them(files: tuple[str, str], tmp_path: Path) -> None:
    """Cards are public, so a name has no more folders than needed."""
    sources = [write(tmp_path / file, labelled()) for file in files]
    assert [task.name for task in load_tasks(sources)] == list(files)
    with pytest.raises(UsageError, match=r"is named twice\. Name each task once"):
        load_tasks([sources[0], sources[0]])


@given(count=st.integers(8, 200), classes=st.integers(2, 4), size=st.integers(1, 60), seed=st.integers(0, 5))
@settings(max_examples=30, deadline=None)
def test_draws_are_disjoint_in_order_and_always_the_same(
    count: int, classes: int, size: int, seed: int, tmp_path_factory: pytest.TempPathFactory
) -> None:
    source = write(tmp_path_factory.mktemp("draw") / "data.jsonl", labelled(count, classes))
    args = {"max_test_samples": size, "seed": seed}
    task, again = load(source, **args), load(source, **args)
    train, test = task.train.samples[0], task.test.samples[0]
    assert (train, test) == (again.train.samples[0], again.test.samples[0])
    assert not set(train) & set(test)
    assert len(test) == min(size, max(round(count / 4), classes))
    for texts, split in ((train, task.train), (test, task.test)):
        numbers = [int(text.split()[1]) for text in texts]
        assert numbers == sorted(numbers)
        assert [str(number % classes) for number in numbers] == list(split.targets)


def test_drawn_and_held_out_rows_keep_the_shares_of_the_classes(tmp_path: Path) -> None:
    """Also in files that are sorted by label."""
    rows = sorted(labelled(400, 4), key=lambda row: row["label"])
    task = load(write(tmp_path / "data.csv", rows), max_train_samples=40, max_test_samples=20)
    assert np.unique(task.train.targets, return_counts=True)[1].tolist() == [10] * 4
    assert np.unique(task.test.targets, return_counts=True)[1].tolist() == [5] * 4


ONE_CLASS = [{"text": "a", "label": 1}] * 8
SCORED = [{"sentence1": "a", "sentence2": "b", "score": value} for value in range(4)]


@pytest.mark.parametrize(
    ("rows", "args", "sentence"),
    [
        ([{"text": "a"}] * 3, {}, "has neither a column of labels nor pairs of texts. .* Its columns are: text."),
        (labelled(), {"label_column_name": "topic"}, "has no column 'topic'. Its columns are: text, label"),
        (labelled(), {"text_column_name": "body"}, "has no column 'body'. Its columns are: text, label"),
        (labelled(), {"text_column_name": "text,label,text"}, "one column, or two for pairs, got 3"),
        (ONE_CLASS, {}, "has a single class in its training rows, '1'"),
        ([*labelled(), {"text": "a", "label": 9}], {}, "has the class '9' in a single row"),
        (labelled(3), {}, "in a single row"),
        (labelled(4), {"max_train_samples": 1}, "has a single class"),
        (
            [*labelled(), {"text": None, "label": 0}],
            {},
            "Row 41 of .* has NoneType .* in column 'text', which must hold strings",
        ),
        (
            [*labelled(), {"text": 5, "label": 0}],
            {},
            r"Row 41 of .* has int \(5\) in column 'text', which must hold strings. Convert",
        ),
        ([*labelled(), {"text": "a", "label": None}], {}, "Row 41 of .* has no label in column 'label'"),
        ([{"text": "a", "label": 0.5}] * 4, {}, "a class in column 'label', got the number 0.5 in row 1 of"),
        ([{"text": "a", "label": [1]}] * 4, {}, "a class in column 'label', got list in row 1 of"),
        ([{**row, "score": 1} for row in SCORED], {}, "has the same score in all rows"),
        ([*SCORED, {**SCORED[0], "score": "good"}], {}, "in column 'score', got 'good' in row 5 of"),
        ([{"a": None, "b": 1.0, "label": row % 2} for row in range(8)], {}, "Row 1 .*empty cell"),
        ([{"a": "x", "b": "y", "label": 1}] * 4, {}, "has several columns of texts: a, b. Name one by"),
        (labelled(), {"max_test_samples": 0}, "max_test_samples must be at least 1, not 0"),
    ],
)
def test_what_makes_no_task_is_one_sentence(rows: Rows, args: Any, sentence: str, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=sentence) as refusal:
        load(write(tmp_path / "data.jsonl", rows), **args)
    assert "\n" not in str(refusal.value)


def test_a_nan_is_reported_with_its_location(tmp_path: Path) -> None:
    (tmp_path / "data.csv").write_text("a,b,label\n1,2,x\n3,nan,y\n")
    with pytest.raises(UsageError, match=r"Row 2 .*line 3.* has nan in column 'b'"):
        load(str(tmp_path / "data.csv"))


def test_missing_or_empty_sources_are_refused(tmp_path: Path) -> None:
    empty, other, folder = tmp_path / "empty.csv", tmp_path / "a.xls", tmp_path / "folder"
    folder.mkdir()
    empty.touch()
    other.write_text("x")
    np.save(tmp_path / "a.npy", np.zeros((3, 2)))
    (tmp_path / "bad.npz").write_bytes(b"no")
    (tmp_path / "header.csv").write_text("text,label\n")
    for source, sentence in (
        (empty, "is empty. Give a file with rows"),
        (other, "unknown suffix '.xls'"),
        (folder, "is a folder without a file test.* or train.*"),
        (tmp_path / "none.csv", "does not exist. Check the path"),
        (tmp_path / "a.npy", "has no labels. Save an .npz file"),
        (tmp_path / "bad.npz", "cannot be read as arrays"),
        (tmp_path / "header.csv", "has no rows"),
        ("nobody/nothing", "is neither a file nor a folder, and no dataset was loaded"),
    ):
        with pytest.raises(UsageError, match=sentence) as refusal:
            load(str(source))
        assert "\n" not in str(refusal.value)


@pytest.mark.parametrize("name", ["test", "dev"])
def test_classes_that_cannot_be_learnt_are_counted(name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """They count as wrong, so a warning says how many rows have them, and which classes these are."""
    write(tmp_path / "train.jsonl", labelled(20))
    write(tmp_path / "test.jsonl", labelled(20))
    write(tmp_path / f"{name}.jsonl", labelled(21, 3))
    load(str(tmp_path))
    split = {"dev": "validation"}.get(name, name)
    assert f"7 of 21 {split} rows have a class that no training row has, and count as wrong: '2'" in caplog.text


@pytest.mark.parametrize("labels", [("0.0", "1.0"), (" 0", "1 "), ("zero", "one"), (True, False)])
def test_classes_that_are_written_differently_are_refused(labels: tuple[Any, Any], tmp_path: Path) -> None:
    """All test rows would count as wrong; the sentence shows both spellings."""
    write(tmp_path / "train.jsonl", labelled(20))
    write(tmp_path / "test.jsonl", [{"text": "a", "label": label} for label in labels])
    first, second = sorted(map(str, labels))
    with pytest.raises(UsageError, match=rf"training rows \('0', '1'\) in its test rows \('{first}', '{second}'\)"):
        load(str(tmp_path))


@pytest.mark.parametrize(("labels", "classes"), [((0.0, 1), {"0", "1"}), ((True, False), {"True", "False"})])
def test_classes_may_be_whole_floats_and_booleans(labels: Any, classes: set[str], tmp_path: Path) -> None:
    rows = [{"text": f"text {row}", "label": labels[row % 2]} for row in range(20)]
    assert set(require_targets(load(write(tmp_path / "a.jsonl", rows)).test)) == classes


def test_two_files_of_one_split_are_refused(tmp_path: Path) -> None:
    for name in ("test.csv", "test.jsonl"):
        write(tmp_path / name, labelled(20))
    with pytest.raises(UsageError, match=r"has test.csv and test.jsonl. Remove one of them"):
        load(str(tmp_path))
