"""Writes docs/configuration.md from the configuration classes: their docstrings, types, bounds and defaults.

python tools/config_reference.py           writes the file
python tools/config_reference.py --check   exits with 1 where the file is not what would be written
"""

from __future__ import annotations

import inspect
import sys
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import annotated_types
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from metatrain.config import Config

FILE = Path(__file__).parents[1] / "docs" / "configuration.md"

HEAD = """\
# Configuration

<!-- Written by tools/config_reference.py from metatrain/config.py: edit there, then run `make docs`. -->

A recipe is a YAML file with the sections below; what it leaves out keeps its default. `extends: other.yaml` (a path
beside the file, or a list of them) starts from another recipe: mappings merge key by key, anything else replaces.
A recipe that names another meta-learner than the one it extends inherits of `meta` only what every meta-learner has
(`loss`, `huber_delta`, `memory`, `size_weight`), and of another base learner's `model` no `options`.
The command line overrides both: `--train.epochs 3`. An unknown key is refused with the nearest known one.
`metatrain config FILE` prints the resolved recipe.

"""

EXAMPLE = """\
## Example: an event log of your own

Logs of plays as Parquet files, a table of users and a table of films; the label is the share of the film watched.
A line of the log: `account`, `film`, `share`, `played_at`, `device`.

```yaml
run:
  name: plays
  storage: s3://bucket/runs          # any fsspec URL
prepare:
  source: events
  path: s3://bucket/plays/*.parquet  # Parquet, CSV or JSON lines; one file or thousands
  users: s3://bucket/accounts.parquet
  items: s3://bucket/films.parquet   # its column `title` is shown
  columns:
    task: account
    item: film
    label: share                     # null: every event is a click of 1
    timestamp: played_at
  features:
    - {name: country, level: task, kind: categorical, width: 8}
    - {name: genres, level: item, kind: multi, width: 16, separator: "|"}
    - {name: year, level: item, kind: numeric}
    - {name: poster, level: item, kind: vector, width: 64}
    - {name: device, level: event, kind: categorical, width: 4, buckets: 1000}
  item_split:
    by: time                         # films first played last are new: held out of training
    new: 0.1
data:
  dataset: s3://bucket/plays-dataset
```

"""


def sections(model: type[BaseModel], path: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Every section with its path in the YAML, the outer ones first."""
    for name, field in model.model_fields.items():
        inner = section_of(field.annotation)
        if inner is not None:
            at = f"{path}{name}"
            if inner is not field.annotation:
                at += ".NAME" if typing.get_origin(field.annotation) is dict else "[]"
            yield at, inner
            yield from sections(inner, f"{at}.")


def section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class in an annotation such as `UserSplit` or `tuple[FeatureSource, ...]`."""
    if inspect.isclass(annotation) and not isinstance(annotation, types.GenericAlias):
        return annotation if issubclass(annotation, BaseModel) else None
    return next((s for a in typing.get_args(annotation) if (s := section_of(a)) is not None), None)


def type_text(annotation: Any, metadata: list[Any]) -> str:
    """A type as a reader of YAML thinks of it: `integer > 0`, `a, b or c`, `list of text`, `number or null`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return type_text(arguments[0], [*metadata, *unpacked(arguments[1:])])
    if origin is typing.Literal:
        *most, last = [f"`{a}`" for a in arguments]
        return f"{', '.join(most)} or {last}" if most else last
    if origin in (types.UnionType, typing.Union):
        *most, last = ["null" if a is type(None) else type_text(a, metadata) for a in arguments]
        return f"{', '.join(most)} or {last}"
    if origin is dict:
        return f"mapping of text to {type_text(arguments[1], metadata)}"
    if origin is tuple:
        return f"list of {type_text(arguments[0], metadata)}"
    if (section := section_of(annotation)) is not None:
        return section.__name__
    names = {int: "integer", float: "number", str: "text", bool: "true or false"}
    return " ".join([names[annotation], " and ".join(bounds(metadata))]).strip()


def unpacked(metadata: tuple[Any, ...]) -> list[Any]:
    """The constraints inside pydantic's `Field(gt=0)`."""
    return [m for item in metadata for m in (item.metadata if isinstance(item, FieldInfo) else [item])]


def bounds(metadata: list[Any]) -> Iterator[str]:
    """Bounds as text: `> 0`, `≤ 1`."""
    signs = {annotated_types.Gt: (">", "gt"), annotated_types.Ge: ("≥", "ge")}
    signs |= {annotated_types.Lt: ("<", "lt"), annotated_types.Le: ("≤", "le")}
    for item in metadata:
        if type(item) in signs:
            sign, attribute = signs[type(item)]
            yield f"{sign} {getattr(item, attribute)}"


def default_text(value: Any, field: FieldInfo) -> str:
    """A default as YAML would write it."""
    if field.is_required():
        return "required"
    if isinstance(value, tuple | list):
        return "`[" + ", ".join(f'"{v}"' if v == "*" else str(v) for v in value) + "]`"
    words = {None: "null", True: "true", False: "false"}
    return f"`{words[value] if value is None or isinstance(value, bool) else value}`"


def rows(path: str, section: type[BaseModel]) -> Iterator[str]:
    """Table rows of a section's own fields; nested sections have tables of their own."""
    base = default_at(path)
    for name, field in section.model_fields.items():
        if isinstance(field.default, BaseModel):
            continue
        # A section's default may differ from its class's: `data.episode` cuts uniformly, `evaluate.episode` last.
        value = getattr(base, name) if base is not None else field.default
        cells = [f"`{name}`", type_text(field.annotation, field.metadata), default_text(value, field)]
        cells.append(" ".join((field.description or "").split()))
        yield "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def default_at(path: str) -> BaseModel | None:
    """The section's instance in a default configuration; None inside a list or mapping, which is empty by default."""
    if "[]" in path or ".NAME" in path:
        return None
    value: Any = Config()
    for part in path.split("."):
        value = getattr(value, part)
    return value


def reference() -> str:
    """The whole page."""
    parts = [HEAD, EXAMPLE]
    for path, section in sections(Config):
        parts.append(f"## `{path}`\n\n{inspect.cleandoc(section.__doc__ or '')}\n\n")
        parts.append("| field | value | default | meaning |\n|---|---|---|---|\n")
        parts.append("\n".join(rows(path, section)) + "\n\n")
    return "".join(parts).rstrip() + "\n"


def main() -> int:
    """Writes or checks the page."""
    page = reference()
    if "--check" in sys.argv[1:]:
        same = FILE.exists() and FILE.read_text(encoding="utf-8") == page
        print(f"{FILE}: {'up to date' if same else 'out of date: run `make docs`'}")
        return int(not same)
    FILE.write_text(page, encoding="utf-8")
    print(f"wrote {FILE}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
