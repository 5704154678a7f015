"""Atomic writing of files and folders: write under another name, sync, rename."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_STAGING_DIR = "_final.new"


@contextmanager
def atomic_write(path: str | Path) -> Iterator[Path]:
    """Yield a path with the same suffix to write to; on success it atomically replaces `path`.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "notes.txt"
    >>> with atomic_write(path) as new:
    ...     _ = new.write_text("complete")
    ...     print(new.name, path.exists())
    _notes.new.txt False
    >>> path.read_text()
    'complete'
    """
    path = Path(path)
    new = path.with_name(f"_{path.stem}.new{path.suffix}")
    try:
        yield new
        _fsync(new)
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


def atomic_write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically, in UTF-8 and with its line ends unchanged."""
    with atomic_write(path) as new:
        new.write_text(text, encoding="utf-8", newline="")


@contextmanager
def atomic_write_dir(folder: str | Path) -> Iterator[Path]:
    """Yield an empty folder to write to; on success its entries move to `folder`.

    Each entry atomically replaces the entry of the same name. Other content of `folder` stays. After an error or
    Ctrl-C, a folder that was created for it is gone.
    """
    folder = Path(folder)
    new, existed = folder / _STAGING_DIR, folder.exists()
    remove_path(new)
    new.mkdir(parents=True)
    try:
        yield new
        fsync_tree(new)
        for entry in sorted(new.iterdir()):
            replace_atomically(entry, folder / entry.name)
    finally:
        remove_path(new)
        if not existed and not any(folder.iterdir()):
            folder.rmdir()


def replace_atomically(new: Path, place: Path) -> None:
    """Rename a file or folder to `place`; an existing folder is first renamed, then removed."""
    old = place.with_name(f"_{place.name}.old")
    if new.is_dir():
        remove_path(old)
        if place.is_dir():
            place.replace(old)
    new.replace(place)
    _fsync(place.parent)
    if place.is_dir():
        remove_path(old)


def is_staging_name(name: str, written: str) -> bool:
    """Return whether `name` is a leftover of an interrupted write of the file or folder `written`.

    >>> is_staging_name("_notes.new.txt", "notes.txt"), is_staging_name("notes.txt", "notes")
    (True, False)
    """
    path = Path(written)
    return name in (f"_{path.stem}.new{path.suffix}", f"_{written}.old", _STAGING_DIR)


def fsync_tree(folder: Path) -> None:
    """Flush all files and folders in a folder to disk."""
    for path in folder.rglob("*"):
        if not path.is_symlink():
            _fsync(path)
    _fsync(folder)


def remove_path(path: Path) -> None:
    """Delete a file, link or folder with its content, if it exists."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _fsync(path: Path) -> None:
    on_windows = os.name == "nt"
    if on_windows and path.is_dir():  # it cannot be opened there
        return
    descriptor = os.open(path, os.O_RDWR if on_windows else os.O_RDONLY)  # Windows flushes only what may be written
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
