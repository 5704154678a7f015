"""Positions in sequences: gathering, sine-cosine tables, rotary angles."""

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


def rotary_angles(positions: torch.Tensor, head_size: int, base: float = 10000.0) -> torch.Tensor:
    """Compute the angles by which rotary attention turns queries and keys (Su et al. 2021, "RoFormer", equation 15).

    Args:
        positions: `[N, S]` integers.
        head_size: features of a head; of an odd number the last one is not turned.

    Returns:
        float32 `[N, S, head_size // 2]`, position / base^(2 i / head_size).
    """
    index = torch.arange(head_size // 2, device=positions.device)
    return positions[..., None] * base ** (-2 * index / head_size)


def rotate(vectors: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn the pairs of features (i, i + d // 2), computed in float32.

    Args:
        vectors: queries or keys `[..., S, d]`.
        cos, sin: of the angles, broadcastable to `[..., S, d // 2]`.

    Returns:
        `[..., S, d]`, in the type of `vectors`.
    """
    half = cos.shape[-1]
    first, second, rest = vectors.float().split([half, half, vectors.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(vectors.dtype)
