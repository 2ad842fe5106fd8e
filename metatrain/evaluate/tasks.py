"""Tasks as padded arrays: what metrics and baselines see of a TaskBatch. No loop over tasks.

Symbols: T tasks, S support events (padded), Q query events (padded). Events keep their order; padding comes last,
with item 0, label 0 and mask False.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from metatrain.data.batch import TaskBatch
from metatrain.data.columns import stored, take

Array = np.ndarray


@dataclass(frozen=True)
class PaddedTasks:
    """Support and query of T tasks; items are catalogue rows."""

    tasks: Array  # int64 [T]: ordinals in the split
    support_items: Array  # int64 [T, S]
    support_labels: Array  # float64 [T, S]
    support_mask: Array  # bool [T, S]
    query_items: Array  # int64 [T, Q]
    query_labels: Array  # float64 [T, Q]
    query_mask: Array  # bool [T, Q]

    @property
    def size(self) -> int:
        """Number of tasks, T."""
        return int(self.tasks.shape[0])


def padded(batch: TaskBatch) -> PaddedTasks:
    """A batch of numpy columns as padded arrays."""
    items = np.asarray(batch.items)[np.asarray(batch.event_items)].astype(np.int64)
    labels = np.asarray(batch.labels, dtype=np.float64)
    support, query = np.asarray(batch.support_lengths), np.asarray(batch.query_lengths)
    starts = np.cumsum(support + query) - (support + query)
    support_index, support_mask = _positions(starts, support)
    query_index, query_mask = _positions(starts + support, query)

    def take(column: Array, index: Array, mask: Array) -> Array:
        if not column.size:
            return np.zeros(index.shape, dtype=column.dtype)
        return np.where(mask, column[index], 0)

    return PaddedTasks(
        np.asarray(batch.tasks),
        take(items, support_index, support_mask),
        take(labels, support_index, support_mask),
        support_mask,
        take(items, query_index, query_mask),
        take(labels, query_index, query_mask),
        query_mask,
    )


def newest_support(batch: TaskBatch, size: int) -> TaskBatch:
    """The batch with no more than the newest `size` support events of each task; the queries are as they were.

    Newest by timestamp; of events of the same second, those later in the batch. What stays keeps its order.
    """
    support, query = np.asarray(batch.support_lengths), np.asarray(batch.query_lengths)
    lengths = support + query
    task = np.repeat(np.arange(len(lengths)), lengths)
    position = np.arange(len(task))
    in_support = position - np.repeat(np.cumsum(lengths) - lengths, lengths) < np.repeat(support, lengths)
    # Query events go behind a task's support whatever their time, so that an event's place from the end of the
    # support is its age.
    order = np.lexsort((position, np.asarray(batch.timestamps), ~in_support, task))
    place = np.empty_like(position)
    place[order] = position
    age = np.repeat(np.cumsum(lengths) - query, lengths) - 1 - place  # 0: the newest; negative: query
    kept = age < size
    return replace(
        batch,
        support_lengths=np.minimum(support, size),
        event_items=np.asarray(batch.event_items)[kept],
        labels=np.asarray(batch.labels)[kept],
        timestamps=np.asarray(batch.timestamps)[kept],
        event_features={name: take(stored(c), np.flatnonzero(kept)) for name, c in batch.event_features.items()},
    )


def _positions(starts: Array, lengths: Array) -> tuple[Array, Array]:
    """Positions [T, L] of each task's events in the flat columns, 0 in padding, and their mask."""
    columns = np.arange(int(lengths.max(initial=0)))[None, :]
    mask = columns < lengths[:, None]
    return np.where(mask, starts[:, None] + columns, 0), mask
