"""Files and folders that are there whole or not at all: written under another name, then renamed."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_NEW_FOLDER = "_final.new"


@contextmanager
def whole_file(path: str | Path) -> Iterator[Path]:
    """A path to write to instead of `path`, with the same ending; at the end it takes `path`'s place in one act.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "notes.txt"
    >>> with whole_file(path) as new:
    ...     _ = new.write_text("all of it")
    ...     print(new.name, path.exists())
    _notes.new.txt False
    >>> path.read_text()
    'all of it'
    """
    path = Path(path)
    new = path.with_name(f"_{path.stem}.new{path.suffix}")
    try:
        yield new
        _sync(new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def whole_files(folder: str | Path) -> Iterator[Path]:
    """A new folder to write to instead of `folder`, whose other content stays.

    At the end each file and folder in it takes the place of what had its name, in one act.
    """
    folder = Path(folder)
    new = folder / _NEW_FOLDER
    remove(new)
    new.mkdir(parents=True)
    try:
        yield new
        sync_folder(new)
        for entry in sorted(new.iterdir()):
            put_in_place(entry, folder / entry.name)
    finally:
        remove(new)


def put_in_place(new: Path, place: Path) -> None:
    """Rename a file, or a folder, to `place`. A folder that is there is renamed before, and removed after."""
    old = place.with_name(f"_{place.name}.old")
    if new.is_dir():
        remove(old)
        if place.is_dir():
            place.replace(old)
    new.replace(place)
    _sync(place.parent)
    if place.is_dir():
        remove(old)


def left_behind(name: str, written: str) -> bool:
    """Whether `name` is what a killed process left of writing the file or folder `written`.

    >>> left_behind("_notes.new.txt", "notes.txt"), left_behind("_jepa.old", "jepa"), left_behind("notes.txt", "notes")
    (True, True, False)
    """
    path = Path(written)
    return name in (f"_{path.stem}.new{path.suffix}", f"_{written}.old", _NEW_FOLDER)


def sync_folder(folder: Path) -> None:
    """Have all of a folder on the disk, not only in the system's memory, before it is renamed."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            _sync(path)
    _sync(folder)


def remove(path: Path) -> None:
    """Delete a file, a link, or a folder with all that is in it; nothing happens where nothing is."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
