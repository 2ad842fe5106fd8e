"""What a raw column must hold, as vectorised checks: the same rule for text, Parquet and JSON."""

from __future__ import annotations

from enum import Enum

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_NUMBER = r"^\s*[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?\s*$"
#: Labels are 32-bit numbers in the shards.
_GREATEST_LABEL = float(np.finfo(np.float32).max)
#: Beyond these seconds a time is none: the year 33,658.
_LATEST = 1e12
#: Above it a number of time is in milliseconds (1973 in milliseconds, the year 5138 in seconds), then micro, nano.
_MILLISECONDS, _MICROSECONDS, _NANOSECONDS = 1e11, 1e14, 1e17


class Check(Enum):
    """What the values of a column must be."""

    KEY = "key"  # text, not empty
    TEXT = "text"  # any text, or nothing
    RATING = "rating"  # a finite number
    CLICK = "click"  # 0 or 1
    NUMBER = "number"  # a finite number, or nothing
    TIME = "time"  # seconds, milliseconds, or ISO 8601

    @property
    def arrow_type(self) -> pa.DataType:
        """The type to read it as."""
        return pa.float64() if self in (Check.RATING, Check.CLICK, Check.NUMBER) else pa.string()

    @property
    def problem(self) -> str:
        """The sentence for a value that fails."""
        return {
            Check.KEY: "A key is empty.",
            Check.TEXT: "A text cannot be read.",
            Check.RATING: "A label is not a finite number.",
            Check.CLICK: "A click's label must be 0 or 1 (or set `prepare.click_threshold`).",
            Check.NUMBER: "A value is not a finite number.",
            Check.TIME: "A time is neither a number of seconds or milliseconds nor ISO 8601.",
        }[self]


def bad_values(column: pa.Array | pa.ChunkedArray, check: Check) -> np.ndarray:
    """Which rows break the rule, for a column of the check's `arrow_type`: bool [n]."""
    if check is Check.TEXT:
        return np.zeros(len(column), dtype=bool)
    missing = _bool(pc.is_null(column))
    if check is Check.KEY:
        return missing
    if check is Check.TIME:
        return np.isnan(seconds(column))
    values = pc.fill_null(column, 0.0).to_numpy()
    wrong = ~np.isfinite(values)
    if check is Check.NUMBER:
        return wrong
    wrong |= np.abs(values) > _GREATEST_LABEL
    if check is Check.CLICK:
        wrong |= (values != 0.0) & (values != 1.0)
    return wrong | missing


def text_of(column: pa.Array, check: Check) -> np.ndarray:
    """Which rows of a column still in text break the rule: bool [n]."""
    if check.arrow_type != pa.float64():
        return bad_values(column, check)
    is_number = _bool(pc.fill_null(pc.match_substring_regex(column, _NUMBER), check is Check.NUMBER))
    present = pc.if_else(pa.array(is_number), column, None)
    return ~is_number | bad_values(parsed_number(present), check)


def parsed(column: pa.Array | pa.ChunkedArray, check: Check) -> pa.Array | pa.ChunkedArray:
    """A column that passed its check, as text, float64, or int64 seconds."""
    if check is Check.TIME:
        return pa.array(np.floor(seconds(column)).astype(np.int64))
    if check.arrow_type == pa.float64() and pa.types.is_string(column.type):
        return parsed_number(column)
    return column


def parsed_number(column: pa.Array) -> pa.Array:
    """Text that matches a number, as float64."""
    return pc.cast(pc.utf8_trim_whitespace(pc.replace_substring(column, "+", "")), pa.float64())


def seconds(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Times as float64 seconds [n]; NaN where a value cannot be read as one.

    Numbers are taken as seconds, milliseconds, microseconds or nanoseconds by their size; text may be numbers or
    ISO 8601, whose times are UTC unless they name a zone.
    """
    kind = column.type
    if pa.types.is_timestamp(kind) or pa.types.is_date(kind):
        return _micros(pc.cast(column, pa.timestamp("us"), safe=False))
    if pa.types.is_string(kind) or pa.types.is_large_string(kind):
        try:
            return _scaled(pc.cast(column, pa.float64()))
        except pa.ArrowInvalid:
            return _seconds_of_text(column)
    if pa.types.is_integer(kind) or pa.types.is_floating(kind):
        return _scaled(pc.cast(column, pa.float64(), safe=False))
    return np.full(len(column), np.nan)


def _seconds_of_text(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    array = pa.concat_arrays(column.chunks) if isinstance(column, pa.ChunkedArray) else column
    numeric = pc.fill_null(pc.match_substring_regex(array, _NUMBER), False)
    result = _scaled(parsed_number(pc.if_else(numeric, array, None)))
    for pattern, kind in (
        (r"^\d{4}-\d\d-\d\d([T ]\d\d:\d\d(:\d\d(\.\d{1,6})?)?)?$", pa.timestamp("us")),
        (r"^\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d{1,6})?)?(Z|[+-]\d\d:?\d\d)$", pa.timestamp("us", "UTC")),
    ):
        matching = pc.fill_null(pc.match_substring_regex(array, pattern), False)
        if pc.any(matching).as_py():
            found = _micros_or_nan(pc.if_else(matching, array, None), kind)
            result = np.where(np.isnan(result), found, result)
    return result


def _micros_or_nan(text: pa.Array, kind: pa.TimestampType) -> np.ndarray:
    try:
        return _micros(pc.cast(text, kind))
    except pa.ArrowInvalid:  # a day that no calendar has, such as 2020-02-31: find which, one at a time
        return np.array([_one(value, kind) for value in text.to_pylist()])


def _one(value: str | None, kind: pa.TimestampType) -> float:
    try:
        return np.nan if value is None else float(_micros(pc.cast(pa.array([value]), kind))[0])
    except pa.ArrowInvalid:
        return np.nan


def _micros(times: pa.Array | pa.ChunkedArray) -> np.ndarray:
    ticks = pc.cast(pc.cast(times, pa.int64()), pa.float64(), safe=False)
    return _float(ticks) / 1e6


def _scaled(numbers: pa.Array | pa.ChunkedArray) -> np.ndarray:
    values = _float(numbers)
    size = np.abs(values)
    scale = np.select([size > _NANOSECONDS, size > _MICROSECONDS, size > _MILLISECONDS], [1e9, 1e6, 1e3], 1.0)
    found = np.where(np.isfinite(values), values / scale, np.nan)
    return np.where(np.abs(found) <= _LATEST, found, np.nan)


def _float(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    """Null becomes NaN."""
    return pc.fill_null(column, float("nan")).to_numpy().astype(np.float64, copy=False)


def _bool(column: pa.Array | pa.ChunkedArray) -> np.ndarray:
    return column.to_numpy() if isinstance(column, pa.ChunkedArray) else column.to_numpy(zero_copy_only=False)
