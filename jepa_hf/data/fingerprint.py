"""Row count and hash of training data, to detect data that changed under a run."""

import os
from collections.abc import Iterable, Sequence
from typing import Any

from datasets import Dataset
from datasets.fingerprint import Hasher

from ..utils.counts import evenly_spaced
from .file_readers import match_files

# Rows, files and blocks of a file that are read: a bound on time and memory, whatever the data's size.
_MAX_SAMPLES = 256
_BLOCK_BYTES = 2**16


def data_fingerprint(dataset: Any, files: str | None = None) -> dict[str, int | str | None]:
    """Return the number of rows of a training set and a hash of a sample of them.

    Equal data give equal hashes in every process, also after a copy or a change of modification times. The sample is
    spread evenly over rows and `files` (a value of `train_file`; folders are skipped, because rows of images hold the
    paths in them): any change of at most 256 rows, or of at most 16 MiB of files, changes the hash; in larger data a
    change of few bytes may be missed. A stream or a torch data set, whose rows may be random, is not sampled.

    Returns:
        `rows`, None for a stream, and `fingerprint`, None if neither rows nor files can be sampled.
    """
    rows = len(dataset) if hasattr(dataset, "__len__") else None
    samples: list[Any] = []
    if isinstance(dataset, Dataset):
        # As stored: neither decoded nor transformed.
        samples += dataset.with_format("arrow")[evenly_spaced(len(dataset), _MAX_SAMPLES)].to_pylist()
    elif isinstance(dataset, Sequence):
        samples += (dataset[index] for index in evenly_spaced(len(dataset), _MAX_SAMPLES))
    image_paths = [path for row in samples if (path := _image_path(row)) is not None]
    paths = [path for _, matches in match_files(files or "") for path in matches]
    sampled_paths = [*image_paths, *(paths[index] for index in evenly_spaced(len(paths), _MAX_SAMPLES))]
    for path in sampled_paths:
        samples += _file_blocks(path, max(_MAX_SAMPLES // len(sampled_paths), 2))
    return {"rows": rows, "fingerprint": _hash(samples) if samples else None}


def _image_path(row: Any) -> str | None:
    """Return the path of an image that a row names without holding its bytes."""
    image = row.get("image") if isinstance(row, dict) else None
    return image["path"] if isinstance(image, dict) and image.get("bytes") is None else None


def _file_blocks(path: str, limit: int) -> Iterable[int | bytes]:
    """Yield the size of a file and at most `limit` of its blocks; nothing for a missing one."""
    if not os.path.isfile(path):
        return
    size = os.path.getsize(path)
    yield size
    with open(path, "rb") as file:
        for block in evenly_spaced(-(-size // _BLOCK_BYTES), limit):
            file.seek(block * _BLOCK_BYTES)
            yield file.read(_BLOCK_BYTES)


def _hash(samples: Iterable[Any]) -> str:
    hasher = Hasher()
    for sample in samples:
        hasher.update(sample)
    return hasher.hexdigest()
