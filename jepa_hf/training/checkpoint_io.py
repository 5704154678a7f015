"""Contents of a checkpoint: weights, optimizer, scheduler, random states."""

import logging
import os
import pickle  # nosec B403
import re
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedModel, Trainer
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME
from transformers.trainer_callback import ExportableState
from transformers.trainer_pt_utils import safe_globals

from ..distributed import deepspeed_state, fsdp_state
from ..errors import UsageError
from .checkpoints import (
    STATE_FILE,
    commit_checkpoint,
    create_staging_dir,
    disk_errors_as_run_error,
    latest_valid_checkpoint,
    staging_path,
    validate_checkpoint,
)
from .upstream import save_optimizer_and_scheduler, save_rng_state, save_scaler

logger = logging.getLogger(__name__)

# Files that torch unpickles, by what they hold.
_PICKLED = {
    "optimizer or scheduler": ("optimizer.*", "scheduler.*"),
    "gradient scaler": ("scaler.*",),
    "random state": ("rng_state*",),
    "weights": ("*.bin",),
}


# ---- before resuming


def resolve_checkpoint(run_dir: Path, requested: str | bool | None) -> str | None:
    """Find and verify the checkpoint to resume from: True is the newest complete one in `run_dir`.

    Newer incomplete ones are skipped with a warning.

    Raises:
        UsageError: The checkpoint is incomplete, or there is none.
    """
    if not requested:
        return None
    if requested is not True:
        validate_checkpoint(requested)
        return requested
    newest, skipped = latest_valid_checkpoint(run_dir)
    if newest is None:
        raise UsageError(
            f"Expected output_dir {str(run_dir)!r} to hold a complete checkpoint, found none. "
            "Leave out resume_from_checkpoint to start."
        )
    for warning in skipped:
        logger.warning(warning)
    return str(newest)


def check_states(trainer: Trainer, checkpoint: Path) -> None:
    """Refuse a checkpoint without all states: `Trainer` would go on with fresh or random ones."""
    written_by_trainer = trainer.is_fsdp_enabled and sharded_states(trainer) is None
    if not written_by_trainer and not (checkpoint / OPTIMIZER_NAME).is_file():
        raise UsageError(
            f"Checkpoint {checkpoint} holds no {OPTIMIZER_NAME} to resume from. Start from its weights with "
            "--model_name_or_path and another --output_dir."
        )
    names: set[str] = set()
    for path in checkpoint.glob("model*.safetensors"):  # adapters have another name
        with safe_open(path, "pt") as weights:
            names |= set(weights.keys())
    if names:
        model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
        own = set(model.state_dict())
        check_keys(model, sorted(own - names), sorted(names - own))
    metadata = next(checkpoint.rglob(".metadata"), None)
    if metadata is not None:
        raise UsageError(
            f"File {metadata} is a pickle, which could run any program, so it is not loaded. Take a checkpoint "
            "written with fsdp_state_dict_type FULL_STATE_DICT."
        )


@contextmanager
def pickles_as_usage_errors(checkpoint: str | None) -> Iterator[None]:
    """Turn torch's refusal of a pickle (`weights_only`) into a `UsageError`."""
    try:
        yield
    except pickle.UnpicklingError as error:
        part = None if checkpoint is None else _unsafe_part(Path(checkpoint))
        if part is None:  # of another file
            raise
        name = re.search(r"GLOBAL (\S+)", str(error))
        content = f"it would import {name[1]}" if name else "it is another pickle"
        raise UsageError(
            f"Expected only numbers as the {part} in {checkpoint}, but {content}, which could run any program, so it "
            "is not loaded. Take a checkpoint from a source that you trust."
        ) from None


def _unsafe_part(checkpoint: Path) -> str | None:
    """Name the first part of a checkpoint that holds more than numbers."""
    for part, patterns in _PICKLED.items():
        for path in (path for pattern in patterns for path in sorted(checkpoint.glob(pattern))):
            try:
                with safe_globals():  # numpy's random state is not a tensor
                    torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError:
                return part
    return None


# ---- writing


def write_checkpoint(trainer: Trainer, checkpoint: Path, size: int) -> None:
    """Write a checkpoint: all ranks write to a staging directory, which rank 0 then renames."""
    with disk_errors_as_run_error(checkpoint, checkpoint.parent, size):
        if trainer.args.should_save:
            create_staging_dir(checkpoint)
        trainer.accelerator.wait_for_everyone()
        _write_checkpoint_files(trainer, str(staging_path(checkpoint)))
        trainer.accelerator.wait_for_everyone()
        if trainer.args.should_save:
            commit_checkpoint(checkpoint)
        trainer.accelerator.wait_for_everyone()


def _write_checkpoint_files(trainer: Any, folder: str) -> None:
    """Write this rank's parts of a checkpoint."""
    trainer.save_model(folder, _internal_call=True)
    if not trainer.args.save_only_model:
        _save_optimizer(trainer, folder)
        save_scaler(trainer, folder)
        save_rng_state(trainer, folder)
    if trainer.args.should_save:
        states: dict[str, list[Any]] = defaultdict(list)
        for callback in (*trainer.callback_handler.callbacks, trainer.control):
            if isinstance(callback, ExportableState):
                states[type(callback).__name__].append(callback.state())
        # The format that `Trainer` reads: a list only for several callbacks of a class.
        trainer.state.stateful_callbacks = {
            name: several if several[1:] else several[0] for name, several in states.items()
        }
        trainer.state.save_to_json(os.path.join(folder, STATE_FILE))


def _save_optimizer(trainer: Any, folder: str) -> None:
    sharded = sharded_states(trainer)
    if sharded is None:
        save_optimizer_and_scheduler(trainer, folder)
        return
    # `Trainer` would write files that only FSDP or DeepSpeed reads, and the weights a second time.
    state = sharded.full_optimizer_state_dict(trainer.optimizer.optimizer, trainer.args.should_save)
    if trainer.args.should_save:
        torch.save(state, os.path.join(folder, OPTIMIZER_NAME))
        torch.save(trainer.lr_scheduler.state_dict(), os.path.join(folder, SCHEDULER_NAME))


def tensor_bytes(*tensors: torch.Tensor) -> int:
    """Sum up the sizes of tensors in bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def optimizer_bytes(optimizer: Any) -> int:
    """Estimate the size of an optimizer's states in bytes."""
    values = (value for state in optimizer.state.values() for value in state.values())
    return tensor_bytes(*(value for value in values if isinstance(value, torch.Tensor)))


# ---- sharded weights and states


def sharded_states(trainer: Trainer) -> ModuleType | None:
    """Return the module that gathers sharded weights and states; None where `Trainer` handles them.

    `Trainer` also handles FSDP2 with PEFT adapters.
    """
    if trainer.is_deepspeed_enabled:
        return deepspeed_state
    return fsdp_state if trainer.is_fsdp_enabled and saves_full_model(trainer) else None


def saves_full_model(trainer: Trainer) -> bool:
    """Return whether checkpoints hold all weights, and not only PEFT adapters."""
    model = trainer.accelerator.unwrap_model(trainer.model, keep_torch_compile=False)
    return isinstance(model, PreTrainedModel)


def load_sharded_optimizer(trainer: Any, checkpoint: str, sharded: ModuleType) -> None:
    """Load full optimizer and scheduler states into the shards of this rank."""
    optimizer, scheduler = (
        torch.load(os.path.join(checkpoint, name), map_location="cpu", weights_only=True)
        for name in (OPTIMIZER_NAME, SCHEDULER_NAME)
    )
    sharded.load_full_optimizer_state_dict(trainer.optimizer.optimizer, optimizer)
    trainer.lr_scheduler.load_state_dict(scheduler)


def check_keys(model: Any, missing: list[str], unexpected: list[str]) -> None:
    """Refuse weights of another model."""
    tied = set(model.all_tied_weights_keys)
    different = [name for name in missing if name not in tied] + unexpected
    if different:
        raise UsageError(
            f"The checkpoint to resume from holds another model: {', '.join(different[:3])} differ. Start over, or "
            "pass it as --model_name_or_path."
        )
