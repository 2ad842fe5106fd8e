"""Rows gathered by C++ and by numpy: both beside a loop over rows."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metatrain import compiled
from metatrain.data.columns import Jagged, gathered, take
from metatrain.data.gather import LookUp, Runs, all_below, all_finite, gather
from metatrain.data.kernels import kernels

pytestmark = pytest.mark.usefixtures("both_ways")

TYPES = [np.bool_, np.int16, np.int32, np.int64, np.float32]


def rows_of(column: Any) -> list[Any]:
    """A column row by row."""
    if isinstance(column, Jagged):
        return [column.values[a:b].tolist() for a, b in zip(column.offsets, column.offsets[1:], strict=False)]
    if hasattr(column, "lengths"):
        assert column.lengths.dtype == np.int32
        ends = np.cumsum(column.lengths).tolist()
        return [column.values[e - n : e].tolist() for e, n in zip(ends, column.lengths.tolist(), strict=True)]
    return column.tolist()


@st.composite
def columns_and_runs(draw: st.DrawFn) -> tuple[list[Any], Runs]:
    seed, count, kind = draw(st.integers(0, 2**32 - 1)), draw(st.integers(1, 4)), draw(st.integers(0, len(TYPES)))
    width = draw(st.sampled_from([None, 1, 3]))
    rng = np.random.default_rng(seed)
    sizes = rng.integers(0, 60, count)
    columns: list[Any] = []
    for size in sizes:
        if kind == len(TYPES):
            offsets = np.concatenate([[0], np.cumsum(rng.integers(0, 7, size))]).astype(np.int64)
            columns.append(Jagged(offsets, rng.integers(0, 100, offsets[-1]).astype(np.int32)))
        else:
            shape = (size,) if width is None else (size, width)
            columns.append(rng.integers(0, 100, shape).astype(TYPES[kind]))
    which = rng.integers(0, count, draw(st.integers(0, 30)))
    starts = rng.integers(0, sizes[which] + 1)
    lengths = rng.integers(0, sizes[which] - starts + 1)
    return columns, Runs(starts, lengths, None if count == 1 and seed % 2 else which)


@settings(deadline=None)
@given(columns_and_runs())
def test_runs_are_gathered_as_by_a_loop(drawn: tuple[list[Any], Runs]) -> None:
    columns, runs = drawn
    which = np.zeros(len(runs.starts), np.int64) if runs.which is None else runs.which
    rows = [rows_of(column) for column in columns]
    wanted = [
        row
        for number, start, length in zip(which.tolist(), runs.starts.tolist(), runs.lengths.tolist(), strict=True)
        for row in rows[number][start : start + length]
    ]
    found = gathered(columns, runs)
    assert rows_of(found) == wanted
    if isinstance(found, np.ndarray):
        assert (found.dtype, found.shape[1:]) == (columns[0].dtype, columns[0].shape[1:])


@settings(deadline=None)
@given(columns_and_runs(), st.sampled_from([np.int32, np.int64, np.int16]), st.integers(0, 40))
def test_rows_are_taken_as_by_a_loop(drawn: tuple[list[Any], Runs], kind: type, count: int) -> None:
    column = drawn[0][0]
    rows = rows_of(column)
    numbers = np.random.default_rng(count).integers(0, max(1, len(rows)), count if rows else 0).astype(kind)
    assert rows_of(take(column, numbers)) == [rows[number] for number in numbers]


@pytest.mark.parametrize(
    ("starts", "lengths", "which"),
    [
        ([0], [1], [2]),
        ([0], [1], [-1]),
        ([9], [0], [0]),
        ([-1], [1], [0]),
        ([0], [-1], [0]),
        ([2], [2], [0]),
        ([0], [5], [1]),
        ([0, 3], [3, 1], [0, 0]),
    ],
)
def test_runs_outside_of_a_column_are_refused(starts: list[int], lengths: list[int], which: list[int]) -> None:
    runs = Runs(*(np.array(part, np.int64) for part in (starts, lengths, which)))
    columns = [np.arange(3, dtype=np.int32), np.arange(4, dtype=np.int32)]
    with pytest.raises(IndexError):
        gather(columns, runs)
    with pytest.raises(IndexError):
        gathered([Jagged(np.arange(len(column) + 1), column) for column in columns], runs)
    with pytest.raises(IndexError):
        LookUp(9)(columns, runs, 1)


@pytest.mark.parametrize("number", [-1, 3, 2**31 - 1])
@pytest.mark.parametrize("kind", [np.int32, np.int64])
def test_rows_that_are_not_there_are_refused(number: int, kind: type) -> None:
    for column in (np.arange(3.0), Jagged(np.arange(4), np.arange(3, dtype=np.int32))):
        with pytest.raises(IndexError, match=f"no row {number} in a column of 3"):
            take(column, np.array([0, number], kind))


@pytest.mark.parametrize("numbers", [np.zeros((2, 2), np.int64), np.array([True, False, True]), np.array([0.0])])
def test_what_is_not_a_list_of_rows_is_refused(numbers: np.ndarray) -> None:
    for column in (np.arange(3.0), Jagged(np.arange(4), np.arange(3, dtype=np.int32))):
        with pytest.raises(IndexError, match=r"integers \[n\] were expected"):
            take(column, numbers)


@pytest.mark.parametrize("offsets", [[0, 4_000_000, 5, 5], [0, 3, 1005, 1005], [-2, 3, 5, 5]])
def test_offsets_outside_of_the_values_are_refused(offsets: list[int]) -> None:
    column = Jagged(np.array(offsets), np.arange(5, dtype=np.int32))
    with pytest.raises((IndexError, ValueError)):
        take(column, np.array([0, 1]))
    with pytest.raises((IndexError, ValueError)):
        gathered([column], Runs(np.array([0, 1]), np.array([1, 1])))


@pytest.mark.parametrize("item", [-1, 5, 2**31 - 1])
def test_items_outside_of_the_catalogue_are_refused_and_leave_nothing(item: int) -> None:
    look_up = LookUp(5)
    with pytest.raises(IndexError):
        look_up([np.array([1, item], np.int32)], Runs(np.array([0]), np.array([2])), 1)
    items, positions, bounds = look_up([np.array([4, 4], np.int32)], Runs(np.array([0]), np.array([2])), 1)
    assert (items.tolist(), positions.tolist(), bounds.tolist()) == ([4], [0, 0], [0, 1])


@pytest.mark.parametrize("catalogue", [64, 4096, 300_000, 20_000_000])
def test_large_catalogues_are_looked_up_as_by_unique(catalogue: int) -> None:
    rng = np.random.default_rng(catalogue)
    columns = [rng.integers(0, catalogue, 500).astype(np.int32) for _ in range(3)]
    columns[0][:2] = 0, catalogue - 1
    runs = Runs(np.array([0, 10, 400, 3]), np.array([300, 0, 100, 20]), np.array([0, 1, 2, 0]))
    items, positions, bounds = LookUp(catalogue)(columns, runs, 2)
    for step, rows in enumerate((columns[0][:300], np.concatenate([columns[2][400:], columns[0][3:23]]))):
        distinct, inverse = np.unique(rows, return_inverse=True)
        assert items[bounds[step] : bounds[step + 1]].tolist() == distinct.tolist()
        assert positions[300 * step :][: len(rows)].tolist() == inverse.tolist()


def test_numbers_are_checked() -> None:
    assert all_below(np.array([0, 4], np.int32), 5)
    assert not all_below(np.array([0, 5], np.int32), 5)
    assert not all_below(np.array([-1, 4], np.int32), 5)
    assert all_below(np.zeros(0, np.int32), 0)
    assert not all_below(np.zeros(1, np.int32), 0)
    assert not all_below(np.arange(12, dtype=np.int32)[::2], 10)
    for kind in (np.float32, np.float64):
        assert all_finite(np.array([[0, -3e38], [1e-40, 3e38]], kind))
        for wrong in (np.nan, np.inf, -np.inf):
            assert not all_finite(np.array([[0.5, 1], [wrong, 2]], kind))


@pytest.mark.parametrize("other", [np.arange(3, dtype=np.int64), np.zeros((3, 2), np.int32)])
def test_columns_of_two_kinds_are_not_mixed(other: np.ndarray) -> None:
    with pytest.raises(ValueError, match="of one type and width"):
        gather([np.arange(3, dtype=np.int32), other], Runs(np.array([0, 0]), np.array([1, 1]), np.array([0, 1])))


def test_objects_keep_their_counts() -> None:
    names = np.array(["a", "b", "c"], object)
    found = gather([names, names], Runs(np.array([1, 0]), np.array([2, 1]), np.array([0, 1])))
    del names
    assert found.tolist() == ["b", "c", "a"]


def test_without_a_compiler_numpy_serves(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(compiled, "compiler", lambda: None)
    monkeypatch.setattr(compiled, "loaded", compiled.loaded.__wrapped__)
    monkeypatch.setenv("METATRAIN_KERNELS", "1")
    kernels.cache_clear()
    try:
        assert gather([np.arange(5)], Runs(np.array([1]), np.array([3]))).tolist() == [1, 2, 3]
        assert caplog.text.count("no C++ compiler is here") == 1
        assert "by numpy" in caplog.text
    finally:
        kernels.cache_clear()
