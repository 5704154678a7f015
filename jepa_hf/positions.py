"""Picking positions out of sequences."""

import torch
import torch.nn.functional as F


def gather_positions(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Pick positions: `[N, L, ...]`, long `[N, K]` -> `[N, K, ...]`. Index tensors only, so the device never waits."""
    index = positions.reshape(*positions.shape, *(1,) * (states.dim() - 2)).expand(-1, -1, *states.shape[2:])
    return states.gather(1, index)


def repeat_samples(states: torch.Tensor, times: int) -> torch.Tensor:
    """Each sample so many times: `[N, ...]` -> `[N * times, ...]`. Of one time torch would make a copy."""
    return states if times == 1 else states.repeat_interleave(times, dim=0)


def sincos_positions(grid: tuple[int, ...], width: int) -> torch.Tensor:
    """Fixed 2-D sine-cosine position table: half of the features for the row, half for the column.

    Args:
        grid: rows, columns.
        width: number of features; what is left of it over a multiple of 4 is 0.

    Returns:
        `[rows * columns, width]`, rows first.
    """
    rows, columns = grid
    frequency = 10000.0 ** -(torch.arange(width // 4) / (width // 4))
    row = torch.arange(rows).repeat_interleave(columns)[:, None] * frequency
    column = torch.arange(columns).repeat(rows)[:, None] * frequency
    table = torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=1)
    return F.pad(table, (0, width % 4))
