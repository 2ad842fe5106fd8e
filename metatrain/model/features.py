"""Features of a batch as a base learner's inputs: from ids to looked-up rows to padded episodes.

An event's input is its task's features, its item's and its own, each group in the schema's order; features whose
rows adapt are left out of it and delivered apart, as each task's own rows and the slots that its events use.
Timestamps are not inputs. Padding is zero.

Symbols: T tasks, N events, U items, E events of a task (padded), M ids of a feature in one event (padded), R rows of
an adapted feature in a task (padded), D embedding width, n entities of a level: T, U or N.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from metatrain.config import ModelConfig
from metatrain.data.batch import Column, Ragged, TaskBatch
from metatrain.data.schema import ITEM_FEATURE, Feature, Kind, Level, Schema
from metatrain.errors import ConfigError
from metatrain.meta.episode import Episodes, Examples, Slots
from metatrain.model import hashing
from metatrain.model.tables import TableSpec

# Fills the places of `TaskRows.ids` that hold no row. Greater than any id, so that a task's ids stay in order.
_NO_ROW = torch.iinfo(torch.int64).max


class TaskRows(NamedTuple):
    """One adapted feature's rows of T tasks."""

    rows: Tensor  # [T, R, D]
    ids: Tensor  # int64 [T, R], ascending, then a filler


@dataclass(frozen=True)
class Assembled:
    """A batch ready for the meta-learner, and what scoring further items of its tasks needs."""

    episodes: Episodes
    task_x: Tensor  # [T, F_task]: the tasks' part of the input
    row_ids: dict[str, Tensor]  # adapted feature → [T, R]
    task_slots: dict[str, Slots]  # adapted feature of the task → [T, 1, M]


class _Events(NamedTuple):
    """Where the padded events of one side (support or query) are in the flat columns."""

    index: Tensor  # int64 [T, E] into N; 0 where padded
    mask: Tensor  # bool [T, E]


class Featurizer(nn.Module):
    """Turns batches into episodes. It has no parameters of its own: rows come from `Tables`.

    Args:
        schema: The dataset's features.
        config: `features` chooses among them; `id_dropout` hides items' own ids in training.
        adapt_rows: Features whose rows adapt.
        seed: Of the dropout.

    Raises:
        ConfigError: A name that is no feature, or an adapted feature without embedding rows.
    """

    def __init__(self, schema: Schema, config: ModelConfig, adapt_rows: Iterable[str] = (), seed: int = 0) -> None:
        super().__init__()
        known = {feature.name: feature for feature in schema.features}
        if config.features is not None:
            for name in config.features:
                _known(name, known, "model.features")
        self.features = tuple(f for f in schema.features if config.features is None or f.name in config.features)
        used = {feature.name: feature for feature in self.features}
        self.adapted = {name: _known(name, used, "meta.adapt_rows") for name in sorted(set(adapt_rows))}
        for feature in self.adapted.values():
            if not feature.embedded:
                raise ConfigError(
                    "This feature has no embedding rows that could adapt.",
                    where="meta.adapt_rows",
                    got=feature.name,
                    remedy=f"Choose among {', '.join(f.name for f in self.features if f.embedded)}.",
                )
        if not self.features:
            raise ConfigError("The model has no features.", where="model.features", remedy="Name at least one.")
        self._id_dropout, self._numeric_scale, self._seed = config.id_dropout, config.numeric_scale, seed
        self._fixed = {
            level: tuple(f for f in self.features if f.level is level and f.name not in self.adapted) for level in Level
        }

    @property
    def width(self) -> int:
        """Width of a base learner's input: fixed inputs, then the adapted features."""
        return sum(map(_width, self.features))

    def table_specs(self) -> list[TableSpec]:
        """The tables that the features need."""
        shared: dict[str, list[Feature]] = {}
        for feature in self.features:
            if feature.embedded:
                shared.setdefault(str(feature.table), []).append(feature)
        return [
            TableSpec(table, int(fs[0].rows or 0), int(fs[0].width or 0), tuple(f.name for f in fs))
            for table, fs in shared.items()
        ]

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

    def vectors(self, level: Level, columns: Mapping[str, Column], rows: Mapping[str, Tensor], n: int) -> Tensor:
        """The fixed inputs of a level's entities: [n, F_level]. Multi-valued features are means over their ids."""
        device = next(iter(rows.values())).device if rows else _device(columns)
        parts = [torch.zeros(n, 0, device=device)]
        for feature in self._fixed[level]:
            column = columns[feature.name]
            if feature.kind is Kind.MULTI:
                assert isinstance(column, Ragged)
                parts.append(_means(rows[feature.name], column.lengths))
            elif feature.kind is Kind.CATEGORICAL:
                parts.append(rows[feature.name])
            else:
                assert isinstance(column, Tensor)
                parts.append(column.to(torch.float32).reshape(n, _width(feature)) * self._numeric_scale)
        return torch.cat(parts, dim=1)

    def assemble(self, batch: TaskBatch, rows: Mapping[str, Tensor], ids: Mapping[str, Tensor]) -> Assembled:
        """Padded episodes of a batch.

        Args:
            batch: Tensors.
            rows: What the tables found for `ids`.
            ids: As given to the tables (after dropout).
        """
        task_x = self.vectors(Level.TASK, batch.task_features, rows, batch.size)
        # An item's vector is made once, however many events it has.
        item_x = self.vectors(Level.ITEM, batch.item_features, rows, batch.items.shape[0])
        event_x = self.vectors(Level.EVENT, batch.event_features, rows, batch.labels.shape[0])
        first = (batch.support_lengths + batch.query_lengths).cumsum(0) - batch.support_lengths - batch.query_lengths
        sides = (_padded(first, batch.support_lengths), _padded(first + batch.support_lengths, batch.query_lengths))
        own, slots, task_slots = {}, ({}, {}), {}
        for name, feature in self.adapted.items():
            own[name], both = self._adapted(feature, batch, rows[name], ids[name], sides)
            if feature.level is Level.TASK:
                task_slots[name] = both[0]
                both = tuple(Slots(*(t.expand(-1, s.mask.shape[1], -1) for t in both[0])) for s in sides)
            for side, of_side in zip(slots, both, strict=True):
                side[name] = of_side
        examples = []
        for side, of_side in zip(sides, slots, strict=True):
            items = _picked(batch.event_items[:, None], side.index).squeeze(-1)
            mask = side.mask.to(torch.float32)
            x = torch.cat(
                [
                    task_x.unsqueeze(1).expand(-1, side.mask.shape[1], -1),
                    _picked(item_x, items),
                    _picked(event_x, side.index),
                ],
                dim=-1,
            )
            labels = _picked(batch.labels[:, None], side.index).squeeze(-1)
            examples.append(Examples(x * mask.unsqueeze(-1), of_side, labels * mask, mask))
        support, query = examples
        return Assembled(
            Episodes(support, query, {name: r.rows for name, r in own.items()}),
            task_x,
            {name: r.ids for name, r in own.items()},
            task_slots,
        )

    def _adapted(
        self, feature: Feature, batch: TaskBatch, rows: Tensor, ids: Tensor, sides: tuple[_Events, _Events]
    ) -> tuple[TaskRows, tuple[Slots, ...]]:
        """A feature's rows of each task, and the slots of support and query (of the task itself, at level task)."""
        column = _columns(batch, feature.level)[feature.name]
        lengths = column.lengths if isinstance(column, Ragged) else torch.ones_like(ids)
        if feature.level is Level.TASK:
            everyone = torch.arange(batch.size, device=ids.device)[:, None]
            entities, present = everyone, torch.ones_like(everyone, dtype=torch.bool)
        else:
            entities = torch.cat([side.index for side in sides], dim=1)
            present = torch.cat([side.mask for side in sides], dim=1)
            if feature.level is Level.ITEM:
                entities = _picked(batch.event_items[:, None], entities).squeeze(-1)
        found, used = _occurrences(entities, present, lengths)
        own, slot = _rows_of_tasks(found, used, rows, ids, int(feature.rows or 0))
        both = Slots(slot, used.to(torch.float32))
        if feature.level is Level.TASK:
            return own, (both,)
        edge = sides[0].mask.shape[1]
        return own, (Slots(*(t[:, :edge] for t in both)), Slots(*(t[:, edge:] for t in both)))


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
    found, used = _occurrences(candidates, torch.ones_like(candidates, dtype=torch.bool), lengths)
    index = slot_of_id[:, found[0]] if ids.shape[0] else found.expand(tasks, -1, -1)
    return Slots(index, used.to(torch.float32).expand(tasks, -1, -1))


def _width(feature: Feature) -> int:
    return 1 if feature.kind is Kind.NUMERIC else int(feature.width or 0)


def _columns(batch: TaskBatch, level: Level) -> dict[str, Column]:
    return {Level.TASK: batch.task_features, Level.ITEM: batch.item_features, Level.EVENT: batch.event_features}[level]


def _device(columns: Mapping[str, Column]) -> torch.device:
    first = next(iter(columns.values()), None)
    tensor = first.values if isinstance(first, Ragged) else first
    return tensor.device if isinstance(tensor, Tensor) else torch.device("cpu")


def _padded(first: Tensor, lengths: Tensor) -> _Events:
    """The events first[t] … first[t] + lengths[t] - 1 of each task, padded to the longest (at least one place)."""
    longest = max(1, int(lengths.max())) if lengths.numel() else 1
    place = torch.arange(longest, device=lengths.device)
    mask = place < lengths[:, None]
    return _Events((first[:, None] + place) * mask, mask)


def _picked(values: Tensor, index: Tensor) -> Tensor:
    """values[index], [n, F] and [T, E] → [T, E, F]; zeros where there is nothing to pick from."""
    if not values.shape[0]:
        return values.new_zeros(*index.shape, values.shape[1])
    return values.index_select(0, index.flatten()).view(*index.shape, values.shape[1])


def _means(rows: Tensor, lengths: Tensor) -> Tensor:
    """Means of consecutive rows: [Σ lengths, D] → [n, D], zero where a length is zero."""
    n = lengths.shape[0]
    entity = torch.repeat_interleave(torch.arange(n, device=lengths.device), lengths, output_size=rows.shape[0])
    sums = torch.zeros(n, rows.shape[1], dtype=rows.dtype, device=rows.device).index_add(0, entity, rows)
    return sums / lengths.clamp(min=1).to(rows.dtype)[:, None]


def _occurrences(entities: Tensor, present: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Positions of the entities' ids in the flat ids, [T, E, M], and which of them are in use (bool)."""
    most = max(1, int(lengths.max())) if lengths.numel() else 1
    place = torch.arange(most, device=lengths.device)
    count = _picked(lengths[:, None], entities)
    used = (place < count) & present.unsqueeze(-1)
    return (_picked((lengths.cumsum(0) - lengths)[:, None], entities) + place) * used, used


def _rows_of_tasks(found: Tensor, used: Tensor, rows: Tensor, ids: Tensor, table_rows: int) -> tuple[TaskRows, Tensor]:
    """Each task's distinct ids, as rows of its own: `TaskRows`, and the slot of each occurrence, [T, E, M]."""
    tasks = found.shape[0]
    task = torch.arange(tasks, device=found.device)[:, None, None].expand_as(found)[used]
    occurrence = found[used]
    pairs, which = torch.unique(task * table_rows + ids[occurrence], return_inverse=True)
    owner = pairs // table_rows
    counts = torch.bincount(owner, minlength=tasks)
    slot = torch.arange(pairs.shape[0], device=found.device) - (counts.cumsum(0) - counts)[owner]
    most = max(1, int(counts.max())) if tasks else 1
    # Equal ids have equal rows, so any occurrence will do; the first, so that it is always the same.
    first = torch.full_like(pairs, _NO_ROW).scatter_reduce(0, which, occurrence, "amin")
    place = owner * most + slot
    own = torch.zeros(tasks * most, rows.shape[1], dtype=rows.dtype, device=rows.device)
    own = own.index_copy(0, place, rows.index_select(0, first)).view(tasks, most, -1)
    own_ids = torch.full((tasks * most,), _NO_ROW, device=found.device).index_copy(0, place, pairs % table_rows)
    slots = torch.zeros_like(found)
    slots[used] = slot[which]
    return TaskRows(own, own_ids.view(tasks, most)), slots


def _known(name: str, features: Mapping[str, Feature], where: str) -> Feature:
    if name in features:
        return features[name]
    near = difflib.get_close_matches(name, features, n=1)
    raise ConfigError(
        "There is no feature of this name.",
        where=where,
        got=name,
        remedy=f"Did you mean {near[0]!r}?" if near else f"Known here: {', '.join(features)}.",
    )
