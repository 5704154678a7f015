"""Whole checkpoints: written aside and renamed as the last act, verified before anything is resumed from them.

A run's folders named `checkpoint-N` are its checkpoints. Each is written as `_checkpoint-N.new`, where nothing looks
for one; when all ranks have written their parts, a manifest with every file's size and SHA-256 is added, all is
synchronised to the disk, and the folder is renamed. So a process that ends at any moment, or a machine that loses its
power, leaves whole checkpoints and perhaps such a folder, which the next start removes. transformers' own
`get_last_checkpoint` takes the newest folder whatever it holds (transformers issue 35782).

What the manifest tells apart later is what happens to a whole checkpoint: a copy that broke off, a deletion that broke
off, a bit that flipped.
"""

import errno
import hashlib
import json
import re
import shutil
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..errors import RunError, UsageError
from ..utils.atomic_files import put_in_place, remove, sync_folder

MANIFEST = "manifest.json"
STATE_FILE = "trainer_state.json"

_NAME = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_LEFT_BEHIND = re.compile(rf"_{PREFIX_CHECKPOINT_DIR}-\d+\.(new|old)")

# No room, over quota, file too large, read-only, failing, forbidden.
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)
# What torch.save says of any of these.
_TORCH_WRITER = ("inline_container", "PytorchStreamWriter", "iostream error")


# ---- names


def is_checkpoint_name(name: str) -> bool:
    """Whether a folder of this name is a run's checkpoint.

    >>> is_checkpoint_name("checkpoint-10"), is_checkpoint_name("checkpoint-10-copy")
    (True, False)
    """
    return _NAME.fullmatch(name) is not None


def is_left_behind(name: str) -> bool:
    """Whether a folder of this name is a checkpoint that is being written or deleted, or never was to the end.

    >>> is_left_behind("_checkpoint-10.new"), is_left_behind("checkpoint-10")
    (True, False)
    """
    return _LEFT_BEHIND.fullmatch(name) is not None


def aside(checkpoint: Path) -> Path:
    """Where a checkpoint is written.

    >>> aside(Path("out/checkpoint-10")).name
    '_checkpoint-10.new'
    """
    return checkpoint.with_name(f"_{checkpoint.name}.new")


def _step(checkpoint: Path) -> int:
    return int(_NAME.fullmatch(checkpoint.name)[1])


# ---- writing


def begin(checkpoint: Path) -> None:
    """Make the empty folder that the parts of `checkpoint` are written to. One process calls this, before all write."""
    remove(aside(checkpoint))
    aside(checkpoint).mkdir(parents=True)


def publish(checkpoint: Path) -> None:
    """Make what was written aside the checkpoint. One process calls this, after all have written.

    A checkpoint of the same number that is there already is replaced.
    """
    folder = aside(checkpoint)
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    content = json.dumps({"files": files}, indent=1)
    (folder / MANIFEST).write_text(f"{content}\n", encoding="utf-8")
    sync_folder(folder)
    put_in_place(folder, checkpoint)


@contextmanager
def writing(place: Path, run_dir: Path, needed: int) -> Iterator[None]:
    """Say in a sentence what a full or failing disk raises while a run writes `place`; no half of a checkpoint stays.

    Args:
        place: the checkpoint, or the folder of the results.
        needed: bytes that it takes, about.

    Raises:
        RunError: the disk is full, read-only, or fails.
    """
    try:
        yield
    except BaseException as error:
        if is_checkpoint_name(place.name):
            remove(aside(place))
        if not _is_of_the_disk(error):
            raise
        free = shutil.disk_usage(run_dir).free if run_dir.is_dir() else 0
        raise RunError(
            f"{place} could not be written ({' '.join(str(error).split())}): it takes about {_megabytes(needed)}, and "
            f"{_megabytes(free)} are free there; {how_to_go_on(run_dir, 'make room, and')}"
        ) from error


def how_to_go_on(run_dir: Path, first: str = "") -> str:
    """The end of a sentence about a run that was cut off.

    >>> how_to_go_on(Path("no such run"), "mend it, and")
    'no whole checkpoint is there yet: mend it, and give the same command again to start over'
    """
    newest, _ = newest_whole(run_dir, contents=False)
    there, what = (
        ("no whole checkpoint is there yet", "start over") if newest is None else (f"{newest} is whole", "go on")
    )
    return f"{there}: {first} give the same command again to {what}".replace("  ", " ")


def _is_of_the_disk(error: BaseException) -> bool:
    """Whether it is what Python, safetensors or torch raise where a file cannot be written to its end."""
    if isinstance(error, OSError):
        return error.errno in _DISK_ERRORS
    if isinstance(error, SafetensorError):
        return "I/O error" in str(error) or "IoError" in str(error)  # before safetensors 0.6
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in _TORCH_WRITER)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def rotate(run_dir: Path, limit: int | None, keep: Collection[Path]) -> None:
    """Delete checkpoints until `limit` are left: torn ones first, then those that were written first.

    Args:
        limit: `save_total_limit`; None or 0 for no limit.
        keep: never deleted: the checkpoint that was just written, which is whole, and the best one.
    """
    checkpoints = _checkpoints(run_dir)
    if not limit or limit < 0 or len(checkpoints) <= limit:
        return

    def age(checkpoint: Path) -> tuple[bool, int, int]:
        whole = damage(checkpoint, contents=False) is None
        return whole, (checkpoint / MANIFEST).stat().st_mtime_ns if whole else 0, _step(checkpoint)

    kept = {checkpoint.resolve() for checkpoint in keep}
    deletable = [checkpoint for checkpoint in sorted(checkpoints, key=age) if checkpoint.resolve() not in kept]
    for checkpoint in deletable[: len(checkpoints) - max(limit, len(checkpoints) - len(deletable))]:
        doomed = checkpoint.with_name(f"_{checkpoint.name}.old")  # a deletion that breaks off leaves no torn one
        remove(doomed)
        checkpoint.replace(doomed)
        remove(doomed)


def remove_left_behind(run_dir: Path) -> None:
    """Delete what an earlier process did not write, or delete, to the end."""
    for folder in [entry for entry in run_dir.glob("_*") if is_left_behind(entry.name)]:
        remove(folder)


# ---- reading


def damage(checkpoint: Path, contents: bool = True) -> str | None:
    """Why a folder is no whole checkpoint, as the part of a sentence; None for a whole one.

    Args:
        contents: read every file and compare its SHA-256; otherwise only the sizes.
    """
    try:
        if not (checkpoint / STATE_FILE).is_file():
            return f"it has no {STATE_FILE}"
        if not (checkpoint / MANIFEST).is_file():
            return f"it has no {MANIFEST}, which is written last"
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, noted in files.items():
            path, size, sha256 = checkpoint / name, int(noted["size"]), str(noted["sha256"])
            if not path.is_file():
                return f"its {name} is missing"
            if path.stat().st_size != size:
                return f"its {name} has {path.stat().st_size:,} bytes and not {size:,}"
            if contents and _sha256(path) != sha256:
                return f"its {name} was changed since it was written"
    except OSError as error:
        return f"it cannot be read ({error.strerror})"
    except (ValueError, KeyError, TypeError, AttributeError):
        return f"its {MANIFEST} is damaged"
    return None


def newest_whole(run_dir: Path, contents: bool = True) -> tuple[Path | None, list[str]]:
    """A run's newest whole checkpoint, None if there is none; and a sentence for each newer one, saying what it lacks.

    Args:
        contents: as `damage` takes it.
    """
    passed_over = []
    for checkpoint in reversed(_checkpoints(run_dir)):
        why = damage(checkpoint, contents)
        if why is None:
            return checkpoint, passed_over
        passed_over.append(f"passing over {checkpoint}, which is not whole: {why}")
    return None, passed_over


def check_checkpoint(folder: str | Path) -> None:
    """Refuse to resume from a folder that is no whole checkpoint.

    Raises:
        UsageError: it is not, with the reason and the newest whole one beside it.
    """
    folder = Path(folder)
    why = damage(folder)
    if why is None:
        return
    if not (folder / STATE_FILE).is_file() and not (folder / MANIFEST).is_file():
        raise UsageError(
            f"resume_from_checkpoint {str(folder)!r} is no checkpoint of a run ({why}); give a folder named "
            "checkpoint-N"
        )
    newest, _ = newest_whole(folder.absolute().parent)
    remedy = f"the newest whole one beside it is {newest.name}" if newest else "there is no whole one beside it"
    raise UsageError(f"resume_from_checkpoint {str(folder)!r} is not whole: {why}; {remedy}")


def _checkpoints(run_dir: Path) -> list[Path]:
    """By their step."""
    found = (entry for entry in run_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if is_checkpoint_name(entry.name))
    return sorted((entry for entry in found if entry.is_dir()), key=_step)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
