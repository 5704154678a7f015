"""Saving and loading of FSDP2 full state dicts.

Checkpoints do not depend on the number of ranks. All functions must be called on all ranks.
"""

from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from .sharding import global_shape, unwrapped_parameter_name


class IncompatibleKeys(NamedTuple):
    """Incompatible names, as `nn.Module.load_state_dict` returns them."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def read_full_state_dict(model: nn.Module, folder: str | Path) -> tuple[dict[str, torch.Tensor], IncompatibleKeys]:
    """Read full weights from the safetensors files in `folder` and compare them with the model.

    A name is unexpected if the model does not have it, or has it in another shape.
    """
    state: dict[str, torch.Tensor] = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        state |= load_file(file)
    shapes = {
        unwrapped_parameter_name(name): global_shape(value) for name, value in model.state_dict(keep_vars=True).items()
    }
    keys = IncompatibleKeys(
        missing_keys=[name for name in shapes if name not in state],
        unexpected_keys=[name for name, value in state.items() if shapes.get(name) != value.shape],
    )
    return state, keys


def load_full_state_dict(model: nn.Module, folder: str | Path) -> IncompatibleKeys:
    """Load full weights from the safetensors files in `folder` into a sharded model.

    Returns:
        Incompatible names. Missing ones keep their weights; if any is unexpected, nothing is loaded.
    """
    state, keys = read_full_state_dict(model, folder)
    if not keys.unexpected_keys:  # torch's own result never has missing keys
        set_model_state_dict(
            model, cast("dict[str, Any]", state), options=StateDictOptions(full_state_dict=True, strict=False)
        )
    return keys


def full_optimizer_state_dict(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """Return `optimizer.state_dict()` with full tensors on the CPU.

    Tensors are None on ranks with `keep` False, which only take part in the collectives.
    """

    def to_full_tensor(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        value = value.full_tensor()
        return value.cpu() if keep else None

    state_dict = optimizer.state_dict()
    states = {
        index: {name: to_full_tensor(value) for name, value in state.items()}
        for index, state in state_dict["state"].items()
    }
    return {**state_dict, "state": states}


def load_full_optimizer_state_dict(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load a full optimizer state dict; shard it like the parameters."""
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]

    def to_shard(index: int, value: Any) -> Any:
        parameter = parameters[index]
        if not (isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and value.shape == parameter.shape):
            return value
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    states = {
        index: {name: to_shard(index, value) for name, value in parameter_state.items()}
        for index, parameter_state in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": states})
