"""A permutation of any size that takes no memory: a Feistel network with cycle walking.

The construction is from Black and Rogaway 2002, "Ciphers with arbitrary finite domains".

    (l, r) → (r, l xor f(r, kᵢ)) for i = 1 ... 8 permutes the numbers of 2h bits, whatever f is.

A number that lands outside of the count goes through the network again until it lands inside. With the smallest 2h
that suffices, at least one number in four lands inside. A stored permutation of the 10⁸ windows of FineWeb's 100
billion tokens would take 800 MB in each process, and seconds to draw it anew for each epoch and each resume.
"""

import numpy as np

ROUNDS = 8


def keys(*seeds: int) -> np.ndarray:
    """Draws the keys that choose a permutation, uint64 (ROUNDS,), from seeds of at least 0."""
    return np.random.default_rng(seeds).integers(1 << 64, size=ROUNDS, dtype=np.uint64)


def permuted(places: np.ndarray, count: int, chosen: np.ndarray) -> np.ndarray:
    """Returns the images of `places` under the permutation of 0 ... count-1 that `chosen` chooses, int64.

    Args:
        places: Numbers from 0 to count-1, 1-D.
        count: How many numbers are permuted.
        chosen: The keys, as `keys` draws them.
    """
    half = np.uint64(max(1, ((count - 1).bit_length() + 1) // 2))
    values = _rounds(places.astype(np.uint64), half, chosen)
    while (outside := values >= count).any():
        values[outside] = _rounds(values[outside], half, chosen)
    return values.astype(np.int64)


def _rounds(values: np.ndarray, half: np.uint64, chosen: np.ndarray) -> np.ndarray:
    mask = (np.uint64(1) << half) - np.uint64(1)
    left, right = values >> half, values & mask
    for key in chosen:
        left, right = right, left ^ (_mixed(right ^ key) & mask)
    return left << half | right


def _mixed(x: np.ndarray) -> np.ndarray:
    """Mixes bits by SplitMix64's finalizer (Steele, Lea and Flood 2014): each bit of x flips about half of them."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
