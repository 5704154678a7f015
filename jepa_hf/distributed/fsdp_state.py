"""Weights and optimizer states that FSDP2 divides among ranks, written and read as one process writes and reads them.

So a checkpoint of any number of ranks goes on in any other, one included. All functions are called by all ranks.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.tensor import DTensor, distribute_tensor

from .sharding import plain_name, whole_shape


class Keys(NamedTuple):
    """What does not fit, as `nn.Module.load_state_dict` tells it."""

    missing_keys: list[str]
    unexpected_keys: list[str]


def read_weights(model: nn.Module, folder: str | Path) -> tuple[dict[str, torch.Tensor], Keys]:
    """The weights in the safetensors files in `folder`, and what of them does not fit the divided model."""
    state: dict[str, torch.Tensor] = {}
    for file in sorted(Path(folder).glob("model*.safetensors")):
        state |= load_file(file)
    shapes = {plain_name(name): whole_shape(value) for name, value in model.state_dict(keep_vars=True).items()}
    keys = Keys(
        missing_keys=[name for name in shapes if name not in state],
        unexpected_keys=[name for name, value in state.items() if shapes.get(name) != value.shape],
    )
    return state, keys


def load_weights(model: nn.Module, folder: str | Path) -> Keys:
    """Read a divided model's weights from the safetensors files in `folder`, which hold them whole.

    Returns:
        The names that are missing there, which keep their weights, and those that the model has not, or in another
        shape: with any of these nothing is loaded.
    """
    state, keys = read_weights(model, folder)
    if not keys.unexpected_keys:  # torch itself fills in what is missing, and says that nothing was
        set_model_state_dict(model, state, options=StateDictOptions(full_state_dict=True, strict=False))
    return keys


def whole_optimizer_state(optimizer: torch.optim.Optimizer, keep: bool) -> dict[str, Any]:
    """`optimizer.state_dict()` with whole tensors, in the CPU's memory.

    Args:
        keep: False on ranks that only contribute; their tensors are None.
    """

    def whole(value: Any) -> Any:
        if not isinstance(value, DTensor):
            return value
        value = value.full_tensor()
        return value.cpu() if keep else None

    given = optimizer.state_dict()
    states = {number: {name: whole(value) for name, value in each.items()} for number, each in given["state"].items()}
    return {**given, "state": states}


def load_optimizer_state(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `whole_optimizer_state` or one process's `state_dict()` gave, divided as the parameters are."""
    parameters = [each for group in optimizer.param_groups for each in group["params"]]

    def divided(number: int, value: Any) -> Any:
        parameter = parameters[number]
        if not (isinstance(parameter, DTensor) and isinstance(value, torch.Tensor) and value.shape == parameter.shape):
            return value
        return distribute_tensor(value.to(parameter.device), parameter.device_mesh, parameter.placements)

    states = {
        number: {name: divided(number, value) for name, value in each.items()}
        for number, each in state["state"].items()
    }
    optimizer.load_state_dict({**state, "state": states})
