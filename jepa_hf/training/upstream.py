"""Private names of transformers, accelerate and torch that `training` calls, one function each.

Last seen in transformers 5.24, accelerate 1.15 and torch 2.13. `tests/training/test_upstream.py` has a contract for
each name, and for each private method of `Trainer` that is overridden: it fails with the name when an upgrade moves it.
Objects of these libraries are `Any` here, because private names have no types.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.data import DataLoader

# ---- transformers.Trainer


def output_dir(trainer: Any, trial: Any) -> Path:
    """Return the directory of checkpoints (`Trainer._get_output_dir`)."""
    return Path(trainer._get_output_dir(trial))


def to_device(trainer: Any, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Copy a batch to the trainer's device (`Trainer._prepare_inputs`)."""
    return trainer._prepare_inputs(batch)


def loader_batch_size(trainer: Any) -> int:
    """Return the batch size of the training loader of one rank (`Trainer._train_batch_size`)."""
    return trainer._train_batch_size


def keep_columns(trainer: Any, columns: Sequence[str]) -> None:
    """Keep columns that the model's forward does not name (`Trainer._signature_columns`)."""
    trainer._set_signature_columns_if_needed()
    trainer._signature_columns = list(dict.fromkeys([*trainer._signature_columns, *columns]))


def signature_columns(trainer: Any) -> list[str]:
    """Return the columns that the model or the collator reads (`Trainer._signature_columns`)."""
    return trainer._signature_columns


def save_optimizer_and_scheduler(trainer: Any, folder: str) -> None:
    """Write unsharded optimizer and scheduler states (`Trainer._save_optimizer_and_scheduler`)."""
    trainer._save_optimizer_and_scheduler(folder)


def save_scaler(trainer: Any, folder: str) -> None:
    """Write the state of the gradient scaler, if there is one (`Trainer._save_scaler`)."""
    trainer._save_scaler(folder)


def save_rng_state(trainer: Any, folder: str) -> None:
    """Write this rank's random states (`Trainer._save_rng_state`)."""
    trainer._save_rng_state(folder)


def load_scaler(trainer: Any, checkpoint: str) -> None:
    """Read the state of the gradient scaler, if there is one (`Trainer._load_scaler`)."""
    trainer._load_scaler(checkpoint)


def loss_since_log(trainer: Any) -> tuple[float, int]:
    """Return the loss summed over the steps since the last log, and the number of these steps.

    The mean over ranks (`Trainer._tr_loss`, `_globalstep_last_logged`).
    """
    loss = trainer.accelerator.reduce(trainer._tr_loss.clone(), reduction="mean")
    return loss.item(), trainer.state.global_step - trainer._globalstep_last_logged


def loss_before_log(trainer: Any) -> float:
    """Return the loss summed over the steps up to the last log (`Trainer._total_loss_scalar`)."""
    return trainer._total_loss_scalar


def restore_loss(trainer: Any, before_log: float, since_log: float, steps: int) -> None:
    """Continue the sums of a run that is resumed, `steps` after its last log."""
    trainer._tr_loss += since_log
    trainer._total_loss_scalar += before_log
    trainer._globalstep_last_logged -= steps


def wait_for_pushes(trainer: Any) -> None:
    """Wait for pushes that are in progress (`Trainer._finish_current_push`)."""
    trainer._finish_current_push()


# ---- accelerate


def torch_loader(loader: Any) -> DataLoader:
    """Return torch's loader inside accelerate's wrapper (`DataLoaderShard.base_dataloader`)."""
    return getattr(loader, "base_dataloader", loader)


def row_sampler(loader: Any) -> Any:
    """Return the sampler of rows below the batch sampler (`BatchSamplerShard.batch_sampler`)."""
    batches = loader.batch_sampler
    return getattr(getattr(batches, "batch_sampler", batches), "sampler", None)


# ---- torch


def shut_down_workers(loader: Any) -> None:
    """Shut down persistent workers (`DataLoader._iterator`, `_shutdown_workers`).

    Left to garbage collection, torch waits 5 s per worker. Another iteration starts new workers.
    """
    loader = torch_loader(loader)
    if loader._iterator is not None:
        loader._iterator._shutdown_workers()
        loader._iterator = None


def supports_found_inf(optimizer: torch.optim.Optimizer) -> bool:
    """Return whether kernels read `found_inf` (`Optimizer._step_supports_amp_scaling`)."""
    return getattr(optimizer, "_step_supports_amp_scaling", False)


def set_found_inf(optimizer: Any, found_inf: torch.Tensor) -> None:
    """Have fused kernels skip the next step where `found_inf` is 1 (`Optimizer.found_inf`)."""
    optimizer.found_inf = found_inf


def inner_module(model: Any) -> nn.Module:
    """Return the module inside torch.compile (`OptimizedModule._orig_mod`) or DDP (`module`)."""
    return model._orig_mod if isinstance(model, torch._dynamo.OptimizedModule) else model.module


def lerp_(tensors: Sequence[torch.Tensor], ends: Sequence[torch.Tensor], weight: float) -> None:
    """Interpolate in place, in few kernels (`torch._foreach_lerp_`)."""
    torch._foreach_lerp_(list(tensors), list(ends), weight)


def norms(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the L2 norms of n tensors, `[n]`, in few kernels (`torch._foreach_norm`)."""
    return torch.stack(list(torch._foreach_norm(list(tensors))))


def differences(minuends: Sequence[torch.Tensor], subtrahends: Sequence[torch.Tensor]) -> Sequence[torch.Tensor]:
    """Subtract n pairs of tensors, in few kernels (`torch._foreach_sub`)."""
    return torch._foreach_sub(list(minuends), list(subtrahends))
