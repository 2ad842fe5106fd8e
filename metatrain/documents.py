"""JSON and YAML from outside, read strictly: plain data comes out, or a `ValueError` that says why not.

Both formats let more through than a reader expects: a key given twice (the last one wins unseen), NaN, numbers too
large for a float, references that unfold to gigabytes, nesting that no stack holds. All of that is refused here.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

import yaml

#: Characters of the largest YAML file that is read: it is written by hand.
YAML_CHARACTERS = 1 << 20
#: Values of the largest YAML file, those behind its references counted each time.
YAML_VALUES = 100_000
#: Levels of nesting in a YAML file.
YAML_DEPTH = 64


def parse_json(content: bytes | str) -> Any:
    """A JSON text (UTF-8) as dicts, lists, texts, numbers, booleans and None.

    Raises:
        ValueError: Not JSON, a key given twice, a number that is not finite, no text, or nested too deeply.
    """
    try:
        text = content if isinstance(content, str) else content.decode("utf-8")
        found = json.loads(text, object_pairs_hook=_once, parse_constant=_no_number, parse_float=_finite)
        if "\\u" in text:
            json.dumps(found, ensure_ascii=False).encode("utf-8")  # half a surrogate pair is no text
        return found
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def parse_yaml(content: bytes | str) -> Any:
    """A YAML text (UTF-8) as plain data. An alias may repeat what its anchor names, but not without bound.

    Raises:
        ValueError: Not YAML, a tag of a programming language, a key given twice, too large, too deep, or without end.
    """
    text = content if isinstance(content, str) else content.decode("utf-8-sig")
    if len(text) > YAML_CHARACTERS:
        raise ValueError(f"it has {len(text)} characters; {YAML_CHARACTERS} are read")
    try:
        loader = yaml.SafeLoader(text)
        try:
            node = loader.get_single_node()
            if node is None:
                return None
            values = _values(node, {}, ())
            if values > YAML_VALUES:
                raise ValueError(f"it unfolds to {values} values; {YAML_VALUES} are read")
            return loader.construct_document(node)
        finally:
            loader.dispose()
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except (LookupError, AttributeError, TypeError, OverflowError) as error:
        # What PyYAML's constructors let through where a value does not fit its tag: `!!bool maybe`, `!!int ""`.
        raise ValueError(f"a value does not fit its tag: {error}") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        seen: set[str] = set()
        twice = next(key for key, _ in pairs if key in seen or seen.add(key))
        raise ValueError(f"the key {twice!r} is given twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is not a number")


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text[:40]} is too large a number")
    return value


def _values(node: yaml.Node, known: dict[int, int], above: tuple[int, ...]) -> int:
    """Values that a node unfolds to, its aliases followed."""
    if id(node) in above:
        raise ValueError(f"line {node.start_mark.line + 1}: an alias names what it is inside of")
    if len(above) > YAML_DEPTH:
        raise ValueError(f"line {node.start_mark.line + 1}: nested more than {YAML_DEPTH} levels deep")
    if id(node) not in known:
        inside, count = (*above, id(node)), 1
        if isinstance(node, yaml.MappingNode):
            _check_keys(node)
            count += sum(_values(part, known, inside) for pair in node.value for part in pair)
        elif isinstance(node, yaml.SequenceNode):
            count += sum(_values(part, known, inside) for part in node.value)
        known[id(node)] = count
    return known[id(node)]


def _check_keys(node: yaml.MappingNode) -> None:
    seen: set[tuple[str, str]] = set()
    for key, _ in node.value:
        if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
            continue
        if (key.tag, key.value) in seen:
            raise ValueError(f"line {key.start_mark.line + 1}: the key `{key.value}` is given twice")
        seen.add((key.tag, key.value))
