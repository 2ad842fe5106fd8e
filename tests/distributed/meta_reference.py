"""The meta-gradient by the book: float64, one task at a time, one event at a time. And made-up batches to try it on.

Nothing here is shared with metatrain.meta or metatrain.model: no vmap, no padding, no masks, no dedup, no sharding,
no nn.Module. Features, the MLP, the losses and the inner steps are written out.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from metatrain.config import Config
from metatrain.data.batch import Column, Ragged, TaskBatch
from metatrain.data.schema import Feature, Kind, LabelKind, Level, Schema

ITEMS, GENRES = 101, 7


def schema(label: LabelKind = LabelKind.RATING) -> Schema:
    """Every level and kind; two features share a table, one table has a single row, two widths."""
    features = (
        Feature(name="item", level=Level.ITEM, kind=Kind.CATEGORICAL, table="item", rows=ITEMS, width=8),
        Feature(name="genres", level=Level.ITEM, kind=Kind.MULTI, table="genre", rows=GENRES, width=4),
        Feature(name="year", level=Level.ITEM, kind=Kind.NUMERIC),
        Feature(name="text", level=Level.ITEM, kind=Kind.VECTOR, width=3),
        Feature(name="age", level=Level.TASK, kind=Kind.CATEGORICAL, table="age", rows=5, width=4),
        Feature(name="likes", level=Level.TASK, kind=Kind.MULTI, table="genre", rows=GENRES, width=4),
        Feature(name="hour", level=Level.EVENT, kind=Kind.CATEGORICAL, table="hour", rows=25, width=4),
        Feature(name="only", level=Level.EVENT, kind=Kind.CATEGORICAL, table="only", rows=1, width=8),
        Feature(name="length", level=Level.EVENT, kind=Kind.NUMERIC),
    )
    mean = 0.4 if label is LabelKind.CLICK else 3.5
    return Schema(features=features, label=label, label_mean=mean, label_deviation=1, label_min=0, label_max=5)


def made_up_batch(
    tasks: int, seed: int, *, click: bool = False, least_support: int = 0, most_support: int = 5
) -> TaskBatch:
    """Tasks of uneven sizes, numpy columns."""
    draw = np.random.default_rng(seed)
    support = draw.integers(least_support, most_support + 1, tasks)
    query = draw.integers(1, 4, tasks)
    events = int((support + query).sum())
    items = np.sort(draw.choice(1000, min(12, max(1, events)), replace=False))
    used = len(items)

    def many(n: int) -> Ragged:
        lengths = draw.integers(0, 4, n)
        return Ragged(draw.integers(0, GENRES, int(lengths.sum())), lengths)

    return TaskBatch(
        tasks=np.arange(tasks),
        support_lengths=support,
        query_lengths=query,
        items=items,
        event_items=draw.integers(0, used, events),
        labels=(draw.integers(0, 2, events) if click else draw.integers(1, 6, events)).astype(np.float32),
        timestamps=np.zeros(events, np.int64),
        task_features={"age": draw.integers(0, 5, tasks), "likes": many(tasks)},
        item_features={
            "item": draw.integers(0, ITEMS, used),
            "genres": many(used),
            "year": draw.normal(size=used).astype(np.float32),
            "text": draw.normal(size=(used, 3)).astype(np.float32),
        },
        event_features={
            "hour": draw.integers(0, 25, events),
            "only": np.zeros(events, np.int64),
            "length": draw.normal(size=events).astype(np.float32),
        },
    )


def part_of(batch: TaskBatch, tasks: range) -> TaskBatch:
    """Some consecutive tasks of a batch, with the items that they use."""
    chosen = slice(tasks.start, tasks.stop)
    lengths = batch.support_lengths + batch.query_lengths
    first = int(lengths[: tasks.start].sum())
    events = slice(first, first + int(lengths[chosen].sum()))
    used, positions = np.unique(batch.event_items[events], return_inverse=True)

    def picked(column: Column, index: np.ndarray) -> Column:
        if not isinstance(column, Ragged):
            return column[index]
        edges = np.concatenate([[0], np.cumsum(column.lengths)])
        values = [column.values[edges[i] : edges[i + 1]] for i in index]
        return Ragged(np.concatenate([column.values[:0], *values]), column.lengths[index])

    all_tasks, all_events = np.arange(batch.size)[chosen], np.arange(len(batch.labels))[events]
    return replace(
        batch,
        tasks=batch.tasks[chosen],
        support_lengths=batch.support_lengths[chosen],
        query_lengths=batch.query_lengths[chosen],
        items=batch.items[used],
        event_items=positions.astype(np.int64),
        labels=batch.labels[events],
        timestamps=batch.timestamps[events],
        task_features={n: picked(c, all_tasks) for n, c in batch.task_features.items()},
        item_features={n: picked(c, used) for n, c in batch.item_features.items()},
        event_features={n: picked(c, all_events) for n, c in batch.event_features.items()},
    )


def ids_of(column: Column, entity: int) -> list[int]:
    """The ids of one task, item or event."""
    if not isinstance(column, Ragged):
        return [int(column[entity])]
    first = int(column.lengths[:entity].sum())
    return [int(i) for i in column.values[first : first + int(column.lengths[entity])]]


class Reference:
    """One configuration's meta-loss, from plain weights.

    Args:
        schema, config: As for `build_model`.
        dense: The learner's parameters (`layers.N.weight` …), float64, and `rates` [steps, adapted tensors] with the
            order of their columns in `rate_names`.
        tables: Table → rows, float64.
    """

    def __init__(
        self,
        schema: Schema,
        config: Config,
        dense: dict[str, Tensor],
        rates: Tensor,
        rate_names: tuple[str, ...],
        tables: dict[str, Tensor],
    ) -> None:
        self.schema, self.config = schema, config
        self.dense, self.rates, self.rate_names, self.tables = dense, rates, rate_names, tables
        self.adapted_rows = sorted(config.meta.adapt_rows)

    def task_losses(self, batch: TaskBatch) -> tuple[list[Tensor], list[Tensor]]:
        """Each task's mean query loss before and after adaptation."""
        before, after = [], []
        first = 0
        for task in range(batch.size):
            middle = first + int(batch.support_lengths[task])
            last = middle + int(batch.query_lengths[task])
            support, query = range(first, middle), range(middle, last)
            first = last
            weights = {n: self.dense[n] for n in self.rate_names if not n.startswith("rows:")}
            rows = {}
            for event in [*support, *query]:
                for name in self.adapted_rows:
                    feature, column, entity = self._place(name, batch, task, event)
                    for row in ids_of(column, entity):
                        rows[name, row] = self.tables[str(feature.table)][row]
            before.append(self._loss(self.config.meta.loss, weights, rows, batch, task, query))
            for step in range(self.config.meta.steps if len(support) else 0):
                weights, rows = self._stepped(step, weights, rows, batch, task, support)
            after.append(self._loss(self.config.meta.loss, weights, rows, batch, task, query))
        return before, after

    def outer_loss(self, batch: TaskBatch) -> Tensor:
        """The mean over tasks, and ½ table_decay × the squares of the distinct rows that the batch names."""
        loss = torch.stack(self.task_losses(batch)[1]).sum() / batch.size
        named = set()
        for feature in self.schema.features:
            if not feature.embedded:
                continue
            columns, count = {
                Level.TASK: (batch.task_features, batch.size),
                Level.ITEM: (batch.item_features, len(batch.items)),
                Level.EVENT: (batch.event_features, len(batch.labels)),
            }[feature.level]
            for entity in range(count):
                named |= {(str(feature.table), row) for row in ids_of(columns[feature.name], entity)}
        decay = self.config.train.optimizer.table_decay
        for table, row in sorted(named):
            loss = loss + 0.5 * decay * (self.tables[table][row] ** 2).sum()
        return loss

    def scores(self, weights: dict[str, Tensor], rows: dict, batch: TaskBatch, task: int, events: range) -> Tensor:
        """Scores of a task's events."""
        return torch.stack([self._score(weights, self._input(rows, batch, task, event)) for event in events])

    def _stepped(self, step, weights, rows, batch, task, support):
        inner = self.config.meta.inner_loss or self.config.meta.loss
        second = self.config.meta.order == 2
        if not second:  # the gradient is a constant, taken at a copy
            frozen = Reference(
                self.schema, self.config, {n: w.detach() for n, w in self.dense.items()}, self.rates, self.rate_names,
                {n: t.detach() for n, t in self.tables.items()},
            )  # fmt: skip
            at_weights = {n: w.detach().requires_grad_() for n, w in weights.items()}
            at_rows = {k: r.detach().requires_grad_() for k, r in rows.items()}
        else:
            frozen, at_weights, at_rows = self, weights, rows
        loss = frozen._loss(inner, at_weights, at_rows, batch, task, support)
        leaves = [*at_weights.values(), *at_rows.values()]
        found = torch.autograd.grad(loss, leaves, create_graph=second, allow_unused=True)
        steps = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]
        rates = dict(zip(self.rate_names, self.rates[step], strict=True))
        of_rows = steps[len(weights) :]
        return (
            {n: w - rates[n] * g for (n, w), g in zip(weights.items(), steps, strict=False)},
            {k: r - rates[f"rows:{k[0]}"] * g for (k, r), g in zip(rows.items(), of_rows, strict=True)},
        )

    def _loss(self, name, weights, rows, batch, task, events) -> Tensor:
        scores = self.scores(weights, rows, batch, task, events)
        total = torch.zeros((), dtype=torch.float64)
        for score, label in zip(scores, batch.labels[events.start : events.stop], strict=True):
            total = total + _event_loss(name, score, float(label), self.config.meta.huber_delta)
        return total / len(events)

    def _score(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        weights = {**self.dense, **weights}
        h = x
        for layer in range(len(self.config.model.hidden)):
            h = weights[f"layers.{layer}.weight"] @ h + weights[f"layers.{layer}.bias"]
            if self.config.model.norm == "layer":
                h = h - h.mean()
                h = h / torch.sqrt((h * h).mean() + 1e-5)
                h = h * weights[f"norms.{layer}.weight"] + weights[f"norms.{layer}.bias"]
            h = torch.tanh(h)
        seen = torch.cat([h, x]) if self.config.model.skip and self.config.model.hidden else h
        mean = self.schema.label_mean
        offset = math.log(mean / (1 - mean)) if self.config.meta.loss == "binary_cross_entropy" else mean
        return (weights["head.weight"] @ seen + weights["head.bias"])[0] + offset

    def _place(self, name: str, batch: TaskBatch, task: int, event: int) -> tuple[Feature, Column, int]:
        feature = next(f for f in self.schema.features if f.name == name)
        return {
            Level.TASK: (feature, batch.task_features.get(name), task),
            Level.ITEM: (feature, batch.item_features.get(name), int(batch.event_items[event])),
            Level.EVENT: (feature, batch.event_features.get(name), event),
        }[feature.level]

    def _input(self, rows: dict, batch: TaskBatch, task: int, event: int) -> Tensor:
        parts = []
        for level in (Level.TASK, Level.ITEM, Level.EVENT):
            fixed = [feature.name for feature in self.schema.of(level) if feature.name not in self.adapted_rows]
            parts += [self._value(name, None, batch, task, event) for name in fixed]
        parts += [self._value(name, rows, batch, task, event) for name in self.adapted_rows]
        return torch.cat(parts)

    def _value(self, name: str, rows: dict | None, batch: TaskBatch, task: int, event: int) -> Tensor:
        feature, column, entity = self._place(name, batch, task, event)
        if not feature.embedded:
            return torch.as_tensor(column[entity], dtype=torch.float64).reshape(-1) * self.config.model.numeric_scale
        table = self.tables[str(feature.table)]
        found = [table[i] if rows is None else rows[name, i] for i in ids_of(column, entity)]
        return torch.stack(found).mean(0) if found else torch.zeros(table.shape[1], dtype=torch.float64)


def _event_loss(name: str, score: Tensor, label: float, delta: float) -> Tensor:
    error = score - label
    if name == "squared":
        return error**2
    if name == "absolute":
        return error.abs()
    if name == "huber":
        return 0.5 * error**2 if float(error.detach().abs()) < delta else delta * (error.abs() - 0.5 * delta)
    chance = 1 / (1 + torch.exp(-score))
    return -(label * torch.log(chance) + (1 - label) * torch.log(1 - chance))
