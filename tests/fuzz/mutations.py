"""What fuzzing does to inputs, and what must come of it: each is read, or refused with an error of the project's own.

METATRAIN_FUZZ=1000 tries so many inputs a test, in place of the few that a quick run of the tests takes.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any, TypeVar

import pyarrow as pa
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from metatrain.errors import MetatrainError

Result = TypeVar("Result")

EXAMPLES = int(os.environ.get("METATRAIN_FUZZ", "0"))


def fuzzed(quick: int = 30) -> settings:
    """Settings of a test of which a quick run takes `quick` inputs."""
    return settings(
        max_examples=EXAMPLES or quick,
        deadline=None,  # a hang is found by the tests' time limit; a busy machine is none
        suppress_health_check=list(HealthCheck),
        derandomize=not EXAMPLES,
    )


def read_or_refused(call: Callable[[], Result], kind: type[MetatrainError] = MetatrainError) -> Result | None:
    """What `call` gives, or None where it refuses its input with a whole error of this kind.

    Any other exception comes out, and fails the test.
    """
    try:
        return call()
    except kind as error:
        refused = error
    assert refused.what
    assert refused.where or refused.got, f"it says nothing of the place: {refused}"
    assert refused.remedy, f"it says nothing of what to do: {refused}"
    return None


# --- bytes -----------------------------------------------------------------------------------------------------------

_SPLICES = [b"\x00", b"\xff\xfe", b"\n", b'"', b",", b"\x80", b"NaN", b"-1", b"9" * 40, b"{", b"]", b"\xef\xbb\xbf"]


@st.composite
def mutated(draw: st.DrawFn, content: bytes) -> bytes:
    """The content with one to four changes: bits, cuts, repetitions, splices, or its end."""
    found = bytearray(content)
    for _ in range(draw(st.integers(1, 4))):
        at = draw(st.integers(0, len(found)))
        kind = draw(st.sampled_from(["flip", "set", "cut", "repeat", "splice", "truncate"]))
        length = draw(st.integers(1, 16))
        if kind == "flip" and at < len(found):
            found[at] ^= 1 << draw(st.integers(0, 7))
        elif kind == "set" and at < len(found):
            found[at] = draw(st.integers(0, 255))
        elif kind == "cut":
            del found[at : at + length]
        elif kind == "repeat":
            found[at:at] = found[at : at + length] * draw(st.integers(1, 3))
        elif kind == "splice":
            found[at:at] = draw(st.sampled_from(_SPLICES) | st.binary(max_size=8))
        elif kind == "truncate":
            del found[at:]
    return bytes(found)


# --- documents -------------------------------------------------------------------------------------------------------

_NUMBERS = [0, 1, -1, 2**31, 2**63, -(2**70), 10**400, 0.5, -0.0, 1e308]
_TEXTS = ["", "x", "7", "..", "../../x", "/etc", "a\x00b", "s3://key:secret@bucket", "é" * 300, "*", "nan", "\ud800"]
#: Values that no field expects, and some that many do.
ODD = st.sampled_from(
    [None, True, False, *_NUMBERS, *_TEXTS, [], {}, [[]], {"": None}, [1, "a"], {"min": 1}]
) | st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=5,
)


@st.composite
def altered(draw: st.DrawFn, document: Any) -> Any:
    """A document of dicts and lists with one to three of its places changed, removed, or added to."""
    found = {"root": copy.deepcopy(document)}
    for _ in range(draw(st.integers(1, 3))):
        place: Any = found
        key: Any = "root"
        while isinstance(place[key], dict | list) and place[key] and draw(st.integers(0, 5)):
            place = place[key]
            key = draw(st.sampled_from(sorted(place)) if isinstance(place, dict) else st.integers(0, len(place) - 1))
        change = draw(st.sampled_from(["set", "set", "set", "remove", "add"]))
        if change == "remove" and key != "root":
            del place[key]
        elif change == "add" and isinstance(place[key], dict):
            place[key][draw(st.text(max_size=6))] = copy.deepcopy(draw(ODD))
        elif change == "add" and isinstance(place[key], list):
            place[key].append(copy.deepcopy(draw(st.sampled_from(place[key]) if place[key] else ODD)))
        else:
            place[key] = copy.deepcopy(draw(ODD))
    return found["root"]


# --- tables ----------------------------------------------------------------------------------------------------------

_TEXT_TYPES = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
_NUMBER_TYPES = [pa.int8(), pa.int32(), pa.int64(), pa.uint64(), pa.float16(), pa.float32(), pa.float64()]
_TIME_TYPES = [pa.timestamp("s"), pa.timestamp("ns", "UTC"), pa.date32(), pa.time64("us"), pa.duration("ms")]
_VALUES_OF_LISTS = [pa.int32(), pa.int64(), pa.float32(), pa.string(), pa.null(), pa.list_(pa.int32())]
_STRUCT = pa.struct([("a", pa.int32())])
TYPES = st.sampled_from(
    [
        *_TEXT_TYPES,
        *_NUMBER_TYPES,
        *_TIME_TYPES,
        *[pa.bool_(), pa.binary(), pa.null(), pa.decimal128(10, 2), _STRUCT, pa.map_(pa.string(), pa.int32())],
        *[pa.list_(kind) for kind in _VALUES_OF_LISTS],
        *[pa.large_list(pa.int32()), pa.list_(pa.float32(), 2), pa.list_view(pa.int32()), pa.list_(_STRUCT)],
    ]
)


@st.composite
def columns(draw: st.DrawFn, rows: int, kind: pa.DataType | None = None) -> pa.Array:
    """A column of any type, with nulls or without, of ordinary and extreme values."""
    kind = kind or draw(TYPES)
    if pa.types.is_null(kind):
        return pa.nulls(rows)

    def value(kind: pa.DataType) -> st.SearchStrategy[Any]:
        if pa.types.is_integer(kind):
            bits = kind.bit_width - (0 if pa.types.is_unsigned_integer(kind) else 1)
            low = 0 if pa.types.is_unsigned_integer(kind) else -(2**bits)
            return st.sampled_from([low, 2**bits - 1, 0, 1, 2, 5]) | st.integers(low, 2**bits - 1)
        if pa.types.is_floating(kind):
            return st.sampled_from([0.0, 1.0, 3.5, -2.0, float("nan"), float("inf"), 6e4])
        if pa.types.is_boolean(kind):
            return st.booleans()
        if pa.types.is_binary(kind):
            return st.binary(max_size=4)
        if pa.types.is_list(kind) or pa.types.is_large_list(kind) or "list_view" in str(kind):
            inner = st.none() if pa.types.is_null(kind.value_type) else st.none() | value(kind.value_type)
            return st.lists(inner, max_size=3)
        if pa.types.is_fixed_size_list(kind):
            return st.lists(value(kind.value_type), min_size=kind.list_size, max_size=kind.list_size)
        if pa.types.is_struct(kind):
            return st.fixed_dictionaries({"a": st.integers(0, 9)})
        if pa.types.is_map(kind):
            return st.lists(st.tuples(st.text(max_size=2), st.integers(0, 9)), max_size=2)
        if pa.types.is_dictionary(kind) or "string" in str(kind):
            return st.sampled_from(
                ["", "7", "item3", "1.5", "nan", "1e400", "a|b", "2020-02-31", "é", "x" * 99, "\x00"]
            )
        return st.just(None)

    values = draw(st.lists(st.none() | value(kind), min_size=rows, max_size=rows))
    if draw(st.booleans()):  # without nulls, where a value can be had
        given = next((v for v in values if v is not None), None)
        values = [given if v is None else v for v in values]
    if pa.types.is_dictionary(kind):
        return pa.array(values, pa.string()).dictionary_encode()
    if pa.types.is_temporal(kind) or pa.types.is_decimal(kind):
        whole = draw(st.lists(st.integers(0, 2**31 - 1), min_size=rows, max_size=rows))
        try:
            return pa.array(whole, pa.int32() if kind.bit_width == 32 else pa.int64()).cast(kind)
        except (pa.ArrowException, NotImplementedError):
            return pa.nulls(rows, kind)
    return pa.array(values, kind)
