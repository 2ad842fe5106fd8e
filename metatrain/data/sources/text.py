"""Delimited text, read in pieces: a row is a line, and every bad row is named by its line or counted, never dropped.

The fast path hands a block of whole lines to pyarrow. A block that it refuses, or in which a checked column holds an
impossible value, is read again line by line to name the place (or, with `skip_bad`, to keep the good lines).
A quoted value may hold the delimiter, but not a line break.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO, Literal

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv

from metatrain.data.sources.checks import Check, bad_values, parsed, text_of
from metatrain.data.sources.files import RawFile
from metatrain.data.sources.rawlog import Rows
from metatrain.errors import SourceError

BLOCK_BYTES = 8 << 20
#: Stands for `::`, which no one-byte delimiter can.
_UNIT_SEPARATOR = "\x1f"


@dataclass(frozen=True)
class Layout:
    """How a text file is laid out. `columns` names all of a line's fields; `None` takes them from the header."""

    checks: dict[str, Check]  # the columns to read, and what each must hold
    columns: tuple[str, ...] | None = None
    delimiter: str = ","
    quoted: bool = True
    encoding: Literal["utf-8", "latin-1"] = "utf-8"


@dataclass(frozen=True)
class TextPart:
    """The lines of a file that begin in the byte range [start, stop)."""

    file: RawFile
    layout: Layout
    skip_bad: bool = False
    start: int = 0
    stop: int | None = None

    def read(self) -> Iterator[Rows]:
        """Tables of the checked columns, parsed; in pieces of about `BLOCK_BYTES`.

        Raises:
            SourceError: A missing column, or (without `skip_bad`) a bad line.
        """
        with self.file.open() as raw:
            file: IO[bytes] = self.file.unpacked(raw)
            header = _header(file, self.layout, self.file) if self.layout.columns is None else None
            columns = header or list(self.layout.columns or ())
            missing = [name for name in self.layout.checks if name not in columns]
            if missing:
                raise missing_column(missing[0], columns, self.file.place)
            if self.start:
                file.seek(self.start - 1)
                file.readline()
            position = file.tell()
            while (self.stop is None or position < self.stop) and (block := _lines(file, position, self.stop)):
                rows = self._parse(block, columns, position)
                position += len(block)
                yield rows

    def _parse(self, block: bytes, columns: list[str], position: int) -> Rows:
        layout = self.layout
        delimiter = layout.delimiter
        if len(delimiter) > 1:
            block, delimiter = block.replace(delimiter.encode(), _UNIT_SEPARATOR.encode()), _UNIT_SEPARATOR
        try:
            table = pacsv.read_csv(
                pa.BufferReader(block),
                read_options=pacsv.ReadOptions(
                    column_names=columns, use_threads=False, block_size=len(block) + 1, encoding=layout.encoding
                ),
                parse_options=pacsv.ParseOptions(delimiter=delimiter, quote_char='"' if layout.quoted else False),
                convert_options=pacsv.ConvertOptions(
                    column_types={name: check.arrow_type for name, check in layout.checks.items()},
                    include_columns=list(layout.checks),
                    null_values=[""],
                    strings_can_be_null=True,
                ),
            )
        except pa.ArrowInvalid:
            return self._slowly(block, columns, delimiter, position)
        if any(bad_values(table[name], check).any() for name, check in layout.checks.items()):
            return self._slowly(block, columns, delimiter, position)
        return Rows(pa.table({name: parsed(table[name], check) for name, check in layout.checks.items()}))

    def _slowly(self, block: bytes, columns: list[str], delimiter: str, position: int) -> Rows:
        """Line by line: only for a block with a bad line in it."""
        numbers: list[int] = []
        fields: list[list[str]] = []
        bad, layout_delimiter = 0, self.layout.delimiter
        first_bad: tuple[int, str, str | None, bytes] | None = None
        for number, line in enumerate(block.split(b"\n")):
            line = line.rstrip(b"\r")
            if not line:
                continue
            row, problem = self._fields(line, delimiter, len(columns))
            if problem:
                bad += 1
                first_bad = first_bad or (number, f"A line cannot be parsed: {problem}.", None, line)
            else:
                numbers.append(number)
                fields.append(row)
        keep = np.ones(len(fields), dtype=bool)
        texts = {}
        for name, check in self.layout.checks.items():
            index = columns.index(name)
            texts[name] = pa.array([row[index] or None for row in fields], type=pa.string())
            wrong = text_of(texts[name], check)
            keep &= ~wrong
            if wrong.any():
                i = int(np.flatnonzero(wrong)[0])
                if first_bad is None or numbers[i] < first_bad[0]:
                    first_bad = (numbers[i], check.problem, name, (fields[i][index] or "nothing").encode())
        if first_bad is not None and not self.skip_bad:
            number, what, column, got = first_bad
            place = f"{self.file.place}: line {self._line(position) + number}" + (
                f", column {column}" if column else ""
            )
            remedy = "Mend the line, or count and skip such rows with --skip-bad-rows."
            shown = got.decode("utf-8", "replace").replace(delimiter, layout_delimiter)
            raise SourceError(what, where=place, got=shown[:200], remedy=remedy)
        bad += int((~keep).sum())
        table = {name: parsed(text.filter(pa.array(keep)), self.layout.checks[name]) for name, text in texts.items()}
        return Rows(pa.table(table), bad)

    def _fields(self, line: bytes, delimiter: str, expected: int) -> tuple[list[str], str]:
        """A line's fields, or what is wrong with it."""
        try:
            text = line.decode(self.layout.encoding)
            row = (
                next(csv.reader([text], delimiter=delimiter, strict=True))
                if self.layout.quoted
                else text.split(delimiter)
            )
        except (UnicodeDecodeError, csv.Error, StopIteration) as error:
            return [], str(error)
        return row, "" if len(row) == expected else f"{len(row)} fields where {expected} are expected"

    def _line(self, position: int) -> int:
        """Number of the line at a byte, from 1: counted only when an error must name it."""
        lines, left = 1, position
        with self.file.open() as raw:
            file: IO[bytes] = self.file.unpacked(raw)
            while left and (piece := file.read(min(left, BLOCK_BYTES))):
                lines += piece.count(b"\n")
                left -= len(piece)
        return lines


def parts(file: RawFile, layout: Layout, skip_bad: bool, part_bytes: int = 8 * BLOCK_BYTES) -> list[TextPart]:
    """A file as parts that tasks can read at the same time; what is packed (zip, gz) can only be read in one."""
    if file.member is not None or file.name.endswith(".gz"):
        return [TextPart(file, layout, skip_bad)]
    starts = list(range(0, max(file.size(), 1), part_bytes))
    return [TextPart(file, layout, skip_bad, a, b) for a, b in zip(starts, [*starts[1:], None], strict=True)]


def missing_column(name: str, columns: list[str], place: str) -> SourceError:
    """The error for a column that is not there, with the nearest name."""
    import difflib

    near = difflib.get_close_matches(name, columns, n=1)
    hint = f"Did you mean `{near[0]}`? " if near else ""
    return SourceError(
        f"A column is missing: {name}.",
        where=place,
        got=", ".join(columns),
        remedy=hint + "Map columns with `prepare.columns`, or mend the file.",
    )


def read_whole(file: RawFile, layout: Layout, skip_bad: bool) -> Rows:
    """A small file whole, such as a table of items."""
    pieces = list(TextPart(file, layout, skip_bad).read())
    if not pieces:
        raise SourceError("The file is empty.", where=file.place, remedy="Check the file.")
    return Rows(pa.concat_tables([p.table for p in pieces]), sum(p.bad for p in pieces))


def _header(file: IO[bytes], layout: Layout, source: RawFile) -> list[str]:
    raw = file.readline()
    try:
        line = raw.decode(layout.encoding).lstrip("\ufeff").rstrip("\r\n")
        if not line:
            raise SourceError("The file is empty: it has no header.", where=source.place, remedy="Check the file.")
        names = next(csv.reader(io.StringIO(line), delimiter=layout.delimiter))
    except (UnicodeDecodeError, csv.Error, StopIteration) as error:
        raise SourceError(
            f"The header cannot be read: {error}.",
            where=f"{source.place}: line 1",
            got=raw[:200].decode("utf-8", "replace"),
            remedy="Mend the header.",
        ) from error
    if twice := [name for name in layout.checks if names.count(name) > 1]:
        raise SourceError(
            "A column is there twice.", where=f"{source.place}: line 1", got=twice[0], remedy="Name each column once."
        )
    return names


def _lines(file: IO[bytes], position: int, stop: int | None) -> bytes:
    """Whole lines: up to `BLOCK_BYTES` and the end of the last line, or to the last line that begins before `stop`."""
    want = BLOCK_BYTES if stop is None else min(BLOCK_BYTES, stop - position)
    block = file.read(want)
    return block if block.endswith(b"\n") else block + file.readline()
