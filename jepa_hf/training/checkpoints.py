"""Checkpoint directories: atomic writing with a manifest, rotation, verification before resuming.

The directories named `checkpoint-N` are a run's checkpoints. Each is written as `_checkpoint-N.new`, a name that no
reader matches. When all ranks have written their parts, a manifest with the size and SHA-256 of every file is added,
everything is synchronized to disk, and the directory is renamed. So a killed process or a power failure leaves complete
checkpoints and at most such a staging directory, which the next start removes. transformers' own `get_last_checkpoint`
takes the newest directory, even an incomplete one (transformers issue 35782).

The manifest detects later damage: an interrupted copy, an interrupted deletion, a flipped bit.
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

from ..errors import RunError, UsageError, one_line
from ..utils.atomic_files import fsync_tree, remove_path, replace_atomically

MANIFEST = "manifest.json"
STATE_FILE = "trainer_state.json"

_CHECKPOINT_RE = re.compile(rf"{PREFIX_CHECKPOINT_DIR}-(\d+)")
_STAGING_RE = re.compile(rf"_{PREFIX_CHECKPOINT_DIR}-\d+\.(new|old)")

# Disk full, quota exceeded, file too large, read-only, I/O error, no permission (twice).
_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.EACCES, errno.EPERM)
# Parts of torch.save's messages about any of these.
_TORCH_WRITE_ERRORS = ("inline_container", "PytorchStreamWriter", "iostream error")


# ---- names


def is_checkpoint_name(name: str) -> bool:
    """Return whether a directory of this name is a run's checkpoint.

    >>> is_checkpoint_name("checkpoint-10"), is_checkpoint_name("checkpoint-10-copy")
    (True, False)
    """
    return _CHECKPOINT_RE.fullmatch(name) is not None


def is_staging_checkpoint(name: str) -> bool:
    """Return whether a directory of this name is being written or deleted.

    >>> is_staging_checkpoint("_checkpoint-10.new"), is_staging_checkpoint("checkpoint-10")
    (True, False)
    """
    return _STAGING_RE.fullmatch(name) is not None


def staging_path(checkpoint: Path) -> Path:
    """Return the staging directory that a checkpoint is written to.

    >>> staging_path(Path("out/checkpoint-10")).name
    '_checkpoint-10.new'
    """
    return checkpoint.with_name(f"_{checkpoint.name}.new")


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rpartition("-")[2])


# ---- writing


def create_staging_dir(checkpoint: Path) -> None:
    """Create the staging directory of `checkpoint`, on one process before all write."""
    remove_path(staging_path(checkpoint))
    staging_path(checkpoint).mkdir(parents=True)


def commit_checkpoint(checkpoint: Path) -> None:
    """Add a manifest to the staging directory and rename it, on one process at the end.

    An existing checkpoint of the same name is replaced.
    """
    folder = staging_path(checkpoint)
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        files[name] = {"size": path.stat().st_size, "sha256": _sha256(path)}
    content = json.dumps({"files": files}, indent=1)
    (folder / MANIFEST).write_text(f"{content}\n", encoding="utf-8")
    fsync_tree(folder)
    replace_atomically(folder, checkpoint)


@contextmanager
def disk_errors_as_run_error(place: Path, run_dir: Path, needed: int) -> Iterator[None]:
    """Turn disk errors into a `RunError`, and remove a half-written checkpoint.

    Raises:
        RunError: The disk is full, read-only, or fails.
    """
    try:
        yield
    except BaseException as error:
        if is_checkpoint_name(place.name):
            remove_path(staging_path(place))
        if not _is_disk_error(error):
            raise
        free = shutil.disk_usage(run_dir).free if run_dir.is_dir() else 0
        raise RunError(
            f"{place} could not be written ({one_line(error)}). It takes about {_megabytes(needed)}, and "
            f"{_megabytes(free)} are free. {resume_hint(run_dir, 'Make room, and')}"
        ) from error


def resume_hint(run_dir: Path, first: str = "") -> str:
    """Return sentences that say how to continue an interrupted run.

    >>> resume_hint(Path("no such run"), "Make room, and")
    'Make room, and give the same command again to start over: no checkpoint is complete yet.'
    """
    newest, _ = latest_valid_checkpoint(run_dir, contents=False)
    goal = "start over: no checkpoint is complete yet" if newest is None else f"go on from {newest}"
    return f"{first} give the same command again to {goal}." if first else f"Give the same command again to {goal}."


def _is_disk_error(error: BaseException) -> bool:
    """Return whether an error means that a file could not be written."""
    if isinstance(error, OSError):
        return error.errno in _DISK_ERRORS
    if isinstance(error, SafetensorError):
        return "I/O error" in str(error) or "IoError" in str(error)  # before safetensors 0.6
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _TORCH_WRITE_ERRORS)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:,.1f} MB"


def rotate(run_dir: Path, limit: int | None, keep: Collection[Path]) -> None:
    """Delete checkpoints until `limit` remain, but none of `keep`: incomplete ones first, then the oldest."""
    checkpoints = _checkpoints(run_dir)
    if not limit or limit < 0 or len(checkpoints) <= limit:
        return

    def age(checkpoint: Path) -> tuple[bool, int, int]:
        is_complete = find_corruption(checkpoint, contents=False) is None
        return is_complete, (checkpoint / MANIFEST).stat().st_mtime_ns if is_complete else 0, _step(checkpoint)

    protected = {checkpoint.resolve() for checkpoint in keep}
    deletable = [checkpoint for checkpoint in sorted(checkpoints, key=age) if checkpoint.resolve() not in protected]
    for checkpoint in deletable[: len(checkpoints) - max(limit, len(checkpoints) - len(deletable))]:
        trash = checkpoint.with_name(f"_{checkpoint.name}.old")  # an interrupted deletion leaves no incomplete one
        remove_path(trash)
        checkpoint.replace(trash)
        remove_path(trash)


def remove_incomplete(run_dir: Path) -> None:
    """Delete checkpoints that a killed process was writing or deleting."""
    for folder in [entry for entry in run_dir.glob("_*") if is_staging_checkpoint(entry.name)]:
        remove_path(folder)


# ---- reading


def find_corruption(checkpoint: Path, contents: bool = True) -> str | None:
    """Return the damage of a checkpoint as a clause; None for a complete one.

    Without `contents` only the sizes of files are compared, not their SHA-256.
    """
    try:
        if not (checkpoint / STATE_FILE).is_file():
            return f"it has no {STATE_FILE}"
        if not (checkpoint / MANIFEST).is_file():
            return f"it has no {MANIFEST}, which is written last"
        files = json.loads((checkpoint / MANIFEST).read_text(encoding="utf-8"))["files"]
        for name, entry in files.items():
            path, size, sha256 = checkpoint / name, int(entry["size"]), str(entry["sha256"])
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


def latest_valid_checkpoint(run_dir: Path, contents: bool = True) -> tuple[Path | None, list[str]]:
    """Find a run's newest complete checkpoint.

    Returns:
        The checkpoint, or None; and a warning for each newer one that is incomplete.
    """
    skipped: list[str] = []
    for checkpoint in reversed(_checkpoints(run_dir)):
        reason = find_corruption(checkpoint, contents)
        if reason is None:
            return checkpoint, skipped
        skipped.append(f"skipping {checkpoint}, which is incomplete: {reason}")
    return None, skipped


def validate_checkpoint(folder: str | Path) -> None:
    """Refuse to resume from a directory that is not a complete checkpoint.

    Raises:
        UsageError: It is not; the message names the damage and the newest complete checkpoint of the run.
    """
    folder = Path(folder)
    reason = find_corruption(folder)
    if reason is None:
        return
    if not (folder / STATE_FILE).is_file() and not (folder / MANIFEST).is_file():
        raise UsageError(
            f"Expected resume_from_checkpoint to be a checkpoint of a run, got {str(folder)!r}: {reason}. Use a folder "
            "named checkpoint-N."
        )
    newest, _ = latest_valid_checkpoint(folder.absolute().parent)
    remedy = f"Use the newest complete one, {newest.name}" if newest else "No other checkpoint of the run is complete"
    raise UsageError(f"resume_from_checkpoint {str(folder)!r} is incomplete: {reason}. {remedy}.")


def _checkpoints(run_dir: Path) -> list[Path]:
    """List the checkpoints in the order of their steps."""
    entries = run_dir.glob(f"{PREFIX_CHECKPOINT_DIR}-*")
    return sorted((entry for entry in entries if is_checkpoint_name(entry.name) and entry.is_dir()), key=_step)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
