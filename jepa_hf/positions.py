"""Picking positions out of sequences."""

import torch


def gather_positions(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Pick positions: `[N, L, ...]`, long `[N, K]` -> `[N, K, ...]`. Index tensors only, so the device never waits."""
    index = positions.reshape(*positions.shape, *(1,) * (states.dim() - 2)).expand(-1, -1, *states.shape[2:])
    return states.gather(1, index)
