"""RawLog: what every source gives to preparation, as chunks that Ray tasks read in parallel and out of core.

A chunk is a small picklable object; `read` yields bounded tables. Columns of an events table: `key` (string: the
user), `item` (string), `label` (float32), `timestamp` (int64, seconds), and the raw event features. Of a task table:
`key` and the raw task features. Of an item table: `key`, `title` (string or null) and the raw item features.
Sources write all this of users and items as the log has them; with `prepare.task: item` both sides are then exchanged
(see `transposed`), and a task table may have a `title`.
A raw feature is string (categorical), list<string> (multi), float64 (numeric) or list<float> (vector); null is missing.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import pyarrow as pa

from metatrain.config import FeatureSource
from metatrain.data.sources.files import RawFile


class Rows(NamedTuple):
    """A piece of a raw table, and how many rows beside it could not be parsed and were skipped by choice."""

    table: pa.Table
    bad: int = 0


class Chunk(Protocol):
    """A part of a raw table that one Ray task reads."""

    def read(self) -> Iterator[Rows]:
        """Yields the part's rows, in the log's order, in pieces of bounded size."""
        ...


@dataclass(frozen=True)
class TableChunk:
    """A table that is in memory already: item and user tables of fixed, small size."""

    table: pa.Table

    def read(self) -> Iterator[Rows]:
        """Yields the table."""
        yield Rows(self.table)


@dataclass(frozen=True)
class Several:
    """Small chunks that one task reads one after the other."""

    chunks: tuple[Chunk, ...]

    def read(self) -> Iterator[Rows]:
        """Yields the rows of each."""
        for chunk in self.chunks:
            yield from chunk.read()


@dataclass(frozen=True)
class RawLog:
    """A raw log, opened but not read."""

    name: str
    events: Sequence[Chunk]
    #: About how many events there are: sets the number of partitions.
    events_estimate: int
    tasks: Sequence[Chunk] | None = None
    items: Sequence[Chunk] | None = None
    features: tuple[FeatureSource, ...] = ()
    facts: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    #: Every file that is read, by what it is for ("events", "users", …): while they hold the same, preparing again is
    #: idle.
    files: dict[str, list[RawFile]] = field(default_factory=dict)
    #: Rows of small tables that were skipped when the source was opened.
    bad_rows: int = 0


def raw_type(feature: FeatureSource) -> pa.DataType:
    """The Arrow type of a raw feature's column."""
    if feature.kind == "categorical":
        return pa.string()
    if feature.kind == "multi":
        return pa.list_(pa.string())
    return pa.float64() if feature.kind == "numeric" else pa.list_(pa.float32())
