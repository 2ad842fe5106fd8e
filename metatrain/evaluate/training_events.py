"""Training users' events as the baselines are fitted on: flat columns of bounded size."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from metatrain.data.batch import TaskBatch

Array = np.ndarray


@dataclass(frozen=True)
class TrainingEvents:
    """Training users' events behind one another; `limited` where only the first users were read."""

    users: Array  # int32 [N]: 0, 1, …, ascending
    items: Array  # int32 [N]
    labels: Array  # float32 [N]
    user_count: int
    item_count: int
    limited: bool = False

    @property
    def mean(self) -> float:
        """The labels' mean."""
        return float(self.labels.mean(dtype=np.float64)) if self.labels.size else 0.0


def training_events(batches: Iterable[TaskBatch], item_count: int, limit: int = 5_000_000) -> TrainingEvents:
    """Collects events, 12 bytes each, stopping after the batch that reaches `limit`: memory has a bound.

    Users lie in the shards by a hash of their key, so the first ones are a fair sample of all.
    """
    users, items, labels, count, total, limited = [], [], [], 0, 0, False
    for batch in batches:
        if total >= limit:
            limited = True
            break
        lengths = np.asarray(batch.support_lengths) + np.asarray(batch.query_lengths)
        users.append((count + np.repeat(np.arange(len(lengths)), lengths)).astype(np.int32))
        items.append(np.asarray(batch.items)[np.asarray(batch.event_items)].astype(np.int32))
        labels.append(np.asarray(batch.labels, dtype=np.float32))
        count, total = count + len(lengths), total + len(labels[-1])
    empty = [np.zeros(0, np.int32)]
    return TrainingEvents(
        np.concatenate(users or empty),
        np.concatenate(items or empty),
        np.concatenate(labels or [np.zeros(0, np.float32)]),
        count,
        item_count,
        limited,
    )
