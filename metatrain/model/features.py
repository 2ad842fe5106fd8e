"""Features of a batch as a base learner's inputs: from ids to looked-up rows to padded episodes.

An event's input is its task's features, its item's and its own, each group in the schema's order; features whose
rows adapt are left out of it and delivered apart, as each task's own rows and the slots that its events use.
Timestamps are not inputs. Padding is zero.

Symbols: T tasks, N events, U items, E events of a task (padded), P padded places (see `places`), R rows of an adapted
feature in a task (padded), D embedding width, n entities of a level: T, U or N.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from metatrain.config import ModelConfig
from metatrain.data.batch import Column, Ragged, TaskBatch
from metatrain.data.schema import ITEM_FEATURE, Feature, Kind, Level, Schema
from metatrain.meta.buckets import Bucket
from metatrain.meta.episode import Episodes, Examples, Slots
from metatrain.meta.layout import Columns, Layout
from metatrain.model import hashing
from metatrain.model.choices import TableSpec, chosen_features, table_specs
from metatrain.model.picking import picked
from metatrain.model.places import Places, TaskRows, occurrences, places, rows_of_tasks, whole

# Keeps this draw apart from that of `id_dropout`.
_SUPPORTS = hashing.of_name("support_dropout")


@dataclass(frozen=True)
class Assembled:
    """Tasks of a bucket ready for the meta-learner, and what scoring further items of its tasks needs."""

    episodes: Episodes
    task_x: Tensor  # [T, F_task]: the tasks' part of the input
    row_ids: dict[str, Tensor]  # adapted feature → [T, R]
    task_slots: dict[str, Slots]  # adapted feature of the task → [T, 1, M]


class _Adapted(NamedTuple):
    """One adapted feature in all buckets."""

    rows: list[TaskRows]  # one a bucket
    slots: list[Slots]  # of its support and of its query: two a bucket
    of_tasks: list[Slots]  # of the task itself, one a bucket; none where the feature is not the task's


class Featurizer(nn.Module):
    """Turns batches into episodes. It has no parameters of its own: rows come from `Tables`.

    Args:
        schema: The dataset's features.
        config: `features` chooses among them; `id_dropout` and `support_dropout` are what training hides.
        adapt_rows: Features whose rows adapt.
        seed: Of the dropout.

    Raises:
        ConfigError: A name that is no feature, or an adapted feature without embedding rows.
    """

    def __init__(self, schema: Schema, config: ModelConfig, adapt_rows: Iterable[str] = (), seed: int = 0) -> None:
        super().__init__()
        self.features, self.adapted = chosen_features(schema, config, adapt_rows)
        self._id_dropout, self._numeric_scale, self._seed = config.id_dropout, config.numeric_scale, seed
        self._support_dropout = config.support_dropout
        self._fixed = {
            level: tuple(f for f in self.features if f.level is level and f.name not in self.adapted) for level in Level
        }

    @property
    def layout(self) -> Layout:
        """Whose the columns of a base learner's input are: fixed inputs, then the adapted features."""
        ordered = [f for level in Level for f in self._fixed[level]] + list(self.adapted.values())
        stops = itertools.accumulate(map(_width, ordered))
        return Layout(
            tuple(Columns(f.name, f.level.value, s - _width(f), s) for f, s in zip(ordered, stops, strict=True))
        )

    @property
    def width(self) -> int:
        """Width of a base learner's input."""
        return self.layout.width

    @property
    def row_widths(self) -> dict[str, int]:
        """Embedding width of each adapted feature."""
        return {name: _width(feature) for name, feature in self.adapted.items()}

    @property
    def fixed_width(self) -> int:
        """Width of the fixed inputs alone."""
        return self.width - sum(self.row_widths.values())

    def table_specs(self) -> list[TableSpec]:
        """The tables that the features need."""
        return table_specs(self.features)

    def ids(self, batch: TaskBatch, step: int | None = None) -> dict[str, Tensor]:
        """Embedded feature → its ids in the batch, flat: one a task, item or event, or as many as a `Ragged` has.

        Args:
            batch: Tensors.
            step: The training step, for `id_dropout`, which hides an item's id (as 0, unknown) by a hash of seed,
                step and item alone: the same at any world size. None: nothing is hidden.
        """
        ids: dict[str, Tensor] = {}
        for feature in self.features:
            if feature.embedded:
                column = _columns(batch, feature.level)[feature.name]
                ids[feature.name] = column.values if isinstance(column, Ragged) else column
        if step is not None and self._id_dropout > 0 and ITEM_FEATURE in ids:
            hidden = hashing.chosen(self._id_dropout, self._seed, step, batch.items)
            ids[ITEM_FEATURE] = ids[ITEM_FEATURE].masked_fill(hidden, 0)
        return ids

    def without_supports(
        self, assembled: Sequence[Assembled], tasks: Tensor, buckets: Sequence[Bucket], step: int
    ) -> list[Assembled]:
        """A training step's episodes, the supports of a share of tasks hidden (`support_dropout`) by a hash of seed,
        step and task alone: the same at any world size.

        Args:
            assembled: A step's, one a bucket.
            tasks: The batch's ordinals of tasks, int64 [T].
            buckets: Whose they are.
            step: The training step.
        """
        if self._support_dropout <= 0:
            return list(assembled)
        seen = ~hashing.chosen(self._support_dropout, self._seed, step, _SUPPORTS, tasks)

        def some(one: Assembled, bucket: Bucket) -> Assembled:
            support = one.episodes.support
            mask = support.mask * seen[bucket.tasks, None].to(support.mask.dtype)
            return replace(one, episodes=replace(one.episodes, support=replace(support, mask=mask)))

        return [some(one, bucket) for one, bucket in zip(assembled, buckets, strict=True)]

    def vectors(self, level: Level, columns: Mapping[str, Column], rows: Mapping[str, Tensor], n: int) -> Tensor:
        """The fixed inputs of a level's entities: [n, F_level]. Multi-valued features are means over their ids."""
        device = next(iter(rows.values())).device if rows else _device(columns)
        parts = [torch.zeros(n, 0, device=device)]
        for feature in self._fixed[level]:
            column = columns[feature.name]
            if feature.embedded:
                parts.append(pooled(column, rows[feature.name]))
            else:
                assert isinstance(column, Tensor)
                parts.append(column.to(torch.float32).reshape(n, _width(feature)) * self._numeric_scale)
        return torch.cat(parts, dim=1)

    def assemble(
        self,
        batch: TaskBatch,
        rows: Mapping[str, Tensor],
        ids: Mapping[str, Tensor],
        buckets: Sequence[Bucket] | None = None,
        represent: Callable[[Tensor], Tensor] | None = None,
    ) -> list[Assembled]:
        """Padded episodes of a batch, one `Assembled` a bucket.

        Args:
            batch: Tensors.
            rows: What the tables found for `ids`.
            ids: As given to the tables (after dropout).
            buckets: Which tasks are padded to which lengths. Default: all of them to the longest, in one.
            represent: Makes what the episodes hold of items, [U, H], of inputs [U, F] that have the items' part alone;
                events have no features of their own. Default: the episodes hold whole inputs.
        """
        where = places(batch, buckets if buckets is not None else [whole(batch)])
        task_x = self.vectors(Level.TASK, batch.task_features, rows, batch.size)
        # An item's vector is made once, however many events it has.
        item_x = self.vectors(Level.ITEM, batch.item_features, rows, batch.items.shape[0])
        event_x = self.vectors(Level.EVENT, batch.event_features, rows, batch.labels.shape[0])
        items = picked(batch.event_items[:, None], where.event).squeeze(-1)
        mask = where.mask.to(torch.float32)
        # All buckets' inputs are picked at once: one gradient a table row, not one a bucket.
        if represent is None:
            tables, indices = (task_x, item_x, event_x), (where.task, items, where.event)
            x, represented = where.picked(tables, indices), None
        else:
            # An event's input is wide, its representation is not: gathered and differentiated, it costs a fraction.
            made = represent(pad(item_x, (task_x.shape[1], 0)))
            represented = where.picked((made,), (items,))
            of_tasks = pad(task_x, (0, item_x.shape[1])).unsqueeze(1)
            x = [of_tasks.index_select(0, bucket.tasks) for bucket in where.buckets for _ in range(2)]
        labels = [part.squeeze(-1) for part in where.picked((batch.labels[:, None],), (where.event,))]
        masks = where.split(mask)
        adapted = {n: self._adapted(f, batch, rows[n], ids[n], where) for n, f in self.adapted.items()}

        def examples(i: int) -> Examples:
            slots = {name: own.slots[i] for name, own in adapted.items()}
            return Examples(x[i], slots, labels[i], masks[i], represented[i] if represented else None)

        return [
            Assembled(
                Episodes(
                    examples(2 * i), examples(2 * i + 1), {name: own.rows[i].rows for name, own in adapted.items()}
                ),
                task_x.index_select(0, bucket.tasks),
                {name: own.rows[i].ids for name, own in adapted.items()},
                {name: own.of_tasks[i] for name, own in adapted.items() if own.of_tasks},
            )
            for i, bucket in enumerate(where.buckets)
        ]

    def _adapted(self, feature: Feature, batch: TaskBatch, rows: Tensor, ids: Tensor, where: Places) -> _Adapted:
        """A feature's rows of each task, and the slots that its events use, bucket by bucket."""
        column = _columns(batch, feature.level)[feature.name]
        lengths = column.lengths if isinstance(column, Ragged) else torch.ones_like(ids)
        order = torch.cat([bucket.tasks for bucket in where.buckets])
        counts = [len(bucket.tasks) for bucket in where.buckets]
        # Tasks are numbered as they lie in the buckets, one bucket behind the other.
        number = torch.empty_like(order).index_copy(0, order, torch.arange(batch.size, device=order.device))
        if feature.level is Level.TASK:
            entities, present, owner = order, torch.ones_like(order, dtype=torch.bool), number[order]
        else:
            entities, present, owner = where.event, where.mask, number[where.task]
            if feature.level is Level.ITEM:
                entities = picked(batch.event_items[:, None], entities).squeeze(-1)
        found, used = occurrences(entities, present, lengths)
        own, slots = rows_of_tasks(found, used, owner, counts, rows, ids, int(feature.rows or 0))
        if feature.level is not Level.TASK:
            return _Adapted(own, [Slots(*pair) for pair in zip(*map(where.split, slots), strict=True)], [])
        of_tasks = [Slots(*pair) for pair in zip(*(t.unsqueeze(1).split(counts) for t in slots), strict=True)]
        events = [length for bucket in where.buckets for length in (bucket.support, bucket.query)]
        of_events = [Slots(*(t.expand(-1, n, -1) for t in of_tasks[i // 2])) for i, n in enumerate(events)]
        return _Adapted(own, of_events, of_tasks)


def pooled(column: Column, rows: Tensor) -> Tensor:
    """The rows of an embedded feature as one vector an entity: of several values their mean."""
    return _means(rows, column.lengths) if isinstance(column, Ragged) else rows


def _width(feature: Feature) -> int:
    return 1 if feature.kind is Kind.NUMERIC else int(feature.width or 0)


def _columns(batch: TaskBatch, level: Level) -> dict[str, Column]:
    return {Level.TASK: batch.task_features, Level.ITEM: batch.item_features, Level.EVENT: batch.event_features}[level]


def _device(columns: Mapping[str, Column]) -> torch.device:
    first = next(iter(columns.values()), None)
    tensor = first.values if isinstance(first, Ragged) else first
    return tensor.device if isinstance(tensor, Tensor) else torch.device("cpu")


def _means(rows: Tensor, lengths: Tensor) -> Tensor:
    """Means of consecutive rows: [Σ lengths, D] → [n, D], zero where a length is zero."""
    n = lengths.shape[0]
    entity = torch.repeat_interleave(torch.arange(n, device=lengths.device), lengths, output_size=rows.shape[0])
    sums = torch.zeros(n, rows.shape[1], dtype=rows.dtype, device=rows.device).index_add(0, entity, rows)
    return sums / lengths.clamp(min=1).to(rows.dtype)[:, None]
