"""A run's output directory: whose it is, how far the run in it got, and what to do about it."""

import json
import os
import platform
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

from ..errors import UsageError
from ..hub.export import JEPA_FOLDER, TARGET_FOLDER
from ..hub.push import LAST_CHECKPOINT, MODEL_FILES, RUN_FILES
from ..utils.atomic_files import left_behind, remove, whole_file
from ..version import __version__
from .checkpoints import check_checkpoint, is_checkpoint_name, is_left_behind, newest_whole
from .hub_trainer import PUSH_FOLDER

# An underscore in front: the Hub client's uploads leave it out.
RUN_FILE = "_run.json"

# What a run of ours writes into its directory, and so may delete.
_WRITTEN = (
    *(name.partition("/")[0] for name in (*MODEL_FILES, *RUN_FILES)), JEPA_FOLDER, TARGET_FOLDER, RUN_FILE, "runs",
    "masks.png", "report.html", PUSH_FOLDER,
)  # fmt: skip
# What a download of a pushed run brings along, and what no run deletes.
_FROM_THE_HUB = (".cache", ".gitattributes", LAST_CHECKPOINT)

# Settings that do not change what is learnt: a run may be resumed with others.
_FREE = (
    "output_dir", "overwrite_output_dir", "resume_from_checkpoint", "logging_*", "log_*", "report_to", "run_name",
    "project", "trackio_*", "push_to_hub*", "hub_*", "disable_tqdm", "save_*", "eval_*", "do_predict",
    "do_train", "per_device_eval_batch_size", "dataloader_num_workers", "dataloader_p*", "token", "cache_dir",
    "preprocessing_num_workers", "overwrite_cache", "use_cpu", "ddp_*", "export_encoder", "smoke_test", "_n_gpu",
    "probe_task", "health_steps", "stop_on_collapse", "generation_samples", "generation_metrics", "max_new_tokens",
    "database",
    "local_rank", "debug", "objective", "skip_memory_metrics", "restore_callback_states_from_checkpoint",
)  # fmt: skip
# The run's length: another one is allowed, with a warning, because schedules stretch with it.
_LENGTH = ("max_steps", "num_train_epochs")


@dataclass
class RunPlan:
    """What to do in an output directory.

    Args:
        finished: the same run is done already.
        checkpoint: where to resume from; None for a fresh start.
        note: what to tell the user; empty where there is nothing to tell.
        delete: files and folders of an earlier run to delete before the start.
    """

    finished: bool = False
    checkpoint: Path | None = None
    note: str = ""
    delete: tuple[Path, ...] = ()


def plan_run(
    output_dir: str | Path, settings: dict[str, Any], overwrite: bool = False, checkpoint: str | None = None
) -> RunPlan:
    """Look at an output directory, touching nothing, and decide what a run with these settings does there.

    Args:
        settings: the run's settings, as JSON knows them.
        overwrite: start over, deleting what an earlier run wrote.
        checkpoint: a checkpoint that the user named to resume from, or "true" for the newest whole one, which there
            must then be.

    Raises:
        UsageError: the directory holds something else, or a run with other settings, or cannot be written to; or
            `checkpoint` is not whole.
    """
    folder = Path(output_dir)
    if checkpoint is not None and overwrite:
        raise UsageError("resume_from_checkpoint and overwrite_output_dir exclude each other; give one of them")
    newest_wanted = checkpoint is not None and checkpoint.lower() == "true"
    if newest_wanted:
        checkpoint = None
    if checkpoint is not None:
        check_checkpoint(checkpoint)
    if any(place.exists() and not place.is_dir() for place in (folder, *folder.parents)):
        raise UsageError(f"output_dir {str(folder)!r} is a file, or lies under one; name a directory")
    _check_writable(folder)
    left = [entry for entry in folder.iterdir() if _is_left_behind(entry.name)] if folder.is_dir() else []
    entries = sorted({*folder.iterdir()} - {*left}) if folder.is_dir() else []
    if not entries and newest_wanted:
        raise UsageError(f"resume_from_checkpoint true: output_dir {str(folder)!r} holds no run; leave it out to start")
    if not entries:
        return RunPlan(checkpoint=Path(checkpoint), note=f"resuming from {checkpoint}") if checkpoint else RunPlan()
    foreign = [entry.name for entry in entries if not _is_ours(entry.name) and entry.name not in _FROM_THE_HUB]
    run_file = folder / RUN_FILE
    if not run_file.is_file() and not (checkpoint and not foreign):
        raise UsageError(
            f"output_dir {str(folder)!r} holds something else ({(foreign or [entries[0].name])[0]}), which no run of "
            "run_jepa.py wrote; choose another directory"
        )
    if overwrite:
        ours = tuple(entry for entry in (*entries, *left) if _is_ours(entry.name) or entry in left)
        return RunPlan(note=f"starting over in {folder}", delete=ours)
    if checkpoint:
        return RunPlan(checkpoint=Path(checkpoint), note=f"resuming from {checkpoint}")

    before = read_run(folder)
    changed = [
        f"{name} {_shown(before['settings'].get(name))} -> {_shown(settings.get(name))}"
        for name in sorted({*settings, *before["settings"]})
        if _matters(name) and settings.get(name) != before["settings"].get(name)
    ]
    if changed:
        raise UsageError(
            f"output_dir {str(folder)!r} holds a run with other settings ({', '.join(changed[:3])}); repeat those, "
            "choose another directory, or start over with --overwrite_output_dir"
        )
    longer = [
        f"{name} {_shown(before['settings'].get(name))} -> {_shown(settings.get(name))}"
        for name in _LENGTH
        if settings.get(name) != before["settings"].get(name)
    ]
    if before["finished"] and not longer:
        return RunPlan(finished=True, note=f"the run in {folder} is finished; start over with --overwrite_output_dir")
    last, passed_over = newest_whole(folder)
    if last is None and newest_wanted:
        reasons = "; ".join(["holds no whole checkpoint", *passed_over])
        raise UsageError(f"resume_from_checkpoint true: output_dir {str(folder)!r} {reasons}; leave it out to start")
    if last is None and before["finished"]:
        raise UsageError(
            f"output_dir {str(folder)!r} holds a finished run of another length ({', '.join(longer)}) without a "
            "checkpoint to go on from; choose another directory, or start over with --overwrite_output_dir"
        )
    if last is None:
        note = f"{folder} holds a run that saved no {'whole ' if passed_over else ''}checkpoint: starting it from the "
        return RunPlan(note="\n".join([*passed_over, f"{note}beginning"]))
    note = f"resuming the unfinished run in {folder} from {last.name}"
    if longer:
        note = f"resuming the run in {folder} from {last.name} with another length ({', '.join(longer)}), to which the "
        note += "learning rate and EMA schedules stretch: the result differs from that of a run of this length"
    return RunPlan(checkpoint=last, note="\n".join([*passed_over, note]))


def _check_writable(folder: Path) -> None:
    """Refuse a directory that this process may not write to, or may not make."""
    there = next(place for place in (folder.absolute(), *folder.absolute().parents) if place.exists())
    if not os.access(there, os.W_OK | os.X_OK):
        raise UsageError(f"output_dir {str(folder)!r} cannot be written to ({there} is read-only); choose another one")


def start_run(output_dir: str | Path, settings: dict[str, Any], plan: RunPlan) -> None:
    """Carry out a plan: delete what is to go, and note that this run is now the directory's."""
    folder = Path(output_dir)
    if plan.delete:  # a deletion that breaks off leaves a directory that no run goes on in
        _write(folder, {}, finished=False)
    for entry in plan.delete:
        if entry.name != RUN_FILE:
            remove(entry)
    _write(folder, settings, finished=False)


def finish_run(output_dir: str | Path, settings: dict[str, Any]) -> None:
    """Note that the run in this directory is done."""
    _write(Path(output_dir), settings, finished=True)


def read_run(output_dir: str | Path) -> dict[str, Any]:
    """What a directory notes about its run.

    Returns:
        `settings`, a dictionary as JSON knows it; `finished`, a bool; and `versions`, the versions of what wrote
        it last by name, empty for runs that did not note them.

    Raises:
        UsageError: the file is damaged.
    """
    run_file = Path(output_dir) / RUN_FILE
    try:
        content = json.loads(run_file.read_text(encoding="utf-8"))
        return {
            "settings": dict(content["settings"]),
            "finished": bool(content["finished"]),
            "versions": dict(content.get("versions", {})),
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{run_file} is damaged ({error}); start over with --overwrite_output_dir") from None


def versions() -> dict[str, str]:
    """What decides how a run goes, beside its settings.

    >>> sorted(versions())[:3]
    ['Python', 'accelerate', 'datasets']
    """
    packages = ("torch", "transformers", "accelerate", "datasets", "numpy")
    return {"jepa_hf": __version__, "Python": platform.python_version()} | {name: version(name) for name in packages}


def _is_ours(name: str) -> bool:
    return is_checkpoint_name(name) or any(fnmatch(name, pattern) for pattern in _WRITTEN)


def _is_left_behind(name: str) -> bool:
    """Whether a killed run left it in the middle of writing or deleting something; it counts as nothing."""
    return is_left_behind(name) or any(left_behind(name, written) for written in _WRITTEN)


def _shown(value: Any) -> Any:
    return "unset" if value is None else value


def _matters(name: str) -> bool:
    return name not in _LENGTH and not any(fnmatch(name, pattern) for pattern in _FREE)


def _write(folder: Path, settings: dict[str, Any], finished: bool) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {"finished": finished, "settings": settings, "versions": versions()}
    with whole_file(folder / RUN_FILE) as new:
        new.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
