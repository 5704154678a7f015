"""Sampling of masks: whole batches at once, array operations only.

Every draw is a pure function of a 64-bit key per row (a counter-based generator), so that a row's mask depends neither
on the other rows of its batch, nor on the padded width, nor on the process or worker that made it.
"""

import math

import numpy as np

from .counter_rng import uniforms


def maskable_units(maskable: np.ndarray, word_ids: np.ndarray | None = None) -> np.ndarray:
    """Number the units that a span is made of: maskable tokens, or words of them.

    A new unit starts at each maskable token, or with `word_ids` where the word changes, and after a special token.

    Args:
        maskable: `[B, L]` bool, False on special and padding tokens.
        word_ids: `[B, L]` integers, optional: tokens with the same number next to each other are one word.

    Returns:
        `[B, L]`, each token's unit number in its row, −1 where not maskable.
    """
    start = maskable.copy()
    if word_ids is not None:
        start[:, 1:] &= ~maskable[:, :-1] | (word_ids[:, 1:] != word_ids[:, :-1])
    return np.where(maskable, np.cumsum(start, axis=1) - 1, -1)


def span_lengths(draws: np.ndarray, mean: float) -> np.ndarray:
    """Turn uniform draws into geometric lengths: P(length = k) = (1 - p)^(k - 1) p with p = 1 / `mean`.

    SpanBERT (Joshi et al. 2020, section 3.1) uses p = 0.2, a mean of 5, and draws again above 10.

    Args:
        draws: uniform in [0, 1).
        mean: mean of the lengths, at least 1, where all lengths are 1.

    Returns:
        Positive whole numbers, float64 of the shape of `draws`.
    """
    with np.errstate(divide="ignore"):  # log 0 = -inf at a mean of 1
        return 1.0 + np.floor(np.log1p(-draws) / np.log1p(-1.0 / mean))


def sample_span_mask(
    maskable: np.ndarray,
    keys: np.ndarray,
    mask_ratio: float = 0.3,
    mean_span_length: float = 5.0,
    word_ids: np.ndarray | None = None,
) -> np.ndarray:
    """Mask contiguous spans until `mask_ratio` of each row's maskable tokens are masked.

    Lengths of spans are geometric (see `span_lengths`), at most the row's. Spans are placed one after another so that
    each covers every maskable token with the same chance: they may merge, and are clipped at both ends of their
    run of maskable tokens. The last is cut, so that round(ratio × maskable) tokens are reached exactly; this favours
    the ends of short rows, by 9 % at 16 tokens and a mean of 5, by 1 % at 200. With a mean of 1, single tokens are
    drawn uniformly without replacement, as data2vec and BERT do. With `word_ids` spans are counted in words (SpanBERT,
    Joshi et al. 2020, section 3.1) and the number of masked tokens is the nearest that whole words allow, within one
    word. At least one unit is masked and one is left.

    Args:
        maskable: `[B, L]` bool, False on special and padding tokens.
        keys: uint64 `[B]`, see `row_keys`.
        mask_ratio: share of the maskable tokens, in (0, 1).
        mean_span_length: mean before merging and clipping, in units (tokens, or words), at least 1.
        word_ids: `[B, L]`, see `maskable_units`.

    Returns:
        bool `[B, L]`, True where masked. Rows of fewer than two units stay all False.

    Raises:
        ValueError: a ratio outside (0, 1) or a mean below 1.
    """
    if not 0.0 < mask_ratio < 1.0:
        raise ValueError(f"mask_ratio must lie strictly between 0 and 1, not {mask_ratio}")
    if not mean_span_length >= 1:
        raise ValueError(f"mean_span_length must be at least 1, not {mean_span_length}")
    batch, length = maskable.shape
    total = np.count_nonzero(maskable, axis=1)
    # A run of units is one of maskable tokens.
    starts, ends = maskable.copy(), maskable.copy()
    starts[:, 1:] &= ~maskable[:, :-1]
    ends[:, :-1] &= ~maskable[:, 1:]
    row, first_token = np.divmod(np.flatnonzero(starts), max(length, 1))
    last_token = np.flatnonzero(ends) - row * length
    num_runs = np.bincount(row, minlength=batch)

    # Units lie in cells, with so many tokens each. A run of units lies in cells next to each other.
    if word_ids is None:  # a token is a unit, and its position its cell
        weight, num_units = maskable, total
        size = last_token + 1 - first_token
        begin = np.cumsum(size) - size - np.repeat(np.cumsum(total) - total, num_runs)
        end, shift = begin + size, first_token - begin
    else:
        unit = maskable_units(maskable, word_ids)
        num_units = unit.max(axis=1, initial=-1) + 1
        width = int(num_units.max(initial=0))
        token = np.flatnonzero(maskable)
        cell = np.repeat(np.arange(batch) * width, total) + unit.reshape(-1)[token]
        weight = np.bincount(cell, minlength=batch * width).reshape(batch, width)
        begin, end, shift = unit[row, first_token], unit[row, last_token] + 1, np.zeros_like(row)
    possible = num_units >= 2
    if not possible.any():
        return np.zeros_like(maskable)
    budget = np.where(possible, np.maximum(np.rint(total * mask_ratio).astype(np.int64), 1), 0)

    # The same by row and number of the run: its first unit, the one after its last, and from units to cells.
    place = row, np.arange(row.size) - np.repeat(np.cumsum(num_runs) - num_runs, num_runs)
    run_begin, run_end, run_shift = (
        _table(values, place, (batch, num_runs.max()), fill)
        for values, fill in ((begin, np.iinfo(np.int32).max), (end, 0), (shift, 0))
    )

    # `first[b, c]` is the number of the first span that covers cell c. Spans are drawn in blocks until every row has
    # enough; a row that has enough ignores later blocks, so its mask does not depend on the others.
    never = np.iinfo(np.int32).max
    first = np.full(weight.shape, never, dtype=np.int32)
    covered = np.zeros(batch, dtype=np.int64)
    # So many spans that hardly a row needs a second block: they overlap, and their number varies like a Poisson count.
    expected = -math.log1p(-mask_ratio) * num_units.max() / mean_span_length
    block = int(expected + 3 * math.sqrt(expected)) + 4
    drawn = 0
    while True:
        short = np.flatnonzero(possible & (covered < budget))
        if short.size == 0:
            break
        draws = uniforms(keys[short], 2 * drawn, 2 * block).reshape(-1, block, 2)
        units = num_units[short, None]
        lengths = span_lengths(draws[:, :, 1], mean_span_length).clip(max=units).astype(np.int64)
        # A span may begin before its run and is clipped: otherwise the first units of a run would seldom be covered.
        places = (draws[:, :, 0] * (units + num_runs[short, None] * (lengths - 1))).astype(np.int64)
        which = np.zeros_like(places)
        for number in range(1, run_begin.shape[1]):
            which += places >= run_begin[short, number, None] + number * (lengths - 1)
        starts = places - (which + 1) * (lengths - 1)
        ends = np.minimum(starts + lengths, np.take_along_axis(run_end[short], which, axis=1))
        starts = np.maximum(starts, np.take_along_axis(run_begin[short], which, axis=1))
        sizes = (ends - starts).ravel()
        cells = starts + np.take_along_axis(run_shift[short], which, axis=1) + short[:, None] * weight.shape[1]
        numbers = np.broadcast_to(np.arange(drawn, drawn + block, dtype=np.int32), starts.shape).ravel()
        # All cells of all spans: from each span's first on.
        offset = cells.ravel() - (np.cumsum(sizes) - sizes)
        flat = np.repeat(offset, sizes) + np.arange(sizes.sum())
        np.minimum.at(first.reshape(-1), flat, np.repeat(numbers, sizes))
        drawn += block
        seen = first != never
        covered = np.count_nonzero(seen, axis=1) if word_ids is None else np.where(seen, weight, 0).sum(axis=1)

    from_right = (keys >> np.uint64(63)).astype(bool)
    masked = _first_units_within_budget(first, weight, budget, num_units, drawn, from_right, exact=word_ids is None)
    if word_ids is None:
        return masked
    mask = np.zeros(batch * length, dtype=bool)
    mask[token] = masked.reshape(-1)[cell]
    return mask.reshape(batch, length)


def _first_units_within_budget(
    first: np.ndarray,
    weight: np.ndarray,
    budget: np.ndarray,
    num_units: np.ndarray,
    drawn: int,
    from_right: np.ndarray,
    exact: bool,
) -> np.ndarray:
    """Choose units in the order of the span that covers them first, up to the budget.

    Args:
        first: `[B, U]`, number of the first span that covers a unit; beyond `drawn` where none does.
        weight: `[B, U]`, tokens of a unit.
        budget: `[B]`, tokens to choose.
        num_units: `[B]`.
        drawn: number of spans.
        from_right: bool `[B]`, from which side the span that reaches the budget is taken: always from the left would
            favour the left of short rows.
        exact: whether units are single tokens.

    Returns:
        bool `[B, U]`.
    """
    batch, width = first.shape
    seen = first < drawn
    cell, count = _by_row(seen)
    number = first.reshape(-1)[cell] + np.repeat(np.arange(batch) * drawn, count)
    tokens = None if exact else weight.reshape(-1)[cell]
    per_span = np.bincount(number, weights=tokens, minlength=batch * drawn).reshape(batch, drawn)
    reached = np.cumsum(per_span, axis=1)
    # The span in which the budget is reached, and what is missing before it.
    cut = (reached < budget[:, None]).sum(axis=1)
    rows = np.arange(batch)
    missing = budget - reached[rows, cut] + per_span[rows, cut]
    chosen = first < cut[:, None]
    in_cut = first == cut[:, None]
    cell, count = _by_row(in_cut)
    tokens = np.ones_like(cell) if exact else weight.reshape(-1)[cell]
    within = np.cumsum(tokens)
    last = np.cumsum(count)
    sums = np.append(0, within)
    before, whole = sums[last - count], sums[last] - sums[last - count]
    within -= np.repeat(before, count)
    within = np.where(np.repeat(from_right, count), np.repeat(whole, count) - within + tokens, within)
    # A word that crosses the budget is taken where that comes nearer to it than leaving it.
    slack = 0 if exact else tokens // 2
    chosen.reshape(-1)[cell[within - np.repeat(missing, count) <= slack]] = True

    taken = budget if exact else np.count_nonzero(chosen, axis=1)
    none, full = (budget > 0) & (taken == 0), (budget > 0) & (taken >= num_units)
    if none.any() or full.any():
        span = np.minimum(first, drawn)
        # Units in the order they are taken in.
        column = np.where(from_right[:, None], width - 1 - np.arange(width), np.arange(width))
        order = np.where(weight > 0, span.astype(np.int64) * width + column, np.iinfo(np.int64).max)
        # One word, longer than twice the budget, is taken all the same; of all words the last is left.
        rows = np.flatnonzero(none)
        chosen[rows, np.argmin(order[rows], axis=1)] = True
        rows = np.flatnonzero(full)
        chosen[rows, np.argmax(np.where(chosen[rows], order[rows], -1), axis=1)] = False
    return chosen


def _by_row(chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Places of what is True in a bool `[B, C]`, counted over all rows, and how many there are in each row."""
    place = np.flatnonzero(chosen)
    return place, np.diff(np.searchsorted(place, np.arange(chosen.shape[0] + 1) * chosen.shape[1]))


def _table(values: np.ndarray, place: tuple[np.ndarray, np.ndarray], shape: tuple[int, int], fill: int) -> np.ndarray:
    """Values at their places, and `fill` elsewhere."""
    table = np.full(shape, fill, dtype=np.int64)
    table[place] = values
    return table
