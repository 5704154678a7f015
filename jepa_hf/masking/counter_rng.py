"""Counter-based random numbers: a row's key and a counter give the same numbers everywhere."""

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _mix(x: np.ndarray) -> np.ndarray:
    """SplitMix64's finaliser (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators")."""
    x = x ^ (x >> np.uint64(30))  # a new array, in which the rest is done
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def row_keys(input_ids: np.ndarray, valid: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """One key per row from the run's seed, the epoch and the row's clean tokens, whatever the padding around them.

    Args:
        input_ids: `[B, L]` integers.
        valid: `[B, L]` bool, False on padding.
        seed: seed of the run.
        epoch: number of the epoch; another epoch gives other keys.

    Returns:
        uint64 `[B]`.
    """
    full = valid.all()
    order = np.arange(1, valid.shape[1] + 1, dtype=np.uint64) if full else np.cumsum(valid, axis=1, dtype=np.uint64)
    tokens = _mix(order * _GOLDEN + input_ids.astype(np.int64, copy=False).view(np.uint64))
    if not full:
        tokens *= valid
    return content_keys(tokens.sum(axis=1, dtype=np.uint64), seed, epoch)


def content_keys(content: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """One key per sample from the run's seed, the epoch and a hash of the sample's content.

    Args:
        content: uint64 `[B]`, the hashes.
        seed: seed of the run.
        epoch: number of the epoch; another epoch gives other keys.

    Returns:
        uint64 `[B]`.
    """
    run = _mix(np.array([seed & 0xFFFFFFFFFFFFFFFF, epoch], dtype=np.uint64) + _GOLDEN)
    return _mix(_mix(content ^ run[0]) + run[1])


def uniforms(keys: np.ndarray, start: int, count: int) -> np.ndarray:
    """Numbers `start` to `start + count - 1` of each key's stream, uniform in [0, 1).

    Args:
        keys: uint64 `[B]`.

    Returns:
        float64 `[B, count]`.
    """
    counter = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    bits = _mix(keys[:, None] + counter[None, :] * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
