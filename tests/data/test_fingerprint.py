"""Tests of `data_fingerprint`: equal data, changed data, all kinds of rows."""

import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
from datasets import Dataset

from jepa_hf.data.fingerprint import data_fingerprint

ROWS = {
    "tokens": [{"input_ids": [number, 5, 6]} for number in range(400)],
    "text": [{"text": f"text {number}"} for number in range(400)],
    "series": [{"features": [[0.5, number], [1.0, 2.0]]} for number in range(400)],
    "image bytes": [{"image": {"bytes": bytes([number % 256, 1]), "path": None}} for number in range(400)],
}


@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS)
@pytest.mark.parametrize("as_list", [True, False])
def test_rows(rows: list, as_list: bool) -> None:
    """Equal rows give equal results; a changed, missing or moved last row gives others."""
    make = list if as_list else Dataset.from_list
    result = data_fingerprint(make(rows))
    assert result["rows"] == 400
    assert result["fingerprint"]
    assert result == data_fingerprint(make(rows))
    for other in ([*rows[:-1], rows[0]], rows[:-1], [*rows[1:], rows[0]]):
        assert data_fingerprint(make(other)) != result


def test_stored_rows() -> None:
    """A view of a table (selected rows, another format) has the fingerprint of the rows that it shows."""
    dataset = Dataset.from_dict({"features": np.arange(12.0).reshape(6, 2).tolist()})
    selected = dataset.select([1, 3]).with_format("numpy")
    assert data_fingerprint(selected) == data_fingerprint(Dataset.from_list([dataset[1], dataset[3]]))


def test_files(tmp_path) -> None:
    """Of a stream the files are hashed: the same after a copy, another after any changed byte or file."""
    path = tmp_path / "a.txt"
    path.write_bytes(b"one\n" * 100_000)
    stream = Dataset.from_dict({"text": ["one"]}).to_iterable_dataset()
    result = data_fingerprint(stream, str(path))
    assert result["rows"] is None
    assert result["fingerprint"]
    shutil.copy(path, tmp_path / "b.txt")
    os.utime(tmp_path / "b.txt", (0, 0))
    assert data_fingerprint(stream, str(tmp_path / "b.txt")) == result
    assert data_fingerprint(stream, f"{path}, {tmp_path}/b*") != result
    content = bytearray(path.read_bytes())
    content[150_001] = 0
    path.write_bytes(content)
    assert data_fingerprint(stream, str(path)) != result


def test_image_paths(tmp_path) -> None:
    """Rows that only name images change with the images' contents."""
    path = tmp_path / "x.png"
    path.write_bytes(b"picture")
    rows = Dataset.from_dict({"image": [{"path": str(path), "bytes": None}]})
    result = data_fingerprint(rows, str(tmp_path))
    path.write_bytes(b"pictura")
    assert data_fingerprint(rows, str(tmp_path)) != result


def test_no_sample() -> None:
    """Rows that cannot be sampled (a stream without files, a torch data set) give no fingerprint."""

    class Random:
        def __len__(self) -> int:
            return 3

    assert data_fingerprint(Random()) == {"rows": 3, "fingerprint": None}
    assert data_fingerprint(iter(())) == {"rows": None, "fingerprint": None}


@pytest.mark.slow
def test_process() -> None:
    """Another process, with another hash seed, gives the same result."""
    code = (
        "from jepa_hf.data.fingerprint import data_fingerprint; from datasets import Dataset\n"
        "print(hash('a'), data_fingerprint(Dataset.from_dict({'text': ['a', 'b'], 'label': [1, None]})))"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "1"}
    process = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    number, _, fingerprint = process.stdout.strip().partition(" ")
    assert int(number) != hash("a")
    assert fingerprint == str(data_fingerprint(Dataset.from_dict({"text": ["a", "b"], "label": [1, None]})))
