"""A shuffle of [0, n) that is computed, not stored: any position can be asked for alone.

A Feistel network is a bijection of [0, 2**bits) whatever its round function is. Values that fall outside [0, n) are
sent through again until they fall inside ("cycle walking"), which leaves a bijection of [0, n). Since 2**bits < 2n,
that takes less than two passes on average.
"""

import hashlib

import numpy as np

# Even. Four make a network of this kind look random, two more make up for few bits when n is small.
NUM_ROUNDS = 6
# So that a group of number 0 has keys of its own too (splitmix64's step).
_ODD = np.uint64(0x9E3779B97F4A7C15)


def shuffled(positions: np.ndarray, *, length: int, seed: int, epoch: int) -> np.ndarray:
    """Where each position of the shuffled epoch comes from: a bijection of [0, length), its own for (seed, epoch).

    positions: int64 [m], each in [0, length). Returns int64 [m], the same values on every machine.
    """
    return _walked(positions, length, _round_keys(seed, epoch))


def shuffled_within(positions: np.ndarray, groups: np.ndarray, *, length: int, seed: int, epoch: int) -> np.ndarray:
    """The same for many sets of `length` at once, each in an order of its own: position i is one of set `groups[i]`.

    positions, groups: int64 [m]. Returns int64 [m].
    """
    return _walked(positions, length, _round_keys(seed, epoch)[:, None] ^ _mixed(groups.astype(np.uint64) + _ODD))


def _walked(positions: np.ndarray, length: int, keys: np.ndarray) -> np.ndarray:
    """keys: uint64 [NUM_ROUNDS], or [NUM_ROUNDS, m] where each position has its own."""
    assert length >= 1 and (positions.size == 0 or (positions.min() >= 0 and positions.max() < length))
    bits = max(2, (length - 1).bit_length())
    values = _feistel(positions.astype(np.uint64), bits, keys)
    while (outside := values >= length).any():
        of_outside = keys if keys.ndim == 1 else keys[:, outside]
        values[outside] = _feistel(values[outside], bits, of_outside)
    return values.astype(np.int64)


def _round_keys(seed: int, epoch: int) -> np.ndarray:
    """uint64 [NUM_ROUNDS]"""
    digest = hashlib.blake2b(f"raynium shuffle {seed} {epoch}".encode(), digest_size=8 * NUM_ROUNDS).digest()
    return np.frombuffer(digest, dtype="<u8").astype(np.uint64)


def _feistel(values: np.ndarray, bits: int, keys: np.ndarray) -> np.ndarray:
    """uint64 [m] -> uint64 [m], with keys as in `_walked`.

    The halves differ by one bit when `bits` is odd, so each round changes one in place.
    """
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64(2 ** (bits // 2) - 1)
    high_mask = np.uint64(2 ** (bits - bits // 2) - 1)
    high, low = values >> low_bits, values & low_mask
    for key in keys.reshape(-1, 2, *keys.shape[1:]):
        high = high ^ (_mixed(low ^ key[0]) & high_mask)
        low = low ^ (_mixed(high ^ key[1]) & low_mask)
    return (high << low_bits) | low


def _mixed(values: np.ndarray) -> np.ndarray:
    """Every bit of the argument moves the low bits of the result (the multipliers are splitmix64's)."""
    values = values * np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(32)
    values *= np.uint64(0x94D049BB133111EB)
    values >>= np.uint64(32)
    return values
