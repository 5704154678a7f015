"""Names, shapes and local shards of parameters that FSDP2 or ZeRO divides."""

import torch
from torch.distributed.tensor import DTensor

_WRAPPERS = {"_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}


def plain_name(name: str) -> str:
    """A parameter's name without what torch.compile, DDP, FSDP and activation checkpointing put into it.

    >>> plain_name("module._orig_mod.layers.0.weight")
    'layers.0.weight'
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def placement(parameter: torch.Tensor) -> object:
    """How a parameter is divided among the ranks; None where it is not."""
    if isinstance(parameter, DTensor):
        return parameter.device_mesh, parameter.placements
    part = zero_part(parameter)
    return None if part is None else part.numel()


def whole_shape(parameter: torch.Tensor) -> torch.Size:
    """A parameter's shape, whatever FSDP2 or ZeRO-3 left of it on this rank."""
    return parameter.shape if zero_part(parameter) is None else parameter.ds_shape


def zero_part(parameter: torch.Tensor) -> torch.Tensor | None:
    """What DeepSpeed's ZeRO-3 left of a parameter on this rank; None where it did not divide it."""
    return getattr(parameter, "ds_tensor", None)


def shard(parameter: torch.Tensor) -> torch.Tensor:
    """The elements of a parameter that this rank has: all, or a shard of FSDP2's or ZeRO-3's."""
    if isinstance(parameter, DTensor):
        return parameter.to_local()
    part = zero_part(parameter)
    if part is None:
        return parameter
    # The last ranks' parts are filled up.
    before = part.numel() * torch.distributed.get_rank(parameter.ds_process_group)
    return part.detach().view(-1)[: min(max(parameter.ds_numel - before, 0), part.numel())]
