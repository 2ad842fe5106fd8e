"""Generic event logs: Parquet, CSV or JSON lines; one file, a folder, a pattern, a zip archive; at any fsspec URL.

`prepare.columns` maps the columns, `prepare.features` names the features; users and items may have tables of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from metatrain.config import FeatureSource, ItemSplit, PrepareConfig, UserSplit
from metatrain.data.sources.checks import Check
from metatrain.data.sources.chunks import table_chunks
from metatrain.data.sources.files import RawFile, find_files
from metatrain.data.sources.labels import label_check, labelled
from metatrain.data.sources.rawlog import Chunk, RawLog, Rows
from metatrain.data.sources.tables import Wanted, column_names
from metatrain.data.sources.text import missing_column
from metatrain.errors import ConfigError


@dataclass(frozen=True)
class EventsChunk:
    """A part of the log, its labels as they are trained on."""

    part: Chunk
    threshold: float | None

    def read(self) -> Iterator[Rows]:
        """Yields events."""
        for rows in self.part.read():
            t = rows.table
            if "label" in t.column_names:
                label = labelled(t["label"], self.threshold)
                t = t.set_column(t.column_names.index("label"), "label", label)
            else:
                t = t.append_column("label", pa.array(np.ones(t.num_rows, np.float32)))
            yield Rows(t, rows.bad)


def read_events(config: PrepareConfig) -> RawLog:
    """Opens a generic log.

    Raises:
        ConfigError: No path; features of a table that isn't named.
        SourceError: No files, or a missing column.
    """
    if config.path is None:
        raise ConfigError(
            "The source `events` needs a path.", where="prepare.path", remedy="Give a file, folder, pattern or URL."
        )
    for level, table in (("task", config.users), ("item", config.items)):
        without = [f.name for f in config.features if f.level == level and table is None]
        if without:
            field = "users" if level == "task" else "items"
            raise ConfigError(
                f"A feature of level {level} needs the table of {field}.",
                where="prepare.features",
                got=without[0],
                remedy=f"Name the table in `prepare.{field}`.",
            )
    c = config.columns
    wanted = {
        "key": Wanted(c.task, Check.KEY),
        "item": Wanted(c.item, Check.KEY),
        "timestamp": Wanted(c.timestamp, Check.TIME),
    }
    if c.label is not None:
        wanted["label"] = Wanted(c.label, label_check(config))
    files = find_files(config.path)
    chunks, rows = _chunks(files, wanted, config, "event")
    users = find_files(config.users) if config.users else []
    items = find_files(config.items) if config.items else []
    of_users, of_items = config.user_split, config.item_split
    if config.task == "item":
        of_users, of_items = of_items, of_users
    tasks = item_chunks = None
    if users:
        extra = _split_column(of_users)
        tasks = _chunks(users, {"key": Wanted(c.task, Check.KEY)} | extra, config, "task")[0]
    if items:
        names = column_names(items[0])
        title = {"title": Wanted("title", Check.TEXT)} if names is None or "title" in names else {}
        extra = _split_column(of_items)
        item_chunks = _chunks(items, {"key": Wanted(c.item, Check.KEY)} | title | extra, config, "item")[0]
    return RawLog(
        name="events",
        events=[EventsChunk(chunk, config.click_threshold) for chunk in chunks],
        events_estimate=rows,
        tasks=tasks,
        items=item_chunks,
        features=config.features,
        facts={"files": len(files)},
        files={"events": files, "users": users, "items": items},
    )


def _chunks(
    files: list[RawFile], wanted: dict[str, Wanted], config: PrepareConfig, level: str
) -> tuple[list[Chunk], int]:
    features: list[FeatureSource] = [f for f in config.features if f.level == level]
    wanted = wanted | {f.name: Wanted(f.name, f) for f in features}
    names = column_names(files[0])
    # Refused here, before Ray starts, when the first file shows it already.
    for w in wanted.values():
        if names is not None and w.theirs not in names:
            raise missing_column(w.theirs, names, files[0].place)
    return table_chunks(files, wanted, config.skip_bad_rows)


def _split_column(split: UserSplit | ItemSplit) -> dict[str, Wanted]:
    """The column of a side's table that its split reads."""
    if split.column is None:
        return {}
    return {split.column: Wanted(split.column, Check.NUMBER if split.by == "time" else Check.TEXT)}
