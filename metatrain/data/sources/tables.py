"""Tables of any format (Parquet, CSV, JSON lines) as wanted columns, every row checked, every bad one's place named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.json as pajson
import pyarrow.parquet as pq

from metatrain.config import FeatureSource
from metatrain.data.parquet import open_parquet
from metatrain.data.sources.checks import Check, bad_values, parsed, text_of
from metatrain.data.sources.features import feature_check, feature_column
from metatrain.data.sources.files import RawFile, table_format
from metatrain.data.sources.rawlog import Rows
from metatrain.data.sources.text import TextPart, missing_column
from metatrain.documents import parse_json
from metatrain.errors import SourceError

_BATCH_ROWS = 1 << 18
_BLOCK_BYTES = 8 << 20
#: Bytes of a line that may hold thousands of lists inside one another.
_LONG_LINE = 4096


@dataclass(frozen=True)
class Wanted:
    """A column to read: its name in the file, and what it must hold."""

    theirs: str
    holds: Check | FeatureSource

    @property
    def check(self) -> Check:
        """The rule for its values."""
        return self.holds if isinstance(self.holds, Check) else feature_check(self.holds)

    @property
    def required(self) -> bool:
        """Whether a JSON line may leave it out."""
        return self.check not in (Check.TEXT, Check.NUMBER)


@dataclass(frozen=True)
class TablePart:
    """A file, or a part of it: the wanted columns under our names."""

    file: RawFile
    wanted: dict[str, Wanted]
    skip_bad: bool
    text: TextPart | None = None  # for CSV
    row_groups: tuple[int, int] | None = None  # for a part of a Parquet file

    def read(self) -> Iterator[Rows]:
        """Yields the rows.

        Raises:
            SourceError: A missing column, a bad row (without `skip_bad`), a column of an impossible type.
        """
        if self.text is not None:
            for rows in self.text.read():
                yield Rows(self._shaped({ours: rows.table[w.theirs] for ours, w in self.wanted.items()}), rows.bad)
        elif table_format(self.file) == "parquet":
            yield from self._parquet()
        else:
            yield from self._json()

    def _shaped(self, columns: dict[str, pa.ChunkedArray]) -> pa.Table:
        result = {}
        for ours, w in self.wanted.items():
            column = columns[ours]
            result[ours] = column if isinstance(w.holds, Check) else feature_column(w.holds, column, self.file.place)
        return pa.table(result)

    def _checked(self, table: pa.Table, lines: np.ndarray, unit: str) -> Rows:
        """Keeps good rows; names the first bad one. `lines` numbers the rows in the file."""
        bad = np.zeros(table.num_rows, dtype=bool)
        columns: dict[str, pa.Array | pa.ChunkedArray] = {}
        for ours, w in self.wanted.items():
            column = table[w.theirs] if w.theirs in table.column_names else pa.chunked_array([pa.nulls(table.num_rows)])
            if not isinstance(w.holds, Check) and w.holds.kind != "numeric":
                columns[ours] = column
                continue
            typed, wrong = self._typed(column, w)
            if wrong.any() and not self.skip_bad:
                i = int(np.flatnonzero(wrong)[0])
                got = column[i].as_py()
                raise SourceError(
                    w.check.problem,
                    where=f"{self.file.place}: {unit} {int(lines[i])}, column {w.theirs}",
                    got="nothing" if got is None else got,
                    remedy="Mend the row, or count and skip such rows with --skip-bad-rows.",
                )
            bad |= wrong
            columns[ours] = typed
        keep = pa.array(~bad)
        kept = {ours: (c.filter(keep) if bad.any() else c) for ours, c in columns.items()}
        for ours, w in self.wanted.items():
            if isinstance(w.holds, Check):
                kept[ours] = parsed(kept[ours], w.check)
        return Rows(self._shaped(kept), int(bad.sum()))

    def _typed(self, column: pa.ChunkedArray, w: Wanted) -> tuple[pa.Array | pa.ChunkedArray, np.ndarray]:
        """A column in its check's type, and which rows break the rule."""
        array, check = column.combine_chunks(), w.check
        text = pa.types.is_string(array.type) or pa.types.is_large_string(array.type)
        if check is Check.TIME:
            return array, bad_values(array, check)
        if check.arrow_type == pa.float64() and text:
            wrong = text_of(array.cast(pa.string()), check)
            good = pc.if_else(pa.array(~wrong), array.cast(pa.string()), None)
            return parsed(good, check), wrong
        try:
            typed = array.cast(check.arrow_type)
        except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
            raise SourceError(
                f"A column has a type that cannot be used: {error}.",
                where=f"{self.file.place}, column {w.theirs}",
                got=str(array.type),
                remedy="Mend the column, or map another one in `prepare.columns`.",
            ) from error
        if check is Check.KEY:
            typed = pc.if_else(pc.equal(typed, ""), None, typed)
        if check is Check.NUMBER:
            typed = pc.if_else(pc.is_nan(typed), None, typed)  # NaN is how pandas writes "missing"
        return typed, bad_values(typed, check)

    def _parquet(self) -> Iterator[Rows]:
        with self.file.open() as raw:
            file = opened_parquet(self.file, raw)
            names = file.schema_arrow.names
            for w in self.wanted.values():
                if w.theirs not in names:
                    raise missing_column(w.theirs, names, self.file.place)
            first, last = self.row_groups or (0, file.num_row_groups)
            done = sum(file.metadata.row_group(i).num_rows for i in range(first))
            columns = list(dict.fromkeys(w.theirs for w in self.wanted.values()))
            try:
                for batch in file.iter_batches(_BATCH_ROWS, row_groups=list(range(first, last)), columns=columns):
                    lines = np.arange(done + 1, done + batch.num_rows + 1)
                    done += batch.num_rows
                    yield self._checked(pa.table(batch), lines, "row")
            except (pa.ArrowInvalid, OSError) as error:
                raise SourceError(
                    f"The Parquet file is broken: {error}.",
                    where=f"{self.file.place}: after row {done}",
                    remedy="Get the file again.",
                ) from error

    def _json(self) -> Iterator[Rows]:
        line, seen = 1, set()
        with self.file.open() as raw:
            file = self.file.unpacked(raw)
            while block := file.read(_BLOCK_BYTES):
                block = block if block.endswith(b"\n") else block + file.readline()
                rows, names = self._json_block(block, line)
                line += block.count(b"\n")
                seen |= names
                yield rows
        for w in self.wanted.values():
            if w.theirs not in seen and line > 1:
                raise missing_column(w.theirs, sorted(seen), self.file.place)

    def _json_block(self, block: bytes, first: int) -> tuple[Rows, set[str]]:
        try:
            if not _plain_lines(block):
                raise pa.ArrowInvalid("lines that pyarrow does not take")
            table = pajson.read_json(pa.BufferReader(block), read_options=pajson.ReadOptions(block_size=len(block) + 1))
            if table.num_rows != block.count(b"\n") + (not block.endswith(b"\n")):
                raise pa.ArrowInvalid("rows are not lines")
            lines, bad = np.arange(first, first + table.num_rows), 0
        except pa.ArrowInvalid:
            table, lines, bad = self._json_slowly(block, first)
        for w in self.wanted.values():
            if w.required and w.theirs not in table.column_names and table.num_rows:
                raise missing_column(w.theirs, table.column_names, f"{self.file.place}: line {int(lines[0])}")
        rows = self._checked(table, lines, "line")
        return Rows(rows.table, rows.bad + bad), set(table.column_names)

    def _json_slowly(self, block: bytes, first: int) -> tuple[pa.Table, np.ndarray, int]:
        """Line by line: only for a block with a bad line, or with values of differing types."""
        rows, numbers, bad = [], [], 0
        for number, line in enumerate(block.split(b"\n"), first):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
                if not isinstance(row, dict):
                    raise ValueError("not an object")
            except ValueError as error:
                if not self.skip_bad:
                    raise SourceError(
                        f"A line is not a JSON object: {error}.",
                        where=f"{self.file.place}: line {number}",
                        got=line[:200].decode("utf-8", "replace"),
                        remedy="Mend the line, or count and skip such rows with --skip-bad-rows.",
                    ) from error
                bad += 1
                continue
            rows.append(row)
            numbers.append(number)
        names = dict.fromkeys(name for row in rows for name in row)
        columns = {
            w.theirs: _inferred([row.get(w.theirs) for row in rows]) for w in self.wanted.values() if w.theirs in names
        }
        # A table of no columns has no rows; the count must survive for the missing column to be named.
        return pa.table(columns or {"": pa.nulls(len(rows))}), np.array(numbers, dtype=np.int64), bad


def _plain_lines(block: bytes) -> bool:
    """Whether a block is text, all its lines begin as objects, and none is long enough to be nested deeply.

    pyarrow's reader of JSON (26) ends the process on a line `null` at the beginning and on lists in lists by the
    thousand, and takes a line `null` further down for an object without values.
    """
    if not block.isascii():
        try:
            block.decode("utf-8")  # pyarrow takes names of columns as they are
        except UnicodeDecodeError:
            return False
    content = np.frombuffer(block, np.uint8)
    ends = np.flatnonzero(content == ord("\n"))
    starts = np.concatenate([[0], ends + 1])
    first = content[starts[starts < len(content)]]
    longest = int(np.diff(np.append(starts, len(content))).max())
    return bool(np.isin(first, np.frombuffer(b"{\r\n", np.uint8)).all()) and (
        longest < _LONG_LINE or max(block.count(b"["), block.count(b"{")) < _LONG_LINE // 2
    )


def _inferred(values: list) -> pa.Array:
    try:
        return pa.array(values)
    except (pa.ArrowInvalid, pa.ArrowTypeError, OverflowError):
        return pa.array(
            [None if v is None else v if isinstance(v, str) else json.dumps(v) for v in values], type=pa.string()
        )


def column_names(file: RawFile) -> list[str] | None:
    """The columns of a file, from its header or footer; None for JSON lines, which have neither."""
    kind = table_format(file)
    if kind == "json":
        return None
    with file.open() as raw:
        if kind == "parquet":
            return opened_parquet(file, raw).schema_arrow.names
        text = file.unpacked(raw)
        line = text.readline().decode("utf-8", "replace").lstrip("\ufeff").rstrip("\r\n")
    if not line:
        raise SourceError("The file is empty: it has no header.", where=file.place, remedy="Check the file.")
    return [name.strip('"') for name in line.split(delimiter_of(file))]


def delimiter_of(file: RawFile) -> str:
    """A tab for .tsv, otherwise a comma."""
    return "\t" if file.name.removesuffix(".gz").endswith(".tsv") else ","


def opened_parquet(file: RawFile, raw) -> pq.ParquetFile:
    """Opens a Parquet file.

    Raises:
        SourceError: It is truncated, or not Parquet.
    """
    try:
        return open_parquet(raw)
    except (pa.ArrowException, OSError) as error:
        raise SourceError(
            f"Not a whole Parquet file: {error}.", where=file.place, remedy="Get the file again."
        ) from error
