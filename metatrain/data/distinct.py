"""How many different values there were, from 4 KiB whatever their number: HyperLogLog, within some 2 %.

Sketches of pieces merge to that of the whole, in any order. The estimator is Ertl's (2017), which needs no correction
for small or large counts.
"""

from __future__ import annotations

import math

import numpy as np

from metatrain.data.hashing import Hashes

_BITS = 12
_REGISTERS = 1 << _BITS
_LONGEST = 64 - _BITS  # bits of a hash behind those that choose its register


class DistinctValues:
    """A sketch of the values seen, by their 64-bit hashes."""

    def __init__(self) -> None:
        self._registers = np.zeros(_REGISTERS, np.uint8)

    def add(self, hashes: Hashes) -> None:
        """Adds values; those seen before change nothing."""
        rest = hashes & np.uint64((1 << _LONGEST) - 1)
        # The rest's bit length, of halves: a double's exponent, which low bits of a longer number could round up.
        high = rest >> np.uint64(_LONGEST // 2)
        length = np.where(
            high > 0,
            np.frexp(high.astype(np.float64))[1] + _LONGEST // 2,
            np.frexp((rest & np.uint64((1 << _LONGEST // 2) - 1)).astype(np.float64))[1],
        )
        np.maximum.at(
            self._registers, (hashes >> np.uint64(_LONGEST)).astype(np.int64), (_LONGEST - length + 1).astype(np.uint8)
        )

    def merge(self, other: DistinctValues) -> None:
        """Adds all values of another."""
        np.maximum(self._registers, other._registers, out=self._registers)

    def estimate(self) -> int:
        """The number of different values, about."""
        counts = np.bincount(self._registers, minlength=_LONGEST + 2)
        z = _REGISTERS * _tau(1 - counts[_LONGEST + 1] / _REGISTERS)
        for k in range(_LONGEST, 0, -1):
            z = 0.5 * (z + counts[k])
        z += _REGISTERS * _sigma(counts[0] / _REGISTERS)
        return round(_REGISTERS**2 / (2 * math.log(2) * z)) if math.isfinite(z) else 0


def sharing(values: int, buckets: int) -> float:
    """The share of values that share their bucket with another, when hashes spread them evenly."""
    return -math.expm1((values - 1) * math.log1p(-1 / buckets)) if values > 1 and buckets > 1 else float(values > 1)


def _sigma(x: float) -> float:
    if x == 1:
        return math.inf
    y, z, before = 1.0, x, -1.0
    while z != before:
        x, before = x * x, z
        z, y = z + x * y, 2 * y
    return z


def _tau(x: float) -> float:
    if x in (0, 1):
        return 0.0
    y, z, before = 1.0, 1 - x, -1.0
    while z != before:
        x, before, y = math.sqrt(x), z, y / 2
        z -= (1 - x) ** 2 * y
    return z / 3
