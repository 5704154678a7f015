"""Claims about weights and optimizer states that are read whole; tests/distributed/test_fsdp.py divides them."""

from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn

from jepa_hf.distributed.fsdp_state import (
    full_optimizer_state_dict,
    load_full_optimizer_state_dict,
    load_full_state_dict,
)


def linear(seed: int) -> nn.Linear:
    torch.manual_seed(seed)
    return nn.Linear(3, 2)


def test_weights_are_read_from_the_models_files_alone(tmp_path: Path) -> None:
    """A checkpoint may hold others: a teacher's."""
    model, other = linear(0), linear(1)
    save_file({"weight": other.weight.detach()}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"bias": other.bias.detach()}, tmp_path / "model-00002-of-00002.safetensors")
    save_file({"strange": torch.zeros(1)}, tmp_path / "teacher.safetensors")
    assert load_full_state_dict(model, tmp_path) == ([], [])
    assert torch.equal(model.weight, other.weight)
    assert torch.equal(model.bias, other.bias)


def test_mismatched_states_are_reported(tmp_path: Path) -> None:
    """A missing name, a strange one, and one of another shape, with which nothing is loaded."""
    model, before = linear(0), linear(0)
    save_file({"weight": torch.ones(2, 3)}, tmp_path / "model.safetensors")
    assert load_full_state_dict(model, tmp_path) == (["bias"], [])
    assert torch.equal(model.weight, torch.ones(2, 3))
    assert torch.equal(model.bias, before.bias)
    for state in ({"weight": torch.zeros(3, 3), "bias": torch.zeros(2)}, {"weights": torch.zeros(2, 3)}):
        save_file(state, tmp_path / "model.safetensors")
        assert load_full_state_dict(model, tmp_path).unexpected_keys == list(state)[:1]
        assert torch.equal(model.weight, torch.ones(2, 3))


def test_an_optimizers_state_is_the_same_there_and_back() -> None:
    ours, theirs = ((model, torch.optim.AdamW(model.parameters())) for model in (linear(0), linear(0)))
    for _ in range(2):
        ours[0](torch.ones(3)).sum().backward()
        ours[1].step()
    state = full_optimizer_state_dict(ours[1], keep=True)
    load_full_optimizer_state_dict(theirs[1], state)
    for number, each in ours[1].state_dict()["state"].items():
        for name, value in each.items():
            assert torch.equal(theirs[1].state_dict()["state"][number][name], value)
