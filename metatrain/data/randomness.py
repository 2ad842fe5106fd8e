"""Counter-based randomness: every draw is a function of named integers alone, of no generator's state.

So a draw is the same in any process, batch, order or restart, and under any version of numpy (the streams of
`numpy.random.Generator` are not promised to stay between versions; a resumed run may meet another one).
"""

from __future__ import annotations

import numpy as np

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def hashed(*counters: int | np.ndarray) -> np.ndarray:
    """A uniform 64-bit number for each tuple of counters, which are broadcast: uint64 of their common shape.

    The finalizer of splitmix64 after each counter. Negative integers count modulo 2**64.
    """
    state = np.zeros((), np.uint64)
    with np.errstate(over="ignore"):  # arithmetic modulo 2**64 is meant; numpy warns of it for scalars
        for counter in counters:
            state = (state ^ _as_uint64(counter)) + _GOLDEN
            state = (state ^ (state >> np.uint64(30))) * _FIRST
            state = (state ^ (state >> np.uint64(27))) * _SECOND
            state = state ^ (state >> np.uint64(31))
    return np.asarray(state)


def below(bounds: np.ndarray, hashes: np.ndarray) -> np.ndarray:
    """Hashes as uniform integers in [0, bound): int64. Bounds of at most 2**53."""
    unit = (hashes >> np.uint64(11)).astype(np.float64) * 2.0**-53
    return np.minimum((unit * bounds).astype(np.int64), bounds - 1)


def permutation(n: int, *counters: int) -> np.ndarray:
    """A uniform permutation of 0 … n - 1 for these counters: int64 [n]."""
    # Hashes that differ in the last counter alone are all different (each step is one-to-one): any sort gives this one.
    return np.argsort(hashed(*counters, np.arange(n)))


def _as_uint64(counter: int | np.ndarray) -> np.ndarray:
    if isinstance(counter, int):
        return np.asarray(counter % 2**64, np.uint64)
    return np.asarray(counter).astype(np.uint64)
