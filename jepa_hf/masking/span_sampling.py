"""Sampling of span masks for a batch, with array operations only.

Every draw is a pure function of a 64-bit key per row (a counter-based generator). A row's mask therefore depends
neither on the other rows of its batch, nor on the padded width, nor on the process or worker.
"""

import math
from dataclasses import dataclass

import numpy as np

from ..errors import UsageError
from .counter_rng import uniform_draws

_UNCOVERED = np.iinfo(np.int32).max


def unit_ids(maskable: np.ndarray, word_ids: np.ndarray | None = None) -> np.ndarray:
    """Number the units that spans consist of: maskable tokens, or words of them.

    Without `word_ids` each maskable token is a unit. With them (adjacent tokens with the same number are one word) a
    unit starts where the word changes, and after a special token.

    Returns:
        `[B, L]`, each token's unit number in its row, −1 where not maskable.
    """
    start = maskable.copy()
    if word_ids is not None:
        start[:, 1:] &= ~maskable[:, :-1] | (word_ids[:, 1:] != word_ids[:, :-1])
    return np.where(maskable, np.cumsum(start, axis=1) - 1, -1)


def span_lengths(draws: np.ndarray, mean: float) -> np.ndarray:
    """Turn uniform draws into geometric lengths: P(k) = (1 - p)^(k - 1) p with p = 1 / `mean`.

    SpanBERT (Joshi et al. 2020, section 3.1) uses p = 0.2, a mean of 5, and redraws lengths above
    10. At a mean of 1 all lengths are 1. The lengths are float64.
    """
    with np.errstate(divide="ignore"):  # log 0 = -inf at a mean of 1
        return 1.0 + np.floor(np.log1p(-draws) / np.log1p(-1.0 / mean))


def check_span_settings(mask_ratio: float | None, mean_span_length: float | None) -> None:
    """Raise a `UsageError` for a ratio outside (0, 1), or a mean below 1; None stands for a default."""
    if mask_ratio is not None and not 0.0 < mask_ratio < 1.0:
        raise UsageError(f"mask_ratio must lie strictly between 0 and 1, not {mask_ratio}.")
    if mean_span_length is not None and not mean_span_length >= 1:
        raise UsageError(f"mean_span_length must be at least 1, not {mean_span_length}.")


def sample_span_mask(
    maskable: np.ndarray,
    keys: np.ndarray,
    mask_ratio: float = 0.3,
    mean_span_length: float = 5.0,
    word_ids: np.ndarray | None = None,
) -> np.ndarray:
    """Mask contiguous spans until `mask_ratio` of each row's maskable tokens are masked.

    Span lengths are geometric (see `span_lengths`), at most the row's length. Spans are placed one after another, and
    each covers every maskable token with equal probability. They may merge, and are clipped at both ends of their run
    of maskable tokens. The last span is cut, so that exactly round(ratio × maskable) tokens are masked. The cut favours
    the ends of short rows: by 9 % at 16 tokens and a mean of 5, by 1 % at 200 tokens.

    With a mean of 1, single tokens are drawn uniformly without replacement, as in data2vec and BERT. With `word_ids`
    span lengths count words (SpanBERT, Joshi et al. 2020, section 3.1). The number of masked tokens is then the nearest
    that complete words allow, within one word. At least one unit is masked and at least one stays visible.

    Args:
        maskable: `[B, L]` bool, False on special and padding tokens.
        keys: uint64 `[B]`, see `row_keys`.
        mask_ratio: Share of the maskable tokens, in (0, 1).
        mean_span_length: Mean before merging and clipping, in units (tokens or words), at least 1.
        word_ids: `[B, L]`, see `unit_ids`.

    Returns:
        bool `[B, L]`, True where masked. Rows of fewer than two units stay all False.

    Raises:
        UsageError: The ratio is outside (0, 1), or the mean is below 1.
    """
    check_span_settings(mask_ratio, mean_span_length)
    units = _find_units(maskable, word_ids)
    possible = units.counts >= 2
    if not possible.any():
        return np.zeros_like(maskable)
    num_tokens = np.count_nonzero(maskable, axis=1)
    budget = np.where(possible, np.maximum(np.rint(num_tokens * mask_ratio).astype(np.int64), 1), 0)
    first, num_spans = _draw_spans(keys, units, budget, mask_ratio, mean_span_length)
    from_right = (keys >> np.uint64(63)).astype(bool)
    masked = _select_units_up_to_budget(first, units, budget, num_spans, from_right)
    mask = np.zeros(maskable.shape, dtype=bool)
    mask[maskable] = masked.reshape(-1)[units.token_cells]
    return mask


@dataclass(frozen=True)
class _Units:
    """The units of a batch in cells, and their runs: consecutive units between special tokens.

    Attributes:
        weight: `[B, U]`, tokens in each cell; 0 in cells without a unit.
        counts: `[B]`, units per row.
        token_cells: `[number of maskable tokens]`, the flat index of each token's cell.
        run_counts: `[B]`, runs per row.
        run_begin: `[B, R]`, the first unit of each run.
        run_end: `[B, R]`, the unit after its last.
    """

    weight: np.ndarray
    counts: np.ndarray
    token_cells: np.ndarray
    run_counts: np.ndarray
    run_begin: np.ndarray
    run_end: np.ndarray


def _find_units(maskable: np.ndarray, word_ids: np.ndarray | None) -> _Units:
    batch = len(maskable)
    unit = unit_ids(maskable, word_ids)
    counts = unit.max(axis=1, initial=-1) + 1
    width = int(counts.max(initial=0))
    token_cells = np.repeat(np.arange(batch) * width, np.count_nonzero(maskable, axis=1)) + unit[maskable]
    weight = np.bincount(token_cells, minlength=batch * width).reshape(batch, width)

    starts, ends = maskable.copy(), maskable.copy()
    starts[:, 1:] &= ~maskable[:, :-1]
    ends[:, :-1] &= ~maskable[:, 1:]
    run_counts = np.count_nonzero(starts, axis=1)
    is_run = np.arange(run_counts.max(initial=0)) < run_counts[:, None]
    run_begin, run_end = np.full(is_run.shape, _UNCOVERED, dtype=np.int64), np.zeros(is_run.shape, dtype=np.int64)
    run_begin[is_run], run_end[is_run] = unit[starts], unit[ends] + 1
    return _Units(weight, counts, token_cells, run_counts, run_begin, run_end)


def _draw_spans(
    keys: np.ndarray, units: _Units, budget: np.ndarray, mask_ratio: float, mean_span_length: float
) -> tuple[np.ndarray, int]:
    """Draw spans in blocks until they cover `budget` tokens of each row.

    A row that has reached its budget ignores later blocks, so its mask does not depend on the other rows.

    Returns:
        int32 `[B, U]`, the number of the first span that covers each cell, `_UNCOVERED` if none
        does; and the number of spans drawn.
    """
    first = np.full(units.weight.shape, _UNCOVERED, dtype=np.int32)
    covered = np.zeros(len(budget), dtype=np.int64)
    # Spans overlap, and the number required varies like a Poisson count: with this size few rows need a second block.
    expected = -math.log1p(-mask_ratio) * units.counts.max() / mean_span_length
    block = int(expected + 3 * math.sqrt(expected)) + 4
    num_spans = 0
    while (rows := np.flatnonzero(covered < budget)).size:
        draws = uniform_draws(keys[rows], 2 * num_spans, 2 * block).reshape(-1, block, 2)
        cells, sizes = _place_spans(draws, units, rows, mean_span_length)
        numbers = np.broadcast_to(np.arange(num_spans, num_spans + block, dtype=np.int32), cells.shape).ravel()
        cells, sizes = cells.ravel(), sizes.ravel()
        # The cells of all spans, one span after another.
        offset = cells - (np.cumsum(sizes) - sizes)
        flat = np.repeat(offset, sizes) + np.arange(sizes.sum())
        np.minimum.at(first.reshape(-1), flat, np.repeat(numbers, sizes))
        num_spans += block
        is_covered = first != _UNCOVERED
        covered = np.where(is_covered, units.weight, 0).sum(axis=1)
    return first, num_spans


def _place_spans(
    draws: np.ndarray, units: _Units, rows: np.ndarray, mean_span_length: float
) -> tuple[np.ndarray, np.ndarray]:
    """Return the flat index of each span's first cell and the number of its cells, both `[N, S]`.

    `draws` `[N, S, 2]` are position and length of S spans in each of the `rows` `[N]` of the batch.
    """
    counts, run_counts = units.counts[rows, None], units.run_counts[rows, None]
    run_begin = units.run_begin[rows]
    lengths = span_lengths(draws[:, :, 1], mean_span_length).clip(max=counts).astype(np.int64)
    # Spans may begin before their run and are clipped: otherwise a run's first units would rarely be covered.
    offsets = (draws[:, :, 0] * (counts + run_counts * (lengths - 1))).astype(np.int64)
    run = np.zeros_like(offsets)
    for number in range(1, run_begin.shape[1]):
        run += offsets >= run_begin[:, number, None] + number * (lengths - 1)
    starts = offsets - (run + 1) * (lengths - 1)
    ends = np.minimum(starts + lengths, np.take_along_axis(units.run_end[rows], run, axis=1))
    starts = np.maximum(starts, np.take_along_axis(run_begin, run, axis=1))
    return starts + rows[:, None] * units.weight.shape[1], ends - starts


def _select_units_up_to_budget(
    first: np.ndarray, units: _Units, budget: np.ndarray, num_spans: int, from_right: np.ndarray
) -> np.ndarray:
    """Choose units in the order of the first span that covers them, up to `budget` tokens: bool `[B, U]`.

    `first` is that of `_draw_spans`. `from_right` is the side from which a row's last span is cut: always cutting on
    one side would favour the other side of short rows.
    """
    batch, weight = len(first), units.weight
    cell, count = _flat_indices(first < num_spans)
    number = first.reshape(-1)[cell] + np.repeat(np.arange(batch) * num_spans, count)
    per_span = np.bincount(number, weights=weight.reshape(-1)[cell], minlength=batch * num_spans)
    per_span = per_span.reshape(batch, num_spans)
    reached = np.cumsum(per_span, axis=1)
    # The last span, with which the budget is reached, and the tokens that are missing before it.
    last = (reached < budget[:, None]).sum(axis=1)
    rows = np.arange(batch)
    missing = budget - reached[rows, last] + per_span[rows, last]
    chosen = first < last[:, None]

    cell, count = _flat_indices(first == last[:, None])
    tokens = weight.reshape(-1)[cell]
    cumulative = np.cumsum(tokens)
    sums, end = np.append(0, cumulative), np.cumsum(count)
    before, total = sums[end - count], sums[end] - sums[end - count]
    cumulative -= np.repeat(before, count)
    cumulative = np.where(np.repeat(from_right, count), np.repeat(total, count) - cumulative + tokens, cumulative)
    # A word that crosses the budget is masked if that comes nearer to the budget than leaving it visible.
    chosen.reshape(-1)[cell[cumulative - np.repeat(missing, count) <= tokens // 2]] = True

    num_chosen = np.count_nonzero(chosen, axis=1)
    empty, full = (budget > 0) & (num_chosen == 0), (budget > 0) & (num_chosen >= units.counts)
    if empty.any() or full.any():
        order = _unit_order(np.minimum(first, num_spans), weight, from_right)
        # A single word longer than twice the budget is masked all the same. Of all words the last stays visible.
        rows = np.flatnonzero(empty)
        chosen[rows, np.argmin(order[rows], axis=1)] = True
        rows = np.flatnonzero(full)
        chosen[rows, np.argmax(np.where(chosen[rows], order[rows], -1), axis=1)] = False
    return chosen


def _unit_order(span: np.ndarray, weight: np.ndarray, from_right: np.ndarray) -> np.ndarray:
    """Rank the units of each row by span, then by side; cells without a unit come last."""
    column = np.arange(span.shape[1])
    column = np.where(from_right[:, None], column[::-1], column)
    return np.where(weight > 0, span.astype(np.int64) * span.shape[1] + column, np.iinfo(np.int64).max)


def _flat_indices(selected: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return the flat indices of the True entries of `[B, C]`, and their number per row."""
    indices = np.flatnonzero(selected)
    return indices, np.diff(np.searchsorted(indices, np.arange(selected.shape[0] + 1) * selected.shape[1]))
