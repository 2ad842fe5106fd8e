"""What every meta-learner is: it adapts a base learner to a task's support, and scores the task's query with it.

A meta-learner is one file beside this one with one class: `adapt` and `predict` are its own, the rest has a default
here. Its constructor takes the base learner, then keyword arguments alone; `model/pair.py` gives it those of the
configuration that it names. It imports torch and `metatrain.meta` alone.

What holds for every meta-learner:

- Padding has mask 0 and changes no result; a task may have no support at all.
- Losses are sums over tasks, by what each counts (`Episodes.summed`): the caller divides by what all ranks' tasks count
  together, so ranks may hold unequal numbers.
- No loop over tasks or events in Python.
- `FastWeights` hold whatever a task's adapted state is, under names of the method's own, tasks first.

Symbols: T tasks, E events (padded), R rows of an adapted feature in a task, D embedding width, H width of a
representation.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, ClassVar, NamedTuple, Protocol, cast

import torch
from torch import Tensor, nn

from metatrain.meta.buckets import Bucket, cut
from metatrain.meta.engine import FastWeights, Tensors
from metatrain.meta.episode import Episodes, Examples, Sizes, inputs
from metatrain.meta.link import Staircase
from metatrain.meta.losses import event_loss, mean_over_events

#: Counted seconds of a call, and of a product's operation: they decide how finely tasks are bucketed.
_CALL_SECONDS, _OPERATION_SECONDS = 1e-3, 2e-11


class QueryLoss(NamedTuple):
    """The meta-loss of T tasks."""

    # Scalar to differentiate: the sum over tasks of each one's mean query loss after adaptation, by what the task
    # counts (`Episodes.summed`); a method may weigh that with losses of its own.
    total: Tensor
    after: Tensor  # [T], detached: each task's mean query loss after adaptation
    before: Tensor  # [T], detached: the same without adaptation


class Represents(Protocol):
    """A base learner whose score is read off a representation: what closed-form and metric-based methods need."""

    represented: int  # H
    #: Whether an event's representation is its item's, whoever's event it is and whatever the event's own features say.
    of_items: bool

    def represent(self, x: Tensor) -> Tensor:
        """Inputs [..., E, F] → representations [..., E, H]."""
        ...

    def score(self, represented: Tensor, x: Tensor) -> Tensor:
        """Representations and the inputs that they are of → scores [..., E]: the same as the learner's forward."""
        ...


def representing(learner: nn.Module, method: str) -> Represents:
    """The base learner, where it can represent.

    Raises:
        ValueError: It cannot.
    """
    if not (hasattr(learner, "represent") and hasattr(learner, "represented")):
        raise ValueError(
            f"{method} works on what a base learner represents events by, and {type(learner).__name__} has no "
            "`represent`; choose another base learner"
        )
    return cast(Represents, learner)


class MetaLearner(nn.Module):
    """Base class of meta-learners.

    Args:
        learner: The base learner: maps inputs [..., E, F + ΣD] to scores [..., E] (see `episode.concatenate`).
        adapt_rows: Features whose embedding rows reach the method task by task (`Episodes.rows`), in name order.
        memory: Bytes that scoring may hold at a time.
        loss: Name of the query's event loss (see `losses.event_loss`).
        huber_delta: For the Huber loss.
        precision: Type of the base learner's products under torch.autocast; losses stay in the labels' type.
    """

    def __init__(
        self,
        learner: nn.Module,
        *,
        adapt_rows: tuple[str, ...] = (),
        memory: int = 1 << 30,
        loss: str = "squared",
        huber_delta: float = 1.0,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.learner = learner
        self.adapt_rows = tuple(sorted(adapt_rows))
        self.memory = memory
        self.loss, self.event_loss = loss, event_loss(loss, huber_delta)
        self.precision = precision
        #: From scores to predictions, where that is more than the identity: the builder's to set (see `link`).
        self.link: Staircase | None = None

    #: Whether all that the method reads of items is what `represented` gives: items may then be represented once a
    #: batch, however many events they have.
    by_items: ClassVar[bool] = False

    # --- a method's own --------------------------------------------------------------------------------------------

    def adapt(self, support: Examples, rows: Tensors) -> FastWeights:
        """The adapted state of T tasks from their support.

        Args:
            support: What each task adapts on; a task may have no event.
            rows: Adapted feature → initial rows [T, R, D].
        """
        raise NotImplementedError(f"{type(self).__name__}.adapt")

    def predict(self, fast: FastWeights, examples: Examples) -> Tensor:
        """Scores [T, E] of each task's events in its adapted state; labels of `examples` are not read.

        On the labels' scale, or logits; `predictions` are what the query loss is of.
        """
        raise NotImplementedError(f"{type(self).__name__}.predict")

    # --- what has a default ----------------------------------------------------------------------------------------

    def unadapted(self, support: Examples, rows: Tensors) -> FastWeights:
        """The state of T tasks about whose users nothing is known; `support` gives shapes alone."""
        return self.adapt(
            replace(support, labels=torch.zeros_like(support.labels), mask=torch.zeros_like(support.mask)), rows
        )

    def adapt_whole(self, support: Examples, rows: Tensors) -> FastWeights:
        """The adapted state with the link's own part: what `predictions` go by. Arguments as of `adapt`."""
        fast = self.adapt(support, rows)
        if self.link is None or not self.link.own:
            return fast
        return replace(fast, steps=self.link.steps_of(self.predict(fast, support), support.labels, support.mask))

    def unadapted_whole(self, support: Examples, rows: Tensors) -> FastWeights:
        """The state without adaptation with the link's own part. Arguments as of `unadapted`."""
        fast = self.unadapted(support, rows)
        if self.link is None or not self.link.own:
            return fast
        none = support.labels[:, :0]
        return replace(fast, steps=self.link.steps_of(none, none, none))

    def predictions(self, fast: FastWeights, examples: Examples) -> Tensor:
        """Predictions [T, E] of each task's events in its adapted state: its scores, by way of the link."""
        return self._linked(self.predict(fast, examples), fast)

    def _linked(self, scores: Tensor, fast: FastWeights) -> Tensor:
        return scores if self.link is None else self.link(scores, fast.steps)

    def forward(self, episodes: Episodes) -> QueryLoss:
        """The tasks' query losses after adaptation and the link's own, by what each counts; each before and after."""
        support, query, rows = episodes.support, episodes.query, episodes.rows
        fast = self.adapt_whole(support, rows)
        scores = self.predict(fast, query)
        after = self.task_losses(self._linked(scores, fast), query)
        total = episodes.summed(after) + self.untouched()
        if self.link is not None:
            total = total + episodes.summed(self.link.order_loss(scores, query.labels, query.mask))
        with torch.no_grad():
            before = self.task_losses(self.predictions(self.unadapted_whole(support, rows), query), query)
        return QueryLoss(total, after.detach(), before)

    def candidates(self) -> Sequence[Mapping[str, float]]:
        """Settings of adaptation that training leaves open: evaluation gives each to `choose` and keeps the one that
        serves validation tasks best. None by default."""
        return ()

    def choose(self, settings: Mapping[str, float]) -> None:
        """Adapts with one of `candidates` from now on."""
        raise NotImplementedError(f"{type(self).__name__}.choose")

    @property
    def links(self) -> bool:
        """Whether the query loss is of `predictions`, so that a link may stand between scores and these."""
        return type(self).forward is MetaLearner.forward

    def curves(self) -> dict[str, float]:
        """What of the method is worth a curve: tag → value now."""
        return {}

    def buckets(self, support: Tensor, query: Tensor, inputs: int, row_widths: Mapping[str, int]) -> list[Bucket]:
        """How to pad tasks for `forward`.

        Args:
            support, query: Their lengths, int64 [T].
            inputs: Width of the learner's input but for the adapted features.
            row_widths: Embedding width of each of those.
        """
        operations = 6 * sum(p.numel() for p in self.parameters()) + inputs + sum(row_widths.values())

        def seconds(tasks: int, support: int, query: int) -> float:
            return _CALL_SECONDS + tasks * (support + query) * operations * _OPERATION_SECONDS

        return cut(support, query, seconds)

    def tasks_at_a_time(self, sizes: Sizes) -> int:
        """How many tasks are scored at a time, at least 1."""
        a_row = sum(width for _, width in sizes.rows.values())
        numbers = sizes.inputs + a_row + sum(p.shape[0] for p in self.parameters() if p.dim())
        events = sizes.support + sizes.query
        # Of a representation a task may hold a matrix.
        a_task = 4 * sizes.itemsize * (events * (numbers + events) + max(p.numel() for p in self.parameters()))
        return max(1, self.memory // a_task)

    # --- for methods to call ---------------------------------------------------------------------------------------

    def task_losses(self, scores: Tensor, examples: Examples) -> Tensor:
        """Each task's mean event loss: [T, E] → [T]."""
        return mean_over_events(self.event_loss(scores, examples.labels), examples.mask)

    def inputs(self, examples: Examples, rows: Tensors) -> Tensor:
        """The base learner's inputs [T, E, F + ΣD]."""
        return inputs(examples, rows)

    def scores(self, x: Tensor) -> Tensor:
        """The base learner's scores with the shared parameters: [T, E, F + ΣD] → [T, E]."""
        with self.autocast(x.device.type):
            return self.learner(x)

    def represented(self, learner: Represents, x: Tensor, of_items: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Representations [T, E, H] and scores [T, E] of inputs, made at one go, both in the inputs' type.

        Args:
            learner: The base learner.
            x: Its inputs [T, E, F + ΣD].
            of_items: The representations, where they are there already (`Examples.represented`).
        """
        with self.autocast(x.device.type):
            h = learner.represent(x) if of_items is None else of_items
            return h.to(x.dtype), learner.score(h, x).to(x.dtype)

    @property
    def represents_items(self) -> bool:
        """Whether items can be represented once a batch, by `item_representations`."""
        return self.by_items and not self.adapt_rows and bool(getattr(self.learner, "of_items", False))

    def item_representations(self, x: Tensor) -> Tensor:
        """What the base learner represents U items by: inputs [U, F] without a task and an event → [U, H]."""
        with self.autocast(x.device.type):
            return cast(Represents, self.learner).represent(x).to(x.dtype)

    def autocast(self, device: str) -> contextlib.AbstractContextManager[Any]:
        """Where the base learner's products run in `precision`."""
        if self.precision is None:
            return contextlib.nullcontext()
        return torch.autocast(device, dtype=self.precision)

    def untouched(self) -> Tensor:
        """0, with a gradient of 0 to every parameter: the ranks reduce gradients together, used or not."""
        return torch.stack([0.0 * p.sum() for p in self.parameters() if p.requires_grad]).sum()
