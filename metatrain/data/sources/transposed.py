"""A raw log with its sides exchanged: its items are the tasks, its users the catalogue. Nothing else changes.

Sources read every log as users' events on items. With `prepare.task: item` what was the key of an event is its item and
the other way round, the table of items is that of the tasks (with the items' titles), the table of users that of the
catalogue, and features change level with their tables. All that comes after sees tasks and a catalogue as ever.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from metatrain.data.sources.rawlog import Chunk, RawLog, Rows

_COLUMNS = {"key": "item", "item": "key"}
_LEVELS = {"task": "item", "item": "task"}


@dataclass(frozen=True)
class TransposedEvents:
    """Events whose key and item are exchanged; in the log's order, which still settles ties of time."""

    chunk: Chunk

    def read(self) -> Iterator[Rows]:
        """Yields the events."""
        for table, bad in self.chunk.read():
            yield Rows(table.rename_columns([_COLUMNS.get(name, name) for name in table.column_names]), bad)


def transposed(raw: RawLog) -> RawLog:
    """The same log with items as tasks."""
    return replace(
        raw,
        events=[TransposedEvents(chunk) for chunk in raw.events],
        tasks=raw.items,
        items=raw.tasks,
        features=tuple(f.model_copy(update={"level": _LEVELS.get(f.level, f.level)}) for f in raw.features),
    )
