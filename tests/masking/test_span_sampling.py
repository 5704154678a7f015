"""Claims about the sampling of masks."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jepa_hf.masking.counter_rng import row_keys, uniform_draws
from jepa_hf.masking.span_sampling import sample_span_mask, span_lengths, unit_ids

few = settings(max_examples=50, deadline=None)

# A row, token by token: a special token, one more token of the same word, a new word.
SPECIAL, SAME_WORD, NEW_WORD = range(3)
KINDS = st.sampled_from((SPECIAL, *[SAME_WORD] * 3, *[NEW_WORD] * 3))
ROWS = st.lists(st.lists(KINDS, max_size=40), min_size=1, max_size=5)
SEEDS = st.integers(0, 2**63)
RATIOS = st.floats(0.01, 0.99)
MEANS = st.floats(1.0, 20.0)


def batch_of(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Rows of kinds, padded on the right: which tokens are maskable, their words."""
    shape = (len(rows), max(map(len, rows)))
    maskable, words = np.zeros(shape, bool), np.full(shape, -1)
    for index, row in enumerate(rows):
        kinds = np.array(row, dtype=int)
        maskable[index, : len(row)] = kinds != SPECIAL
        words[index, : len(row)] = np.where(kinds == SPECIAL, -1, np.cumsum(kinds == NEW_WORD))
    return maskable, words


def keys_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, size=count, dtype=np.uint64)


def reference_mask(
    maskable: Sequence[bool],
    key: int,
    mask_ratio: float,
    mean_span_length: float,
    words: Sequence[int] | None = None,
) -> list[bool]:
    """The rule of `sample_span_mask` for one row, in plain loops, one span after another."""
    units: list[list[int]] = []
    runs: list[int] = []
    for position, allowed in enumerate(maskable):
        if not allowed:
            continue
        neighbours = position > 0 and maskable[position - 1]
        if neighbours and words is not None and words[position] == words[position - 1]:
            units[-1].append(position)
        else:
            units.append([position])
            runs.append(runs[-1] if neighbours else position)

    mask = [False] * len(maskable)
    if len(units) < 2:
        return mask
    budget = max(round(sum(map(len, units)) * mask_ratio), 1)
    chosen: list[int] = []
    count, number, done = 0, 0, False
    while not done:
        place, length = uniform_draws(np.array([key], dtype=np.uint64), 2 * number, 2)[0].tolist()
        number += 1
        shorter = 1 - 1 / mean_span_length
        size = min(1 + int(math.log1p(-length) / math.log1p(-1 / mean_span_length)) if shorter else 1, len(units))
        # Each run is as long as it has units, and one unit shorter than a span longer, on its left.
        extents = [(run, runs.count(run) + size - 1) for run in dict.fromkeys(runs)]
        place = int(place * sum(extent for _, extent in extents))
        for run, extent in extents:  # noqa: B007
            if place < extent:
                break
            place -= extent
        start = runs.index(run) + place - (size - 1)
        covered = range(max(start, runs.index(run)), min(start + size, runs.index(run) + runs.count(run)))
        new = [unit for unit in covered if unit not in chosen]
        # The span that reaches the budget is taken from one side or the other.
        if count + sum(len(units[unit]) for unit in new) >= budget and key >> 63:
            new.reverse()
        for unit in new:
            if done:
                break
            missing, weight = budget - count, len(units[unit])
            # The word that goes beyond the budget is taken if that ends nearer to it; so is the very first one.
            if weight <= missing or weight - missing <= missing or not chosen:
                chosen.append(unit)
                count += weight
            done = weight >= missing
    if len(chosen) == len(units):
        chosen.pop()
    for unit in chosen:
        for position in units[unit]:
            mask[position] = True
    return mask


@few
@given(ROWS, SEEDS, RATIOS, MEANS, st.booleans())
def test_equals_a_plain_loop_over_spans(
    rows: list[list[int]], seed: int, ratio: float, mean: float, whole_words: bool
) -> None:
    """Each row's mask is what drawing its spans one after another gives, over tokens or words."""
    maskable, words = batch_of(rows)
    keys = keys_of(len(rows), seed)
    mask = sample_span_mask(maskable, keys, ratio, mean, words if whole_words else None)
    for index in range(len(rows)):
        expected = reference_mask(
            maskable[index].tolist(),
            int(keys[index]),
            ratio,
            mean,
            words[index].tolist() if whole_words else None,
        )
        assert mask[index].tolist() == expected


@pytest.mark.parametrize("whole_words", [False, True])
@pytest.mark.parametrize(("ratio", "mean"), [(0.02, 5.0), (0.3, 5.0), (0.5, 1.0), (0.97, 3.0), (0.15, 60.0)])
def test_equals_a_plain_loop_over_spans_at_real_lengths(ratio: float, mean: float, whole_words: bool) -> None:
    """The same on rows of up to 256 tokens, where one block of draws is often not enough."""
    rng = np.random.default_rng(1)
    rows = [rng.choice([0, 1, 1, 2, 2, 2, 2, 2], size=length).tolist() for length in (256, 256, 40, 90)]
    maskable, words = batch_of(rows)
    keys = keys_of(len(rows))
    mask = sample_span_mask(maskable, keys, ratio, mean, words if whole_words else None)
    for index in range(len(rows)):
        row_words = words[index].tolist() if whole_words else None
        assert mask[index].tolist() == reference_mask(
            maskable[index].tolist(), int(keys[index]), ratio, mean, row_words
        )


@few
@given(st.lists(st.integers(2, 300), min_size=1, max_size=6), SEEDS, st.floats(0.001, 0.999), st.floats(1.0, 1e6))
def test_masks_exactly_the_rounded_share(lengths: list[int], seed: int, ratio: float, mean: float) -> None:
    """round(ratio × maskable) tokens are masked, at least 1 and at most all but 1."""
    maskable = np.arange(max(lengths)) < np.array(lengths)[:, None]
    mask = sample_span_mask(maskable, keys_of(len(lengths), seed), ratio, mean)
    assert mask.sum(axis=1).tolist() == [min(max(round(n * ratio), 1), n - 1) for n in lengths]


@few
@given(ROWS, SEEDS, RATIOS, MEANS)
def test_masks_whole_words_and_within_one_word_of_the_share(
    rows: list[list[int]], seed: int, ratio: float, mean: float
) -> None:
    """No word is cut, and the count is off by less than the longest word; where words allow, by half a word."""
    maskable, words = batch_of(rows)
    mask = sample_span_mask(maskable, keys_of(len(rows), seed), ratio, mean, words)
    units = unit_ids(maskable, words)
    for row_mask, row_units in zip(mask, units, strict=True):
        sizes = np.bincount(row_units[row_units >= 0])
        if len(sizes) < 2:
            continue
        for unit in range(len(sizes)):
            assert len(set(row_mask[row_units == unit].tolist())) == 1
        total, masked = sizes.sum(), row_mask.sum()
        budget = max(round(total * ratio), 1)
        forced = len(set(row_units[row_mask].tolist())) in (1, len(sizes) - 1)
        assert abs(masked - budget) <= (sizes.max() if forced else sizes.max() / 2)


@few
@given(ROWS, SEEDS, RATIOS, MEANS, st.booleans())
def test_masks_no_special_token_and_leaves_something(
    rows: list[list[int]], seed: int, ratio: float, mean: float, whole_words: bool
) -> None:
    """Special tokens and padding stay; of two units or more, one is masked and one left; of fewer, none is masked."""
    maskable, words = batch_of(rows)
    words = words if whole_words else None
    mask = sample_span_mask(maskable, keys_of(len(rows), seed), ratio, mean, words)
    units = unit_ids(maskable, words)
    assert mask.shape == maskable.shape
    assert mask.dtype == bool
    assert not (mask & ~maskable).any()
    for row_mask, row_maskable, row_units in zip(mask, maskable, units, strict=True):
        if row_units.max(initial=-1) >= 1:
            assert 0 < row_mask.sum() < row_maskable.sum()
        else:
            assert not row_mask.any()


@few
@given(ROWS, st.integers(0, 9), st.integers(0, 9), SEEDS, RATIOS, MEANS, st.booleans())
def test_mask_depends_on_neither_batch_nor_padding(
    rows: list[list[int]], left: int, right: int, seed: int, ratio: float, mean: float, whole_words: bool
) -> None:
    """A row alone is masked as in any batch, with any width of padding on either side."""
    maskable, words = batch_of(rows)
    ids = np.random.default_rng(seed).integers(5, 1000, size=maskable.shape)
    valid = np.arange(maskable.shape[1]) < np.array([len(row) for row in rows])[:, None]

    def sample(maskable: np.ndarray, words: np.ndarray, ids: np.ndarray, valid: np.ndarray) -> np.ndarray:
        keys = row_keys(np.where(valid, ids, 0), valid, 7, 2)
        return sample_span_mask(maskable, keys, ratio, mean, words if whole_words else None)

    together = sample(maskable, words, ids, valid)
    for index, row in enumerate(rows):
        alone = slice(index, index + 1), slice(0, len(row))
        arrays = [
            np.pad(array[alone], ((0, 0), (left, right)), constant_values=fill)
            for array, fill in ((maskable, False), (words, -1), (ids, 3), (valid, False))
        ]
        shifted = sample(*arrays)[0]
        assert shifted[left : left + len(row)].tolist() == together[index, : len(row)].tolist()
        assert shifted.sum() == together[index].sum()


def test_spans_stop_at_the_end_of_their_run() -> None:
    """Two neighbours are masked together far less often where a special token parts them."""
    maskable, _ = batch_of([[NEW_WORD] * 10 + [SPECIAL] + [NEW_WORD] * 10] * 8000)
    mask = sample_span_mask(maskable, keys_of(8000), mask_ratio=0.1, mean_span_length=4)
    together = (mask[:, :-1] & mask[:, 1:]).mean(axis=0)
    assert 2 * (mask[:, 9] & mask[:, 11]).mean() < together[[3, 14]].min()


def test_another_epoch_seed_or_text_gives_another_mask() -> None:
    """Masks of the same row agree no more often over epochs and seeds than by chance, and repeat exactly otherwise."""
    ids = np.random.default_rng(0).integers(5, 1000, size=(200, 64))
    valid = np.ones_like(ids, dtype=bool)

    def sample(seed: int, epoch: int, ids: np.ndarray = ids) -> np.ndarray:
        return sample_span_mask(valid, row_keys(ids, valid, seed, epoch), 0.3, 5.0)

    base = sample(1, 0)
    assert (base == sample(1, 0)).all()
    others = [sample(1, 1), sample(2, 0), sample(0, 1), sample(1, 2**20), sample(-1, 0), sample(1, 0, ids[:, ::-1])]
    for other in others:
        assert (base == other).all(axis=1).mean() < 0.02
        # Independent masks of 19 in 64 share 30 % of their tokens.
        assert 0.25 < (base & other).sum() / base.sum() < 0.38


def test_row_keys_separate_rows_and_read_any_integer_type() -> None:
    """10,000 rows that differ in one token or in order have 10,000 keys; int32 and int64 ids have the same ones."""
    ids = np.full((10_000, 8), 7)
    ids[:5_000, 3] = np.arange(5_000)
    ids[5_000:, 4] = np.arange(5_000) + 8
    ids[0] = [1, 2, 3, 4, 5, 6, 7, 8]
    ids[1] = ids[0, ::-1]
    valid = np.ones_like(ids, dtype=bool)
    keys = row_keys(ids, valid, 0, 0)
    assert keys.dtype == np.uint64
    assert len(set(keys.tolist())) == len({tuple(row) for row in ids.tolist()}) == 10_000
    assert (keys == row_keys(ids.astype(np.int32), valid, 0, 0)).all()


def test_uniforms_are_uniform_on_the_half_open_unit_interval() -> None:
    """Values lie in [0, 1) with mean 1/2, variance 1/12 and as many in each tenth."""
    values = uniform_draws(keys_of(1000), 0, 200).ravel()
    assert values.min() >= 0.0
    assert values.max() < 1.0
    assert abs(values.mean() - 1 / 2) < 4 * math.sqrt(1 / 12 / values.size)
    assert abs(values.var() - 1 / 12) < 0.001
    counts = np.bincount((values * 10).astype(int), minlength=10)
    assert ((counts - 20_000) ** 2 / 20_000).sum() < 27.9  # chi-square with 9 degrees of freedom, p = 0.001


def test_uniforms_of_different_keys_and_positions_are_uncorrelated() -> None:
    """Streams of random, neighbouring and M-mask keys, and of one key at any lag, correlate no more than noise."""
    for keys in (keys_of(40), np.arange(40, dtype=np.uint64), np.arange(40, dtype=np.uint64) << np.uint64(58)):
        streams = uniform_draws(np.unique(keys), 0, 4000)
        correlation = np.corrcoef(streams) - np.eye(len(streams))
        assert np.abs(correlation).max() < 5 / math.sqrt(4000)
    stream = uniform_draws(keys_of(1), 0, 20_000)[0] - 0.5
    lags = [12 * (stream[lag:] * stream[:-lag]).mean() for lag in range(1, 30)]
    assert np.abs(lags).max() < 4 / math.sqrt(20_000)


@few
@given(SEEDS, st.integers(0, 10**6), st.integers(0, 20), st.integers(0, 20))
def test_uniforms_are_slices_of_one_stream(seed: int, start: int, skip: int, count: int) -> None:
    """Numbers start … of a stream are the same however many are asked for and from wherever."""
    keys = keys_of(3, seed)
    assert (uniform_draws(keys, start, skip + count)[:, skip:] == uniform_draws(keys, start + skip, count)).all()
    assert (uniform_draws(keys[1:2], start, count)[0] == uniform_draws(keys, start, count)[1]).all()


def test_spans_of_one_token_start_uniformly_over_maskable_tokens() -> None:
    """With spans of one token and one token to mask, that token is every maskable one equally often, and no other."""
    maskable = np.ones((40_000, 44), dtype=bool)
    maskable[:, [0, 20, 42, 43]] = False
    counts = sample_span_mask(maskable, keys_of(len(maskable)), 0.01, 1.0).sum(axis=0)
    assert (counts[~maskable[0]] == 0).all()
    counts = counts[maskable[0]]
    assert counts.sum() == 40_000
    assert abs(counts / 1000 - 1).max() < 0.13  # four standard errors


@pytest.mark.parametrize("mean", [1.0, 2.0, 5.0])
def test_span_lengths_have_the_mean_and_the_shape_of_a_geometric_distribution(mean: float) -> None:
    """Mean within three standard errors, P(length >= k) = (1 - 1 / mean)^(k - 1); at a mean of 1 every length is 1."""
    lengths = span_lengths(uniform_draws(keys_of(100), 0, 1000).ravel(), mean)
    deviation = math.sqrt(mean * (mean - 1))
    assert abs(lengths.mean() - mean) <= 3 * deviation / math.sqrt(lengths.size)
    for k in range(1, 12):
        expected = (1 - 1 / mean) ** (k - 1)
        assert abs((lengths >= k).mean() - expected) <= 4 * math.sqrt(expected * (1 - expected) / lengths.size)


@pytest.mark.parametrize("whole_words", [False, True])
def test_a_mean_of_one_hides_single_tokens_independently_of_their_neighbours(whole_words: bool) -> None:
    """Any two places are hidden together as often as in uniform draws without replacement, neighbours too; the share
    is exact and every place is alike."""
    count, length, hidden = 20_000, 64, 19
    words = np.tile(np.arange(length), (count, 1)) if whole_words else None
    mask = sample_span_mask(np.ones((count, length), bool), keys_of(count), 0.3, 1.0, words)
    assert (mask.sum(axis=1) == hidden).all()
    share = hidden / length
    assert abs(mask.mean(axis=0) - share).max() < 4 * math.sqrt(share * (1 - share) / count)
    for lag in (1, 2, 5):
        pairs = (mask[:, lag:] & mask[:, :-lag]).mean(axis=1)
        expected = hidden * (hidden - 1) / (length * (length - 1))
        assert abs(pairs.mean() - expected) < 3 * pairs.std() / math.sqrt(count)


@pytest.mark.parametrize("mean", [1.0, 3.0, 5.0, 12.0])
def test_spans_that_hardly_ever_meet_have_geometric_lengths(mean: float) -> None:
    """In masks, P(length ≥ k) = (1 - 1 / mean)^(k - 1)."""
    mask = sample_span_mask(np.ones((40, 20_000), bool), keys_of(40), 0.02, mean)
    edges = np.diff(mask.astype(np.int8), axis=1, prepend=0, append=0)
    lengths = np.nonzero(edges == -1)[1] - np.nonzero(edges == 1)[1]
    for k in (2, math.ceil(mean), math.ceil(2 * mean), math.ceil(3 * mean)):
        assert abs((lengths >= k).mean() - (1 - 1 / mean) ** (k - 1)) < 0.025
    assert abs(lengths.mean() / mean - 1) < 0.06


@pytest.mark.parametrize("mean", [2.0, 5.0, 10.0])
def test_every_token_is_masked_equally_often(mean: float) -> None:
    """First, last and inner tokens of both runs of a row have one chance, the ratio, within 8 percent of it."""
    maskable = np.ones((20_000, 160), dtype=bool)
    maskable[:, [0, 100, 159]] = False
    rates = sample_span_mask(maskable, keys_of(len(maskable)), 0.3, mean)[:, maskable[0]].mean(axis=0)
    assert abs(rates.mean() - 47 / 157) < 1e-9
    assert abs(rates / rates.mean() - 1).max() < 0.08


def test_maskable_units_of_a_hand_made_row() -> None:
    """Words and tokens are numbered in order; a special token splits a word."""
    #        [CLS]  a     ##b   c     [UNK]  c    d     d     [PAD]
    maskable = np.array([[False, True, True, True, False, True, True, True, False]])
    words = np.array([[-1, 0, 0, 1, 1, 1, 2, 2, -1]])
    assert unit_ids(maskable).tolist() == [[-1, 0, 1, 2, -1, 3, 4, 5, -1]]
    assert unit_ids(maskable, words).tolist() == [[-1, 0, 0, 1, -1, 2, 3, 3, -1]]


def test_one_word_longer_than_twice_the_share_is_masked_alone() -> None:
    """Two words of 9 and 1 tokens at a share of 1 token: one whole word is masked, never both, never none."""
    words = np.array([[0] * 9 + [1]] * 500)
    mask = sample_span_mask(np.ones_like(words, dtype=bool), keys_of(500), 0.1, 5.0, words)
    assert set(mask.sum(axis=1).tolist()) == {1, 9}


@pytest.mark.parametrize("tokens", [0, 1])
@pytest.mark.parametrize("whole_words", [False, True])
def test_rows_of_fewer_than_two_units_stay_clean(tokens: int, whole_words: bool) -> None:
    """Such a row is left alone, by itself and among others; a single word of several tokens is one unit."""
    maskable = np.zeros((2, 6), dtype=bool)
    maskable[0, 2 : 2 + tokens * (3 if whole_words else 1)] = True
    maskable[1] = True
    words = np.array([[5] * 6, [0, 1, 2, 3, 4, 5]]) if whole_words else None
    mask = sample_span_mask(maskable, keys_of(2), 0.5, 2.0, words)
    assert mask.sum(axis=1).tolist() == [0, 3]
    assert not sample_span_mask(maskable[:1], keys_of(1), 0.5, 2.0, None if words is None else words[:1]).any()


@pytest.mark.parametrize("shape", [(0, 5), (3, 0), (0, 0)])
def test_nothing_gives_nothing(shape: tuple[int, int]) -> None:
    """An empty batch and rows without a token give an empty mask."""
    assert sample_span_mask(np.ones(shape, bool), keys_of(shape[0])).shape == shape


@pytest.mark.parametrize("ratio", [0.0, 1.0, -0.1, 1.5, float("nan")])
def test_a_ratio_outside_the_open_unit_interval_is_refused(ratio: float) -> None:
    """0 would mask nothing and 1 would leave nothing: ValueError, naming the setting and the value."""
    with pytest.raises(ValueError, match=f"mask_ratio .*{ratio}"):
        sample_span_mask(np.ones((1, 9), bool), keys_of(1), ratio)


@pytest.mark.parametrize("mean", [0.0, 0.99, -3.0, float("nan")])
def test_a_mean_below_one_is_refused(mean: float) -> None:
    """ValueError, naming the setting and the value."""
    with pytest.raises(ValueError, match=f"mean_span_length .*{mean}"):
        sample_span_mask(np.ones((1, 9), bool), keys_of(1), 0.3, mean)


@pytest.mark.parametrize("mean", [1e30, 1e300, float("inf")])
def test_a_mean_beyond_any_row_masks_the_exact_share(mean: float) -> None:
    """Spans longer than a row are as long as the row: the share is exact, and both ends are reached."""
    mask = sample_span_mask(np.ones((200, 20), bool), keys_of(200), 0.3, mean)
    assert (mask.sum(axis=1) == 6).all()
    assert mask.any(axis=0).all()
