"""The whole model: tables, features, and a meta-learner around a base learner. Its forward is the whole meta-loss.

The same module trains (after `sharding.distribute`), and scores without any process group: `build_model`, load the
checkpoint's tensors, then `adapted_scores`, or `adapt` once and `score_items` as often as needed.

Symbols: T tasks, Q query events (padded), C candidates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from metatrain.data.batch import Column, Ragged, TaskBatch
from metatrain.data.schema import Kind, Level
from metatrain.meta.buckets import Bucket
from metatrain.meta.engine import FastWeights
from metatrain.meta.episode import Episodes, Examples, Sizes, Slots
from metatrain.meta.learner import MetaLearner, Represents
from metatrain.model.features import Assembled, Featurizer, pooled
from metatrain.model.places import candidate_slots
from metatrain.model.tables import Held, Request, Tables
from metatrain.observe.laps import Laps


class StepOutput(NamedTuple):
    """One rank's part of a training step. All but `loss` are detached, and unscaled sums over this rank's tasks."""

    loss: Tensor  # scalar for backward: the mean of the ranks' losses is the meta-loss of the global batch
    before: Tensor  # scalar: sum of the tasks' mean query losses with the shared parameters
    after: Tensor  # scalar: the same after adaptation
    gains: Tensor  # [T]: before - after of each task
    tasks: int  # T
    rows: int  # looked up: each id of this rank once, where they are deduplicated
    row_squares: Tensor  # scalar: sum of the squares of these rows' numbers
    held: Held | None = None  # gradients of rows that wait for `pass_on`


class Asked(NamedTuple):
    """A batch's lookup under way: made by `MetaModel.ask`, used up by its forward."""

    ids: dict[str, Tensor]
    request: Request


class Scores(NamedTuple):
    """Scores of query events; for clicks under binary cross-entropy they are logits. Padding has mask 0."""

    before: Tensor  # [T, Q], with the shared parameters
    after: Tensor  # [T, Q], adapted on the support
    mask: Tensor  # float [T, Q]


@dataclass(frozen=True)
class AdaptedTasks:
    """Tasks that are ready to score items: `MetaModel.adapt` makes it."""

    fast: FastWeights
    assembled: Assembled

    @property
    def size(self) -> int:
        """Number of tasks, T."""
        return self.assembled.episodes.size


class MetaModel(nn.Module):
    """Tables, features and meta-learner. Made by `build.build_model`."""

    def __init__(
        self,
        tables: Tables,
        featurizer: Featurizer,
        meta: MetaLearner,
        table_decay: float = 0.0,
        size_weight: float = 0.0,
    ) -> None:
        super().__init__()
        self.tables, self.featurizer, self.meta = tables, featurizer, meta
        self._table_decay, self._size_weight = table_decay, size_weight

    def forward(
        self,
        batch: TaskBatch,
        step: int,
        weight_global: Callable[[], Tensor] | float,
        world_size: int = 1,
        asked: Asked | None = None,
        laps: Laps | None = None,
        hold: bool = False,
    ) -> StepOutput:
        """The meta-loss of this rank's tasks; every rank must call it, if only with a batch of no tasks.

        The loss is world_size / weight_global × (sum of this rank's tasks' query losses, by what each task counts), so
        that the mean over ranks that DDP and the tables take is the mean over the global batch. With `table_decay` d,
        the step also adds ½ d × (sum of squares of the distinct rows that the global batch looks up), so that each of
        these rows gets the gradient d × row, at any world size.

        Args:
            batch: Tensors of this rank's tasks.
            step: Training step, for what is hidden in training.
            weight_global: What the tasks of all ranks count together (`weight`); a function of that where the ranks are
                still counting: it is called after the inner loop.
            world_size: Number of ranks.
            asked: What `ask` gave for this batch and step. Default: asked now.
            laps: Told of the stages.
            hold: Whether the backward pass ends before the tables, and goes on by `StepOutput.held`.
        """
        laps = laps or Laps(batch.labels.device)
        ids, request = asked or self.ask(batch, step)
        laps.lap("lookup")
        found = self.tables.lookup(request, hold, laps.lap)
        laps.lap("lookup")
        if batch.size:
            buckets = self._buckets(batch)
            assembled = self.featurizer.assemble(batch, found.features, ids, buckets, self._represent)
            if self.training:
                assembled = self.featurizer.without_supports(assembled, batch.tasks, buckets, step)
            laps.lap("assemble")
            parts = [self.meta(self._weighed(of_bucket.episodes)) for of_bucket in assembled]
            total = torch.stack([part.total for part in parts]).sum()
            after, before = (_in_order(buckets, [getattr(p, name) for p in parts]) for name in ("after", "before"))
        else:
            # Other ranks wait for this one's gradients, dense ones and rows' alike.
            total = torch.stack(
                [0.0 * parameter.sum() for parameter in self.meta.parameters()]
                + [0.0 * rows.sum() for _, rows in found.tables.values()]
            ).sum()
            after = before = torch.zeros(0, device=total.device)
        laps.lap("inner_loop")
        loss = total * (world_size / (weight_global() if callable(weight_global) else weight_global))
        if self._table_decay and torch.is_grad_enabled():
            loss = loss + (0.5 * self._table_decay * world_size) * self.tables.touched_norm(found)
        looked_up = [rows.detach() for _, rows in found.tables.values()]
        squares = torch.stack([total.detach().new_zeros(()), *(rows.norm() for rows in looked_up)]).square().sum()
        count = sum(rows.shape[0] for rows in looked_up)
        return StepOutput(loss, before.sum(), after.sum(), before - after, batch.size, count, squares, found.held)

    def weight(self, batch: TaskBatch) -> Tensor | float:
        """What a batch's tasks count together in the meta-loss: a scalar."""
        if not self._size_weight:
            return float(batch.size)
        return batch.query_lengths.to(torch.float64).pow(self._size_weight).sum()

    def _weighed(self, episodes: Episodes) -> Episodes:
        if not self._size_weight:
            return episodes
        return replace(episodes, weights=episodes.query.mask.sum(-1).pow(self._size_weight))

    def ask(self, batch: TaskBatch, step: int) -> Asked:
        """Begins the lookup of a batch; no row is read before `forward`. Collective, as `forward` is."""
        ids = self.featurizer.ids(batch, step if self.training else None)
        return Asked(ids, self.tables.request(ids))

    @torch.no_grad()
    def adapted_scores(self, batch: TaskBatch) -> Scores:
        """Scores of each task's query before and after adaptation on its support. Query labels are not read."""
        if not batch.size:
            nothing = torch.zeros(0, 1, device=batch.labels.device)
            return Scores(nothing, nothing, nothing)
        buckets = self._buckets(batch)
        longest = max(1, int(batch.query_lengths.max()))
        parts: list[Scores] = []
        for assembled in self._assembled(batch, buckets):
            episodes = assembled.episodes
            before, after = (self._in_chunks(episodes, adapted) for adapted in (False, True))
            room = (0, longest - before.shape[1])  # of padding; less than none where lengths were rounded up
            parts.append(Scores(*(pad(t, room) for t in (before, after, episodes.query.mask))))
        return Scores(*(_in_order(buckets, of_parts) for of_parts in zip(*parts, strict=True)))

    @torch.no_grad()
    def adapt(self, batch: TaskBatch, adapted: bool = True) -> AdaptedTasks:
        """Adapts to each task's support. The batch's query is not used and may be empty.

        Args:
            batch: Tensors, at least one task.
            adapted: False: the unadapted model, as if no task had any support.
        """
        (assembled,) = self._assembled(batch)
        support, rows = assembled.episodes.support, assembled.episodes.rows
        return AdaptedTasks((self.meta.adapt_whole if adapted else self.meta.unadapted_whole)(support, rows), assembled)

    @torch.no_grad()
    def score_items(self, adapted: AdaptedTasks, item_features: Mapping[str, Column]) -> Tensor:
        """Scores [T, C] of candidates for each adapted task; features of events are as unknown (0).

        Args:
            adapted: From `adapt`.
            item_features: The candidates' item features as tensors, C of each: a slice of the catalogue. Memory grows
                with T × C × width, so call it for slices of the catalogue.
        """
        featurizer, assembled = self.featurizer, adapted.assembled
        device = assembled.task_x.device
        columns = {level: dict(item_features) if level is Level.ITEM else {} for level in Level}
        for feature in featurizer.features:
            if feature.level is Level.EVENT:
                columns[Level.EVENT][feature.name] = _unknown(feature.kind, int(feature.width or 1), device)
        ids: dict[str, Tensor] = {}
        for feature in featurizer.features:
            if feature.embedded and feature.level is not Level.TASK:
                column = columns[feature.level][feature.name]
                ids[feature.name] = column.values if isinstance(column, Ragged) else column
        rows = self.tables(ids)
        count, tasks = _count(item_features), adapted.size
        item_x = featurizer.vectors(Level.ITEM, columns[Level.ITEM], rows, count)
        event_x = featurizer.vectors(Level.EVENT, columns[Level.EVENT], rows, 1)
        x = torch.cat(
            [
                assembled.task_x[:, None].expand(-1, count, -1),
                item_x.expand(tasks, -1, -1),
                event_x.expand(tasks, count, -1),
            ],
            dim=-1,
        )
        slots, own = {}, {}
        for name, feature in featurizer.adapted.items():
            own[name] = adapted.fast.rows[name]
            if feature.level is Level.TASK:
                slots[name] = Slots(*(t.expand(-1, count, -1) for t in assembled.task_slots[name]))
                continue
            column = columns[feature.level][name]
            lengths = column.lengths if isinstance(column, Ragged) else torch.ones_like(ids[name])
            of_ids = candidate_slots(assembled.row_ids[name], ids[name], lengths)
            slots[name] = Slots(*(t.expand(-1, count, -1) for t in of_ids))
            own[name] = torch.cat([own[name], rows[name].expand(tasks, -1, -1)], dim=1)
        zeros = x.new_zeros(tasks, count)
        return self.meta.predictions(replace(adapted.fast, rows=own), Examples(x, slots, zeros, torch.ones_like(zeros)))

    @torch.no_grad()
    def item_vectors(self, item_features: Mapping[str, Column]) -> Tensor:
        """Items as the base learner represents them, about a task and a context unknown: [C, H].

        Of a base learner that has no `represent`, the items' part of its inputs. Where the tables are sharded all ranks
        must call it, if only with no items.

        Args:
            item_features: The items' features as tensors, C of each.
        """
        featurizer, learner = self.featurizer, self.meta.learner
        features = [f for f in featurizer.features if f.level is Level.ITEM]
        columns = {f.name: item_features[f.name] for f in features}
        embedded = {f.name: columns[f.name] for f in features if f.embedded}
        rows = self.tables({name: c.values if isinstance(c, Ragged) else c for name, c in embedded.items()})
        count = _count(columns) if columns else 0
        if not count:
            return torch.zeros(0, 0)
        item_x = featurizer.vectors(Level.ITEM, columns, rows, count)
        adapted = [pooled(columns[name], rows[name]) for name, f in featurizer.adapted.items() if f.level is Level.ITEM]
        of_item = torch.cat([item_x, *adapted], dim=-1)
        if not hasattr(learner, "represent"):
            return of_item
        x = item_x.new_zeros(count, featurizer.width)
        x[:, featurizer.layout.of("item").to(x.device)] = of_item
        return cast(Represents, learner).represent(x)

    def _buckets(self, batch: TaskBatch) -> list[Bucket]:
        return self.meta.buckets(
            batch.support_lengths, batch.query_lengths, self.featurizer.fixed_width, self.featurizer.row_widths
        )

    @property
    def _represent(self) -> Callable[[Tensor], Tensor] | None:
        return self.meta.item_representations if self.meta.represents_items else None

    def _assembled(self, batch: TaskBatch, buckets: list[Bucket] | None = None) -> list[Assembled]:
        ids = self.featurizer.ids(batch)
        return self.featurizer.assemble(batch, self.tables(ids), ids, buckets, self._represent)

    def _in_chunks(self, episodes: Episodes, adapted: bool) -> Tensor:
        """Scores of the query, adapted on the support or not, in pieces that fit the meta-learner's memory."""
        support, query, rows = episodes.support, episodes.query, episodes.rows
        chunk = self.meta.tasks_at_a_time(Sizes.of(support, query, rows))
        parts = []
        for start in range(0, episodes.size, chunk):
            few = support.tasks(start, start + chunk), {n: own[start : start + chunk] for n, own in rows.items()}
            fast = (self.meta.adapt_whole if adapted else self.meta.unadapted_whole)(*few)
            parts.append(self.meta.predictions(fast, query.tasks(start, start + chunk)))
        return torch.cat(parts)


def _in_order(buckets: Sequence[Bucket], parts: Sequence[Tensor]) -> Tensor:
    """What the buckets' tasks have, [T', …] each, in the batch's order: [T, …]."""
    joined = torch.cat(list(parts))
    return torch.empty_like(joined).index_copy_(0, torch.cat([bucket.tasks for bucket in buckets]), joined)


def _unknown(kind: Kind, width: int, device: torch.device) -> Column:
    """A column of one entity about which nothing is known."""
    if kind is Kind.CATEGORICAL:
        return torch.zeros(1, dtype=torch.int64, device=device)
    if kind is Kind.MULTI:
        empty = torch.zeros(1, dtype=torch.int64, device=device)
        return Ragged(empty[:0], empty)
    return torch.zeros(1, width, device=device) if kind is Kind.VECTOR else torch.zeros(1, device=device)


def _count(columns: Mapping[str, Column]) -> int:
    """Number of entities in a level's columns."""
    first = next(iter(columns.values()))
    return int((first.lengths if isinstance(first, Ragged) else first).shape[0])
