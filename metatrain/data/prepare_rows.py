"""Raw rows as preparation moves them: one shape for each kind of table, whatever the source. No Ray.

- EVENT  an event: `key`, `item`, `label`, `timestamp`, `event:NAME` raw features
- TASK   a row of the tasks' table (the user table; the item table, where items are tasks, then with `title`): `key`,
         `split` where the split is a column of that table, `task:NAME` raw features
- GIVEN  a row of a split file: `key`, `split`

A large user table or split file is partitioned like the events, so none is ever held whole.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum

import pyarrow as pa

from metatrain.config import FeatureSource, PrepareConfig
from metatrain.data.sources.rawlog import Chunk, Rows, raw_type
from metatrain.errors import SourceError


class RowKind(StrEnum):
    """Which table a row is of."""

    EVENT = "event"
    TASK = "task"
    GIVEN = "given"


@dataclass(frozen=True)
class Reading:
    """A chunk to read, and what its rows are."""

    chunk: Chunk
    kind: RowKind
    number: int  # of the chunk in its table, which orders events of the same time


def row_schema(kind: RowKind, features: tuple[FeatureSource, ...], config: PrepareConfig) -> pa.Schema:
    """The columns of a kind's rows."""
    fields = [("key", pa.string())]
    if kind is RowKind.EVENT:
        fields += [("item", pa.string()), ("label", pa.float32()), ("timestamp", pa.int64())]
    else:
        fields += [("split", pa.string())]
    if kind is RowKind.TASK and config.task == "item":
        fields += [("title", pa.string())]
    fields += [(f"{f.level}:{f.name}", raw_type(f)) for f in features if f.level == kind.value]
    return pa.schema(fields)


def read_rows(reading: Reading, config: PrepareConfig, features: tuple[FeatureSource, ...]) -> Iterator[Rows]:
    """A chunk's rows in the columns of `row_schema`, in the log's order.

    Raises:
        SourceError: What the chunk raises.
    """
    schema = row_schema(reading.kind, features, config)
    column = config.user_split.column
    for table, bad in reading.chunk.read():
        columns = {name: table[name] for name in schema.names if name in table.column_names}
        if table.num_rows:
            if reading.kind is RowKind.TASK and column:
                columns["split"] = _column(table, column, config)
            columns |= {
                f"{f.level}:{f.name}": _column(table, f.name, config) for f in features if f.level == reading.kind
            }
        yield Rows(_conformed(columns, table.num_rows, schema), bad)


def _column(table: pa.Table, name: str, config: PrepareConfig) -> pa.ChunkedArray:
    if name not in table.column_names:
        raise SourceError(
            f"A column is missing: {name}.",
            where=f"the {config.task} table",
            got=", ".join(table.column_names),
            remedy="Check `prepare.user_split.column` and `prepare.features`.",
        )
    return table[name]


def _conformed(columns: dict[str, pa.ChunkedArray], n: int, schema: pa.Schema) -> pa.Table:
    return pa.table(
        [columns[f.name].cast(f.type) if f.name in columns else pa.nulls(n, f.type) for f in schema], schema=schema
    )
