"""Embedding of a source of rows in parts, so that memory is bounded and a killed run can resume."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from ..errors import UsageError
from ..utils.atomic_files import atomic_write, atomic_write_text
from .embedder import Embedder
from .progress import progress_bar
from .row_sources import RowSource
from .table_readers import EMBEDDING_COLUMN

OUTPUT_SUFFIXES = (".parquet", ".npy")
_SETTINGS_FILE = "settings.json"


def embed_files(
    embedder: Embedder,
    source: RowSource,
    output: str | Path,
    pooling: str = "mean",
    settings: dict[str, Any] | None = None,
    show_progress: bool = False,
) -> int:
    """Write the embeddings of all rows, float32.

    Finished parts stay in `OUTPUT.parts/` until the last one is written, so the same call resumes after them.

    Args:
        embedder: the encoder.
        source: rows from `open_source`.
        output: a new file; `.parquet` for the source's columns and a column of lists, `embedding`;
            `.npy` for an array `[rows, D]`.
        pooling: see `Embedder`.
        settings: further settings that must be equal to resume, in JSON types; such as the model's name.
        show_progress: whether to show a progress bar.

    Returns:
        Width D of the embeddings.

    Raises:
        UsageError: `output` exists or cannot be written, `OUTPUT.parts/` belongs to another
            embedding, or the encoder cannot read a row.
    """
    output = Path(output)
    check_output(output)
    fingerprint = json.loads(json.dumps({"pooling": pooling, **source.description, **(settings or {})}, default=str))
    folder = Path(f"{output}.parts")
    _check_parts(folder, fingerprint)
    paths: list[Path] = []
    first = 0
    with progress_bar(source.count, embedder.name, "rows", show_progress) as bar:
        for table, samples in source.parts():
            path = folder / f"part-{len(paths):06d}{output.suffix}"
            if _num_rows_if_complete(path) != len(samples):
                try:
                    vectors = embedder.embed_list(
                        samples, (pooling,), feature_column_names=source.feature_column_names
                    )[pooling]
                except UsageError as error:
                    raise UsageError(f"In the rows from {first + 1} on: {error}") from None
                if not paths:  # without a part, no folder is left to clear up after an error
                    folder.mkdir(exist_ok=True)
                    atomic_write_text(folder / _SETTINGS_FILE, json.dumps(fingerprint, indent=1))
                _write_part(path, table, vectors)
            paths.append(path)
            first += len(samples)
            bar.update(len(samples))
    width = _join(paths, output, first)
    shutil.rmtree(folder)
    return width


def check_output(output: Path) -> None:
    """Check that a file can be created.

    Raises:
        UsageError: the file exists, has an unknown ending, or its folder is missing or not writable.
    """
    if output.suffix not in OUTPUT_SUFFIXES:
        raise UsageError(f"Expected output to end in {' or '.join(OUTPUT_SUFFIXES)}, got {str(output)!r}.")
    if output.exists():
        raise UsageError(f"Output {str(output)!r} exists. Delete it, or name another.")
    if not output.parent.is_dir() or not os.access(output.parent, os.W_OK):
        raise UsageError(f"The folder of output {str(output)!r} does not exist or is not writable. Name another.")


def _check_parts(folder: Path, fingerprint: dict[str, Any]) -> None:
    """Check that the folder is absent, or holds parts with these settings."""
    path = folder / _SETTINGS_FILE
    if path.is_file():
        previous = json.loads(path.read_text(encoding="utf-8"))
        changed = [name for name in fingerprint if fingerprint[name] != previous.get(name)]
        if changed:
            raise UsageError(
                f"{str(folder)!r} holds parts of another embedding (with other {', '.join(changed)}). Repeat that "
                "command, delete the folder, or name another output."
            )
    elif folder.exists() and any(folder.iterdir()):
        raise UsageError(f"The folder for parts, {str(folder)!r}, holds other files. Name another output.")


def _write_part(path: Path, table: pa.Table, vectors: np.ndarray) -> None:
    with atomic_write(path) as new:
        if path.suffix == ".npy":
            np.save(new, vectors)
            return
        offsets = np.arange(0, vectors.size + 1, vectors.shape[1], dtype=np.int32)
        lists = pa.ListArray.from_arrays(offsets, pa.array(vectors.reshape(-1)))
        pq.write_table(table.append_column(EMBEDDING_COLUMN, lists), new)


def _num_rows_if_complete(path: Path) -> int | None:
    """Return the number of rows of a part; None if the file is missing or truncated."""
    try:
        if path.suffix == ".npy":
            return len(np.load(path, mmap_mode="r"))
        return pq.read_metadata(path).num_rows
    except (OSError, ValueError, pa.ArrowException):
        return None


def _join(paths: list[Path], output: Path, count: int) -> int:
    """Write all parts to one file, atomically; return the width of the embeddings."""
    with atomic_write(output) as new:
        if output.suffix == ".npy":
            width = np.load(paths[0], mmap_mode="r").shape[1]
            _join_arrays(paths, new, (count, width))
            return width
        _join_tables(paths, new)
    return len(pq.ParquetFile(paths[0]).read_row_group(0, [EMBEDDING_COLUMN])[EMBEDDING_COLUMN][0])


def _join_arrays(paths: list[Path], new: Path, shape: tuple[int, int]) -> None:
    joined = np.lib.format.open_memmap(new, mode="w+", dtype=np.float32, shape=shape)
    begin = 0
    for path in paths:
        part = np.load(path)
        joined[begin : begin + len(part)] = part
        begin += len(part)
    joined.flush()


def _join_tables(paths: list[Path], new: Path) -> None:
    with pq.ParquetWriter(new, pq.read_schema(paths[0])) as writer:
        for path in paths:
            writer.write_table(pq.read_table(path))
