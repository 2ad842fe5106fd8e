"""Shuffle windows: the row groups a lane has open, decoded to columns once and kept until the lane has passed them.

At most one window a lane is open (two while a batch spans both; and, reading ahead, the next one).
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import pyarrow as pa

from metatrain.data.columns import Stored, feature_column, jagged, keep, numbers
from metatrain.data.plan import EpochPlan, Slice
from metatrain.data.schema import Feature, Level
from metatrain.data.shards import REMEDY, Shards
from metatrain.errors import DatasetError


@dataclass(frozen=True)
class Window:
    """The tasks of one shuffle window as columns: n tasks, E events of the item set behind one another."""

    offsets: np.ndarray  # int64 [n + 1]: events of a task
    items: np.ndarray  # int [E]: catalogue rows
    labels: np.ndarray  # float32 [E]
    timestamps: np.ndarray  # int64 [E]
    task_features: dict[str, Stored]  # n rows
    event_features: dict[str, Stored]  # E rows
    keys: pa.Array | None  # [n]


class Windows:
    """The open windows of one split.

    Args:
        shards: The split's row groups.
        features: The features to read, by level.
        catalogue_rows: Items of the catalogue.
        counts: Whether the events of an item count: bool [catalogue_rows]; the others are left out. None: all count.
        keys: Whether the tasks' keys are read.
        ahead: Whether a thread reads a lane's next window while the open one is used.
    """

    def __init__(
        self,
        shards: Shards,
        features: dict[Level, tuple[Feature, ...]],
        catalogue_rows: int,
        counts: np.ndarray | None,
        *,
        keys: bool,
        ahead: bool,
    ) -> None:
        self._shards, self._features, self._catalogue_rows, self._counts = shards, features, catalogue_rows, counts
        self._keys = keys
        self._open: dict[tuple[int, int, int], Window | Future[Window]] = {}
        self._ahead = ThreadPoolExecutor(1, "read-ahead") if ahead else None
        self._reading = threading.Lock()

    def of(self, plan: EpochPlan, piece: Slice) -> Window:
        """The window of this slice, read where it is not open; the lane's other windows are closed.

        Raises:
            DatasetError: A shard that is missing, broken, or not as the manifest says.
        """
        mine, following = ((plan.epoch, piece.lane, window) for window in (piece.window, piece.window + 1))
        for passed in [key for key in self._open if key[1] == piece.lane and key not in (mine, following)]:
            del self._open[passed]
        found = self._open.get(mine)
        if isinstance(found, Future):
            found = found.result()
        if found is None:
            found = self._load(piece.row_groups)
        self._open[mine] = found
        if self._ahead and following not in self._open:
            coming = plan.window_row_groups(piece.lane, piece.window + 1)
            if len(coming):
                self._open[following] = self._ahead.submit(self._load, coming)
        return found

    @cached_property
    def empty(self) -> Window:
        """Columns of the right types without a row."""
        if not len(self._shards.row_groups):
            raise DatasetError(
                "This split has no task.",
                where=self._shards.url,
                remedy="Prepare the dataset with a larger share for it (prepare.user_split).",
            )
        first = np.zeros(1, np.int64)
        with self._reading:
            table = self._shards.read(first, self._names)
        return self._decoded(table.slice(0, 0), first)

    def close(self) -> None:
        """Closes windows and files, and ends the read-ahead."""
        if self._ahead:
            self._ahead.shutdown(wait=True, cancel_futures=True)
        self._open.clear()
        self._shards.close()

    @cached_property
    def _names(self) -> Sequence[str]:
        tasks, events = ([f.name for f in self._features[level]] for level in (Level.TASK, Level.EVENT))
        own = ["items", "labels", "timestamps", *(["key"] if self._keys else [])]
        return [*own, *(f"task:{name}" for name in tasks), *(f"event:{name}" for name in events)]

    def _load(self, row_groups: np.ndarray) -> Window:
        with self._reading:  # the read-ahead thread shares the open files
            table = self._shards.read(row_groups, self._names)
        return self._decoded(table, row_groups)

    def _decoded(self, table: pa.Table, row_groups: np.ndarray) -> Window:
        name = "items"
        try:
            offsets, values = jagged(_single(table[name]))
            items = numbers(values, "integer")
            if len(items) and (items.min() < 0 or items.max() >= self._catalogue_rows):
                raise ValueError(f"catalogue rows below {self._catalogue_rows} were expected, not {items.max()}")
            name = "timestamps"
            timestamps = numbers(_values(table[name], offsets), "integer")
            name = "labels"
            labels = numbers(_values(table[name], offsets), "float")
            if not np.isfinite(labels).all():
                raise ValueError("finite numbers were expected")
            events: dict[str, Stored] = {}
            for feature in self._features[Level.EVENT]:
                name = f"event:{feature.name}"
                events[feature.name] = feature_column(_values(table[name], offsets), feature)
            tasks: dict[str, Stored] = {}
            for feature in self._features[Level.TASK]:
                name = f"task:{feature.name}"
                tasks[feature.name] = feature_column(_single(table[name]), feature)
        except ValueError as error:
            raise DatasetError(
                f"A shard's column is not what the manifest says: {error}.",
                where=f"column {name} of {self._shards.place(row_groups)}",
                remedy=REMEDY,
            ) from error
        if self._counts is not None:
            counts = self._counts[items]
            offsets = np.concatenate([np.zeros(1, np.int64), np.cumsum(counts)])[offsets]
            items, labels, timestamps = items[counts], labels[counts], timestamps[counts]
            events = {name: keep(column, counts) for name, column in events.items()}
        return Window(offsets, items, labels, timestamps, tasks, events, _single(table["key"]) if self._keys else None)


def _single(column: pa.ChunkedArray) -> pa.Array:
    if not column.num_chunks:
        return pa.array([], column.type)
    return column.chunk(0) if column.num_chunks == 1 else pa.concat_arrays(column.chunks)


def _values(column: pa.ChunkedArray, offsets: np.ndarray) -> pa.Array:
    """The values of an event column, whose lists must be as long as the tasks' items."""
    own, values = jagged(_single(column))
    if not np.array_equal(own, offsets):
        raise ValueError("lists of one task differ in length")
    return values
