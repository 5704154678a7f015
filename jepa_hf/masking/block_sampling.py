"""Sampling of block masks over a grid of patches (I-JEPA), with array operations only."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import UsageError
from .counter_rng import uniform_draws

# Simulated samples from which the default number of context patches follows, and the share that may fall short of it.
_NUM_SIMULATED = 4096
_SHORTFALL_QUANTILE = 0.1
# Patches of a block's shorter side from which rounding both sides keeps the mean area. The errors of a
# context block average out less, because its aspect ratio is fixed.
_SHORT_SIDE, _SHORT_CONTEXT_SIDE = 2, 4


def check_block_settings(
    ranges: Mapping[str, tuple[float, float]], target_aspect_ratio: tuple[float, float] | None
) -> None:
    """Raise a `UsageError` for a range of areas or of aspect ratios that does not ascend; None is a default."""
    for name, (low, high) in ranges.items():
        if not 0 < low <= high <= 1:
            raise UsageError(f"{name} must be two ascending numbers, above 0 and at most 1, not {low}, {high}.")
    if target_aspect_ratio is None:
        return
    low, high = target_aspect_ratio
    if not 0 < low <= high < float("inf"):
        raise UsageError(f"target_aspect_ratio must be two ascending positive numbers, not {low}, {high}.")


@dataclass(frozen=True)
class BlockSampler:
    """Target blocks and one context per sample (Assran et al. 2023, section 3, figure 4).

    Scale and aspect ratio are drawn independently; where the grid is too narrow for both, the scale is kept. A target
    block's position is uniform over all positions that overlap the grid, and the part outside is cut off. Every patch
    is therefore a target with equal probability. (See `keep_blocks_inside` for the paper's placement.)

    The context is a block inside the grid, as square as fits, minus all targets. A fixed number of its patches are
    chosen uniformly. If fewer remain, patches outside the context block fill up the number, and then targets.

    Args:
        grid: Rows and columns of patches.
        num_targets: Target blocks per sample, M.
        target_scale: Range of a target block's area, before it is cut, as a share of the grid.
        target_aspect_ratio: Range of its height over its width.
        context_scale: Range of the context block's area.
        keep_blocks_inside: Place target blocks inside the grid, as the paper's code does. No block is
            cut, and patches near the edges are targets less often than those in the middle.
    """

    grid: tuple[int, int]
    num_targets: int = 4
    target_scale: tuple[float, float] = (0.15, 0.2)
    target_aspect_ratio: tuple[float, float] = (0.75, 1.5)
    context_scale: tuple[float, float] = (0.85, 1.0)
    keep_blocks_inside: bool = False

    def sample(self, keys: np.ndarray, num_context: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Sample the masks of B samples.

        Args:
            keys: uint64 `[B]`, see `sample_keys`.
            num_context: Patches of every context, C. Default: `default_num_context`.

        Returns:
            bool `[B, M, rows * columns]`, True on targets, and bool `[B, rows * columns]`, True on
            exactly C patches of context, none of which is a target.
        """
        num_context = self.default_num_context if num_context is None else num_context
        targets, block = self.sample_blocks(keys)
        is_target = targets.any(axis=1)
        # The patches with the `num_context` lowest ranks are the context.
        rank = uniform_draws(keys, 4 * self.num_targets + 3, block.shape[1]) + is_target + (is_target | ~block)
        context = np.zeros_like(is_target)
        np.put_along_axis(context, np.argpartition(rank, num_context - 1, axis=1)[:, :num_context], True, axis=1)
        return targets & ~context[:, None], context

    @cached_property
    def default_num_context(self) -> int:
        """Number of patches that nine of ten context blocks have outside the targets, at least 1."""
        targets, block = self.sample_blocks(np.arange(_NUM_SIMULATED, dtype=np.uint64) << np.uint64(32))
        num_visible = (block & ~targets.any(axis=1)).sum(axis=1)
        return max(int(np.quantile(num_visible, _SHORTFALL_QUANTILE)), 1)

    @cached_property
    def largest_target(self) -> int:
        """Number of patches of the largest possible target block."""
        rows, columns = self.grid
        scale = self.target_scale[1]
        area = scale * rows * columns
        # Height and width change at the ratios at which a side is half an integer, as long as the grid, or
        # so short that the other one is drawn. Evaluate both sides of each.
        sides = np.concatenate([np.arange(max(self.grid)) + 0.5, [_SHORT_SIDE, rows, columns]]) ** 2
        edges = np.concatenate([sides / area, area / sides])
        ratios = np.concatenate([edges * (1 - 1e-9), edges * (1 + 1e-9), self.target_aspect_ratio])
        ratios = ratios.clip(*self.target_aspect_ratio)
        height, width = _block_size(np.full(len(ratios), scale), ratios, self.grid, 1 - 1e-9)
        return int((height * width).max())

    def sample_blocks(self, keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Draw target blocks, bool `[B, M, rows * columns]`, and a context block per sample, which may overlap."""
        (rows, columns), num_targets = self.grid, self.num_targets
        draws = uniform_draws(keys, 0, 4 * num_targets + 3)
        scale, ratio, top, left = draws[:, : 4 * num_targets].reshape(-1, 4, num_targets).transpose(1, 0, 2)
        rounding = uniform_draws(keys, 4 * num_targets + 3 + rows * columns, num_targets + 1)
        low, high = np.log(self.target_aspect_ratio[0]), np.log(self.target_aspect_ratio[1])
        height, width = _block_size(
            self.target_scale[0] + scale * (self.target_scale[1] - self.target_scale[0]),
            np.exp(low + ratio * (high - low)),
            self.grid,
            rounding[:, :num_targets],
        )
        offset = _offset_inside if self.keep_blocks_inside else _offset_overlapping
        targets = _block(offset(top, height, rows), offset(left, width, columns), height, width, self.grid)
        scale, top, left = draws[:, 4 * num_targets :].T
        height, width = _block_size(
            self.context_scale[0] + scale * (self.context_scale[1] - self.context_scale[0]),
            np.ones_like(scale),
            self.grid,
            rounding[:, -1],
            _SHORT_CONTEXT_SIDE,
        )
        top, left = _offset_inside(top, height, rows), _offset_inside(left, width, columns)
        return targets, _block(top, left, height, width, self.grid)


def _offset_inside(draw: np.ndarray, size: np.ndarray, grid_size: int) -> np.ndarray:
    """Turn a uniform draw into the first row (or column) of a block that lies inside the grid."""
    return np.floor(draw * (grid_size - size + 1))


def _offset_overlapping(draw: np.ndarray, size: np.ndarray, grid_size: int) -> np.ndarray:
    """Turn a uniform draw into the first row (or column) of a block that overlaps the grid."""
    return np.floor(draw * (grid_size + size - 1)) - size + 1


def _block_size(
    scale: np.ndarray,
    ratio: np.ndarray,
    grid: tuple[int, int],
    rounding: np.ndarray | float,
    short_side: float = _SHORT_SIDE,
) -> tuple[np.ndarray, np.ndarray]:
    """Return height and width (integers) of blocks with a share `scale` of the grid and, where that fits, a `ratio`.

    The longer side of a block with a side below `short_side` is rounded by draws that are uniform in [0, 1).
    """
    rows, columns = grid
    area = scale * rows * columns
    height, width = np.sqrt(area * ratio), np.sqrt(area / ratio)
    # The other side makes up for one that the grid is too small for.
    height, width = (
        np.where(width > columns, area / columns, height).clip(max=rows),
        np.where(height > rows, area / rows, width).clip(max=columns),
    )
    # Of short sides, the rounding errors do not average out.
    short = np.rint(np.minimum(height, width)).clip(1)
    long = np.floor(area / short + rounding)
    is_short = np.minimum(height, width) < short_side
    height, width = (
        np.where(is_short, np.where(height > width, long, short), np.rint(height)),
        np.where(is_short, np.where(height > width, short, long), np.rint(width)),
    )
    return height.clip(1, rows), width.clip(1, columns)


def _block(
    top: np.ndarray, left: np.ndarray, height: np.ndarray, width: np.ndarray, grid: tuple[int, int]
) -> np.ndarray:
    """Mark the patches of each block: bool `[..., rows * columns]`, row-major."""
    row, column = np.arange(grid[0]), np.arange(grid[1])
    in_rows = (row >= top[..., None]) & (row < (top + height)[..., None])
    in_columns = (column >= left[..., None]) & (column < (left + width)[..., None])
    return (in_rows[..., :, None] & in_columns[..., None, :]).reshape(*top.shape, -1)
