"""Where a batch's events lie once they are padded, and each task's own rows of the features that adapt.

Symbols: T tasks, N events, E events of a task (padded), P padded places of all buckets together, M ids of a feature in
one event (padded), R rows of an adapted feature in a task (padded), D embedding width, C candidates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from metatrain.data.batch import TaskBatch
from metatrain.meta.buckets import Bucket
from metatrain.meta.episode import Slots
from metatrain.model.picking import picked, side_by_side

# Fills the places of `TaskRows.ids` that hold no row. Greater than any id, so that a task's ids stay in order.
_NO_ROW = torch.iinfo(torch.int64).max


class TaskRows(NamedTuple):
    """One adapted feature's rows of T tasks."""

    rows: Tensor  # [T, R, D]
    ids: Tensor  # int64 [T, R], ascending, then a filler


@dataclass(frozen=True)
class Places:
    """The P places of all buckets, padding included: of each bucket its support, T' × E places, then its query."""

    buckets: tuple[Bucket, ...]
    task: Tensor  # int64 [P] into T
    event: Tensor  # int64 [P] into N; 0 where padded
    mask: Tensor  # bool [P]
    shapes: tuple[tuple[int, int], ...]  # (T', E), two a bucket

    def split(self, values: Tensor) -> list[Tensor]:
        """[P, …] → support and query of every bucket, each [T', E, …]."""
        return self._shaped(values.split(self._sizes))

    def picked(self, tables: Sequence[Tensor], indices: Sequence[Tensor]) -> list[Tensor]:
        """tables[i][indices[i]] side by side, [nᵢ, Fᵢ] and integers [P], split as `split` does; zeros where padded."""
        return self._shaped(side_by_side(tables, indices, self.mask, self._sizes))

    @property
    def _sizes(self) -> list[int]:
        return [tasks * events for tasks, events in self.shapes]

    def _shaped(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]


def whole(batch: TaskBatch) -> Bucket:
    """All tasks in their order, padded to the longest."""
    longest = (int(n.max()) if n.numel() else 0 for n in (batch.support_lengths, batch.query_lengths))
    return Bucket(torch.arange(batch.size, device=batch.tasks.device), *(max(1, n) for n in longest))


def places(batch: TaskBatch, buckets: Sequence[Bucket]) -> Places:
    """The places of the buckets' tasks."""
    # A task's support comes first among its events, and its query follows.
    first = (batch.support_lengths + batch.query_lengths).cumsum(0) - batch.support_lengths - batch.query_lengths
    events, masks, tasks, shapes = [], [], [], []
    for bucket in buckets:
        of = bucket.tasks
        start, support = first[of], batch.support_lengths[of]
        for begin, lengths, longest in (
            (start, support, bucket.support),
            (start + support, batch.query_lengths[of], bucket.query),
        ):
            place = torch.arange(longest, device=of.device)
            mask = place < lengths[:, None]
            events.append(((begin[:, None] + place) * mask).flatten())
            masks.append(mask.flatten())
            tasks.append(of.repeat_interleave(longest))
            shapes.append((len(of), longest))
    return Places(tuple(buckets), torch.cat(tasks), torch.cat(events), torch.cat(masks), tuple(shapes))


def candidate_slots(row_ids: Tensor, ids: Tensor, lengths: Tensor) -> Slots:
    """Slots of C candidates that every task looks at: a task's own row where it has one, else the shared row.

    Args:
        row_ids: A task's adapted ids, [T, R] (`TaskRows.ids`).
        ids: The candidates' ids, flat [n].
        lengths: Ids of each candidate, [C].

    Returns:
        Slots [T, C, M] into R + n rows: the task's own, then one for each of `ids`.
    """
    tasks, own = row_ids.shape
    everyone = ids.expand(tasks, -1).contiguous()
    place = torch.searchsorted(row_ids, everyone).clamp(max=own - 1)
    shared = torch.arange(ids.shape[0], device=ids.device) + own
    slot_of_id = torch.where(row_ids.gather(1, place) == everyone, place, shared)  # [T, n]
    candidates = torch.arange(lengths.shape[0], device=ids.device)[None]
    found, used = occurrences(candidates, torch.ones_like(candidates, dtype=torch.bool), lengths)
    index = slot_of_id[:, found[0]] if ids.shape[0] else found.expand(tasks, -1, -1)
    return Slots(index, used.to(torch.float32).expand(tasks, -1, -1))


def occurrences(entities: Tensor, present: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the entities' ids in the flat ids, [P, M], and which of them are in use (bool)."""
    most = max(1, int(lengths.max())) if lengths.numel() else 1
    place = torch.arange(most, device=lengths.device)
    count = picked(lengths[:, None], entities)
    used = (place < count) & present.unsqueeze(-1)
    return (picked((lengths.cumsum(0) - lengths)[:, None], entities) + place) * used, used


def rows_of_tasks(
    found: Tensor, used: Tensor, owner: Tensor, counts: list[int], rows: Tensor, ids: Tensor, table_rows: int
) -> tuple[list[TaskRows], Slots]:
    """Each task's distinct ids, as rows of its own.

    Args:
        found, used: Occurrences of ids at P places, [P, M].
        owner: The task of each place, [P], numbered as the tasks lie in the buckets.
        counts: Tasks of each bucket.
        rows: The looked-up row of each of `ids`.
        ids: Into a table of `table_rows` rows.

    Returns:
        `TaskRows` of each bucket, padded to its longest, and the slot of each occurrence: `Slots` of [P, M].
    """
    tasks, device = sum(counts), found.device
    occurrence = found[used]
    pairs, which = torch.unique(
        owner[:, None].expand_as(found)[used] * table_rows + ids[occurrence], return_inverse=True
    )
    task = pairs // table_rows
    own_counts = torch.bincount(task, minlength=tasks)
    slot = torch.arange(pairs.shape[0], device=device) - (own_counts.cumsum(0) - own_counts)[task]
    most = [max(1, int(of_bucket.max())) if of_bucket.numel() else 1 for of_bucket in own_counts.split(counts)]
    width = torch.repeat_interleave(torch.tensor(most, device=device), torch.tensor(counts, device=device))
    sizes = [n * m for n, m in zip(counts, most, strict=True)]
    # Equal ids have equal rows, so any occurrence will do; the first, so that it is always the same.
    first = torch.full_like(pairs, _NO_ROW).scatter_reduce(0, which, occurrence, "amin")
    place = (width.cumsum(0) - width)[task] + slot
    own = torch.zeros(sum(sizes), rows.shape[1], dtype=rows.dtype, device=device)
    own = own.index_copy(0, place, rows.index_select(0, first)).split(sizes)
    own_ids = torch.full((sum(sizes),), _NO_ROW, device=device).index_copy(0, place, pairs % table_rows).split(sizes)
    slots = torch.zeros_like(found)
    slots[used] = slot[which]
    parts = zip(own, own_ids, counts, most, strict=True)
    return [TaskRows(r.view(n, m, rows.shape[1]), i.view(n, m)) for r, i, n, m in parts], Slots(
        slots, used.to(torch.float32)
    )
