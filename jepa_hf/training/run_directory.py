"""Run directories: ownership, progress, and the decision to start, resume or refuse."""

import json
import platform
from collections.abc import Collection, Iterable
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib.metadata import version
from pathlib import Path
from typing import Any

from transformers.trainer import TRAINER_STATE_NAME

from ..errors import UsageError
from ..hub.export import JEPA_FOLDER, TARGET_FOLDER
from ..hub.push import LAST_CHECKPOINT, MODEL_FILES, RUN_FILES
from ..utils.atomic_files import atomic_write_text, is_staging_name, remove_path
from ..utils.counts import counted
from ..utils.output_directory import check_output_dir
from ..version import __version__
from .checkpoints import is_checkpoint_name, is_staging_checkpoint, latest_valid_checkpoint, validate_checkpoint
from .hub_trainer import PUSH_STAGING_DIR
from .training_args import MAY_CHANGE

# The leading underscore excludes it from uploads by the Hub client.
RUN_FILE = "_run.json"

# Names that a run writes into its directory, and so may delete.
_OWNED_PATTERNS = (
    *(name.partition("/")[0] for name in (*MODEL_FILES, *RUN_FILES)), JEPA_FOLDER, TARGET_FOLDER, RUN_FILE, "runs",
    "masks.png", "report.html", PUSH_STAGING_DIR,
)  # fmt: skip
# Names that a download of a pushed run adds, and that no run deletes.
_FROM_THE_HUB = (".cache", ".gitattributes", LAST_CHECKPOINT)

# The run's length may change with a warning, because schedules stretch with it.
_LENGTH_SETTINGS = ("max_steps", "num_train_epochs")


@dataclass
class RunPlan:
    """What to do in an output directory.

    Args:
        finished: Whether the same run is already finished.
        checkpoint: Checkpoint to resume from; None for a fresh start.
        note: Message for the user; may be empty.
        delete: Files and folders of an earlier run to delete before the start.
        data: Row count and hash of the training data of the run in the directory, or of the
            checkpoint's; None for a fresh start, or if they are not recorded.
    """

    finished: bool = False
    checkpoint: Path | None = None
    note: str = ""
    delete: tuple[Path, ...] = ()
    data: dict[str, Any] | None = None


def plan_run(
    output_dir: str | Path,
    settings: dict[str, Any],
    overwrite: bool = False,
    checkpoint: str | None = None,
    may_change: Collection[str] = MAY_CHANGE,
) -> RunPlan:
    """Decide what a run with these settings does in an output directory.

    Nothing is changed there.

    Args:
        output_dir: The directory; it need not exist.
        settings: The run's settings as JSON values.
        overwrite: Start over, deleting the files of an earlier run.
        checkpoint: Checkpoint to resume from, or "true" for the newest complete one, which must
            exist. The run that wrote it must have the same settings, if they are recorded.
        may_change: Names of the settings that need not be those of the resumed run.

    Raises:
        UsageError: The directory holds other files, or a run with other settings, or is not
            writable; or `checkpoint` is incomplete; or the run only evaluates and the directory
            holds a trained model.
    """
    folder = Path(output_dir)
    if checkpoint is not None and overwrite:
        raise UsageError("resume_from_checkpoint and overwrite_output_dir exclude each other. Set one of them.")
    needs_checkpoint = checkpoint is not None and checkpoint.lower() == "true"
    named = None if checkpoint is None or needs_checkpoint else Path(checkpoint)
    if named is not None:
        validate_checkpoint(named)
    check_output_dir(folder)
    if not settings.get("do_train", True):
        _check_nothing_trained(folder, named)
    content = sorted(folder.iterdir()) if folder.is_dir() else []
    leftovers = [entry for entry in content if _is_staging_leftover(entry.name)]
    entries = [entry for entry in content if entry not in leftovers]
    resume_named = RunPlan(checkpoint=named, note=f"resuming from {named}")
    if named is not None and (named.absolute().parent / RUN_FILE).is_file():
        previous = read_run(named.absolute().parent)
        _check_settings(f"resume_from_checkpoint {str(named)!r} is of", previous["settings"], settings, may_change)
        resume_named.data = previous["data"]
    if not entries:
        if needs_checkpoint:
            raise UsageError(
                f"output_dir {str(folder)!r} holds no run to resume. Leave out resume_from_checkpoint to start."
            )
        return resume_named if named else RunPlan()
    _check_owner(folder, entries, named)
    if overwrite:
        own = tuple(entry for entry in (*entries, *leftovers) if _is_owned(entry.name) or entry in leftovers)
        return RunPlan(note=f"starting over in {folder}", delete=own)
    return resume_named if named else _plan_resume(folder, settings, needs_checkpoint, may_change)


def _check_nothing_trained(folder: Path, checkpoint: Path | None) -> None:
    """Refuse to evaluate in the directory of a training run, whose record and metrics would be replaced."""
    models = [path for path in (folder / JEPA_FOLDER, folder) if _has_model(path)]
    checkpoints = sorted(path for path in folder.glob("*") if is_checkpoint_name(path.name))
    trained = checkpoint or next(iter((*models, *reversed(checkpoints))), None)
    if trained is not None:
        raise UsageError(
            f"--do_eval alone does not evaluate {trained}. Name it as --model_name_or_path, and choose another "
            "output_dir."
        )


def check_has_model(argument: str, name: str) -> None:
    """Refuse the directory of an evaluation, or of a run without its model yet, whose newest checkpoint is named.

    Args:
        argument: Command-line argument with the name of the model, for the message.
        name: Directory or Hub name of a model.

    Raises:
        UsageError: The directory holds no model, or that of a run with steps to go.
    """
    run = read_run(name) if (Path(name) / RUN_FILE).is_file() else None
    if run is None or run["finished"] or (run["stopped_early"] and _has_model(Path(name))):
        return
    label = f"{argument} {name!r}".strip()
    if not run["settings"].get("do_train", True):
        evaluated = run["settings"].get("model_name_or_path")
        remedy = "name the model" + ("" if evaluated is None else f", {evaluated}")
        raise UsageError(f"{label} holds the evaluation of a model, and no model; {remedy}")
    checkpoint, _ = latest_valid_checkpoint(Path(name))
    remedy = "repeat its command to finish it" + ("" if checkpoint is None else f", or name {checkpoint}")
    raise UsageError(f"{label} holds an unfinished run; {remedy}")


def _has_model(folder: Path) -> bool:
    """Return whether a directory holds a model of transformers or adapters."""
    return any((folder / name).is_file() for name in ("config.json", "adapter_config.json"))


def _check_owner(folder: Path, entries: list[Path], checkpoint: Path | None) -> None:
    """Refuse a directory that no run wrote; with a named checkpoint it needs no run file."""
    foreign = [entry.name for entry in entries if not _is_owned(entry.name) and entry.name not in _FROM_THE_HUB]
    if not (folder / RUN_FILE).is_file() and not (checkpoint and not foreign):
        raise UsageError(
            f"output_dir {str(folder)!r} holds something else ({(foreign or [entries[0].name])[0]}), which no run of "
            "run_jepa.py wrote. Choose another directory."
        )


def _check_settings(what: str, previous: dict[str, Any], settings: dict[str, Any], may_change: Collection[str]) -> None:
    """Refuse to resume a run with other settings; its length may change."""
    names = sorted({*settings, *previous} - {*may_change, *_LENGTH_SETTINGS})
    changed = _changes(previous, settings, names)
    if changed:
        raise UsageError(
            f"{what} a run with other settings ({', '.join(changed[:3])}). Repeat those, choose another directory, or "
            "start over with --overwrite_output_dir."
        )


def check_data(plan: RunPlan, data: dict[str, Any]) -> None:
    """Refuse to resume a run on other training data (see `data_fingerprint`): it would not be the run that was started.

    Raises:
        UsageError: The run that is resumed had other data.
    """
    if plan.data is None or plan.data == data:
        return
    rows = [counted(part["rows"], "row") if part.get("rows") is not None else "a stream" for part in (plan.data, data)]
    raise UsageError(
        f"The training data has changed since the run was started ({rows[0]} then, {rows[1]} with other content now). "
        "Restore it, choose another output_dir, or start over with --overwrite_output_dir."
    )


def _plan_resume(
    folder: Path, settings: dict[str, Any], needs_checkpoint: bool, may_change: Collection[str]
) -> RunPlan:
    """Plan the continuation of the run in `folder` from its newest complete checkpoint."""
    previous = read_run(folder)
    _check_settings(f"output_dir {str(folder)!r} holds", previous["settings"], settings, may_change)
    new_length = ", ".join(_changes(previous["settings"], settings, _LENGTH_SETTINGS))
    if previous["finished"] and not new_length:
        note = f"The run in {folder} is finished. Start over with --overwrite_output_dir."
        return RunPlan(finished=True, note=note, data=previous["data"])
    checkpoint, skipped = latest_valid_checkpoint(folder)
    if checkpoint is not None:
        note = f"resuming the unfinished run in {folder} from {checkpoint.name}"
        if previous["stopped_early"]:
            note = (
                f"resuming the run in {folder} from {checkpoint.name}. Its watchdog stopped it (--stop_on_collapse), "
                "and the same settings lead to the same collapse. To change them, add "
                "--overwrite_output_dir."
            )
        if new_length:
            _check_steps_left(checkpoint, settings)
            note = (
                f"resuming the run in {folder} from {checkpoint.name} with another length ({new_length}), to which the "
                "learning rate and EMA schedules stretch: the result differs from that of a run of this length"
            )
        return RunPlan(checkpoint=checkpoint, note="\n".join([*skipped, note]), data=previous["data"])
    if needs_checkpoint:
        reasons = "; ".join(["holds no complete checkpoint", *skipped])
        raise UsageError(
            f"output_dir {str(folder)!r} {reasons}. Leave out resume_from_checkpoint to start from the beginning."
        )
    if previous["finished"]:
        raise UsageError(
            f"output_dir {str(folder)!r} holds a finished run of another length ({new_length}) without a checkpoint to "
            "resume from. Choose another directory, or start over with --overwrite_output_dir."
        )
    kind = "complete checkpoint" if skipped else "checkpoint"
    stopped = " and that its watchdog stopped (--stop_on_collapse)" if previous["stopped_early"] else ""
    note = f"{folder} holds a run that saved no {kind}{stopped}: starting it from the beginning"
    return RunPlan(note="\n".join([*skipped, note]))


def _check_steps_left(checkpoint: Path, settings: dict[str, Any]) -> None:
    """Refuse a new length that the checkpoint is beyond: the result would be that of a longer run."""
    state = json.loads((checkpoint / TRAINER_STATE_NAME).read_text(encoding="utf-8"))
    steps, epochs = settings.get("max_steps", -1), settings.get("num_train_epochs")
    if steps > 0 and state["global_step"] > steps:
        reached, asked = counted(state["global_step"], "step"), f"max_steps {steps}"
    elif steps <= 0 and epochs is not None and state["epoch"] > epochs:
        reached, asked = f"{state['epoch']:g} epochs", f"num_train_epochs {epochs:g}"
    else:
        return
    raise UsageError(
        f"{checkpoint} has {reached} already, and {asked} leaves none to train. Set a greater length, choose another "
        "output_dir, or start over with --overwrite_output_dir."
    )


def _changes(previous: dict[str, Any], settings: dict[str, Any], names: Iterable[str]) -> list[str]:
    """Describe those of the named settings that differ."""
    return [
        f"{name} {_shown(previous.get(name))} -> {_shown(settings.get(name))}"
        for name in names
        if settings.get(name) != previous.get(name)
    ]


def start_run(
    output_dir: str | Path, settings: dict[str, Any], plan: RunPlan, data: dict[str, Any] | None = None
) -> None:
    """Execute a plan: delete the files that it lists, and record this run as the directory's."""
    folder = Path(output_dir)
    if plan.delete:  # no run resumes in the directory that an interrupted deletion leaves
        _write(folder, {}, finished=False)
    for entry in plan.delete:
        if entry.name != RUN_FILE:
            remove_path(entry)
    _write(folder, settings, finished=False, data=data)


def finish_run(
    output_dir: str | Path,
    settings: dict[str, Any],
    data: dict[str, Any] | None = None,
    stopped_early: bool = False,
) -> None:
    """Record that the run in this directory is finished, or that its watchdog stopped it."""
    _write(Path(output_dir), settings, finished=not stopped_early, data=data, stopped_early=stopped_early)


def read_run(output_dir: str | Path) -> dict[str, Any]:
    """Read a directory's record of its run.

    Returns:
        `settings`, a dictionary of JSON values; `finished`, a bool; `stopped_early`, whether the
        watchdog stopped it; `versions`, the last writer's versions by package name; and `data`, row
        count and hash of the training data, or None.

    Raises:
        UsageError: The file is damaged.
    """
    run_file = Path(output_dir) / RUN_FILE
    try:
        content = json.loads(run_file.read_text(encoding="utf-8"))
        return {
            "settings": dict(content["settings"]),
            "finished": bool(content["finished"]),
            "stopped_early": bool(content.get("stopped_early", False)),
            "versions": dict(content.get("versions", {})),
            "data": content.get("data"),
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UsageError(f"{run_file} is damaged ({error}). Start over with --overwrite_output_dir.") from None


def versions() -> dict[str, str]:
    """Return the versions that a run's results depend on.

    >>> sorted(versions())[:3]
    ['Python', 'accelerate', 'datasets']
    """
    packages = ("torch", "transformers", "accelerate", "datasets", "numpy")
    return {"jepa_hf": __version__, "Python": platform.python_version()} | {name: version(name) for name in packages}


def _is_owned(name: str) -> bool:
    return is_checkpoint_name(name) or any(fnmatch(name, pattern) for pattern in _OWNED_PATTERNS)


def _is_staging_leftover(name: str) -> bool:
    """Return whether a killed run left it in the middle of writing or deleting; it is ignored."""
    return is_staging_checkpoint(name) or any(is_staging_name(name, final_name) for final_name in _OWNED_PATTERNS)


def _shown(value: Any) -> Any:
    return "unset" if value is None else value


def _write(
    folder: Path,
    settings: dict[str, Any],
    finished: bool,
    data: dict[str, Any] | None = None,
    stopped_early: bool = False,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    content = {
        "finished": finished,
        "stopped_early": stopped_early,
        "settings": settings,
        "data": data,
        "versions": versions(),
    }
    atomic_write_text(folder / RUN_FILE, json.dumps(content, indent=1) + "\n")
