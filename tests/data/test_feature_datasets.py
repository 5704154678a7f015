"""Claims of jepa_hf/data/feature_*.py."""

import gzip
import json
import logging
import re
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Array2D, ClassLabel, Dataset, DatasetDict, Features, List, Value
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as st_numpy

from jepa_hf.data import (
    feature_arrays,
    feature_blocks,
    feature_csv,
    feature_datasets,
    feature_json,
    feature_readers,
    file_readers,
)
from jepa_hf.data.arguments import DataArguments
from jepa_hf.data.feature_datasets import (
    feature_column_names,
    feature_shape,
    feature_statistics,
    load_feature_datasets,
    series_lengths,
)
from jepa_hf.data.file_readers import log_once
from jepa_hf.errors import UsageError

RANDOM = np.random.default_rng(0)
VECTORS = RANDOM.normal(size=(7, 3)).astype(np.float32)
SERIES = [RANDOM.normal(size=(steps, 2)).astype(np.float32) for steps in (3, 1, 5, 2)]
TABLES = ("csv", "tsv", "json", "jsonl", "parquet")
PACKED_TABLES = [*TABLES, *(f"{ending}.gz" for ending in TABLES)]


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test works in a directory of its own, with its own cache."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def set_constants(monkeypatch: pytest.MonkeyPatch, **constants: int) -> None:
    """Set constants of the readers in all files that use them."""
    for module in (feature_arrays, feature_blocks, feature_csv, feature_datasets, feature_json, feature_readers):
        for name, value in constants.items():
            monkeypatch.setattr(module, name, value, raising=False)


def write(name: str, content: str | bytes) -> str:
    """Write a file, gzipped if it is called so."""
    content = content.encode() if isinstance(content, str) else content
    Path(name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return name


def write_table(name: str, rows: list[dict[str, Any]]) -> str:
    """Write rows of plain Python values in the format that the ending stands for; texts must not hold separators."""
    match name.removesuffix(".gz").rpartition(".")[2]:
        case "parquet":
            file = pa.BufferOutputStream()
            pq.write_table(pa.Table.from_pylist(rows), file)
            return write(name, file.getvalue().to_pybytes())
        case "jsonl":
            return write(name, "".join(json.dumps(row) + "\n" for row in rows))
        case "json":
            return write(name, json.dumps(rows, indent=1))
        case ending:
            separator = "," if ending == "csv" else "\t"
            lines = [list(rows[0]), *(["" if value is None else str(value) for value in row.values()] for row in rows)]
            return write(name, "".join(separator.join(line) + "\n" for line in lines))


def rows_of(vectors: np.ndarray, names: str = "abc", **others: Any) -> list[dict[str, Any]]:
    return [dict(zip(names, map(float, vector), strict=True)) | others for vector in vectors]


def save(name: str, array: np.ndarray) -> str:
    np.save(name, array)
    return name


def load(train_file: str | None = None, need_validation: bool = False, seed: int = 0, **arguments: Any) -> Any:
    train, validation = load_feature_datasets(
        DataArguments(train_file=train_file, **arguments), seed=seed, need_validation=need_validation
    )
    return (train, validation) if need_validation else train


def arrays(dataset: Dataset) -> list[np.ndarray]:
    """The rows, one by one, as a data loader reads them."""
    assert dataset.column_names == ["features"]
    dataset = dataset.with_format("numpy")
    return [dataset[index]["features"] for index in range(len(dataset))]


def assert_rows(dataset: Dataset, expected: Any) -> None:
    """Each row is the very float32 array that is expected, also where a batch of rows is read."""
    actual, together = arrays(dataset), dataset.with_format("numpy")[:]["features"]
    assert len(actual) == len(together) == len(expected) > 0
    for row, other, wanted in zip(actual, together, expected, strict=True):
        assert isinstance(row, np.ndarray)
        assert row.dtype == other.dtype == np.float32
        assert np.array_equal(row, wanted)
        assert np.array_equal(other, wanted)


def assert_refused(message: str, *args: Any, **arguments: Any) -> None:
    """Loading raises a `UsageError` with this message, in one line and without what caused it."""
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        load(*args, **arguments)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__


class TestArrays:
    @pytest.mark.parametrize("dtype", ["<f4", ">f4", "f2", "f8", "i1", "u2", "i8"])
    @pytest.mark.parametrize("order", ["C", "F"])
    @pytest.mark.parametrize("shape", [(7, 3), (4, 5, 2), (2, 1, 1)])
    def test_npy_of_every_type_and_order(self, dtype, order, shape):
        array = np.asarray(RANDOM.normal(size=shape) * 50 + 60, dtype=dtype, order=order)
        dataset = load(save("x.npy", array))
        assert_rows(dataset, array.astype(np.float32))
        assert feature_shape(dataset) == (len(shape) == 3, shape[-1])

    def test_float32_stays_on_disk(self):
        """What is written to the file afterwards is read: no copy was made."""
        dataset = load(save("x.npy", VECTORS))
        np.lib.format.open_memmap("x.npy", mode="r+")[5] = [7, 8, 9]
        assert_rows(dataset, [*VECTORS[:5], [7, 8, 9], VECTORS[6]])

    @pytest.mark.parametrize("shape", [(40, 3), (11, 3, 2)])
    def test_blocks_join_to_the_full_table(self, shape, monkeypatch):
        set_constants(monkeypatch, BLOCK_SIZE=18)
        array = RANDOM.normal(size=shape)
        dataset = load(save("x.npy", array))
        assert dataset.data.column("features").num_chunks > 3
        assert_rows(dataset, array.astype(np.float32))
        array[-1, -1, ...] = np.nan
        assert_refused(f"Row {shape[0]}", save("y.npy", array))

    @pytest.mark.parametrize("name", ["features", "X", "x", "anything"])
    def test_npz_of_one_array(self, name):
        np.savez("x.npz", **{name: VECTORS})
        assert_rows(load("x.npz"), VECTORS)

    def test_npz_of_several_arrays(self):
        np.savez_compressed("x.npz", y=np.arange(7), X=VECTORS, other=VECTORS + 1)
        assert_rows(load("x.npz"), VECTORS)
        assert_rows(load("x.npz", feature_column_names="other"), VECTORS + 1)
        np.savez("z.npz", target=np.arange(7), mine=VECTORS)
        assert_rows(load("z.npz"), VECTORS)
        np.savez("y.npz", y=np.arange(7), mine=VECTORS)
        assert_rows(load("y.npz", label_column_name="y"), VECTORS)

    @pytest.mark.parametrize("names", [("one", "two"), ("X", "x"), ()])
    def test_npz_that_is_not_clear(self, names):
        np.savez("x.npz", **dict.fromkeys(names, VECTORS))
        listed = ", ".join(names) or "(none)"
        assert_refused(f"'x.npz' has the arrays {listed}, of which", "x.npz")
        assert_refused("Name one with --feature_column_names", "x.npz")

    def test_npz_without_the_named_array(self):
        np.savez("x.npz", one=VECTORS)
        assert_refused("'x.npz' has no array 'two'. Name one", "x.npz", feature_column_names="two")

    def test_npz_with_lengths_holds_ragged_series_whatever_the_padding(self):
        padded = np.full((4, 6, 2), np.nan)
        for row, series in zip(padded, SERIES, strict=True):
            row[: len(series)] = series
        np.savez("x.npz", features=padded, lengths=[len(series) for series in SERIES])
        dataset = load("x.npz")
        assert_rows(dataset, SERIES)
        assert feature_shape(dataset) == (True, 2)
        assert series_lengths(dataset).tolist() == list(map(len, SERIES))
        assert series_lengths(dataset.select([0])).tolist() == [len(SERIES[0])]
        padded[2, 4, 1] = np.inf
        np.savez("y.npz", features=padded, lengths=[len(series) for series in SERIES])
        assert_refused("Row 3, step 5, of 'y.npz' has inf in column 2 instead", "y.npz")

    @pytest.mark.parametrize("length", [0, -1, 4])
    def test_npz_with_a_length_out_of_range(self, length):
        np.savez("x.npz", features=np.zeros((2, 3, 2)), lengths=[3, length])
        assert_refused(f"Row 2 of 'x.npz' has the length {length}. Lengths must be from 1 to", "x.npz")

    @pytest.mark.parametrize("lengths", [[1], [1.0, 2.0], [[1], [2]]])
    def test_npz_with_lengths_of_another_kind(self, lengths):
        np.savez("x.npz", features=np.zeros((2, 3, 2)), lengths=lengths)
        assert_refused("for features of shape (2, 3, 2). Save one integer per series", "x.npz")

    @pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e39])
    def test_a_number_that_is_not_finite(self, value):
        array = np.zeros((5, 3))
        array[3, 1] = value
        problem = f"has {np.clip(value, -np.inf, np.inf) if abs(value) != 1e39 else np.inf} in column 2 instead of"
        assert_refused(f"Row 4 of 'x.npy' {problem}", save("x.npy", array))
        array = np.zeros((5, 4, 3))
        array[3, 2, 1] = value
        assert_refused(f"Row 4, step 3, of 'x.npy' {problem}", save("x.npy", array))

    @pytest.mark.parametrize("shape", [(7,), (), (2, 2, 2, 2), (3, 0), (3, 0, 2), (3, 2, 0)])
    def test_another_shape(self, shape):
        assert_refused(f"'x.npy' has the shape {shape}. Save vectors as", save("x.npy", np.zeros(shape)))

    @pytest.mark.parametrize("shape", [(0, 3), (0, 4, 3)])
    def test_no_rows(self, shape):
        assert_refused("No rows in 'x.npy'. Provide data", save("x.npy", np.zeros(shape, dtype=np.float32)))

    @pytest.mark.parametrize("dtype", ["complex64", "bool", "<U3", "datetime64[s]"])
    def test_no_numbers(self, dtype):
        assert_refused(f"'x.npy' holds {dtype}, not numbers", save("x.npy", np.zeros((2, 2)).astype(dtype)))

    def test_objects_are_never_unpickled(self):
        ragged = np.empty(2, dtype=object)
        ragged[:] = [[1.0], [1.0, 2.0]]
        np.save("x.npy", ragged, allow_pickle=True)
        assert_refused("'x.npy' cannot be read as an array of numbers: Array can't be memory-mapped", "x.npy")
        np.savez("x.npz", features=ragged)
        assert_refused("'x.npz' cannot be read as an array of numbers: Object arrays cannot be loaded", "x.npz")

    @pytest.mark.parametrize("name", ["x.npy", "x.npz"])
    @pytest.mark.parametrize("damage", ["empty", "cut", "other"])
    def test_damaged_files(self, name, damage):
        (np.save if name == "x.npy" else np.savez)(name, VECTORS)
        content = Path(name).read_bytes()
        write(name, {"empty": b"", "cut": content[:-30], "other": b"something else"}[damage])
        assert_refused(f"'{name}' cannot be read as an array of numbers: ", name)

    def test_arrays_have_no_named_columns(self):
        save("x.npy", VECTORS)
        assert_refused("'x.npy' has no column names. Omit", "x.npy", feature_column_names="a")


class TestTables:
    @pytest.mark.parametrize("ending", PACKED_TABLES)
    def test_columns_of_numbers_make_the_vector(self, ending):
        dataset = load(write_table(f"x.{ending}", rows_of(VECTORS)))
        assert_rows(dataset, VECTORS)
        assert feature_shape(dataset) == (False, 3)

    @pytest.mark.parametrize("ending", TABLES)
    def test_columns_of_text_are_ignored_and_named(self, ending, caplog):
        rows = [{"name": "first", **row, "note": "n"} for row in rows_of(VECTORS)]
        with caplog.at_level(logging.INFO, "jepa_hf"):
            assert_rows(load(write_table(f"x.{ending}", rows)), VECTORS)
        message = f"'x.{ending}': 3 feature columns: a, b, c; left out: 'name' (no numbers), 'note' (no numbers)"
        assert caplog.messages == [message]

    @pytest.mark.parametrize("ending", TABLES)
    def test_the_label_is_left_out_and_columns_can_be_chosen(self, ending):
        path = write_table(f"x.{ending}", rows_of(VECTORS, y=1))
        assert_rows(load(path, label_column_name="y"), VECTORS)
        assert_rows(load(path, feature_column_names=" c, a"), VECTORS[:, [2, 0]])
        assert_rows(load(path), np.hstack([VECTORS, np.ones((7, 1))]))

    @pytest.mark.parametrize("ending", TABLES)
    @pytest.mark.parametrize(
        "names", [("label",), ("Class",), ("labels", "target"), ("Unnamed: 0",), ("", "Unnamed: 0.1")]
    )
    def test_labels_and_row_numbers_are_no_features(self, ending, names, caplog):
        """Columns with the names that evaluate takes for labels, and columns without a name."""
        path = write_table(f"x.{ending}", rows_of(VECTORS, **dict.fromkeys(names, 1)))
        with caplog.at_level(logging.INFO, "jepa_hf"):
            assert_rows(load(path), VECTORS)
        assert all(
            f"'{name}' ({'label' if name.strip('s').islower() or name == 'Class' else 'row numbers'})" in caplog.text
            for name in names
        )
        assert_rows(load(path, feature_column_names=f"a,{names[-1]}"), np.stack([VECTORS[:, 0], np.ones(7)], axis=1))

    @pytest.mark.parametrize("first", [0, 1, 2])
    def test_a_named_column_of_row_numbers_is_a_feature_with_a_warning(self, first, caplog):
        """It may be one, so it stays; numbers that only ascend do not count rows."""
        log_once.cache_clear()
        path = write_table("x.csv", [{"index": first + row, "a": row / 2} for row in range(12)])
        assert feature_column_names(load(path)) == ["index", "a"]
        warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        assert [text.startswith("column 'index' of 'x.csv' counts the rows") for text in warnings] == [True] * (
            first < 2
        )

    def test_the_index_of_pandas_is_no_feature(self):
        """Neither `__index_level_0__` nor an index with a name; a named label makes other label names features."""
        frame = pd.DataFrame(VECTORS, columns=list("abc")).sample(frac=1, random_state=0)
        frame.to_parquet("x.parquet")
        assert_rows(load("x.parquet"), frame.to_numpy())
        frame.rename_axis("number").to_parquet("y.parquet")
        assert_rows(load("y.parquet"), frame.to_numpy())
        frame.to_csv("z.csv")
        assert_rows(load("z.csv"), frame.to_numpy())
        path = write_table("l.csv", rows_of(VECTORS, target=1, y=2))
        assert_rows(load(path, label_column_name="y"), np.hstack([VECTORS, np.ones((7, 1))]))

    @pytest.mark.parametrize("ending", TABLES)
    def test_the_columns_of_a_trained_encoder_are_found_by_name(self, ending):
        """In any order, among others; a missing one is named, and names given by hand do not change the order."""
        path = write_table(f"x.{ending}", rows_of(VECTORS, broken=None))
        expected = DataArguments(train_file=path)
        dataset, _ = load_feature_datasets(expected, seed=0, need_validation=False, column_names=["c", "a"])
        assert_rows(dataset, VECTORS[:, [2, 0]])
        assert feature_column_names(dataset.select([1])) == ["c", "a"]
        expected.feature_column_names = "a,c"
        dataset, _ = load_feature_datasets(expected, seed=0, need_validation=False, column_names=["c", "a"])
        assert_rows(dataset, VECTORS[:, [2, 0]])
        with pytest.raises(UsageError, match="--feature_column_names lacks the column 'b' of the training data"):
            load_feature_datasets(expected, seed=0, need_validation=False, column_names=["c", "b"])
        expected.feature_column_names = None
        with pytest.raises(UsageError, match=r"No column 'z' in 'x.*', which lacks 1 of the 2 columns"):
            load_feature_datasets(expected, seed=0, need_validation=False, column_names=["a", "z"])

    def test_arrays_have_no_names_and_are_read_in_their_order(self, caplog):
        """Also after a table, and for an encoder with names, which is said."""
        save("x.npy", VECTORS)
        with caplog.at_level(logging.INFO, "jepa_hf"):
            dataset, _ = load_feature_datasets(
                DataArguments(train_file="x.npy"), seed=0, need_validation=False, column_names=["c", "b", "a"]
            )
        assert_rows(dataset, VECTORS)
        assert feature_column_names(dataset) is None
        assert caplog.messages == ["'x.npy': no column names; its columns are read as c, b, a, in this order"]

    @pytest.mark.parametrize("ending", TABLES)
    def test_wrong_choices(self, ending):
        path = write_table(f"x.{ending}", rows_of(VECTORS, name="z"))
        assert_refused(f"No column 'd' in 'x.{ending}'. Choose columns with", path, feature_column_names="a,d")
        assert_refused("out of: a, b, c, name", path, feature_column_names="a,d")
        assert_refused(f"Column 'name' of 'x.{ending}' holds string, not numbers", path, feature_column_names="a,name")
        assert_refused(
            f"No column 'y' in 'x.{ending}'. Correct --label_column_name, out of: a, b", path, label_column_name="y"
        )

    @pytest.mark.parametrize("ending", TABLES)
    def test_no_column_of_numbers(self, ending):
        path = write_table(f"x.{ending}", [{"name": "z", "y": 1}])
        message = f"No column of numbers in 'x.{ending}'. Its columns are: name, y"
        assert_refused(message, path, label_column_name="y")

    @pytest.mark.parametrize("ending", TABLES)
    def test_an_empty_cell(self, ending):
        rows = rows_of(VECTORS)
        rows[4]["b"] = None
        line = " (line 6)" if ending in ("csv", "tsv") else ""
        path = write_table(f"x.{ending}", rows)
        assert_refused(f"Row 5{line} of 'x.{ending}' has an empty cell in column 'b' instead of a finite", path)
        # A column that is all empty is not passed over.
        path = write_table(f"y.{ending}", [{"a": 1.0, "b": None}] * 3)
        line = " (line 2)" if line else ""
        assert_refused(f"Row 1{line} of 'y.{ending}' has an empty cell in column 'b' instead of a finite", path)

    @pytest.mark.parametrize("ending", TABLES)
    @pytest.mark.parametrize("value", [np.nan, -np.inf])
    def test_a_number_that_is_not_finite(self, ending, value):
        rows = rows_of(VECTORS)
        rows[4]["c"] = value
        line = " (line 6)" if ending in ("csv", "tsv") else ""
        path = write_table(f"x.{ending}", rows)
        assert_refused(f"Row 5{line} of 'x.{ending}' has {value} in column 'c' instead of a finite", path)

    @pytest.mark.parametrize("ending", TABLES)
    def test_the_same_columns_in_another_order_are_put_in_order(self, ending):
        write_table(f"1.{ending}", rows_of(VECTORS))
        write_table(f"2.{ending}", rows_of(VECTORS[:, ::-1], "cba", word="z"))
        assert_rows(load(f"*.{ending}"), np.vstack([VECTORS, VECTORS]))
        _, validation = load(f"1.{ending}", validation_file=f"2.{ending}", need_validation=True)
        assert_rows(validation, VECTORS)

    def test_later_tables_may_hold_more_columns_but_not_fewer(self, caplog):
        write_table("1.csv", rows_of(VECTORS))
        more = write_table("2.csv", rows_of(VECTORS[:, [2, 0, 1]], "cab", d=1.0, e=None))
        with caplog.at_level(logging.INFO, "jepa_hf"):
            assert_rows(load("1.csv, 2.csv"), np.vstack([VECTORS, VECTORS]))
            _, validation = load("1.csv", validation_file=more, need_validation=True)
        assert_rows(validation, VECTORS)
        assert "left out: 'd' (not a feature of the training data), 'e' (not" in caplog.messages[1]
        fewer = write_table("3.csv", rows_of(np.ones((2, 2)), "ab"))
        message = "No column 'c' in '3.csv', which lacks 1 of the 3 columns of the training data (a, b, c). Add"
        assert_refused(message, "1.csv", validation_file=fewer, need_validation=True)
        assert_refused(message, "1.csv, 3.csv")
        _, validation = load("1.csv", validation_file=fewer, need_validation=True, feature_column_names="a,b")
        assert_rows(validation, np.ones((2, 2)))

    @pytest.mark.parametrize("ending", TABLES)
    def test_rows_of_all_batches(self, ending, monkeypatch):
        set_constants(monkeypatch, BATCH_ROWS=3)
        set_constants(monkeypatch, BLOCK_SIZE=200)
        vectors = RANDOM.normal(size=(50, 3)).astype(np.float32)
        dataset = load(write_table(f"x.{ending}", rows_of(vectors)))
        assert dataset.data.column("features").num_chunks > 5
        assert_rows(dataset, vectors)
        rows = rows_of(vectors)
        rows[47]["b"] = None
        assert_refused("Row 48", write_table(f"y.{ending}", rows))


class TestCsv:
    def test_quotes_spaces_signs_breaks_and_byte_order_mark(self):
        content = '\ufeff"a",b,s\r\n"1", +2 ,"x,\r\ny"\r\n\r\n-3e-1,.5,z\r\n'
        assert_rows(load(write("x.csv", content)), np.array([[1, 2], [-0.3, 0.5]], dtype=np.float32))

    @pytest.mark.parametrize("name", ["x.csv", "x.tsv"])
    @pytest.mark.parametrize("separator", [",", ";", "\t", "|"])
    def test_the_header_decides_about_the_separator(self, separator, name):
        content = "a,b\n1,2\n3,4\n".replace(",", separator)
        assert_rows(load(write(name, content)), np.array([[1, 2], [3, 4]], dtype=np.float32))

    def test_decimals_become_the_nearest_float32(self):
        texts = ["0.1", "16777217.0000001", "3.4028235e38", "1e-45", "0.30000001192092896"]
        content = "".join(f"{text}\n" for text in ["a", *texts])
        assert_rows(load(write("x.csv", content)), [[np.float32(text)] for text in texts])

    @pytest.mark.parametrize(
        ("cell", "quoted"),
        [("NA", "'NA'"), ("1_0", "'1_0'"), ("1,5", "'1,5'"), (" ", "an empty cell"), ("1e39", "1e39")],
    )
    def test_what_is_no_number_is_named_with_row_line_and_column(self, cell, quoted):
        # The text before it takes two lines, and an empty line is not a row.
        content = f'a,s,b\n1,"x\ny",2\n\n3,z,"{cell}"\n'
        assert_refused(f"Row 2 (line 5) of 'x.csv' has {quoted} in column 'b' instead", write("x.csv", content))

    @pytest.mark.parametrize(
        "content", ["a;b\n0,5;1,2\n0,6;1,3\n", 'b,a\n1,"0,5"\n2,"-1.000,6"\n', "b\ta\n1\t0,5\n", "a;b\n0,5;2\n0.5;3\n"]
    )
    def test_decimal_commas_are_refused(self, content):
        """Also where a column holds nothing else, which is then no column of texts."""
        message = (
            "Row 1 (line 2) of 'x.csv' has '0,5' in column 'a' instead of a finite float32 number. Write a decimal"
        )
        assert_refused(message, write("x.csv", content))

    def test_columns_without_names_may_be_several(self):
        assert_rows(load(write("x.csv", "a,,\n1,,x\n")), [[1.0]])

    def test_a_late_word_in_a_column_of_numbers(self):
        content = "a,b\n" + "1,2\n" * 2000 + "1,x\n"
        assert_refused("Row 2001 (line 2002) of 'x.csv' has 'x' in column 'b'", write("x.csv", content))

    @pytest.mark.parametrize("row", ["1", "1,2,3"])
    def test_a_row_of_another_width(self, row):
        width = row.count(",") + 1
        message = f"Row 2 (line 3) of 'x.csv' has {width} value{'s' if width > 1 else ''} for 2 columns. Put double"
        assert_refused(message, write("x.csv", f"a,b\n1,2\n{row}\n3,4\n"))

    def test_broken_quotes(self):
        assert_refused("of 'x.csv' is not valid CSV", write("x.csv", 'a,b\n1,"2"3\n'))

    def test_several_columns_of_one_name(self):
        assert_refused("'x.csv' has several columns 'b'. Rename all but one", write("x.csv", "a,b,b\n1,2,3\n"))

    @pytest.mark.parametrize("content", ["", "a,b\n", "\n\n"])
    def test_no_rows(self, content):
        assert_refused("No rows in 'x.csv'. Provide data", write("x.csv", content))

    def test_other_encodings(self):
        assert_refused("'x.csv' is not UTF-8 at byte 2", write("x.csv", "a,ä\n1,2\n".encode("latin-1")))

    @pytest.mark.parametrize("ending", TABLES)
    def test_a_cut_gzip_file(self, ending):
        path = write_table(f"x.{ending}.gz", rows_of(RANDOM.normal(size=(3000, 3))))
        Path(path).write_bytes(Path(path).read_bytes()[:-100])
        assert_refused(f"'x.{ending}.gz' is not a complete gzip file", path)


class TestLists:
    @pytest.mark.parametrize("ending", ["json", "jsonl", "parquet", "parquet.gz", "jsonl.gz"])
    def test_a_column_of_lists(self, ending):
        rows = [{"name": "z", "emb": vector.tolist()} for vector in VECTORS]
        assert_rows(load(write_table(f"x.{ending}", rows)), VECTORS)
        rows = [{"name": "z", "emb": series.tolist()} for series in SERIES]
        dataset = load(write_table(f"y.{ending}", rows))
        assert_rows(dataset, SERIES)
        assert feature_shape(dataset) == (True, 2)

    @pytest.mark.parametrize(
        "kind",
        [pa.large_list(pa.float64()), pa.list_(pa.float16(), 3), pa.list_(pa.float32()), pa.list_(pa.decimal128(9, 2))],
        ids=str,
    )
    def test_every_type_of_list_in_parquet(self, kind):
        vectors = np.array([[1, 2.5, 3], [4, 5, 6.25]])
        values = pa.array(vectors.tolist(), type=pa.list_(pa.float64())).cast(kind)
        pq.write_table(pa.table({"emb": values}), "x.parquet")
        assert_rows(load("x.parquet"), vectors)

    def test_parquet_that_datasets_wrote(self):
        features = Features({"x": Array2D(shape=(None, 2), dtype="float64")})
        Dataset.from_dict({"x": [series.tolist() for series in SERIES]}, features=features).to_parquet("x.parquet")
        assert_rows(load("x.parquet"), SERIES)

    def test_lists_next_to_numbers_must_be_chosen(self):
        path = write_table("x.jsonl", [{"y": 1, "emb": [1.0, 2.0], "other": [3.0]}] * 2)
        assert_refused("Column 'emb' of 'x.jsonl' holds lists and cannot be joined with column 'y'. Choose", path)
        message = "Column 'emb' of 'x.jsonl' holds lists and cannot be joined with column 'other'. Choose"
        assert_refused(message, path, label_column_name="y")
        assert_refused(message, path, feature_column_names="emb,other")
        assert_rows(load(path, feature_column_names="emb"), [[1.0, 2.0]] * 2)

    @pytest.mark.parametrize("ending", ["jsonl", "parquet"])
    @pytest.mark.parametrize(
        ("values", "problem"),
        [
            ([[1.0, 2.0], [3.0]], "Row 2 of {} has 1 numbers in column 'x', expected 2"),
            ([[[1.0, 2.0]], [[3.0, 4.0], [5.0]]], "Row 2, step 2, of {} has 1 numbers in column 'x', expected 2"),
            ([[[1.0, 2.0], None]], "Row 1, step 2, of {} has 0 numbers in column 'x', expected 2"),
            ([[[]], [[1.0]]], "Row 1, step 1, of {} has 0 numbers in column 'x', expected at least 1"),
            ([[1.0], []], "Row 2 of {} has an empty list in column 'x'"),
            ([[1.0], None], "Row 2 of {} has an empty list in column 'x'"),
            ([[[1.0]], []], "Row 2 of {} has an empty series in column 'x'"),
            ([[[1.0]], None], "Row 2 of {} has an empty series in column 'x'"),
            ([[], [[1.0]]], "Row 1 of {} has an empty series in column 'x'"),
            ([[1.0, 2.0], [3.0, None]], "Row 2 of {} has an empty cell in column 'x', position 2 instead of a finite"),
            (
                [[[1.0, 2.0]], [[3.0, 4.0], [None, 5.0]]],
                "Row 2, step 2, of {} has an empty cell in column 'x', position 1",
            ),
            ([[1.0, 2.0], [3.0, np.nan]], "Row 2 of {} has nan in column 'x', position 2 instead of a finite"),
            ([[[1.0, 2.0]], [[3.0, 4.0], [np.inf, 5.0]]], "Row 2, step 2, of {} has inf in column 'x', position 1"),
        ],
    )
    def test_what_is_wrong_is_named_with_row_step_and_place(self, ending, values, problem):
        path = write_table(f"x.{ending}", [{"x": value} for value in values])
        assert_refused(problem.format(f"'{path}'"), path)

    def test_a_width_that_changes_in_a_later_batch(self, monkeypatch):
        set_constants(monkeypatch, BATCH_ROWS=2)
        path = write_table("x.jsonl", [{"x": [1.0, 2.0]}] * 4 + [{"x": [1.0, 2.0, 3.0]}] * 2)
        assert_refused("Row 5 of 'x.jsonl' has 3 numbers in column 'x', expected 2", path)

    def test_parquet_with_lists_of_lists_of_lists_or_texts_has_no_numbers(self):
        write_table("x.parquet", [{"deep": [[[1.0]]], "words": ["a"], "flag": True, "struct": {"a": 1}}])
        assert_refused("No column of numbers in 'x.parquet'. Its columns are: deep, words", "x.parquet")


class TestJson:
    @pytest.mark.parametrize(
        ("values", "problem"),
        [
            ([1, "abc"], "Row 2 of 'x.jsonl' has 'abc' in column 'x' instead of a finite"),
            (["abc", 1], "Row 1 of 'x.jsonl' has 'abc' in column 'x' instead of a finite"),
            ([1, 2.5, True], "Row 3 of 'x.jsonl' has True in column 'x' instead of a finite"),
            ([1, [2]], "Row 1 of 'x.jsonl' has 1 in column 'x' instead of a list"),
            ([[1, 2], [3, "a"]], "Row 2 of 'x.jsonl' has 'a' in column 'x', position 2 instead of a finite"),
            ([[1, 2], [3, True]], "Row 2 of 'x.jsonl' has True in column 'x', position 2 instead of a finite"),
            ([[[1, 2]], [[3, 4], [5, "a"]]], "Row 2, step 2, of 'x.jsonl' has 'a' in column 'x', position 2 instead"),
            ([[[1, 2]], [[3, 4], 5]], "Row 2, step 2, of 'x.jsonl' has 5 in column 'x' instead of a list"),
            ([1, 10**30], "Column 'x' of 'x.jsonl' holds integers of more than 53 bits. Write them as floats"),
            ([True, [1]], "Row 1 of 'x.jsonl' has True in column 'x' instead of a list"),
            ([[1], {"a": 1}], "Row 2 of 'x.jsonl' has {'a': 1} in column 'x' instead of a list"),
            ([[], []], "Row 1 of 'x.jsonl' has [] in column 'x' instead of a finite"),
        ],
    )
    def test_what_is_no_number_is_named(self, values, problem):
        assert_refused(problem, write_table("x.jsonl", [{"x": value} for value in values]))

    def test_a_late_word_in_a_column_of_numbers(self):
        path = write_table("x.jsonl", [{"x": 1}] * 2500 + [{"x": "word"}])
        assert_refused("Row 2501 of 'x.jsonl' has 'word' in column 'x'", path)

    def test_integers_and_floats_mix(self):
        path = write_table("x.jsonl", [{"x": 1, "y": [1]}, {"x": 2.5, "y": [2.5]}, {"x": 2**53, "y": [3]}])
        assert_rows(load(path, feature_column_names="x"), [[1.0], [2.5], [2.0**53]])
        assert_rows(load(path, feature_column_names="y"), [[1.0], [2.5], [3.0]])

    def test_a_row_without_the_column(self):
        path = write("x.jsonl", '{"a": 1, "b": 2}\n{"a": 1}\n')
        assert_refused("Row 2 of 'x.jsonl' has an empty cell in column 'b'", path)

    def test_what_is_no_json(self):
        assert_refused("Line 2, column 6, of 'x.jsonl' is not valid JSON", write("x.jsonl", '{"a": 1}\n{"a": \n'))


class TestSources:
    def test_train_and_validation_files_of_different_kinds(self):
        save("x.npy", VECTORS)
        write_table("y.parquet", rows_of(VECTORS + 1))
        train, validation = load("x.npy", validation_file="y.parquet", need_validation=True)
        assert_rows(train, VECTORS)
        assert_rows(validation, VECTORS + 1)
        assert (str(train.split), str(validation.split)) == ("train", "validation")

    def test_validation_is_left_alone_unless_needed(self):
        assert_rows(load(save("x.npy", VECTORS), validation_file="missing.npy"), VECTORS)

    @pytest.mark.parametrize(
        ("array", "wording"),
        [(np.zeros((2, 4)), "vectors of 4 numbers"), (np.zeros((2, 4, 3)), "series with 3 numbers a step")],
    )
    def test_another_width_or_kind(self, array, wording):
        save("1.npy", VECTORS)
        save("2.npy", array)
        message = f"The training data hold vectors of 3 numbers, the validation data {wording}. Provide the same"
        assert_refused(message, "1.npy", validation_file="2.npy", need_validation=True)
        assert_refused(f"'2.npy' holds {wording} and '1.npy' vectors of 3 numbers. Provide files", "*.npy")

    def test_series_of_files_with_other_lengths_join(self):
        first, second = RANDOM.normal(size=(2, 3, 2)), RANDOM.normal(size=(2, 4, 2))
        dataset = load(f"{save('1.npy', first)}, {save('2.npy', second)}")
        assert_rows(dataset, [row.astype(np.float32) for row in (*first, *second)])

    @pytest.mark.parametrize("name", ["x.txt", "x", "x.gz"])
    def test_an_unknown_ending(self, name):
        suffix = Path(name.removesuffix(".gz")).suffix
        assert_refused(f"'{name}' has the unknown suffix '{suffix}'. Use one of .npy, .npz", write(name, "1"))

    def test_arrays_are_not_gzipped(self):
        assert_refused("'x.npy.gz' is a gzipped array. Unpack it", write("x.npy.gz", "1"))

    def test_mixed_kinds_missing_files_and_directories(self):
        save("x.npy", VECTORS)
        write_table("y.csv", rows_of(VECTORS))
        assert_refused("train_file 'x.npy,y.csv' mixes csv and npy files. Provide files of one kind", "x.npy,y.csv")
        assert_refused("train_file 'z.npy' does not exist", "z.npy")
        assert_refused("train_file '.' is a directory", ".")

    def test_sources_that_exclude_each_other_or_are_missing(self):
        assert_refused("dataset_name and train_file exclude each other", "x.npy", dataset_name="y")
        assert_refused("Set --train_file or --dataset_name")

    def test_streaming_is_refused(self):
        assert_refused("Omit --streaming", save("x.npy", VECTORS), streaming=True)

    def test_parquet_that_is_none(self):
        assert_refused("'x.parquet' is not a valid Parquet file", write("x.parquet", b"PAR1 nothing PAR1"))

    def test_limits(self):
        save("x.npy", VECTORS)
        train, validation = load(
            "x.npy", validation_file="x.npy", need_validation=True, max_train_samples=2, max_eval_samples=100
        )
        assert_rows(train, VECTORS[:2])
        assert_rows(validation, VECTORS)


class TestDatasets:
    def local(self, **splits: Dataset) -> str:
        for name, dataset in DatasetDict(splits).items():
            Path("data").mkdir(exist_ok=True)
            dataset.to_parquet(f"data/{name}.parquet")
        return "data"

    def test_columns_lists_and_arrays(self):
        vectors = Dataset.from_list([{"word": "z", **row} for row in rows_of(VECTORS)])
        name = self.local(train=vectors, validation=vectors.select([1, 0]), test=vectors.select([5]))
        train, validation = load(dataset_name=name, need_validation=True)
        assert_rows(train, VECTORS)
        assert_rows(validation, VECTORS[:2][::-1])
        _, test = load(dataset_name=name, need_validation=True, dataset_validation_split="test")
        assert_rows(test, VECTORS[5:6])
        assert_rows(load(dataset_name=name, feature_column_names="b"), VECTORS[:, 1:2])

    def test_series(self):
        nested = Features({"x": List(List(Value("float64")))})
        name = self.local(train=Dataset.from_dict({"x": [series.tolist() for series in SERIES]}, features=nested))
        assert_rows(load(dataset_name=name), SERIES)

    def test_classes_are_no_features(self):
        features = Features({"a": Value("int64"), "label": ClassLabel(names=["no", "yes"])})
        name = self.local(train=Dataset.from_dict({"a": [5, 6], "label": [0, 1]}, features=features))
        assert_rows(load(dataset_name=name), [[5.0], [6.0]])

    def test_what_is_wrong_is_named(self):
        name = self.local(train=Dataset.from_dict({"a": [1.0, None, 3.0], "b": [1.0, 2.0, np.nan], "s": ["x"] * 3}))
        source = "split 'train' of dataset 'data'"
        assert_refused(f"Row 2 of {source} has an empty cell in column 'a' instead", dataset_name=name)
        assert_refused(f"Row 3 of {source} has nan in column 'b' instead", dataset_name=name, feature_column_names="b")
        assert_refused(f"No column 'c' in {source}. Choose", dataset_name=name, feature_column_names="c")
        assert_refused(
            "Dataset 'data' has no split 'test'. Its splits are: train", dataset_name=name, dataset_train_split="test"
        )
        assert_refused("dataset_name './missing/data' cannot be loaded", dataset_name="./missing/data")


class TestHoldOut:
    @pytest.mark.parametrize("percentage", [1, 30, 99])
    def test_the_parts_are_disjoint_complete_and_in_order(self, percentage):
        save("x.npy", np.arange(40.0).reshape(40, 1))
        parts = load("x.npy", need_validation=True, validation_split_percentage=percentage)
        train, validation = ([int(row[0]) for row in arrays(part)] for part in parts)
        assert sorted(train + validation) == list(range(40))
        assert (train, validation) == (sorted(train), sorted(validation))
        assert len(validation) == min(max(round(40 * percentage / 100), 1), 39)

    def test_the_seed_decides(self):
        save("x.npy", np.arange(100.0).reshape(50, 2))
        held = [
            np.array(arrays(load("x.npy", need_validation=True, validation_split_percentage=40, seed=seed)[1]))
            for seed in (3, 3, 4)
        ]
        assert np.array_equal(held[0], held[1])
        assert not np.array_equal(held[0], held[2])

    def test_ragged_series_split_too(self):
        write_table("x.jsonl", [{"x": series.tolist()} for series in SERIES])
        train, validation = load("x.jsonl", need_validation=True, validation_split_percentage=50)
        actual = [*arrays(train), *arrays(validation)]
        assert len(train) == len(validation) == 2
        assert sorted(map(np.ndarray.tolist, actual)) == sorted(map(np.ndarray.tolist, SERIES))

    def test_a_single_row_cannot_be_split(self):
        assert_refused("A single row", save("x.npy", VECTORS[:1]), need_validation=True)


FLOATS = st.floats(width=32, allow_nan=False, allow_infinity=False)


class TestRoundTrip:
    @settings(max_examples=25, deadline=None)
    @given(data=st.data(), steps=st.lists(st.integers(1, 4), min_size=1, max_size=5), width=st.integers(1, 4))
    def test_series_and_vectors_come_back_exactly(self, data, steps, width):
        """Any float32, subnormal or with a negative zero, whole or selected, as series and as vectors."""
        series = [data.draw(st_numpy.arrays(np.float32, (length, width), elements=FLOATS)) for length in steps]
        padded = np.zeros((len(steps), max(steps), width), dtype=np.float32)
        for row, values in zip(padded, series, strict=True):
            row[: len(values)] = values
        np.savez("x.npz", features=padded, lengths=steps)
        np.save("x.npy", np.concatenate(series))
        for path, expected in (("x.npz", series), ("x.npy", np.concatenate(series))):
            dataset = load(path)
            order = data.draw(st.permutations(range(len(expected))))
            for actual, index in zip(arrays(dataset.select(order)), order, strict=True):
                assert actual.tobytes() == expected[index].tobytes()
                assert actual.shape == expected[index].shape
            assert feature_shape(dataset) == (path == "x.npz", width)


class TestPrecision:
    """float32 has steps of 8 at 1e8 and of 128 at a Unix timestamp in seconds."""

    VALUES = np.stack([1e8 + RANDOM.normal(size=40), RANDOM.normal(size=40), np.full(40, 1e8)], axis=1)

    @pytest.mark.parametrize("form", [*TABLES, "npy", "dataset", "two files"])
    def test_columns_that_lose_their_spread_are_named(self, form, caplog):
        """In a warning that says what to do; a constant column and one of float32 are not among them."""
        log_once.cache_clear()
        rows = rows_of(self.VALUES)
        match form:
            case "dataset":
                Path("data").mkdir()
                Dataset.from_list(rows).to_parquet("data/train.parquet")
                load(dataset_name="data")
            case "two files":
                load(",".join(write_table(f"{part}.csv", rows[part::2]) for part in range(2)))
            case "npy":
                load(save("x.npy", self.VALUES))
            case _:
                load(write_table(f"x.{form}", rows))
        (warning,) = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
        column = "number 1" if form == "npy" else "'a'"
        assert f"float32 loses the differences between the values of 1 column ({column}). The standard" in warning
        assert "Subtract a constant from each of them in float64, such as its mean, and save it again" in warning

    @pytest.mark.parametrize("form", ["csv", "jsonl"])
    def test_data_that_loses_all_spread_is_refused(self, form):
        values = self.VALUES[:, [0, 2]] + [1.6e9, 0]
        rows = rows_of(values, "ab") if form == "csv" else [{"v": row.tolist()} for row in values]
        path = write_table(f"x.{form}", rows)
        assert_refused("float32 loses the differences between the values of 1 column", path)

    @pytest.mark.parametrize("values", [VALUES.astype(np.float32), [[0.1, 1e8, 0.3]] * 9, VALUES - VALUES.mean(axis=0)])
    def test_constants_centred_values_and_float32_lose_nothing(self, values, caplog):
        load(save("x.npy", np.asarray(values)))
        assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


class TestStatistics:
    @settings(max_examples=40, deadline=None)
    @given(
        steps=st.lists(st.integers(1, 6), min_size=1, max_size=12),
        width=st.integers(1, 3),
        offset=st.sampled_from([0.0, 1e4, -1e6]),
        seed=st.integers(0, 1000),
        block=st.integers(1, 200),
    )
    def test_they_are_those_of_numpy_for_any_batches(self, steps, width, offset, seed, block):
        """Of vectors and of series, over all steps, whatever the mean and the size of batches."""
        values = np.random.default_rng(seed).normal(size=(sum(steps), width), loc=offset).astype(np.float32)
        padded = np.full((len(steps), max(steps), width), 77.0, dtype=np.float32)
        for row, part in zip(padded, np.split(values, np.cumsum(steps)[:-1]), strict=True):
            row[: len(part)] = part
        np.savez("x.npz", features=padded, lengths=steps)
        np.save("x.npy", values)
        with pytest.MonkeyPatch.context() as patch:
            set_constants(patch, BLOCK_SIZE=block)
            for dataset in (load("x.npz"), load("x.npy")):
                mean, deviation = feature_statistics(dataset)
                assert mean.dtype == deviation.dtype == np.float32
                wide = values.astype(np.float64)
                expected = wide.std(axis=0) if len(values) > 1 else np.ones(width)
                np.testing.assert_allclose(mean, wide.mean(axis=0), rtol=1e-6, atol=1e-6)
                np.testing.assert_allclose(deviation, np.where(expected == 0, 1, expected), rtol=1e-5)

    @pytest.mark.parametrize("value", [0.0, 0.1, -1e30, 16777217.0, 1e-45])
    def test_a_constant_feature_has_deviation_1_and_its_own_mean(self, value, monkeypatch):
        set_constants(monkeypatch, BLOCK_SIZE=700)
        array = np.stack([np.full(997, value), np.arange(997)], axis=1).astype(np.float32)
        mean, deviation = feature_statistics(load(save("x.npy", array)))
        assert mean[0] == np.float32(value)
        assert deviation[0] == 1
        assert deviation[1] == pytest.approx(array[:, 1].std(dtype=np.float64), rel=1e-6)

    def test_rows_that_are_not_selected_do_not_count(self):
        """Statistics of a part are those of the part, of series too."""
        for path, rows in (("x.npy", VECTORS), ("y.jsonl", SERIES)):
            if path == "x.npy":
                save(path, VECTORS)
            else:
                write_table(path, [{"x": series.tolist()} for series in SERIES])
            mean, deviation = feature_statistics(load(path).select([3, 0]))
            chosen = np.vstack([rows[3], rows[0]]).astype(np.float64)
            np.testing.assert_allclose(mean, chosen.mean(axis=0), rtol=1e-5)
            np.testing.assert_allclose(deviation, chosen.std(axis=0), rtol=1e-5)

    def test_datasets_made_by_hand_serve_too(self):
        dataset = Dataset.from_dict({"features": VECTORS.tolist(), "other": ["x"] * 7})
        assert feature_shape(dataset) == (False, 3)
        np.testing.assert_allclose(feature_statistics(dataset)[0], VECTORS.mean(axis=0), rtol=1e-5)
        dataset = Dataset.from_dict({"features": [series.tolist() for series in SERIES]})
        assert feature_shape(dataset) == (True, 2)
        np.testing.assert_allclose(feature_statistics(dataset)[1], np.vstack(SERIES).std(axis=0), rtol=1e-5)


def test_series_of_different_widths_are_refused():
    """In two files of one argument, and in training and validation data."""
    np.save("a.npy", np.zeros((3, 4, 6), np.float32))
    np.save("b.npy", np.zeros((3, 4, 5), np.float32))
    assert_refused("'b.npy' holds series with 5 numbers a step and 'a.npy' series with 6 numbers a step", "a.npy,b.npy")
    args = DataArguments(train_file="a.npy", validation_file="b.npy")
    with pytest.raises(UsageError, match="series with 6 numbers a step, the validation data series with 5"):
        load_feature_datasets(args, seed=0, need_validation=True)


@pytest.mark.parametrize("header", ["1.5,2", "3,4", "5.1,setosa", "0,5;1,2"])
def test_a_table_without_header_is_refused(header):
    """Its first row would be taken for names, and lost. Numbers from 0 on are pandas' default names."""
    write("x.csv", f"{header}\n3,4\n5,6\n")
    numbers = ", ".join(re.findall(r"[\d.]+", header)[:3])
    assert_refused(f"The first line of 'x.csv' holds numbers ({numbers})", "x.csv")
    pd.DataFrame(VECTORS).to_csv("y.csv", index=False)
    assert_rows(load("y.csv"), VECTORS)


def test_a_kind_without_a_reader_is_an_error():
    """It is not read as CSV."""
    path = write("x.csv", "a\n1\n")
    with pytest.raises(ValueError, match="'xml'"):
        file_readers.read_rows(path, "xml")
    with pytest.MonkeyPatch.context() as patch, pytest.raises(ValueError, match="'xml'"):
        patch.setattr(feature_readers, "_column_types", lambda path, kind: ({"a": pa.float64()}, []))
        feature_readers.open_feature_file(path, "xml", DataArguments())
