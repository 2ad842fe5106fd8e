"""Events as they come (a file, a table, a list) as one Arrow table, and how its rows are named in errors."""

from __future__ import annotations

import csv
import io
import os
import posixpath
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from metatrain import storage
from metatrain.data.parquet import read_parquet
from metatrain.documents import parse_json
from metatrain.errors import RequestError

#: What `Recommender.adapt` takes.
Events = str | os.PathLike[str] | pa.Table | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Places:
    """How rows are named in errors."""

    file: str
    first: int  # number of the first row
    word: str  # "line", "row" or "event"
    rows: np.ndarray | None = None

    def __call__(self, row: int, column: str) -> str:
        number = self.first + int(row if self.rows is None else self.rows[row])
        return f"{self.file}: {self.word} {number}, column {column}"

    def at(self, rows: np.ndarray) -> Places:
        """The same for a selection of rows."""
        return Places(self.file, self.first, self.word, rows)


def read_table(events: Events) -> tuple[pa.Table, Places]:
    """The events as a table, and the names of its rows.

    Raises:
        RequestError: No such file, a kind that is not read, or one that cannot be parsed.
    """
    if isinstance(events, pa.Table):
        return _usual(events), Places("the table", 0, "row")
    if not isinstance(events, str | os.PathLike):
        try:
            return _tabled([dict(event) for event in events]), Places("the list", 0, "event")
        except (pa.ArrowException, TypeError, ValueError, OverflowError) as error:
            raise RequestError(
                f"The events cannot be read as a table: {error}",
                where="the list",
                remedy="Give one mapping an event, with values of one type a column.",
            ) from error
    events = os.fspath(events)
    kind = posixpath.splitext(events)[1].lower()
    readers = {".csv": _csv, ".jsonl": _json, ".json": _json, ".ndjson": _json, ".parquet": _parquet}
    if kind not in readers:
        raise RequestError(
            "This kind of file is not read.",
            where=events,
            got=kind or "(no ending)",
            remedy="Give .csv, .jsonl or .parquet.",
        )
    if not storage.exists(events):
        raise RequestError("There is no such file of events.", where=events, remedy="Check the path.")
    first, word = {".csv": (2, "line"), ".parquet": (0, "row")}.get(kind, (1, "line"))
    try:
        return _usual(readers[kind](storage.read_bytes(events))), Places(events, first, word)
    except (pa.ArrowException, OSError, TypeError, ValueError, OverflowError, csv.Error) as error:
        raise RequestError(
            f"The file cannot be parsed: {error}", where=events, remedy="Mend the line; JSON is one object a line."
        ) from error


def _usual(table: pa.Table) -> pa.Table:
    """The same values without codes and views, which few of pyarrow's functions take."""
    for place, field in enumerate(table.schema):
        kind = field.type
        if pa.types.is_dictionary(kind):
            kind = kind.value_type
        if pa.types.is_string_view(kind) or pa.types.is_large_string(kind) or pa.types.is_null(kind):
            kind = pa.string()
        if kind != field.type:
            table = table.set_column(place, field.name, table.column(place).cast(kind))
    return table


def _csv(content: bytes) -> pa.Table:
    header = next(csv.reader(io.StringIO(content.decode("utf-8-sig").partition("\n")[0])), [])
    # As text: a key such as 007 is not the number 7, and errors can show what the file says.
    options = pacsv.ConvertOptions(
        column_types={name: pa.string() for name in header}, strings_can_be_null=True, null_values=[""]
    )
    return pacsv.read_csv(pa.BufferReader(content), convert_options=options)


def _json(content: bytes) -> pa.Table:
    # Not by pyarrow: its reader ends the process on a line `null`, or on lists nested deeply (pyarrow 26).
    listed = []
    for number, line in enumerate(content.removeprefix(b"\xef\xbb\xbf").split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            event = parse_json(line)
        except ValueError as error:
            raise ValueError(f"line {number}: {error}") from error
        if not isinstance(event, dict):
            raise ValueError(f"line {number}: it is no object")
        listed.append(event)
    return _tabled(listed)


def _tabled(listed: Sequence[Mapping[str, Any]]) -> pa.Table:
    """Events as a table of all their columns: pyarrow would take those of the first event alone."""
    names = list(dict.fromkeys(name for event in listed for name in event))
    # A table without a column would have no row, though there are events.
    return pa.table({n: [event.get(n) for event in listed] for n in names} or {"": pa.nulls(len(listed))})


def _parquet(content: bytes) -> pa.Table:
    return read_parquet(content)
