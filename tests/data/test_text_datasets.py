"""Claims of jepa_hf/data/text_datasets.py."""

import csv
import gzip
import io
import json
import logging
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

import datasets
import huggingface_hub
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from datasets import Dataset, IterableDataset
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer, HfArgumentParser

from jepa_hf import UsageError
from jepa_hf.data.arguments import DataArguments
from jepa_hf.data.file_readers import log_once
from jepa_hf.data.text_datasets import builtin_corpus, load_text_datasets
from jepa_hf.data.tokenizer_training import train_wordpiece_tokenizer

TEXTS = ["A first text.", 'With a comma, a "quote" and ünïcödé ☕.', "The last text."]
ENDINGS = ("txt", "text", "md", "jsonl", "json", "csv", "tsv", "parquet")


@pytest.fixture(autouse=True)
def _own_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each test works in a directory of its own, with its own cache."""
    (tmp_path / "work").mkdir()
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def write(name: str, content: str | bytes | list[str]) -> str:
    """Write a file, gzipped if it is called so; a list of texts in the format that the ending stands for."""
    ending = name.removesuffix(".gz").rpartition(".")[2]
    if isinstance(content, list):
        content = formatted(content, ending)
    if isinstance(content, str):
        content = content.encode()
    Path(name).parent.mkdir(parents=True, exist_ok=True)
    Path(name).write_bytes(gzip.compress(content) if name.endswith(".gz") else content)
    return name


def formatted(texts: list[str], ending: str) -> str | bytes:
    rows = [{"id": index, "text": text} for index, text in enumerate(texts)]
    match ending:
        case "jsonl":
            return "".join(json.dumps(row) + "\n" for row in rows)
        case "json":
            return json.dumps(rows, indent=1)
        case "csv" | "tsv":
            file = io.StringIO(newline="")
            writer = csv.DictWriter(file, ["id", "text"], delimiter="," if ending == "csv" else "\t")
            writer.writeheader()
            writer.writerows(rows)
            return file.getvalue()
        case "parquet":
            return parquet(rows)
        case _:
            return "\n".join(texts)


def parquet(rows: list[dict[str, Any]]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), file)
    return file.getvalue()


def load(train_file: str | None = None, **arguments: Any) -> Dataset | IterableDataset:
    return load_text_datasets(DataArguments(train_file=train_file, **arguments), seed=0, need_validation=False)[0]


def texts_of(dataset: Dataset | IterableDataset) -> list[str]:
    assert dataset.column_names == ["text"]
    return [row["text"] for row in dataset]


def files_and_cache() -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in Path.cwd().parent.rglob("*") if path.is_file()}


def assert_refused(message: str, *args: Any, **arguments: Any) -> None:
    """Loading raises a `UsageError` with this message, alone, and leaves the disk as it was."""
    before = files_and_cache()
    with pytest.raises(UsageError, match=re.escape(message)) as caught:
        load(*args, **arguments)
    assert "\n" not in str(caught.value)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None or caught.value.__suppress_context__
    assert files_and_cache() == before


class TestArguments:
    def test_the_command_line_can_show_and_set_them(self, capsys):
        parser = HfArgumentParser(DataArguments)
        (args,) = parser.parse_args_into_dataclasses(["--train_file", "a.txt", "--stride", "3"])
        assert (args.train_file, args.stride, args.concat, args.line_by_line) == ("a.txt", 3, False, None)
        with pytest.raises(SystemExit):
            parser.parse_args(["--help"])
        assert "Percentage of the training rows" in " ".join(capsys.readouterr().out.split())

    def test_exactly_one_mode(self):
        DataArguments(line_by_line=True)
        DataArguments(line_by_line=False, concat=True)
        with pytest.raises(UsageError, match="line_by_line and concat exclude each other"):
            DataArguments(line_by_line=True, concat=True)
        with pytest.raises(UsageError, match=r"no other mode is chosen\. Set --concat or --packed"):
            DataArguments(line_by_line=False)
        DataArguments(line_by_line=False, packed=True)
        for other in ("line_by_line", "concat"):
            with pytest.raises(UsageError, match=f"{other} and packed exclude each other"):
                DataArguments(packed=True, **{other: True})
        with pytest.raises(UsageError, match="packed and stride exclude each other"):
            DataArguments(packed=True, stride=0)

    @pytest.mark.parametrize("percentage", [-1, 0, 100])
    def test_percentage_out_of_range(self, percentage):
        with pytest.raises(UsageError, match=f"validation_split_percentage must be .* not {percentage}"):
            DataArguments(validation_split_percentage=percentage)

    @pytest.mark.parametrize(
        "name", ["pad_to_multiple_of", "max_train_samples", "max_eval_samples", "preprocessing_num_workers"]
    )
    def test_numbers_out_of_range(self, name):
        with pytest.raises(UsageError, match=f"{name} must be at least 1, not 0"):
            DataArguments(**{name: 0})


class TestFiles:
    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize("packing", ["", ".gz"])
    @pytest.mark.parametrize("ending", ENDINGS)
    def test_every_kind_gives_its_texts(self, ending, packing, streaming):
        name = write(f"a.{ending}{packing}", [TEXTS[0], "", " \t", *TEXTS[1:]])
        dataset = load(name, streaming=streaming)
        assert isinstance(dataset, IterableDataset if streaming else Dataset)
        assert dataset.features == {"text": datasets.Value("string")}
        assert texts_of(dataset) == TEXTS

    def test_endings_may_be_upper_case(self):
        assert texts_of(load(write("A.TXT", TEXTS))) == TEXTS

    def test_validation_files_are_read_alike(self):
        write("a.txt", TEXTS)
        args = DataArguments(train_file="a.txt", validation_file=write("b.csv", TEXTS[:2]))
        train, validation = load_text_datasets(args, seed=0, need_validation=True)
        assert texts_of(train) == TEXTS
        assert texts_of(validation) == TEXTS[:2]

    def test_one_file_can_serve_both_purposes(self):
        args = DataArguments(train_file=write("a.txt", TEXTS), validation_file="a.txt")
        train, validation = load_text_datasets(args, seed=0, need_validation=True)
        assert texts_of(train) == texts_of(validation) == TEXTS

    def test_the_validation_file_is_left_alone_if_not_needed(self):
        args = DataArguments(train_file=write("a.txt", TEXTS), validation_file="missing.txt")
        assert load_text_datasets(args, seed=0, need_validation=False)[1] is None

    def test_a_changed_file_is_read_again(self):
        assert texts_of(load(write("a.txt", TEXTS))) == TEXTS
        assert texts_of(load(write("a.txt", TEXTS[:2]))) == TEXTS[:2]

    def test_equal_names_in_two_directories_do_not_mix(self, monkeypatch):
        for name, text in (("x", "aaa"), ("y", "bbb")):
            path = Path(write(f"{name}/a.txt", text))
            os.utime(path, ns=(0, 0))
        actual = []
        for name in "xy":
            with monkeypatch.context() as patch:
                patch.chdir(name)
                actual += texts_of(load("a.txt"))
        assert actual == ["aaa", "bbb"]

    def test_many_lines_stay_on_disk(self):
        dataset = load(write("a.txt", "\n".join(f"line {i}\n" for i in range(100_000))))
        assert len(dataset) == 100_000
        assert dataset[99_999]["text"] == "line 99999"
        assert len(dataset.cache_files) == 1


class TestTextFiles:
    def test_byte_order_mark_goes_and_all_newlines_count(self):
        name = write("a.txt", b"\xef\xbb\xbfone\r\ntwo\rthree\n\n \r\nfour")
        assert texts_of(load(name)) == ["one", "two", "three", "four"]

    def test_other_separators_stay_inside_a_line(self):
        text = "a\x0bb\x0cc\x1cd\x85e\u2028f\u2029g"
        assert texts_of(load(write("a.txt", text))) == [text]

    def test_white_space_around_a_line_stays(self):
        assert texts_of(load(write("a.txt", "  a b \n"))) == ["  a b "]

    def test_a_line_of_ten_megabytes(self):
        line = "word " * 2_000_000
        (text,) = texts_of(load(write("a.txt", line)))
        assert text == line

    def test_they_have_no_other_column(self):
        assert_refused("No column 'body' in 'a.txt'.", write("a.txt", TEXTS), text_column_name="body")


@settings(max_examples=30, deadline=None)
@given(texts=st.lists(st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\r\n\ufeff"))))
@pytest.mark.parametrize("ending", ["txt", "jsonl", "csv"])
def test_any_unicode_comes_back(texts, ending):
    name = write(f"a.{ending}", ["anchor", *texts])
    assert texts_of(load(name, streaming=True)) == ["anchor", *(text for text in texts if text.strip())]


@settings(max_examples=30, deadline=None)
@given(start=st.integers(0, 400), length=st.integers(0, 9), junk=st.binary(max_size=9))
@pytest.mark.parametrize("ending", ENDINGS)
@pytest.mark.parametrize("packing", ["", ".gz"])
def test_any_damage_gives_texts_or_a_usage_error(start, length, junk, ending, packing):
    path = Path(write(f"a.{ending}{packing}", TEXTS * 3))
    full = path.read_bytes()
    path.write_bytes(full[:start] + junk + full[start + length :])
    with suppress(UsageError):
        assert all(text.strip() for text in texts_of(load(str(path), streaming=True)))


class TestJson:
    def test_an_array_and_lines_are_recognized_by_content(self):
        lines, array = formatted(TEXTS, "jsonl"), formatted(TEXTS, "json")
        assert texts_of(load(write("lines.json", "\n" + lines))) == TEXTS
        assert texts_of(load(write("array.jsonl", "\n" + array))) == TEXTS

    def test_null_and_missing_texts_are_dropped(self):
        rows = '{"text": null}\n{"id": 1}\n\n{"text": "a"}\n'
        assert texts_of(load(write("a.jsonl", rows))) == ["a"]

    def test_other_columns_may_hold_anything(self):
        rows = '{"text": "a", "x": 1}\n{"text": "b", "x": "y"}\n{"text": "c", "x": {"z": []}}\n'
        assert texts_of(load(write("a.jsonl", rows))) == ["a", "b", "c"]

    def test_surrogates_are_joined_or_replaced(self):
        rows = r'{"text": "\ud83d\ude00 \ud800 \udc00"}'
        assert texts_of(load(write("a.jsonl", rows))) == ["😀 \ufffd \ufffd"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            (
                '{"text": "a"}\n{"text": "b"\n',
                "Line 2, column 13, of 'a.json' is not valid JSON: Expecting ',' delimiter",
            ),
            (
                '\n[{"text": "a"},\n{"text" "b"}]',
                "Line 3, column 9, of 'a.json' is not valid JSON: Expecting ':' delimiter",
            ),
            ("not json", "Line 1, column 1, of 'a.json' is not valid JSON: Expecting value"),
            ('{"text": "a"}\n"b"\n', "Line 2 of 'a.json' has string where an object is expected"),
            ("[1, 2]", "Item 1 of 'a.json' has int where an object is expected"),
            ("[" * 100_000, "'a.json' cannot be read as JSON: maximum recursion depth exceeded"),
            (
                '{"text": "a"}\n{"text": "b", "text": "c"}',
                "Line 2 of 'a.json' cannot be read as JSON: an object has the key",
            ),
            ("\n \n", "'a.json' has no rows. Provide a file with text"),
            ("[]", "'a.json' has no rows. Provide a file with text"),
            ('{"text": null}', "train_file 'a.json' holds no text, only blank rows"),
            ('{"text": 1}', "Column 'text' of 'a.json' holds int, not strings; its first row has 1. No column"),
            ('{"text": 1, "body": "a"}', "has 1. Name one of the columns of strings with --text_column_name: body."),
            ('{"text": ["a"]}', "Column 'text' of 'a.json' holds list, not strings"),
            ('{"text": "a"}\n{"text": 2}', "Row 2 of 'a.json' has int (2) in column 'text', which must hold strings"),
        ],
    )
    def test_what_cannot_be_read_is_named(self, content, message):
        assert_refused(message, write("a.json", content))


class TestCsv:
    def test_values_may_hold_newlines_and_be_long(self):
        texts = ["two\nlines", "long " * 100_000, "null", "NA"]
        assert texts_of(load(write("a.csv", texts))) == texts

    def test_single_numbers_among_texts_are_texts(self):
        assert texts_of(load(write("a.csv", "text\n1\nb\n2.5\n"))) == ["1", "b", "2.5"]

    def test_byte_order_mark_is_no_part_of_the_first_column(self):
        assert texts_of(load(write("a.csv", b"\xef\xbb\xbftext\r\na\r\n"))) == ["a"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("text\n1\n2\n", "Column 'text' of 'a.csv' holds int, not strings"),
            ("text,a\n1.5,x\n-2,y\n", "Column 'text' of 'a.csv' holds int, not strings"),
            ("text\n1\n2.5\n\n", "Column 'text' of 'a.csv' holds float, not strings"),
            ("text\nHello, world\n", "Line 2 of 'a.csv' has 2 values for 1 column. Put double quotes around"),
            ('text\n"open\nend\n', "The row in lines 2 to 3 of 'a.csv' is not valid CSV: a quote is not closed"),
            ("text\n", "'a.csv' has no rows. Provide a file with text"),
            ('text,a\n" ",1\n,2\n', "train_file 'a.csv' holds no text, only blank rows"),
        ],
    )
    def test_what_cannot_be_read_is_named(self, content, message):
        assert_refused(message, write("a.csv", content))


class TestTablesOfOtherDialects:
    @pytest.mark.parametrize("streaming", [False, True])
    @pytest.mark.parametrize(
        ("name", "content"),
        [
            ("semicolons.csv", "text;label\nhello, there;1\na second;0\n"),
            ("tabs.csv", "text\tlabel\nhello, there\t1\na second\t0\n"),
            ("bars.csv", "text|label\nhello, there|1\na second|0\n"),
            ("commas.tsv", 'text,label\n"hello, there",1\na second,0\n'),
            ("semicolons.tsv", "label;text\n1;hello, there\n0;a second\n"),
            ("quoted_header.csv", '"text";"label, of"\nhello, there;1\n"a second";0\n'),
            ("bom.csv", "\ufefftext;label\r\nhello, there;1\r\na second;0\r\n"),
            ("carriage_returns.csv", 'label,text\r1,"hello, there"\r0,a second\r'),
            ("blank_lines.csv", 'text,label\n\n"hello, there",1\n  \na second,0\n\n'),
            ("blank_start.csv", "\ntext;label\nhello, there;1\na second;0\n"),
        ],
    )
    def test_the_separator_is_that_of_the_header(self, name, content, streaming, caplog):
        """Texts come without labels, and one sentence says which separator is not the suffix's."""
        caplog.set_level(logging.INFO, "jepa_hf")
        log_once.cache_clear()
        assert texts_of(load(write(name, content), streaming=streaming)) == ["hello, there", "a second"]
        said = [message for message in caplog.messages if "separated by" in message]
        other = name.split(".")[0] not in ("carriage_returns", "blank_lines")
        assert len(said) == other
        assert all(f"the columns of '{name}' are separated by a " in message for message in said)

    @pytest.mark.parametrize(
        ("name", "content", "message"),
        [
            ("a.csv", "text;label|id\nx;1|2\n", "has no comma, but several other separators"),
            ("a.csv", "text,label\nhello\n", "Line 2 of 'a.csv' has 1 value for 2 columns"),
            ("a.csv", "text, long;label\nhello;1\n", "Line 2 of 'a.csv' has 1 value for 2 columns"),
            ("a.csv", "text;label\nhello;there;1\n", "Line 2 of 'a.csv' has 3 values for 2 columns"),
            ("a.csv", "text,text\na,b\n", "'a.csv' has several columns 'text'. Rename all but one"),
            ("a.csv", "I like this film a lot,x\nx y z,1\n", "look like a row of data"),
            ("a.csv", "I like it,1\nso do I,0\n", "look like a row of data"),
            ("a.csv", "What a film!\nso do I\n", "look like a row of data"),
            ("a.tsv", 'text\tlabel\n"A quote\t1\nends "\t0\n', "The row in lines 2 to 3 of 'a.tsv' has a value that"),
            ("a.tsv", 'text\tlabel\n"A" quote\t1\n', "Line 2 of 'a.tsv' is not valid CSV"),
            ("a.txt", "hello\t1\n\nthere\t0\n", "The lines of 'a.txt' have 2 columns between tabs"),
            ("a.txt", '{"text": "a", "label": 1}\n{"text": "b"}\n', "'a.txt' holds JSON objects"),
            ("a.jsonl", '{"text;label": "hello;1"}\n', "look like a row of data: 'text;label'"),
            ("a.jsonl", json.dumps({"text": {"en": "a"}}), "Column 'text' of 'a.jsonl' holds dict, not strings"),
            ("a.txt.bz2", "x", "has the unknown suffix '.bz2'"),
            ("a.jsonl.zst", "x", "has the unknown suffix '.zst'"),
            ("a.txt", "hello".encode("utf-16"), "'a.txt' is not UTF-8 at byte 0"),
            ("a.csv", "text\ncafé\n".encode("latin-1"), "'a.csv' is not UTF-8 at byte 8"),
        ],
    )
    def test_what_would_mix_texts_and_labels_is_refused(self, name, content, message):
        assert_refused(message, write(name, content))

    def test_a_long_name_of_a_column_can_be_named(self):
        name = write("a.csv", "What do you think of it?\nIt is good\n")
        assert texts_of(load(name, text_column_name="What do you think of it?")) == ["It is good"]

    def test_a_column_of_another_name_is_said(self, caplog):
        caplog.set_level(logging.INFO, "jepa_hf")
        log_once.cache_clear()
        load(write("a.csv", "id,review\n1,x\n"))
        assert caplog.messages == ["the texts of 'a.csv' are read from the column 'review'"]

    def test_columns_numbered_by_pandas_are_names(self):
        assert texts_of(load(write("a.csv", ",0\n0,hello\n1,there\n"))) == ["hello", "there"]

    def test_text_with_some_tabs_is_text(self):
        texts = ["\ta", "b\tc", "d"]
        assert texts_of(load(write("a.txt", texts))) == texts


class TestDroppedRows:
    ROWS = '{"text": "a b"}\n{"body": "x"}\n{"text": null}\n{"text": " "}\n{"text": "c d"}\n{"text": "e f"}\n'
    COUNTS = "1 without 'text', 1 null, 1 blank"

    @pytest.mark.parametrize("argument", ["train_file", "validation_file"])
    def test_of_files(self, argument, caplog):
        """One sentence has the reasons and their counts; no sentence where nothing is dropped."""
        caplog.set_level(logging.INFO, "jepa_hf")
        files = {"train_file": write("good.txt", TEXTS), "validation_file": "good.txt"}
        files[argument] = write("a.jsonl", self.ROWS)
        load_text_datasets(DataArguments(**files), seed=0, need_validation=True)
        assert caplog.messages == [f"left out 3 of 6 rows of {argument} 'a.jsonl': {self.COUNTS}"]
        assert caplog.records[0].levelname == "INFO"

    def test_most_rows(self, caplog):
        """More than half are a warning with a remedy."""
        load(write("a.jsonl", self.ROWS + '{"x": 1}'))
        (record,) = caplog.records
        assert record.levelname == "WARNING"
        assert record.getMessage().startswith("left out 4 of 7 rows of train_file 'a.jsonl': 2 without 'text', 1 null")
        assert "check the file and --text_column_name" in record.getMessage()

    def test_of_streams(self, caplog):
        """The count so far, at powers of ten, and all at the end of a pass; in the first pass only."""
        caplog.set_level(logging.INFO, "jepa_hf")
        log_once.cache_clear()
        stream = load(write("a.jsonl", self.ROWS + '{"x": 1}\n' * 9 + '{"text": "g"}\n' * 20), streaming=True)
        for _ in range(2):
            assert len(list(stream)) == 23
            assert caplog.messages == [
                "left out 10 of 13 rows of train_file 'a.jsonl' so far: 8 without 'text', 1 null, 1 blank; more than "
                "half, so check the file and --text_column_name",
                "left out 12 of 35 rows of train_file 'a.jsonl': 10 without 'text', 1 null, 1 blank",
            ]

    @pytest.mark.parametrize("streaming", [False, True])
    def test_of_named_datasets(self, streaming, caplog):
        """All of a data set, the count so far of a stream."""
        caplog.set_level(logging.INFO, "jepa_hf")
        log_once.cache_clear()
        write("corpus/train.csv", 'id,text\n1,a\n2," "\n' + "3,\n" * 9 + "4,b\n5,c\n" * 9)
        assert len(list(load(dataset_name="./corpus", streaming=streaming))) == 19
        total = "10 of 11" if streaming else "10 of 29"
        (message,) = caplog.messages
        assert message.startswith(f"left out {total} rows of split 'train' of dataset './corpus'")
        assert {"9 null", "1 blank"} == set(message.partition(": ")[2].partition(";")[0].split(", "))


class TestParquet:
    def test_categories_are_texts(self):
        pq.write_table(pa.table({"text": pa.array(["a", None, "b", "a"]).dictionary_encode()}), "a.parquet")
        assert texts_of(load("a.parquet")) == ["a", "b", "a"]

    def test_nested_texts_are_refused(self):
        name = write("a.parquet", parquet([{"text": {"en": "a"}}]))
        assert_refused("Column 'text' of 'a.parquet' holds struct<en: string>, not strings", name)

    def test_nulls_are_dropped_and_long_strings_taken(self):
        table = pa.table({"text": pa.array(["a", None, " ", "b"], pa.large_string())})
        pq.write_table(table, "a.parquet")
        assert texts_of(load("a.parquet")) == ["a", "b"]

    def test_other_types_are_refused(self):
        name = write("a.parquet", parquet([{"text": 1}]))
        assert_refused("Column 'text' of 'a.parquet' holds int64, not strings; its first row has 1", name)

    def test_columns_of_one_name_are_refused(self):
        pq.write_table(pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"]), "a.parquet")
        assert_refused("'a.parquet' has several columns 'text'", "a.parquet")

    @pytest.mark.parametrize("packing", ["", ".gz"])
    def test_other_bytes_are_refused(self, packing):
        assert_refused(
            f"'a.parquet{packing}' is not a valid Parquet file", write(f"a.parquet{packing}", b"not a parquet file")
        )

    def test_a_file_damaged_inside_is_refused(self):
        content = bytearray(parquet([{"text": f"text {i}"} for i in range(5000)]))
        content[4:2000] = bytes(1996)
        assert_refused("'a.parquet'", write("a.parquet", bytes(content)))


class TestPaths:
    def test_globs_are_sorted_and_lists_keep_their_order(self):
        for name in ("c/2.txt", "a/10.txt", "a/1.txt", "b.txt"):
            write(name, name)
        assert texts_of(load("**/*.txt")) == ["a/1.txt", "a/10.txt", "b.txt", "c/2.txt"]
        assert texts_of(load("c/2.txt, a/*.txt,a/1.txt")) == ["c/2.txt", "a/1.txt", "a/10.txt"]

    def test_a_file_that_exists_is_no_pattern(self):
        write("a,b[1].txt", TEXTS)
        assert texts_of(load("a,b[1].txt")) == TEXTS

    def test_packed_and_plain_files_go_together(self):
        write("1.txt", "a")
        write("2.txt.gz", "b")
        assert texts_of(load("*.txt*")) == ["a", "b"]

    def test_each_file_of_a_glob_chooses_its_column(self):
        write("1.jsonl", '{"text": "a"}')
        write("2.jsonl", '{"body": "b"}')
        assert texts_of(load("*.jsonl")) == ["a", "b"]

    def test_streams_of_several_files_have_a_shard_each(self):
        for name in ("1.txt", "2.txt", "3.txt"):
            write(name, name)
        assert load("*.txt", streaming=True).num_shards == 3

    @pytest.mark.parametrize(
        ("files", "message"),
        [
            ("x.txt", "train_file 'x.txt' does not exist"),
            ("", "train_file '' does not exist"),
            ("a.txt,x.txt", "train_file 'x.txt' does not exist"),
            ("x*.txt", "train_file 'x*.txt' matches no file"),
            ("dir", "train_file 'dir' is a directory. Name its files, such as 'dir/*.txt'"),
            ("di[r]", "train_file 'di[r]' matches no file"),
            ("dir/*", "train_file 'dir/*' mixes csv and text files. Provide files of one kind"),
            ("a.txt,dir/b.csv", "mixes csv and text files"),
            ("a.doc", "'a.doc' has the unknown suffix '.doc'. Use one of .txt, .text, .md, .json, .jsonl, .csv, .tsv"),
            ("a.gz", "'a.gz' has the unknown suffix ''"),
            ("empty.txt", "train_file 'empty.txt' is empty"),
            ("blank.txt", "train_file 'blank.txt' holds no text, only blank rows"),
            ("blank.txt.gz", "train_file 'blank.txt.gz' holds no text, only blank rows"),
        ],
    )
    @pytest.mark.parametrize("streaming", [False, True])
    def test_missing_and_unusable_files_are_named(self, files, message, streaming):
        for name in ("a.txt", "dir/b.csv", "dir/b.txt", "a.doc", "a.gz"):
            write(name, TEXTS)
        write("empty.txt", "")
        write("blank.txt", " \n\n\t\n")
        write("blank.txt.gz", "")
        assert_refused(message, files, streaming=streaming)

    def test_errors_name_the_argument(self):
        args = DataArguments(train_file=write("a.txt", TEXTS), validation_file="x.txt")
        with pytest.raises(UsageError, match=r"validation_file 'x\.txt' does not exist"):
            load_text_datasets(args, seed=0, need_validation=True)


class TestBadBytes:
    @pytest.mark.parametrize("packing", ["", ".gz"])
    @pytest.mark.parametrize("ending", ["txt", "jsonl", "json", "csv", "tsv"])
    def test_the_first_byte_that_is_not_utf8_is_named(self, ending, packing):
        content = formatted(TEXTS, ending).encode() + b"\xff"
        name = write(f"a.{ending}{packing}", content)
        assert_refused(f"'{name}' is not UTF-8 at byte {len(content) - 1}. Convert it to UTF-8", name)

    @pytest.mark.parametrize("length", [0, 3, 2**20 - 2, 2**20 - 1, 2**20, 3 * 2**20 + 5])
    def test_its_offset_is_right_anywhere(self, length):
        # A character of three bytes, of which the last is missing, may lie across two chunks.
        write("a.txt", b"x" * length + b"\xe2\x98 more")
        assert_refused(f"not UTF-8 at byte {length}.", "a.txt")
        write("a.txt", b"x" * length + b"\xe2\x98")
        assert_refused(f"not UTF-8 at byte {length}.", "a.txt")

    @pytest.mark.parametrize("ending", ENDINGS)
    def test_broken_gzip_is_named(self, ending):
        full = gzip.compress(formatted(TEXTS * 500, ending).encode() if ending != "parquet" else bytes(5000))
        name = f"a.{ending}.gz"
        damaged = full[: len(full) // 2] + b"\xff" * 8 + full[len(full) // 2 + 8 :]
        for content in (b"no gzip", full[:-9], full[: len(full) // 2], damaged):
            Path(name).write_bytes(content)
            assert_refused(f"'{name}' is not a complete gzip file", name)

    def test_streams_raise_when_they_get_there(self):
        dataset = load(write("a.txt", b"good\n" * 100_000 + b"\xff"), streaming=True)
        with pytest.raises(UsageError, match=r"'a\.txt' is not UTF-8 at byte 500000"):
            list(dataset)


class TestColumns:
    def test_text_comes_first_then_the_only_column_of_strings(self):
        assert texts_of(load(write("a.csv", "title,text\nt,a\n"))) == ["a"]
        assert texts_of(load(write("b.csv", "id,body\n1,a\n"))) == ["a"]
        assert texts_of(load(write("c.jsonl", '{"id": 1, "body": "a", "tags": []}'))) == ["a"]

    def test_the_wanted_column_is_taken(self):
        assert texts_of(load(write("a.csv", "title,text\nt,a\n"), text_column_name="title")) == ["t"]

    @pytest.mark.parametrize("ending", ["jsonl", "json", "csv", "tsv", "parquet"])
    def test_a_missing_column_is_named_and_the_others_listed(self, ending):
        name = write(f"a.{ending}", TEXTS)
        message = f"No column 'body' in '{name}'. Set --text_column_name to the column with the text, out of: "
        assert_refused(message + "id, text", name, text_column_name="body")

    def test_two_candidates_are_too_many(self):
        name = write("a.csv", "title,body\nt,a\n")
        assert_refused("No column 'text' in 'a.csv'. Set --text_column_name", name)
        assert_refused("out of: title, body", name)


class TestNamedDatasets:
    @pytest.fixture
    def dataset_name(self) -> str:
        """A local directory, which `load_dataset` takes like the name of a dataset on the Hub."""
        write("corpus/train.csv", 'id,body\n1,a\n2," "\n3,\n4,b\n5,c\n')
        write("corpus/validation.csv", "id,body\n6,d\n7,e\n")
        write("corpus/test.csv", "id,body\n8,f\n")
        return "./corpus"

    @pytest.mark.parametrize("streaming", [False, True])
    def test_splits_and_column_are_chosen(self, dataset_name, streaming):
        args = DataArguments(dataset_name=dataset_name, streaming=streaming)
        train, validation = load_text_datasets(args, seed=0, need_validation=True)
        assert texts_of(train) == ["a", "b", "c"]
        assert texts_of(validation) == ["d", "e"]

    @pytest.mark.parametrize("streaming", [False, True])
    def test_splits_and_column_can_be_named(self, dataset_name, streaming):
        args = DataArguments(
            dataset_name=dataset_name,
            streaming=streaming,
            dataset_train_split="validation",
            dataset_validation_split="test",
            text_column_name="body",
        )
        train, validation = load_text_datasets(args, seed=0, need_validation=True)
        assert texts_of(train) == ["d", "e"]
        assert texts_of(validation) == ["f"]

    def test_without_a_validation_split_one_is_made(self, dataset_name):
        Path(dataset_name, "validation.csv").unlink()
        train, validation = load_text_datasets(DataArguments(dataset_name=dataset_name), seed=0, need_validation=True)
        assert sorted(texts_of(train) + texts_of(validation)) == ["a", "b", "c"]

    @pytest.mark.parametrize("streaming", [False, True])
    def test_unknown_splits_and_columns_are_named(self, dataset_name, streaming):
        with pytest.raises(UsageError, match=r"'\./corpus' has no split 'dev'\. Its .* are: train, validation, test"):
            load(dataset_name=dataset_name, streaming=streaming, dataset_train_split="dev")
        with pytest.raises(UsageError, match=r"No column 'text' in dataset '\./corpus'\. .* out of: id, body"):
            load(dataset_name=dataset_name, streaming=streaming, text_column_name="text")
        with pytest.raises(UsageError, match=r"Column 'id' of dataset '\./corpus' holds int(64)?, not strings"):
            load(dataset_name=dataset_name, streaming=streaming, text_column_name="id")

    def test_a_split_of_blanks_is_refused(self):
        write("blanks/train.jsonl", '{"text": " "}\n{"text": null}\n{"text": ""}\n')
        with pytest.raises(UsageError, match="Split 'train' of dataset 'blanks' holds no text in column 'text'"):
            load(dataset_name="blanks")

    def test_a_stream_without_features_works_too(self, monkeypatch):
        stream = IterableDataset.from_generator(lambda: iter([{"id": 1, "body": "a"}, {"id": 2, "body": None}]))
        assert stream.features is None
        monkeypatch.setattr("jepa_hf.data.splits.load_dataset", lambda *args, **kwargs: {"train": stream})
        assert texts_of(load(dataset_name="any", streaming=True)) == ["a"]

    def test_an_unknown_configuration_is_named(self, dataset_name):
        assert_refused(
            "dataset_name './corpus' cannot be loaded: BuilderConfig 'x' not found. Available: ['default']",
            dataset_name=dataset_name,
            dataset_config_name="x",
        )

    def test_broken_files_in_a_directory_are_reported(self):
        write("broken/train.parquet", b"nonsense")
        with pytest.raises(UsageError, match=r"dataset_name 'broken' cannot be loaded: .*[Pp]arquet"):
            load(dataset_name="broken")

    def test_without_network_the_error_names_it(self, monkeypatch, caplog, capfd):
        monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
        assert_refused(
            "dataset_name 'nobody/nothing' cannot be loaded: the Hub cannot be reached; name another dataset, or "
            "local files with --train_file.",
            dataset_name="nobody/nothing",
        )
        assert not caplog.records
        assert capfd.readouterr().err == ""

    def test_an_unknown_name_is_reported(self):
        assert_refused("dataset_name './nothing' cannot be loaded: ", dataset_name="./nothing")

    def test_not_together_with_files(self, dataset_name):
        assert_refused("dataset_name and train_file exclude each other", "a.txt", dataset_name=dataset_name)


class TestValidationSplit:
    def split(self, size: int, seed: int = 0, **arguments: Any) -> tuple[list[str], list[str]]:
        write("a.txt", [f"line {i:05}" for i in range(size)])
        args = DataArguments(train_file="a.txt", **arguments)
        train, validation = load_text_datasets(args, seed=seed, need_validation=True)
        return texts_of(train), texts_of(validation)

    @pytest.mark.parametrize(("size", "percentage", "expected"), [(200, 5, 10), (2, 5, 1), (2, 99, 1), (10, 25, 2)])
    def test_the_share_is_set_apart_but_never_nothing_nor_all(self, size, percentage, expected):
        train, validation = self.split(size, validation_split_percentage=percentage)
        assert len(validation) == expected
        assert sorted(train + validation) == [f"line {i:05}" for i in range(size)]
        assert train == sorted(train)

    def test_it_depends_on_the_seed_alone(self):
        assert self.split(100) == self.split(100)
        assert self.split(100)[1] != self.split(100, seed=1)[1]

    def test_the_embedded_corpus_is_split_too(self):
        train, validation = load_text_datasets(DataArguments(), seed=0, need_validation=True)
        assert sorted(texts_of(train) + texts_of(validation)) == sorted(builtin_corpus())
        assert len(validation) == round(len(builtin_corpus()) * 0.05)

    def test_a_single_row_cannot_be_split(self):
        with pytest.raises(UsageError, match="A single row cannot be split"):
            self.split(1)

    def test_streams_cannot_be_split(self):
        with pytest.raises(UsageError, match=r"A stream cannot be split\. Set --validation_file"):
            self.split(100, streaming=True)


@pytest.mark.parametrize("streaming", [False, True])
def test_samples_are_limited(streaming):
    write("a.txt", TEXTS)
    write("b.txt", TEXTS)
    args = DataArguments(
        train_file="a.txt", validation_file="b.txt", max_train_samples=2, max_eval_samples=99, streaming=streaming
    )
    train, validation = load_text_datasets(args, seed=0, need_validation=True)
    assert texts_of(train) == TEXTS[:2]
    assert texts_of(validation) == TEXTS


class TestEmbeddedCorpus:
    def test_it_is_the_default(self):
        assert texts_of(load()) == builtin_corpus()
        assert texts_of(load(streaming=True)) == builtin_corpus()

    def test_it_is_prose_without_repetitions(self):
        corpus = builtin_corpus()
        assert corpus == builtin_corpus()
        assert len(corpus) == len(set(corpus)) > 1000
        assert 200_000 < sum(map(len, corpus)) < 400_000
        for paragraph in corpus:
            assert len(paragraph) >= 40
            assert paragraph == " ".join(paragraph.split())
            assert not re.search(r">>>|::=|\*{5}|={5}|-{5}", paragraph)
        assert sum(character.isalpha() or character == " " for text in corpus for character in text) > 0.9 * sum(
            map(len, corpus)
        )


class TestWordpieceTokenizer:
    def test_equal_texts_give_equal_tokenizers(self):
        first, second = (train_wordpiece_tokenizer(iter(builtin_corpus()), vocab_size=1000) for _ in range(2))
        assert first.get_vocab() == second.get_vocab()
        assert len(first) == 1000
        assert first.convert_ids_to_tokens(range(5)) == ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

    def test_it_is_a_lower_casing_bert_tokenizer(self):
        tokenizer = train_wordpiece_tokenizer(builtin_corpus(), vocab_size=1000, model_max_length=77)
        encoded = tokenizer("The [MASK] Statement")
        assert tokenizer.is_fast
        assert tokenizer.model_max_length == 77
        assert encoded.tokens() == ["[CLS]", "the", "[MASK]", "statement", "[SEP]"]
        assert tokenizer.unk_token_id not in [i for text in builtin_corpus() for i in tokenizer(text)["input_ids"]]

    def test_it_comes_back_from_disk(self):
        tokenizer = train_wordpiece_tokenizer(TEXTS, vocab_size=100)
        tokenizer.save_pretrained("saved")
        again = AutoTokenizer.from_pretrained("saved")
        assert again.is_fast
        assert again.model_max_length == 512
        assert again.get_vocab() == tokenizer.get_vocab()
        assert again(TEXTS)["input_ids"] == tokenizer(TEXTS)["input_ids"]
        assert again.mask_token_id == tokenizer.mask_token_id == 4
