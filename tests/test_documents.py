"""JSON and YAML from outside: what is strict about them."""

from __future__ import annotations

import pytest

from metatrain.documents import YAML_CHARACTERS, parse_json, parse_yaml


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (b'{"a": 1, "a": 2}', "'a' is given twice"),
        (b'{"x": {"b": 1, "c": 2, "b": 1}}', "'b' is given twice"),
        (b"[NaN]", "not a number"),
        (b"[-Infinity]", "not a number"),
        (b"[1e999]", "too large"),
        (b"[" * 100_000, "nested too deeply"),
        (b"[" + b"9" * 5000 + b"]", "digits"),
        (b"\xff\xfe", "decode"),
        (b"", "Expecting value"),
    ],
)
def test_json_that_is_refused(text: bytes, says: str):
    with pytest.raises(ValueError, match=says):
        parse_json(text)


def test_json_that_is_read():
    assert parse_json('{"a": [1, 2.5, null, "é"]}'.encode()) == {"a": [1, 2.5, None, "é"]}


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "\n".join(
    f"{new}: &{new} [{','.join([f'*{old}'] * 9)}]" for old, new in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: 1\nb: 2\na: 3", "line 3: the key `a` is given twice"),
        ("x: {a: 1, a: 1}", "given twice"),
        (BOMB, "unfolds to"),
        ("a: &a [*a]", "names what it is inside of"),
        ("a: &a {b: *a}", "names what it is inside of"),
        ("[" * 5000, "nested"),
        ("[" * 100 + "]" * 100, "nested more than"),
        ("!!python/object/apply:os.system ['true']", "could not determine a constructor"),
        ("!!python/name:os.system", "could not determine a constructor"),
        ("a: !!bool maybe", "does not fit its tag"),
        ("a: !!int ''", "does not fit its tag|invalid"),
        ("a: 2001-99-99", "month"),
        ("a: [", "expected"),
        ("a: *nothing", "undefined alias"),
        ("a: 1\n---\nb: 2", "single document"),
        ("x" * (YAML_CHARACTERS + 1), "characters"),
        (b"a: \xff", "decode"),
        (b"a: \x00", "unacceptable"),
    ],
)
def test_yaml_that_is_refused(text: str | bytes, says: str):
    with pytest.raises(ValueError, match=says):
        parse_yaml(text)


def test_yaml_that_is_read():
    text = "base: &base {a: 1, b: [2, 3]}\nother:\n  <<: *base\n  a: 5\nagain: [*base, *base]\n"
    base = {"a": 1, "b": [2, 3]}
    assert parse_yaml("\ufeff" + text) == {"base": base, "other": base | {"a": 5}, "again": [base, base]}
    assert parse_yaml("") is None
