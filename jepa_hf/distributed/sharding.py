"""Names, full shapes and local shards of parameters under FSDP2 and ZeRO-3."""

from typing import Any

import torch
from torch.distributed.tensor import DTensor

_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def unwrapped_parameter_name(name: str) -> str:
    """Remove the prefixes of torch.compile, DDP, FSDP and activation checkpointing from a name.

    >>> unwrapped_parameter_name("module._orig_mod.layers.0.weight")
    'layers.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def sharding_key(parameter: torch.Tensor) -> object:
    """Return a key of a parameter's sharding over the ranks, None if it is not sharded."""
    if isinstance(parameter, DTensor):
        return parameter.device_mesh, parameter.placements
    part = zero3_shard(parameter)
    return None if part is None else part.numel()


def global_shape(parameter: torch.Tensor) -> torch.Size:
    """Return the unsharded shape of a parameter under FSDP2 or ZeRO-3."""
    zero_parameter: Any = parameter
    return parameter.shape if zero3_shard(parameter) is None else zero_parameter.ds_shape


def zero3_shard(parameter: torch.Tensor) -> torch.Tensor | None:
    """Return this rank's ZeRO-3 shard of a parameter, None if ZeRO-3 does not shard it."""
    return getattr(parameter, "ds_tensor", None)


def local_shard(parameter: torch.Tensor) -> torch.Tensor:
    """Return the elements of a parameter on this rank: all, or an FSDP2 or ZeRO-3 shard."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    part = zero3_shard(parameter)
    if part is None:
        return parameter
    zero_parameter: Any = parameter
    # The shards of the last ranks are padded.
    offset = part.numel() * torch.distributed.get_rank(zero_parameter.ds_process_group)
    return part.detach().view(-1)[: min(max(zero_parameter.ds_numel - offset, 0), part.numel())]
