"""Claims about block masks."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_hf.masking import block_sampling
from jepa_hf.masking.block_sampling import BlockSampler, _block_size
from jepa_hf.masking.counter_rng import sample_keys

DRAWS = 20_000
GRIDS = [(8, 8), (14, 14), (6, 10), (12, 5), (3, 3)]
few = settings(max_examples=40, deadline=None)


def keys_of(count: int, seed: int = 0) -> np.ndarray:
    return sample_keys(np.arange(count, dtype=np.uint64), seed, epoch=0)


def sample_block_masks(
    keys: np.ndarray, grid: tuple[int, int], num_context: int | None = None, **shape: Any
) -> tuple[np.ndarray, np.ndarray]:
    return BlockSampler(grid, **shape).sample(keys, num_context)


def as_planes(flags: np.ndarray, grid: tuple[int, int]) -> np.ndarray:
    return flags.reshape(*flags.shape[:-1], *grid)


@st.composite
def shapes(draw: st.DrawFn) -> dict[str, Any]:
    """Settings of `BlockSampler` for a grid of at least two patches."""
    rows, columns = draw(st.tuples(st.integers(1, 12), st.integers(1, 12)).filter(lambda grid: grid[0] * grid[1] > 1))
    scales = st.tuples(st.floats(0.01, 1), st.floats(0.01, 1)).map(sorted).map(tuple)
    ratios = st.tuples(st.floats(0.2, 5), st.floats(0.2, 5)).map(sorted).map(tuple)
    return {
        "grid": (rows, columns),
        "num_targets": draw(st.integers(1, 5)),
        "target_scale": draw(scales),
        "target_aspect_ratio": draw(ratios),
        "context_scale": draw(scales),
        "keep_blocks_inside": draw(st.booleans()),
    }


@pytest.mark.parametrize("grid", GRIDS)
def test_every_patch_is_a_target_with_the_same_chance(grid: tuple[int, int]) -> None:
    """First and last rows, corners and the middle: each count is within five binomial deviations of the mean.

    One block per sample, so that samples are independent; a rule that keeps blocks inside the plane is caught.
    """
    context = BlockSampler(grid, num_targets=1).default_num_context
    counts = sample_block_masks(keys_of(DRAWS), grid, num_targets=1, num_context=context)[0].sum(axis=(0, 1))
    chance = counts.mean() / DRAWS
    assert 0.05 < chance < 0.25
    assert np.abs(counts - counts.mean()).max() < 5 * np.sqrt(DRAWS * chance * (1 - chance))
    planes = as_planes(counts, grid)
    for axis in (0, 1):
        lines = planes.mean(axis=axis)
        assert abs(lines[0] - lines[-1]) < 0.05 * counts.mean()


@pytest.mark.parametrize(
    "grid", [(14, 14), (8, 8), (4, 64), (64, 4), (2, 32), (1, 64), (64, 1), (4, 4), (3, 3), (3, 7)]
)
@pytest.mark.parametrize("scale", [(0.15, 0.2), (0.4, 0.6)])
def test_blocks_keep_their_scale_on_every_plane(grid: tuple[int, int], scale: tuple[float, float]) -> None:
    """Wide, tall and small ones: the mean area is within 5 % of the mean scale. Nothing is cut inside the plane."""
    targets, context = BlockSampler(grid, 1, scale, keep_blocks_inside=True).sample_blocks(keys_of(DRAWS))
    assert targets.mean() == pytest.approx(np.mean(scale), rel=0.05)
    assert context.mean() == pytest.approx(0.925, rel=0.05)


def test_the_same_chance_is_not_an_empty_claim() -> None:
    """The bound above tells the rule apart from that of blocks which never leave the plane."""
    counts = sample_block_masks(keys_of(DRAWS), (8, 8), num_targets=1, keep_blocks_inside=True)[0].sum(axis=(0, 1))
    chance = counts.mean() / DRAWS
    assert np.abs(counts - counts.mean()).max() > 20 * np.sqrt(DRAWS * chance * (1 - chance))


def test_blocks_inside_the_plane_are_uncut_and_reach_all_of_it() -> None:
    """What is drawn comes out as it is, and the first and last rows and columns are hidden too.

    The original's placement never reaches the last row and column.
    """
    shape = {"num_targets": 1, "target_scale": (0.25, 0.25), "target_aspect_ratio": (1.0, 1.0)}
    targets = sample_block_masks(keys_of(2000), (8, 8), **shape, keep_blocks_inside=True)[0][:, 0]
    assert (targets.sum(axis=1) == 16).all()
    planes = as_planes(targets.sum(axis=0), (8, 8))
    assert planes.min() > 0
    assert abs(planes[0].sum() / planes[-1].sum() - 1) < 0.2
    assert abs(planes[:, 0].sum() / planes[:, -1].sum() - 1) < 0.2


def test_blocks_of_one_sample_are_drawn_alike_and_independently() -> None:
    """Each of four target blocks has the same mean size and place; no block's size or place, the context's included,
    is correlated with another's."""
    targets, block = BlockSampler((14, 14)).sample_blocks(keys_of(DRAWS))
    planes = as_planes(np.concatenate([targets, block[:, None]], axis=1), (14, 14))
    size = planes.sum(axis=(2, 3))
    row = (planes.sum(axis=3) * np.arange(14)).sum(axis=2) / size
    column = (planes.sum(axis=2) * np.arange(14)).sum(axis=2) / size
    for values in (size, row, column):
        assert np.ptp(values[:, :4].mean(axis=0)) < 0.05 * values[:, :4].std()
    correlations = np.corrcoef(np.concatenate([size, row, column], axis=1).T)
    assert np.abs(correlations - np.eye(15)).max() < 0.035


def test_scale_and_aspect_ratio_are_independent_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    """Scale is uniform, the ratio's logarithm is uniform, both over their full range, independently.

    The original draws both from one number: their correlation would be 1. They are independent of the place, too.
    """
    drawn: list[tuple[np.ndarray, np.ndarray]] = []
    places: list[np.ndarray] = []
    size, place = block_sampling._block_size, block_sampling._offset_overlapping

    def size_and_note(scale: np.ndarray, ratio: np.ndarray, *args: Any) -> tuple[np.ndarray, np.ndarray]:
        drawn.append((scale.ravel(), ratio.ravel()))
        return size(scale, ratio, *args)

    def place_and_note(draw: np.ndarray, block: np.ndarray, room: int) -> np.ndarray:
        places.append(draw.ravel())
        return place(draw, block, room)

    monkeypatch.setattr(block_sampling, "_block_size", size_and_note)
    monkeypatch.setattr(block_sampling, "_offset_overlapping", place_and_note)
    sample_block_masks(keys_of(DRAWS // 4), (14, 14), num_context=80)
    (scale, ratio), (context_scale, context_ratio) = drawn
    log_ratio = np.log(ratio)
    assert scale.shape == ratio.shape == (DRAWS,)
    assert np.abs(np.corrcoef([scale, log_ratio, *places]) - np.eye(4)).max() < 0.03
    for values, low, high in (
        (scale, 0.15, 0.2),
        (log_ratio, np.log(0.75), np.log(1.5)),
        (context_scale, 0.85, 1.0),
        *((place, 0.0, 1.0) for place in places),
    ):
        tenths = np.histogram(values, bins=10, range=(low, high))[0]
        assert tenths.sum() == values.size
        assert np.abs(tenths - values.size / 10).max() < 5 * np.sqrt(values.size * 0.09)
    assert (context_ratio == 1).all()


@few
@given(shape=shapes(), count=st.integers(1, 40), seed=st.integers(0, 2**32), data=st.data())
def test_the_context_has_exactly_its_number_of_patches_and_no_target(
    shape: dict[str, Any], count: int, seed: int, data: st.DataObject
) -> None:
    """Any grid, any sizes, any number N of context patches: exactly N, none hidden."""
    patches = shape["grid"][0] * shape["grid"][1]
    number = data.draw(st.one_of(st.none(), st.integers(1, patches)))
    targets, context = sample_block_masks(keys_of(count, seed), **shape, num_context=number)
    assert targets.shape == (count, shape["num_targets"], patches)
    assert context.shape == (count, patches)
    assert targets.dtype == context.dtype == bool
    if number is None:
        number = BlockSampler(**shape).default_num_context
        assert 1 <= number < patches
        assert targets.any(axis=(1, 2)).all()
    assert (context.sum(axis=1) == number).all()
    assert not (targets.any(axis=1) & context).any()


@few
@given(shape=shapes(), seed=st.integers(0, 2**32))
def test_targets_are_blocks_within_the_range_of_sizes(shape: dict[str, Any], seed: int) -> None:
    """Each drawn block is a full rectangle, not empty and not larger than the largest; the context block is whole."""
    grid, (rows, columns) = shape["grid"], shape["grid"]
    targets, block = BlockSampler(**shape).sample_blocks(keys_of(64, seed))
    largest = BlockSampler(**shape).largest_target
    for flags in (targets.reshape(-1, rows * columns), block):
        planes = as_planes(flags, grid)
        height, width = planes.any(axis=2).sum(axis=1), planes.any(axis=1).sum(axis=1)
        assert (flags.sum(axis=1) == height * width).all()
        assert (height >= 1).all()
        for occupied in (planes.any(axis=2), planes.any(axis=1)):
            # Without gaps: at most one step from outside to inside.
            assert (np.diff(np.pad(occupied.astype(int), ((0, 0), (1, 1)))) == 1).sum(axis=1).max() == 1
    assert targets.sum(axis=2).max() <= largest


def test_the_largest_target_is_reached() -> None:
    """On the grids of CIFAR and ImageNet some sample has a block of exactly this size."""
    for grid in ((8, 8), (14, 14), (6, 10)):
        targets, _ = sample_block_masks(keys_of(DRAWS // 2), grid)
        assert targets.sum(axis=2).max() == BlockSampler(grid).largest_target


@pytest.mark.parametrize("grid", [(8, 8), (6, 10)])
def test_context_thinning_prefers_no_corner(grid: tuple[int, int]) -> None:
    """How often a patch is context is the same after either flip, within five deviations; few patches are kept, so
    that a rule that keeps the first ones is caught."""
    _, context = sample_block_masks(keys_of(DRAWS), grid, num_context=6)
    counts = as_planes(context.sum(axis=0), grid).astype(float)
    assert counts.sum() == 6 * DRAWS
    for flipped in (counts[::-1], counts[:, ::-1]):
        # The difference of two multinomial counts has at most the variance of their sum.
        assert (np.abs(counts - flipped) < 5 * np.sqrt(counts + flipped)).all()


@few
@given(
    grid=st.sampled_from(GRIDS),
    keys=st.lists(st.integers(0, 2**64 - 1), min_size=1, max_size=20),
    others=st.lists(st.integers(0, 2**64 - 1), max_size=20),
)
def test_a_key_gives_the_same_masks_whatever_the_batch(
    grid: tuple[int, int], keys: list[int], others: list[int]
) -> None:
    """Alone, in another order, and among others."""
    together = sample_block_masks(np.array(others + keys[::-1], dtype=np.uint64), grid)
    for number, key in enumerate(keys):
        alone = sample_block_masks(np.array([key], dtype=np.uint64), grid)
        for one, many in zip(alone, together, strict=True):
            assert np.array_equal(one[0], many[len(others) + len(keys) - 1 - number])


def test_different_keys_give_different_masks() -> None:
    """Of 1,000 samples hardly two have the same targets."""
    targets, _ = sample_block_masks(keys_of(1000), (14, 14))
    assert len({row.tobytes() for row in targets}) >= 999


@pytest.mark.parametrize("grid", [(8, 8), (14, 14), (6, 10)])
def test_the_default_number_of_context_patches_falls_short_for_a_tenth(grid: tuple[int, int]) -> None:
    """About one in ten samples has fewer patches left, and one more patch would leave more than that short."""
    number = BlockSampler(grid).default_num_context
    targets, block = BlockSampler(grid).sample_blocks(keys_of(DRAWS, seed=1))
    left = (block & ~targets.any(axis=1)).sum(axis=1)
    assert (left < number).mean() < 0.11
    assert (left < number + 1).mean() > 0.09


def test_where_the_context_falls_short_patches_outside_its_block_make_up_for_it() -> None:
    """A context block of one quarter cannot hold half of the patches: targets are left alone as long as others last."""
    settings = {"num_targets": 1, "context_scale": (0.25, 0.25)}
    targets, context = sample_block_masks(keys_of(500), (8, 8), **settings, num_context=32)
    drawn, block = BlockSampler((8, 8), 1, context_scale=(0.25, 0.25)).sample_blocks(keys_of(500))
    assert np.array_equal(targets, drawn)
    assert ((block & ~drawn[:, 0]) <= context).all()
    assert (context.sum(axis=1) == 32).all()


def test_a_plane_of_one_patch_has_no_target_and_one_of_two_has() -> None:
    """The smallest grids: a single patch is context; with two, one patch is context and the other a target."""
    targets, context = sample_block_masks(keys_of(50), (1, 1))
    assert context.all()
    assert not targets.any()
    for grid in ((1, 2), (2, 1)):
        targets, context = sample_block_masks(keys_of(50), grid)
        assert np.array_equal(targets.any(axis=1), ~context)
        assert (context.sum(axis=1) == 1).all()
    targets, context = sample_block_masks(keys_of(500), (2, 2))
    assert (context.sum(axis=1) == BlockSampler((2, 2)).default_num_context).all()
    assert targets.any(axis=(1, 2)).all()
    assert targets.sum(axis=2).max() == BlockSampler((2, 2)).largest_target == 1


@pytest.mark.parametrize(
    ("grid", "scale", "ratios"),
    [((38, 38), (0.15, 0.2), (0.3, 3.0)), ((29, 29), (0.3, 0.5), (0.5, 2.0)), ((8, 8), (0.15, 0.2), (0.75, 1.5))],
)
def test_the_largest_target_is_the_largest(
    grid: tuple[int, int], scale: tuple[float, float], ratios: tuple[float, float]
) -> None:
    """Against a search over a million aspect ratios."""
    height, width = _block_size(np.full(10**6, scale[1]), np.geomspace(*ratios, 10**6), grid, 1 - 1e-9)
    assert BlockSampler(grid, 4, scale, ratios).largest_target >= int((height * width).max())
