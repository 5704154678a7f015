"""Sampling of block masks over a plane of patches (I-JEPA): whole batches at once, array operations only."""

import numpy as np

from .counter_rng import uniforms

# Samples that the default number of context patches is read from, and the share of them that may fall short of it.
_SIMULATED = 4096
_SHORT = 0.1


def sample_block_masks(
    keys: np.ndarray,
    grid: tuple[int, int],
    num_targets: int = 4,
    target_scale: tuple[float, float] = (0.15, 0.2),
    target_aspect_ratio: tuple[float, float] = (0.75, 1.5),
    context_scale: tuple[float, float] = (0.85, 1.0),
    num_context: int | None = None,
    inside_targets: bool = False,
) -> tuple[np.ndarray, np.ndarray]:
    """Target blocks and one context per sample (Assran et al. 2023, section 3, figure 4).

    Scale and aspect ratio are drawn independently of each other. A target block's place is uniform over all places
    where it meets the plane, and what falls outside is cut off: so every patch is a target with the same chance. (See
    `inside_targets` for the paper's placement.) The
    context is a square block, placed inside the plane, minus all targets; of it `num_context` patches are kept, chosen
    uniformly. Where fewer are left, patches outside the context block make up for them, and, if need be, targets.

    Args:
        keys: uint64 `[B]`, see `content_keys`.
        grid: rows and columns of the plane.
        num_targets: target blocks per sample, M.
        target_scale: range of a target block's area, before it is cut, as a share of the plane.
        target_aspect_ratio: range of its height over its width.
        context_scale: range of the context block's area.
        num_context: patches of every context, C; default `default_num_context`.
        inside_targets: place target blocks inside the plane, as the paper's code does: none is cut, and patches near
            the plane's edges are targets less often than those in its middle.

    Returns:
        bool `[B, M, rows * columns]`, True on targets, and bool `[B, rows * columns]`, True on exactly C patches of
        context, none of which is a target.
    """
    rows, columns = grid
    if num_context is None:
        num_context = default_num_context(
            grid, num_targets, target_scale, target_aspect_ratio, context_scale, inside_targets
        )
    targets, block = _draw(keys, grid, num_targets, target_scale, target_aspect_ratio, context_scale, inside_targets)
    hidden = targets.any(axis=1)
    # The lowest `num_context` of these numbers are the context.
    rank = uniforms(keys, 4 * num_targets + 3, rows * columns) + hidden + (hidden | ~block)
    context = np.zeros_like(hidden)
    np.put_along_axis(context, np.argpartition(rank, num_context - 1, axis=1)[:, :num_context], True, axis=1)
    return targets & ~context[:, None], context


def default_num_context(
    grid: tuple[int, int],
    num_targets: int = 4,
    target_scale: tuple[float, float] = (0.15, 0.2),
    target_aspect_ratio: tuple[float, float] = (0.75, 1.5),
    context_scale: tuple[float, float] = (0.85, 1.0),
    inside_targets: bool = False,
) -> int:
    """Patches that nine of ten context blocks have left beside the targets, and at least one."""
    keys = np.arange(_SIMULATED, dtype=np.uint64) << np.uint64(32)
    targets, block = _draw(keys, grid, num_targets, target_scale, target_aspect_ratio, context_scale, inside_targets)
    left = (block & ~targets.any(axis=1)).sum(axis=1)
    return max(int(np.quantile(left, _SHORT)), 1)


def largest_target(
    grid: tuple[int, int],
    target_scale: tuple[float, float] = (0.15, 0.2),
    target_aspect_ratio: tuple[float, float] = (0.75, 1.5),
) -> int:
    """Patches of the largest target block that may be drawn."""
    area = target_scale[1] * grid[0] * grid[1]
    # Height and width change where one of their roots is half a patch past a whole number: look on both sides of each.
    halves = (np.arange(max(grid)) + 0.5) ** 2
    edges = np.concatenate([halves / area, area / halves])
    ratios = np.concatenate([edges * (1 - 1e-9), edges * (1 + 1e-9), target_aspect_ratio]).clip(*target_aspect_ratio)
    height, width = _size(np.full(len(ratios), target_scale[1]), ratios, grid)
    return int((height * width).max())


def _draw(
    keys: np.ndarray,
    grid: tuple[int, int],
    num_targets: int,
    target_scale: tuple[float, float],
    target_aspect_ratio: tuple[float, float],
    context_scale: tuple[float, float],
    inside_targets: bool,
) -> tuple[np.ndarray, np.ndarray]:
    """Target blocks, bool `[B, M, rows * columns]`, and the context block, bool `[B, rows * columns]`."""
    rows, columns = grid
    draws = uniforms(keys, 0, 4 * num_targets + 3)
    scale, ratio, top, left = draws[:, : 4 * num_targets].reshape(-1, 4, num_targets).transpose(1, 0, 2)
    low, high = np.log(target_aspect_ratio[0]), np.log(target_aspect_ratio[1])
    height, width = _size(
        target_scale[0] + scale * (target_scale[1] - target_scale[0]), np.exp(low + ratio * (high - low)), grid
    )
    place = _inside if inside_targets else _meeting
    targets = _block(place(top, height, rows), place(left, width, columns), height, width, grid)
    scale, top, left = draws[:, 4 * num_targets :].T
    height, width = _size(context_scale[0] + scale * (context_scale[1] - context_scale[0]), np.ones_like(scale), grid)
    context = _block(_inside(top, height, rows), _inside(left, width, columns), height, width, grid)
    return targets, context


def _inside(draw: np.ndarray, size: np.ndarray, room: int) -> np.ndarray:
    """The first row or column of a block of this size, from a uniform draw: where all of it is in the plane."""
    return np.floor(draw * (room - size + 1))


def _meeting(draw: np.ndarray, size: np.ndarray, room: int) -> np.ndarray:
    """The first row or column of a block of this size, from a uniform draw: where it meets the plane."""
    return np.floor(draw * (room + size - 1)) - size + 1


def _size(scale: np.ndarray, ratio: np.ndarray, grid: tuple[int, int]) -> tuple[np.ndarray, np.ndarray]:
    """Height and width, whole numbers, of blocks of a share `scale` of the plane and the aspect ratio `ratio`."""
    rows, columns = grid
    area = scale * rows * columns
    return np.clip(np.rint(np.sqrt(area * ratio)), 1, rows), np.clip(np.rint(np.sqrt(area / ratio)), 1, columns)


def _block(
    top: np.ndarray, left: np.ndarray, height: np.ndarray, width: np.ndarray, grid: tuple[int, int]
) -> np.ndarray:
    """Which patches lie in each block: bool `[..., rows * columns]`, rows first."""
    row, column = np.arange(grid[0]), np.arange(grid[1])
    in_rows = (row >= top[..., None]) & (row < (top + height)[..., None])
    in_columns = (column >= left[..., None]) & (column < (left + width)[..., None])
    return (in_rows[..., :, None] & in_columns[..., None, :]).reshape(*top.shape, -1)
