"""Positions in sequences: gathering, sine-cosine tables, rotary angles."""

import torch
import torch.nn.functional as F


def gather_positions(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Gather positions: `[N, L, ...]`, long `[N, K]` -> `[N, K, ...]`, without device sync."""
    index = positions.reshape(*positions.shape, *(1,) * (states.dim() - 2)).expand(-1, -1, *states.shape[2:])
    return states.gather(1, index)


def repeat_interleave_samples(states: torch.Tensor, times: int) -> torch.Tensor:
    """Repeat each sample: `[N, ...]` -> `[N * times, ...]`; one time returns the tensor itself."""
    return states if times == 1 else states.repeat_interleave(times, dim=0)


def sincos_positions(grid: tuple[int, ...], dim: int) -> torch.Tensor:
    """Compute a 2-D sine-cosine position table: half of the features for rows, half for columns.

    Args:
        grid: rows, columns.
        dim: number of features; the remainder of a division by 4 is filled with 0.

    Returns:
        `[rows * columns, width]`, row by row.
    """
    rows, columns = grid
    frequency = 10000.0 ** -(torch.arange(dim // 4) / (dim // 4))
    row = torch.arange(rows).repeat_interleave(columns)[:, None] * frequency
    column = torch.arange(columns).repeat(rows)[:, None] * frequency
    table = torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], dim=1)
    return F.pad(table, (0, dim % 4))


def rotary_angles(positions: torch.Tensor, head_size: int, base: float = 10000.0) -> torch.Tensor:
    """Compute the rotation angles of rotary attention (RoFormer, Su et al. 2021, equation 15).

    Args:
        positions: integers `[N, S]`.
        head_size: features of a head; the last one of an odd number is not rotated.
        base: base of the frequencies, default 10000.

    Returns:
        float32 `[N, S, head_size // 2]`, position / base^(2 i / head_size).
    """
    index = torch.arange(head_size // 2, device=positions.device)
    return positions[..., None] * base ** (-2 * index / head_size)


def rotate(vectors: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs of features (i, i + d // 2), computed in float32.

    Args:
        vectors: queries or keys `[..., S, d]`.
        cos: cosines of the angles, broadcastable to `[..., S, d // 2]`.
        sin: their sines.

    Returns:
        `[..., S, d]` in the dtype of `vectors`.
    """
    half = cos.shape[-1]
    first, second, rest = vectors.float().split([half, half, vectors.shape[-1] - 2 * half], dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin, rest], dim=-1).to(vectors.dtype)
