"""Feature columns: from Arrow to numpy without a copy where Arrow allows it, and gathered without a loop over rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from metatrain.data.batch import Column, Ragged
from metatrain.data.gather import Runs, all_below, all_finite, gather, gather_jagged, take_jagged, take_rows
from metatrain.data.schema import Feature, Kind


@dataclass(frozen=True)
class Jagged:
    """A multi-valued column that rows are gathered from: row r is values[offsets[r]:offsets[r + 1]]."""

    offsets: np.ndarray  # int64 [n + 1]
    values: np.ndarray


#: A column as it is kept for gathering.
Stored = np.ndarray | Jagged


def jagged(array: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """A list array as its offsets (int64 [n + 1], from 0) and its values.

    Raises:
        ValueError: A null, or not a list.
    """
    if not isinstance(array, pa.ListArray | pa.LargeListArray) or array.null_count:
        raise ValueError(f"a list without nulls was expected, not {array.type} with {array.null_count} nulls")
    offsets = array.offsets.to_numpy().astype(np.int64)
    if not len(offsets):
        offsets = np.zeros(1, np.int64)
    return offsets - offsets[0], array.values.slice(offsets[0], offsets[-1] - offsets[0])


def numbers(array: pa.Array, kind: str) -> np.ndarray:
    """An array of numbers, of `kind` "integer" or "float".

    Raises:
        ValueError: A null, or another type.
    """
    right = pa.types.is_integer(array.type) if kind == "integer" else pa.types.is_floating(array.type)
    if not right or array.null_count:
        raise ValueError(f"{kind} values without nulls were expected, not {array.type} with {array.null_count} nulls")
    return array.to_numpy()


def alike(one: pa.DataType, other: pa.DataType) -> bool:
    """Whether two types are the same but for the names of lists' values, and whether they may be null."""
    if pa.types.is_fixed_size_list(one) and pa.types.is_fixed_size_list(other):
        return one.list_size == other.list_size and alike(one.value_type, other.value_type)
    if pa.types.is_list(one) and pa.types.is_list(other):
        return alike(one.value_type, other.value_type)
    return one == other


def stored_type(feature: Feature) -> pa.DataType:
    """The Arrow type of a feature's column, one value a row."""
    if feature.kind is Kind.CATEGORICAL:
        return pa.int32()
    if feature.kind is Kind.MULTI:
        return pa.list_(pa.int32())
    return pa.float32() if feature.kind is Kind.NUMERIC else pa.list_(pa.float32(), feature.width or 0)


def feature_column(array: pa.Array, feature: Feature) -> Stored:
    """A feature's column; of an event feature, the values of its list.

    Raises:
        ValueError: Nulls, a type that is not the feature's kind, ids outside of its table, or numbers not finite.
    """
    if feature.kind is Kind.VECTOR:
        if not isinstance(array, pa.FixedSizeListArray) or array.type.list_size != feature.width or array.null_count:
            raise ValueError(f"vectors of {feature.width} without nulls were expected, not {array.type}")
        return _finite(numbers(array.flatten(), "float")).reshape(-1, feature.width or 0)
    if feature.kind is Kind.NUMERIC:
        return _finite(numbers(array, "float"))
    if feature.kind is Kind.MULTI:
        offsets, values = jagged(array)
        return Jagged(offsets, _ids(values, feature))
    return _ids(array, feature)


def stored(column: Column) -> Stored:
    """A batch's column made ready for gathering."""
    if isinstance(column, Ragged):
        return Jagged(np.concatenate([np.zeros(1, np.int64), np.cumsum(column.lengths, dtype=np.int64)]), column.values)
    return column


def take(column: Stored, index: np.ndarray) -> Column:
    """The rows `index` of a column, as a batch holds it.

    Raises:
        IndexError: A row that the column does not have.
    """
    if isinstance(column, Jagged):
        return Ragged(*take_jagged(column.offsets, column.values, index))
    return take_rows(column, index)


def gathered(columns: Sequence[Stored], runs: Runs) -> Column:
    """The rows of some columns of one kind, as a batch holds them.

    Raises:
        IndexError: Rows that a column does not have.
    """
    arrays = [column for column in columns if not isinstance(column, Jagged)]
    if arrays:
        return gather(arrays, runs)
    jagged = [column for column in columns if isinstance(column, Jagged)]
    return Ragged(*gather_jagged([column.offsets for column in jagged], [column.values for column in jagged], runs))


def cut(column: Stored, start: int, stop: int) -> Column:
    """Consecutive rows of a column, as a batch holds them; nothing is copied."""
    if isinstance(column, Jagged):
        offsets = column.offsets[start : stop + 1]
        return Ragged(column.values[offsets[0] : offsets[-1]], np.diff(offsets).astype(np.int32))
    return column[start:stop]


def concatenate(columns: Sequence[Any]) -> Any:
    """Columns behind one another, all of one kind."""
    if len(columns) == 1:
        return columns[0]
    if isinstance(columns[0], Ragged):
        return Ragged(np.concatenate([c.values for c in columns]), np.concatenate([c.lengths for c in columns]))
    return np.concatenate(list(columns))


def missing(feature: Feature, rows: int) -> Column:
    """A column for rows that have no value: the unknown id 0, no ids, the mean (0 when standardised), zeros."""
    if feature.kind is Kind.MULTI:
        return Ragged(np.zeros(0, np.int32), np.zeros(rows, np.int32))
    if feature.kind is Kind.VECTOR:
        return np.zeros((rows, feature.width or 0), np.float32)
    return np.zeros(rows, np.int32 if feature.kind is Kind.CATEGORICAL else np.float32)


def _finite(values: np.ndarray) -> np.ndarray:
    # One that is not would make the loss of its whole batch so, with nothing to tell whose it was.
    if not all_finite(values):
        raise ValueError("finite numbers were expected")
    return values


def _ids(array: pa.Array, feature: Feature) -> np.ndarray:
    ids = numbers(array, "integer")
    # An id behind the table's end would read another row, or crash the lookup in a worker that knows no file.
    if not all_below(ids, feature.rows or 0):
        raise ValueError(f"ids from 0 to {(feature.rows or 0) - 1} were expected, not {ids.min()} to {ids.max()}")
    return ids
