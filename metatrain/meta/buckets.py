"""Buckets: a batch's tasks by length, so that few of the padded events are padding.

Promises: a pure function of the lengths and of counted costs, so that a resumed run cuts as the first one did; every
task in exactly one bucket; never counted slower than one bucket for all tasks, rounded alike.

Tasks of 1, 2, 9, 10, 60 and 64 support events, padded to the longest, are 384 events of which 146 are there. Cut in
three they are 4, 20 and 128::

    longest   ████████████████████████    buckets   █ ███ ████████
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

#: Cuts are at multiples of this share of the tasks: like batches are then cut into like shapes, which engines keep.
UNITS = 8


class Bucket(NamedTuple):
    """Tasks that are padded alike."""

    tasks: Tensor  # int64 [T']: positions in the batch
    support: int  # padded length, at least 1
    query: int  # the same


#: (tasks, support, query) → counted seconds of a call on tasks that are padded so.
Seconds = Callable[[int, int, int], float]


@functools.lru_cache(maxsize=4096)  # asked some hundred times a step
def rounded(length: int, parts: int = 4) -> int:
    """The next length of a ladder, at least 1; of four parts it is 1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, …

    Args:
        length: At least 0.
        parts: Steps are a power of two divided by this, and at least 4.
    """
    above = 1 << max(length - 1, 0).bit_length()  # the next power of two
    step = max(above // parts, 4)
    return min(above, -(-length // step) * step) if length > 2 else max(length, 1)


def cut(support: Tensor, query: Tensor, seconds: Seconds) -> list[Bucket]:
    """The buckets of tasks with these lengths (int64 [T]), by ascending support: those of the least counted time.

    Each is padded to its longest support and query, rounded up on a ladder, but at most an eighth beyond the batch's
    longest.
    """
    tasks = support.shape[0]
    if not tasks:
        return []
    # Query second: among tasks of one support, those of like queries are together.
    order = torch.argsort(support * (query.max() + 1) + query, stable=True)
    unit = -(-tasks // UNITS)
    edges = [*range(0, tasks, unit), tasks]
    # Longest of every unit; a bucket's longest is that of its units.
    longest = [[int(part.max()) for part in lengths.index_select(0, order).split(unit)] for lengths in (support, query)]
    # Batches whose longest differ a little are to be of one shape, too.
    most = [rounded(max(of_units), 16) for of_units in longest]
    best: list[tuple[float, int, int, int]] = [(0.0, 0, 0, 0)]  # up to an edge: seconds, start, support, query
    for stop in range(1, len(edges)):
        options = []
        so_far = [0, 0]
        for start in range(stop - 1, -1, -1):
            so_far = [max(length, of_units[start]) for length, of_units in zip(so_far, longest, strict=True)]
            padded = [min(rounded(length), bound) for length, bound in zip(so_far, most, strict=True)]
            time = best[start][0] + seconds(edges[stop] - edges[start], *padded)
            options.append((time, start, *padded))
        best.append(min(options))
    buckets: list[Bucket] = []
    stop = len(edges) - 1
    while stop:
        _, start, padded_support, padded_query = best[stop]
        buckets.insert(0, Bucket(order[edges[start] : edges[stop]], padded_support, padded_query))
        stop = start
    return buckets
