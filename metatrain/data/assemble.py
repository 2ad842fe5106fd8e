"""Batches from parts: item rows looked up once each, and their features gathered for those alone."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from metatrain.data.batch import Column, TaskBatch
from metatrain.data.columns import concatenate, missing, stored, take
from metatrain.data.schema import Feature, Level
from metatrain.errors import ConfigError, RequestError

if TYPE_CHECKING:
    from metatrain.data.dataset import TaskDataset
    from metatrain.data.schema import Schema

#: One task's support: catalogue rows int64 [S], labels float [S], timestamps int64 [S], in time order.
Support = tuple[np.ndarray, np.ndarray, np.ndarray]


def concatenate_batches(batches: Sequence[TaskBatch]) -> TaskBatch:
    """The batches' tasks behind one another, each item once: equal to the batch that one reader would have made."""
    if len(batches) == 1:
        return batches[0]
    every = np.concatenate([b.items for b in batches])
    items, first, position = np.unique(every, return_index=True, return_inverse=True)
    position = position.astype(np.int32)
    before = np.cumsum([0, *(len(b.items) for b in batches)])
    times = [b.timestamps for b in batches if b.timestamps is not None]

    def joined(columns: Sequence[dict[str, Column]]) -> dict[str, Column]:
        return {name: concatenate([c[name] for c in columns]) for name in columns[0]}

    return TaskBatch(
        tasks=np.concatenate([b.tasks for b in batches]),
        support_lengths=np.concatenate([b.support_lengths for b in batches]),
        query_lengths=np.concatenate([b.query_lengths for b in batches]),
        items=items,
        event_items=np.concatenate([position[b.event_items + before[i]] for i, b in enumerate(batches)]),
        labels=np.concatenate([b.labels for b in batches]),
        timestamps=np.concatenate(times) if times else None,
        task_features=joined([b.task_features for b in batches]),
        item_features={
            name: take(stored(column), first) for name, column in joined([b.item_features for b in batches]).items()
        },
        event_features=joined([b.event_features for b in batches]),
        skipped=sum(b.skipped for b in batches),
    )


def batch_from_events(
    dataset: TaskDataset,
    supports: Sequence[Support],
    queries: Sequence[np.ndarray],
    task_features: Mapping[str, Column] | None = None,
    event_features: Mapping[str, Column] | None = None,
    features: Sequence[str] | None = None,
) -> TaskBatch:
    """A batch of tasks that are in no shard: people who ask for recommendations.

    Args:
        dataset: Whose catalogue and schema the tasks use.
        supports: Each task's events; T of them.
        queries: The catalogue rows to score for each task: T arrays int64 [Q_t].
        task_features: Encoded columns of T rows; a feature that isn't given is missing in all.
        event_features: Encoded columns of N rows, in the batch's order (a task's support, then its query).
        features: Names of the features to fill in. Default: all of the schema's.

    Returns:
        Labels of the query are 0, its timestamps the task's latest of the support (0 where there is none).

    Raises:
        RequestError: A catalogue row that does not exist (an unknown item's -1, for one), or lists that differ in
            length.
    """
    if len(supports) != len(queries):
        raise RequestError("Supports and queries are of different tasks.", got=f"{len(supports)} and {len(queries)}")
    support_lengths = np.array([len(s[0]) for s in supports], np.int64)
    query_lengths = np.array([len(q) for q in queries], np.int64)
    latest = np.array([s[2][-1] if len(s[2]) else 0 for s in supports], np.int64)
    rows = _interleaved([s[0] for s in supports], queries, np.int64)
    catalogue = len(dataset.catalogue.new)
    if len(rows) and (rows.min() < 0 or rows.max() >= catalogue):
        raise RequestError(
            "An item is not in the catalogue.",
            got=f"rows {rows.min()} to {rows.max()} of {catalogue}",
            remedy="Leave unknown items out, and count them, before making a batch.",
        )
    zeros = [np.zeros(n, np.float32) for n in query_lengths]
    times = np.split(np.repeat(latest, query_lengths), np.cumsum(query_lengths)[:-1])
    items, event_items = np.unique(rows, return_inverse=True)
    wanted = features_of(dataset.schema, features)
    return TaskBatch(
        tasks=np.arange(len(supports)),
        support_lengths=support_lengths,
        query_lengths=query_lengths,
        items=items.astype(np.int32),
        event_items=event_items.astype(np.int32),
        labels=_interleaved([s[1] for s in supports], zeros, np.float32),
        timestamps=_interleaved([s[2] for s in supports], times, np.int64),
        task_features=_given(wanted[Level.TASK], task_features or {}, len(supports)),
        item_features={f.name: take(stored(dataset.catalogue.features[f.name]), items) for f in wanted[Level.ITEM]},
        event_features=_given(wanted[Level.EVENT], event_features or {}, len(rows)),
    )


def features_of(schema: Schema, names: Sequence[str] | None) -> dict[Level, tuple[Feature, ...]]:
    """The features of each level to read: all, or those named.

    Raises:
        ConfigError: A name that the schema does not have.
    """
    known = [f.name for f in schema.features]
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise ConfigError(
            "The dataset has no such feature.",
            got=", ".join(unknown),
            remedy=f"Name features of the dataset: {', '.join(known)}.",
        )
    return {level: tuple(f for f in schema.of(level) if names is None or f.name in names) for level in Level}


def _given(wanted: Sequence[Feature], given: Mapping[str, Column], rows: int) -> dict[str, Column]:
    return {f.name: given[f.name] if f.name in given else missing(f, rows) for f in wanted}


def _interleaved(supports: Sequence[np.ndarray], queries: Sequence[np.ndarray], kind: type) -> np.ndarray:
    parts = [np.asarray(part, kind) for pair in zip(supports, queries, strict=True) for part in pair]
    return np.concatenate([np.zeros(0, kind), *parts])
