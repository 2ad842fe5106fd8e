"""Rows gathered from columns in one pass, by the kernels where there are any, else by numpy."""

from __future__ import annotations

import ctypes
import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np

from metatrain.data.kernels import RUNS, address, kernels
from metatrain.data.segments import counting, segments


class Runs(NamedTuple):
    """Runs of consecutive rows to gather, in this order, R of them, each of one of several columns."""

    starts: np.ndarray  # int64 [R]: a run's first row
    lengths: np.ndarray  # int64 [R]: its rows
    which: np.ndarray | None = None  # int64 [R]: its column; None: the first

    @property
    def rows(self) -> int:
        """Of all runs."""
        return max(0, int(self.lengths.sum()))  # a negative length is found where it is used


def gather(columns: Sequence[np.ndarray], runs: Runs) -> np.ndarray:
    """The rows of columns of one type and width, behind one another: a new array.

    Raises:
        IndexError: A run that is not within its column.
        ValueError: Columns that differ in type or width.
    """
    library, first = kernels(), columns[0]
    for column in columns:
        if column.dtype != first.dtype or column.shape[1:] != first.shape[1:]:
            kinds = f"{first.dtype} {first.shape[1:]} and {column.dtype} {column.shape[1:]}"
            raise ValueError(f"columns of one type and width were expected, not {kinds}")
    if library is None or first.dtype.hasobject:
        return _gather_by_numpy(columns, runs)
    out = np.empty((runs.rows, *first.shape[1:]), first.dtype)
    given = _Given(columns, list(map(len, columns)), runs)
    _check(library.metatrain_gather(address(out), len(out), _width(first), given.columns, given.runs))
    return out


def gather_jagged(
    offsets: Sequence[np.ndarray], values: Sequence[np.ndarray], runs: Runs
) -> tuple[np.ndarray, np.ndarray]:
    """The rows of jagged columns behind one another, row r of one being values[offsets[r]:offsets[r + 1]].

    Returns:
        The rows' values, and how many each has: int32 [rows].

    Raises:
        IndexError: A run that is not within its column.
    """
    library = kernels()
    if library is None:
        begins, ends = (
            _gather_by_numpy(offsets, Runs(edge, np.ones_like(edge), runs.which))
            for edge in (runs.starts, runs.starts + runs.lengths)
        )
        lengths = _gather_by_numpy([np.diff(own).astype(np.int32) for own in offsets], runs)
        return _gather_by_numpy(values, Runs(begins, ends - begins, runs.which)), lengths
    lengths = np.empty(runs.rows, np.int32)
    begins, counts = np.empty((2, len(runs.starts)), np.int64)
    given = _Given(offsets, [len(own) - 1 for own in offsets], runs, np.int64)
    places = (address(part) for part in (begins, counts))
    _check(library.metatrain_lengths(address(lengths), len(lengths), *places, given.columns, given.runs))
    return gather(values, Runs(begins, counts, runs.which)), lengths


def take_rows(column: np.ndarray, numbers: np.ndarray) -> np.ndarray:
    """The rows of these numbers, integers [n]: a new array.

    Raises:
        IndexError: A number that the column does not have.
    """
    library, numbers = kernels(), _index(numbers)
    if library is None or column.dtype.hasobject:
        return column[_numbers_within(numbers, len(column))]
    column = np.ascontiguousarray(column)
    out = np.empty((len(numbers), *column.shape[1:]), column.dtype)
    _check_number(
        library.metatrain_take(
            *(address(out), _width(column), address(column), len(column)),
            *(address(numbers), numbers.itemsize, len(numbers)),
        ),
        numbers,
        len(column),
    )
    return out


def take_jagged(offsets: np.ndarray, values: np.ndarray, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The rows of these numbers, integers [n], of a jagged column (see `gather_jagged`).

    Returns:
        The rows' values, and how many each has: int32 [n].

    Raises:
        IndexError: A number that the column does not have.
    """
    library, size, numbers = kernels(), len(offsets) - 1, _index(numbers)
    if library is None:
        numbers = _numbers_within(numbers, size)
        begins = offsets[numbers]
        lengths = offsets[numbers + 1] - begins
        return _gather_by_numpy([values], Runs(begins, lengths)), lengths.astype(np.int32)
    offsets, values = np.ascontiguousarray(offsets, np.int64), np.ascontiguousarray(values)
    lengths, count = np.empty(len(numbers), np.int32), ctypes.c_int64()
    index = (address(numbers), numbers.itemsize, len(numbers))
    _check_number(
        library.metatrain_take_lengths(
            *(address(lengths), ctypes.byref(count), address(offsets), size, len(values), *index)
        ),
        numbers,
        size,
    )
    out = np.empty(count.value, values.dtype)
    library.metatrain_take_values(address(out), values.itemsize, address(values), address(offsets), *index)
    return out, lengths


def all_below(numbers: np.ndarray, bound: int) -> bool:
    """Whether numbers are all from 0 to bound - 1."""
    library = kernels()
    if library is None or numbers.dtype != np.int32 or not numbers.flags.c_contiguous:
        return not len(numbers) or bool(numbers.min() >= 0 and numbers.max() < bound)
    return bool(library.metatrain_all_below(address(numbers), numbers.size, bound))


def all_finite(numbers: np.ndarray) -> bool:
    """Whether numbers are all finite."""
    library = kernels()
    if library is None or numbers.dtype != np.float32 or not numbers.flags.c_contiguous:
        return bool(np.isfinite(numbers).all())
    return bool(library.metatrain_all_finite(address(numbers), numbers.size))


#: Up to so many rows of the catalogue an event, looking through marks of them all takes less than sorting the events.
_MARKED_ROWS_AN_EVENT = 4


class LookUp:
    """Finds the distinct items of steps, as np.unique with its inverse would, at a fraction of its time.

    One thread at a time.
    """

    def __init__(self, catalogue_rows: int) -> None:
        self._rows, self._library = catalogue_rows, kernels()
        if self._library is not None:  # a quarter of a byte for each row of the catalogue
            self._words = np.zeros(self._library.metatrain_distinct_words(catalogue_rows), np.uint64)
            self._ranks = np.empty(-(-catalogue_rows // 64), np.int32)
            self._items = np.empty(0, np.int32)  # room for a call's, kept
        else:
            self._place = np.empty(catalogue_rows, np.int32)  # of an item among the step's
            self._seen = np.zeros(catalogue_rows, bool)  # none is, between calls

    def __call__(
        self, columns: Sequence[np.ndarray], runs: Runs, steps: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Each step's distinct catalogue rows, ascending; the events' positions in them; where each step's begin.

        Args:
            columns: Catalogue rows: int32.
            runs: The events, step by step, as many runs for each.
            steps: Number of steps, S.

        Returns:
            int32 [U], int32 [N], int64 [S + 1].

        Raises:
            IndexError: A run that is not within its column, or a row that the catalogue does not have.
        """
        assert not steps or len(runs.starts) % steps == 0, "each step has as many runs"
        if self._library is None:
            return self._by_numpy(columns, runs, steps)
        count, given = runs.rows, _Given(columns, list(map(len, columns)), runs, np.int32)
        if len(self._items) < count:
            self._items = np.empty(count, np.int32)
        positions, item_bounds = np.empty(count, np.int32), np.empty(steps + 1, np.int64)
        wrong = self._library.metatrain_distinct(
            *(given.columns, given.runs, steps, self._rows, address(self._words), address(self._ranks)),
            *(address(self._items), address(positions), count, address(item_bounds)),
        )
        if wrong >= 0:
            raise IndexError(f"run {wrong} is not within its column, or of items not in the catalogue of {self._rows}")
        return self._items[: item_bounds[-1]].copy(), positions, item_bounds

    def _by_numpy(
        self, columns: Sequence[np.ndarray], runs: Runs, steps: int
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        rows = _numbers_within(_gather_by_numpy(columns, runs), self._rows)
        by_step = runs.lengths.reshape(steps, len(runs.lengths) // max(1, steps)).sum(1)
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(by_step)])
        positions, items, item_bounds = np.empty(len(rows), np.int32), [np.zeros(0, np.int32)], [0]
        for start, stop in pairwise(bounds.tolist()):
            own = rows[start:stop]
            distinct = self._marked(own) if len(self._seen) <= _MARKED_ROWS_AN_EVENT * len(own) else _sorted(own)
            self._place[distinct] = counting(len(distinct))
            self._place.take(own, out=positions[start:stop], mode="clip")  # "raise" would go through a buffer
            items.append(distinct.astype(np.int32))
            item_bounds.append(item_bounds[-1] + len(distinct))
        return np.concatenate(items), positions, np.array(item_bounds)

    def _marked(self, rows: np.ndarray) -> np.ndarray:
        self._seen[rows] = True
        distinct = np.flatnonzero(self._seen)
        self._seen[distinct] = False
        return distinct


def _sorted(rows: np.ndarray) -> np.ndarray:
    ascending = np.sort(rows.astype(np.int32))  # a catalogue's rows fit, and sort in half the time
    new = np.ones(len(rows), bool)
    np.not_equal(ascending[1:], ascending[:-1], out=new[1:])
    return ascending[np.flatnonzero(new)]  # a mask of numbers would take thrice as long


def _gather_by_numpy(columns: Sequence[np.ndarray], runs: Runs) -> np.ndarray:
    starts, lengths, which = runs
    sizes = np.array(list(map(len, columns)))
    own = np.zeros_like(starts) if which is None else which
    within = (own >= 0) & (own < len(sizes)) & (starts >= 0) & (lengths >= 0)
    within[within] = (starts <= sizes[own.clip(0, len(sizes) - 1)] - lengths)[within]
    _check(int(np.flatnonzero(~within)[0]) if not within.all() else -1)
    if which is None:
        return columns[0][segments(starts, lengths)]
    ends = np.cumsum(lengths)
    out = np.empty((runs.rows, *columns[0].shape[1:]), columns[0].dtype)
    for number, column in enumerate(columns):
        own = np.flatnonzero(which == number)
        out[segments(ends[own] - lengths[own], lengths[own])] = column[segments(starts[own], lengths[own])]
    return out


def _numbers_within(numbers: np.ndarray, size: int) -> np.ndarray:
    """The numbers as numpy's own kind of index, which it would widen anew at each use."""
    wrong = np.flatnonzero((numbers < 0) | (numbers >= size))
    _check_number(int(wrong[0]) if len(wrong) else -1, numbers, size)
    return numbers.astype(np.intp)


def _check(wrong: int) -> None:
    if wrong >= 0:
        raise IndexError(f"run {wrong} of rows is not within its column")


def _check_number(wrong: int, numbers: np.ndarray, size: int) -> None:
    if wrong >= 0:
        raise IndexError(f"there is no row {numbers[wrong]} in a column of {size}")


def _width(column: np.ndarray) -> int:
    """Bytes of a row."""
    return math.prod(column.shape[1:]) * column.itemsize


def _index(numbers: np.ndarray) -> np.ndarray:
    if numbers.ndim != 1 or (numbers.dtype.kind not in "iu" and len(numbers)):
        raise IndexError(f"integers [n] were expected, not {numbers.dtype} {list(numbers.shape)}")
    return np.ascontiguousarray(numbers, None if numbers.dtype in (np.int32, np.int64) else np.int64)


class _Given:
    """Columns and runs as C++ takes them, kept for the length of the call."""

    def __init__(self, columns: Sequence[np.ndarray], sizes: Sequence[int], runs: Runs, kind: Any = None) -> None:
        count = len(columns)
        assert all(part is None or len(part) == len(runs.starts) for part in runs), "a run has a start and a length"
        self._columns = [np.ascontiguousarray(column, kind) for column in columns]
        self._sizes = (ctypes.c_int64 * count)(*sizes)
        self._runs = [None if part is None else np.ascontiguousarray(part, np.int64) for part in runs]
        starts, lengths, which = (None if part is None else address(part) for part in self._runs)
        self.columns = (ctypes.c_void_p * count)(*map(address, self._columns))
        places = (ctypes.addressof(self._sizes), count, which, starts, lengths, len(runs.starts))
        self.runs = ctypes.byref(RUNS(*places))
