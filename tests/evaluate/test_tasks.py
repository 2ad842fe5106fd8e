"""Padding and truncation of batches against loops that are slow and obvious."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metatrain.data.batch import Ragged, TaskBatch
from metatrain.evaluate.tasks import newest_support, padded


def batch_of(support: list[int], query: list[int], seed: int) -> TaskBatch:
    generator = np.random.default_rng(seed)
    count = sum(support) + sum(query)
    items = np.unique(generator.integers(0, 50, size=8))
    lengths = generator.integers(0, 3, size=count)
    return TaskBatch(
        tasks=np.arange(len(support)) + 100,
        support_lengths=np.array(support, np.int64),
        query_lengths=np.array(query, np.int64),
        items=items,
        event_items=generator.integers(0, len(items), size=count),
        labels=generator.integers(1, 6, size=count).astype(np.float32),
        timestamps=generator.integers(0, 6, size=count),  # many ties
        event_features={
            "place": generator.integers(0, 9, size=count),
            "words": Ragged(generator.integers(0, 9, size=int(lengths.sum())), lengths),
        },
    )


def events_of(batch: TaskBatch) -> list[tuple[list, list]]:
    """Each task's support and query: (item, label, time, place, words) of each event."""
    words = np.split(batch.event_features["words"].values, np.cumsum(batch.event_features["words"].lengths)[:-1])
    rows = [
        (int(batch.items[i]), float(y), int(t), int(p), tuple(w.tolist()))
        for i, y, t, p, w in zip(
            batch.event_items, batch.labels, batch.timestamps, batch.event_features["place"], words, strict=True
        )
    ]
    tasks, start = [], 0
    for s, q in zip(batch.support_lengths, batch.query_lengths, strict=True):
        tasks.append((rows[start : start + s], rows[start + s : start + s + q]))
        start += s + q
    return tasks


sizes = st.lists(st.tuples(st.integers(0, 5), st.integers(1, 4)), min_size=1, max_size=5)


@settings(max_examples=100, deadline=None)
@given(sizes, st.integers(0, 1000))
def test_padded_holds_every_event_once(lengths, seed):
    batch = batch_of([s for s, _ in lengths], [q for _, q in lengths], seed)
    tasks = padded(batch)
    for t, (support, query) in enumerate(events_of(batch)):
        for items, labels, mask, events in (
            (tasks.support_items, tasks.support_labels, tasks.support_mask, support),
            (tasks.query_items, tasks.query_labels, tasks.query_mask, query),
        ):
            assert mask[t].tolist() == [n < len(events) for n in range(mask.shape[1])]
            assert items[t][mask[t]].tolist() == [e[0] for e in events]
            assert labels[t][mask[t]].tolist() == [e[1] for e in events]


@settings(max_examples=100, deadline=None)
@given(sizes, st.integers(0, 6), st.integers(0, 1000))
def test_newest_support_keeps_the_newest_and_all_of_the_query(lengths, size, seed):
    batch = batch_of([s for s, _ in lengths], [q for _, q in lengths], seed)
    short = newest_support(batch, size)
    for (support, query), (kept, same) in zip(events_of(batch), events_of(short), strict=True):
        newest = sorted(range(len(support)), key=lambda n: (support[n][2], n))[max(0, len(support) - size) :]
        assert kept == [support[n] for n in sorted(newest)]
        assert same == query


def test_padding_of_no_task():
    empty = padded(batch_of([], [], 0))
    assert empty.size == 0
    assert empty.query_items.shape == (0, 0)


@pytest.mark.parametrize("size", [0, 3])
def test_tasks_without_support(size):
    short = newest_support(batch_of([0, 0], [2, 1], 3), size)
    assert short.support_lengths.tolist() == [0, 0]
    assert len(short.labels) == 3
