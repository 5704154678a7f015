"""Claims about files and folders that are written whole: the old content or the new, nothing in between."""

import os
from pathlib import Path

import pytest

from jepa_hf.utils import atomic_files
from jepa_hf.utils.atomic_files import (
    atomic_write,
    atomic_write_dir,
    fsync_tree,
    is_staging_name,
    remove_path,
    replace_atomically,
)


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder, with its text."""
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_file_keeps_its_old_content_until_the_new_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with atomic_write(path) as new:
        assert new.suffix == ".json"  # by which matplotlib chooses a format
        new.write_text("half")
        assert path.read_text() == "old"
        assert is_staging_name(new.name, "a.json")
    assert tree(tmp_path) == {"a.json": "half"}


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text("old")
    with pytest.raises(OSError, match="full"), atomic_write(path) as new:
        new.write_text("half")
        raise OSError("full")
    assert tree(tmp_path) == {"a.json": "old"}


def test_files_and_folders_are_renamed_and_others_stay(tmp_path: Path) -> None:
    """A folder is replaced as a whole: no file of the old one stays in it."""
    (tmp_path / "jepa").mkdir()
    for name in ("weights", "jepa/old", "notes"):
        (tmp_path / name).write_text("old")
    (tmp_path / "_final.new").mkdir()
    (tmp_path / "_final.new" / "stale").write_text("of a killed process")
    with atomic_write_dir(tmp_path) as new:
        (new / "jepa").mkdir()
        for name in ("weights", "jepa/new"):
            (new / name).write_text("new")
        assert (tmp_path / "weights").read_text() == "old"
    assert tree(tmp_path) == {"weights": "new", "jepa/new": "new", "notes": "old"}
    assert {path.name for path in tmp_path.iterdir()} == {"weights", "jepa", "notes"}


def test_windows_flushes_files_and_opens_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There, a folder cannot be opened, and `fsync` needs a file that may be written."""
    opened: list[Path] = []

    def open_as_on_windows(path: Path, flags: int) -> int:
        assert path.is_file()
        assert flags == os.O_RDWR
        opened.append(path)
        return original(path, flags)

    original = os.open
    (tmp_path / "jepa").mkdir()
    (tmp_path / "jepa" / "weights").write_text("new")
    monkeypatch.setattr(atomic_files.os, "name", "nt")
    monkeypatch.setattr(atomic_files.os, "open", open_as_on_windows)
    fsync_tree(tmp_path)
    assert opened == [tmp_path / "jepa" / "weights"]


def test_an_error_leaves_the_old_files(tmp_path: Path) -> None:
    (tmp_path / "weights").write_text("old")
    with pytest.raises(OSError, match="full"), atomic_write_dir(tmp_path) as new:
        (new / "weights").write_text("half")
        raise OSError("full")
    assert tree(tmp_path) == {"weights": "old"}


def test_a_replacement_that_was_killed_between_its_renames_is_finished_by_the_next(tmp_path: Path) -> None:
    (tmp_path / "_jepa.old").mkdir()
    assert is_staging_name("_jepa.old", "jepa")
    (tmp_path / "new").mkdir()
    replace_atomically(tmp_path / "new", tmp_path / "jepa")
    assert [path.name for path in tmp_path.iterdir()] == ["jepa"]


def test_what_a_link_leads_to_is_not_removed(tmp_path: Path) -> None:
    (tmp_path / "kept").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "kept")
    for name in ("link", "nothing"):
        remove_path(tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]
