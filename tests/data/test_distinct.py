"""Distinct values are estimated within a few percent, whatever their number and order; so is who shares a bucket."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metatrain.data.distinct import DistinctValues, sharing
from metatrain.data.randomness import hashed


def sketch(first: int, count: int) -> DistinctValues:
    found = DistinctValues()
    found.add(hashed(7, np.arange(first, first + count)))
    return found


@pytest.mark.parametrize("count", [0, 1, 5, 100, 2_000, 10_000, 100_000, 2_000_000])
def test_the_estimate_is_near(count: int) -> None:
    assert sketch(0, count).estimate() == pytest.approx(count, rel=0.05, abs=1)


@given(st.lists(st.tuples(st.integers(0, 500), st.integers(0, 3000)), max_size=6))
@settings(deadline=None)
def test_pieces_merge_to_the_whole_in_any_order(pieces: list[tuple[int, int]]) -> None:
    there, back, whole = DistinctValues(), DistinctValues(), DistinctValues()
    for first, count in pieces:
        there.merge(sketch(first, count))
        whole.add(hashed(7, np.arange(first, first + count)))
    for first, count in reversed(pieces):
        back.merge(sketch(first, count))
    assert there.estimate() == back.estimate() == whole.estimate()
    values = len({i for first, count in pieces for i in range(first, first + count)})
    assert there.estimate() == pytest.approx(values, rel=0.1, abs=2)


@pytest.mark.parametrize(("values", "buckets"), [(0, 10), (1, 10), (50, 1000), (1000, 1000), (30_000, 1000), (5, 1)])
def test_sharing_is_what_a_draw_shows(values: int, buckets: int) -> None:
    drawn = hashed(3, np.arange(values)) % np.uint64(buckets)
    counts = np.bincount(drawn.astype(np.int64), minlength=buckets)
    alone = int((counts == 1).sum())
    assert sharing(values, buckets) == pytest.approx(1 - alone / values if values else 0, abs=0.05)
