"""Counter-based random numbers: a key and a counter give the same numbers in every process."""

from hashlib import blake2b

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)


def _splitmix64(x: np.ndarray) -> np.ndarray:
    """Apply SplitMix64's finalizer.

    Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators".
    """
    x = x ^ (x >> np.uint64(30))  # a copy, so that the rest may work in place
    x *= np.uint64(0xBF58476D1CE4E5B9)
    x ^= x >> np.uint64(27)
    x *= np.uint64(0x94D049BB133111EB)
    x ^= x >> np.uint64(31)
    return x


def row_keys(input_ids: np.ndarray, valid: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Derive one key per row, uint64 `[B]`, from seed, epoch and the row's unmasked tokens without padding.

    `input_ids` and `valid`, False on padding, are `[B, L]`.
    """
    full = valid.all()
    order = np.arange(1, valid.shape[1] + 1, dtype=np.uint64) if full else np.cumsum(valid, axis=1, dtype=np.uint64)
    tokens = _splitmix64(order * _GOLDEN + input_ids.astype(np.int64, copy=False).view(np.uint64))
    if not full:
        tokens *= valid
    return sample_keys(tokens.sum(axis=1, dtype=np.uint64), seed, epoch)


def sample_keys(content: np.ndarray, seed: int, epoch: int) -> np.ndarray:
    """Derive one key per sample, uint64 `[B]`, from the seed, the epoch and a hash of the sample's content."""
    run = _splitmix64(np.array([seed & 0xFFFFFFFFFFFFFFFF, epoch], dtype=np.uint64) + _GOLDEN)
    return _splitmix64(_splitmix64(content ^ run[0]) + run[1])


def content_hash(*parts: bytes) -> int:
    """Hash the concatenated bytes of a sample to 64 bits."""
    digest = blake2b(digest_size=8)
    for part in parts:
        digest.update(part)
    return int.from_bytes(digest.digest(), "little")


def uniform_draws(keys: np.ndarray, start: int, count: int) -> np.ndarray:
    """Return `count` numbers of each key's stream from index `start` on, uniform in [0, 1): float64 `[B, count]`."""
    counter = np.arange(start + 1, start + count + 1, dtype=np.uint64)
    bits = _splitmix64(keys[:, None] + counter[None, :] * _GOLDEN)
    return (bits >> np.uint64(11)).astype(np.float64) * 2.0**-53
