"""Features in a request, encoded as the dataset's are: the same vocabularies, hashes and statistics."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from metatrain.data.batch import Column
from metatrain.data.columns import feature_column, stored, take
from metatrain.data.dataset import TaskDataset
from metatrain.data.prepare_encode import encode
from metatrain.data.schema import Feature, Kind
from metatrain.data.sources.checks import Check, bad_values, parsed, text_of
from metatrain.errors import RequestError, SourceError

#: Between the values of a multi-valued feature that is given as text.
SEPARATOR = "|"


class Encoded(NamedTuple):
    """A column of n rows, and what of it the model doesn't know."""

    column: Column
    warnings: list[str]


def encoded(column: pa.Array, feature: Feature, dataset: TaskDataset, place: Callable[[int], str]) -> Encoded:
    """A raw column [n] as a batch's column of n rows. A value outside of the vocabulary gets the unknown id 0 (of
    a multi-valued feature: is left out), and is warned of.

    Args:
        column: Text or numbers (categorical), lists or text with `|` (multi), numbers (numeric), lists (vector).
        feature: Which feature it is.
        dataset: Whose vocabularies.
        place: How a row is named in an error.

    Raises:
        RequestError: A value that cannot be of this feature.
    """
    vocabulary = None
    if feature.embedded and not feature.buckets:
        vocabulary = pa.array(dataset.vocabulary(str(feature.table)), pa.string())
    try:
        raw = _raw(column, feature, place)
        rows = take(stored(feature_column(encode(feature, raw, vocabulary), feature)), np.arange(len(column)))
        return Encoded(rows, [] if vocabulary is None else _unknown(raw, feature, vocabulary))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError, SourceError) as error:
        wanted = {
            Kind.MULTI: "a list of texts, or one text with | between the values",
            Kind.VECTOR: f"a list of {feature.width} finite numbers",
        }.get(feature.kind, "one value")
        raise RequestError(
            f"The feature `{feature.name}` cannot be read: {str(error).splitlines()[0]}",
            where=place(0),
            got=str(column.type),
            remedy=f"Give {wanted} an event, or leave the column out.",
        ) from error


def _unknown(raw: pa.Array, feature: Feature, vocabulary: pa.Array) -> list[str]:
    """A warning of values that are given but not in the vocabulary; an empty text is no value."""
    values = pc.drop_null(raw.flatten() if feature.kind is Kind.MULTI else raw)
    values = values.filter(pc.and_(pc.not_equal(values, ""), pc.invert(pc.is_in(values, value_set=vocabulary))))
    if not len(values):
        return []
    known = _listed(vocabulary) if len(vocabulary) else "no value at all"
    plural = "value is" if len(values) == 1 else "values are"
    what = f"{len(values)} {plural} unknown to the model: {_listed(values.unique())}"
    return [f"{feature.name}: {what} (it knows {known})."]


def _listed(values: pa.Array) -> str:
    return ", ".join(values[:5].to_pylist()) + (", …" if len(values) > 5 else "")


def _raw(column: pa.Array, feature: Feature, place: Callable[[int], str]) -> pa.Array:
    """In the type that preparation encodes from."""
    if feature.kind is Kind.NUMERIC:
        return _numbers(column, place)
    if feature.kind is Kind.VECTOR:
        return column.cast(pa.list_(pa.float32()))
    if feature.kind is Kind.MULTI:
        if pa.types.is_list(column.type):
            return column.cast(pa.list_(pa.string()))
        parts = pc.split_pattern(column.cast(pa.string()), SEPARATOR)
        values = pc.utf8_trim_whitespace(parts.flatten())
        return pa.ListArray.from_arrays(parts.offsets, values) if not parts.null_count else parts
    return as_text(column)


def _numbers(column: pa.Array, place: Callable[[int], str]) -> pa.Array:
    text = not (pa.types.is_integer(column.type) or pa.types.is_floating(column.type))
    column = column.cast(pa.string() if text else pa.float64())
    bad = text_of(column, Check.NUMBER) if text else bad_values(column, Check.NUMBER)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        raise RequestError(
            Check.NUMBER.problem, where=place(row), got=str(column[row].as_py()), remedy="Give a number, or nothing."
        )
    return parsed(column, Check.NUMBER)


def as_text(column: pa.Array) -> pa.Array:
    """Keys and categories as text: 7 is "7", also where a missing value beside it made the column one of floats."""
    if pa.types.is_floating(column.type) and pc.all(pc.equal(pc.floor(column), column)).as_py() is not False:
        column = column.cast(pa.int64())
    return column.cast(pa.string())
