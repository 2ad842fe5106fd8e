"""MAML: a start from which a few gradient steps on a task's support fit its query.

Finn, Abbeel and Levine 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks": the inner loop is
their equation in section 2.2, θ'ᵢ = θ − α ∇ L_support(θ), taken k times; the outer loss is their equation 1,
Σᵢ L_query(θ'ᵢ). Learned rates, one a parameter tensor a step, are those of Antoniou, Edwards and Storkey 2019, "How
to train your MAML", section 4 (LSLR).

The module's forward is the whole meta-loss, so that DistributedDataParallel around it averages exactly the
meta-gradient. Symbols: T tasks, E events (padded), R rows of an adapted feature in a task, D embedding width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from metatrain.meta.buckets import Bucket, cut
from metatrain.meta.engine import FastWeights, Tensors, rows_key
from metatrain.meta.episode import Episodes, Examples, Sizes
from metatrain.meta.learner import MetaLearner, QueryLoss
from metatrain.meta.low_rank_choice import ChoosingEngine, EngineName
from metatrain.meta.memory import Loop, Plan, plan

_log = logging.getLogger(__name__)


class MAML(MetaLearner):
    """Model-agnostic meta-learning around any base learner.

    Args:
        learner: Maps inputs [..., E, F + ΣD] to scores [..., E] (see `episode.concatenate` for the inputs' order).
        order: 2, or 1 for first-order MAML.
        steps: Inner steps; 0 leaves every task unadapted.
        rate: Inner rate; where rates are learned, their start.
        learn_rates: Whether each parameter tensor has a learned rate of its own in every step.
        adapt: Shell patterns over the learner's parameter names: what adapts.
        adapt_rows: Features whose embedding rows adapt, in each task its own copy.
        chunk: Tasks adapted at a time; at most one chunk's graph is in memory. 0: as many as `memory` allows.
        memory: Bytes that the inner loop may hold at a time.
        keep: Inner steps whose intermediate results are kept at a time where the engine is vmap, 0: all; "auto": all,
            where `memory` allows (see `memory.plan`).
        loss, inner_loss: Names of the query's and the support's event loss (see `losses.event_loss`).
        huber_delta: For the Huber loss.
        precision: Type of the base learner's products under torch.autocast; losses stay in the labels' type.
        engine: auto, low_rank or vmap: the inner loop's engine (see `low_rank_choice`); the gradient is the same.

    Raises:
        ValueError: A pattern that matches no parameter, or an unknown loss.
    """

    #: Whether each task starts from weights of its own.
    own_start = False
    #: Whether a subclass' `rates` hold one number a weight, in place of one a parameter tensor a step.
    _rates_a_weight: ClassVar[bool] = False

    def __init__(
        self,
        learner: nn.Module,
        *,
        order: int = 2,
        steps: int = 1,
        rate: float = 0.01,
        learn_rates: bool = False,
        adapt: Iterable[str] = ("*",),
        adapt_rows: Iterable[str] = (),
        chunk: int = 0,
        memory: int = 1 << 30,
        keep: int | Literal["auto"] = "auto",
        loss: str = "squared",
        inner_loss: str | None = None,
        huber_delta: float = 1.0,
        precision: torch.dtype | None = None,
        engine: EngineName = "auto",
    ) -> None:
        super().__init__(
            learner,
            adapt_rows=tuple(adapt_rows),
            memory=memory,
            loss=loss,
            huber_delta=huber_delta,
            precision=precision,
        )
        self.steps, self.chunk = steps, chunk
        self._keep: int | Literal["auto"] = keep
        self.adapted = matching_parameters(learner, adapt)
        self._order = order
        self._engine = ChoosingEngine(
            learner,
            inner_loss or loss,
            order,
            huber_delta,
            precision,
            chunk,
            memory,
            engine,
            rates_a_weight=self._rates_a_weight,
        )
        self._logged: set[str] = set()
        self._seconds: dict[tuple[int, int, int, int], float] = {}  # counted once: see `buckets`
        #: What the columns of `rates` belong to.
        self.rate_names = (*self.adapted, *(rows_key(name) for name in self.adapt_rows))
        rates = torch.full((steps, len(self.rate_names)), float(rate))
        if learn_rates and rates.numel():
            self.rates = nn.Parameter(rates)
        else:
            # Not part of the state: it comes from the configuration, and nothing changes it.
            self.register_buffer("rates", rates, persistent=False)

    def adapt(self, support: Examples, rows: Tensors) -> FastWeights:
        """See `MetaLearner.adapt`; a task without events keeps the shared parameters."""
        steps = self._step_rates(self.rates)
        return self._engine.adapt(self._parameters_and_buffers(), self.adapted, steps, support, rows)

    def unadapted(self, support: Examples, rows: Tensors) -> FastWeights:
        """See `MetaLearner.unadapted`: the shared parameters, of which nobody has a copy."""
        return FastWeights({}, rows)

    def predict(self, fast: FastWeights, examples: Examples) -> Tensor:
        """Scores [T, E] of each task's events with its fast weights; labels of `examples` are not read."""
        return self._engine.predict(self._parameters_and_buffers(), fast, examples)

    def forward(self, episodes: Episodes) -> QueryLoss:
        """The tasks' query losses after adaptation, by what each counts, and each before and after."""
        if self._fuses(episodes):
            return self._query_loss(self._parameters_and_buffers(), self.rates, episodes, 0)
        plan = self.plan(Sizes.of(episodes.support, episodes.query, episodes.rows))
        if plan.reason not in self._logged and (plan.chunk < episodes.size or plan.keep):
            self._logged.add(plan.reason)
            _log.log(logging.INFO if len(self._logged) == 1 else logging.DEBUG, "inner loop: %s", plan.reason)
        if plan.chunk < episodes.size:
            return self._by_chunks(episodes, plan)
        return self._query_loss(self._parameters_and_buffers(), self.rates, episodes, plan.keep)

    def plan(self, sizes: Sizes) -> Plan:
        """How many tasks, and how many of their steps, the vmap engine holds at a time of such a batch."""
        # Before the first product in bfloat16, weights and inputs are there in both types.
        itemsize = sizes.itemsize * 3 // 2 if self.precision is not None else sizes.itemsize
        rows = sum(count * width for count, width in sizes.rows.values())
        return plan(
            Loop.of(self.learner, self.adapted, self.steps, self._order, self.rates.requires_grad, self.own_start),
            *sizes[:3],
            self.memory,
            rows=rows,
            itemsize=itemsize,
            chunk=self.chunk,
            keep=self._keep,
        )

    def tasks_at_a_time(self, sizes: Sizes) -> int:
        """See `MetaLearner.tasks_at_a_time`."""
        return max(1, self.plan(sizes).chunk)

    def curves(self) -> dict[str, float]:
        """The inner rate of each adapted tensor, its mean over the steps."""
        if not self.rates.numel():
            return {}
        means = self.rates.detach().mean(0).tolist()
        return {f"rates/inner {name}": rate for name, rate in zip(self.rate_names, means, strict=True)}

    def buckets(self, support: Tensor, query: Tensor, inputs: int, row_widths: Mapping[str, int]) -> list[Bucket]:
        """See `MetaLearner.buckets`."""

        def seconds(tasks: int, support: int, query: int) -> float:
            # As if every event used a row of its own: the most there are of features with one value.
            rows = {name: (support + query, width) for name, width in row_widths.items()}
            key = (tasks, support, query, inputs)
            if key not in self._seconds:
                self._seconds[key] = self._counted_seconds(Sizes(*key, rows))
            return self._seconds[key]

        return cut(support, query, seconds)

    def _counted_seconds(self, sizes: Sizes) -> float:
        return self._engine.seconds(self.adapted, self.steps, sizes)

    def _fuses(self, episodes: Episodes) -> bool:
        """Whether `_query_loss` bounds its memory itself, whatever the number of tasks."""
        return self._engine.fuses(self.adapted, self.steps, episodes)

    def _query_loss(self, parameters: Tensors, rates: Tensor, episodes: Episodes, keep: int) -> QueryLoss:
        steps = self._step_rates(rates)
        return QueryLoss(*self._engine.query_loss(parameters, self.adapted, steps, episodes, self.loss, keep))

    def _step_rates(self, rates: Tensor) -> list[Tensors]:
        return [dict(zip(self.rate_names, of_step.unbind(), strict=True)) for of_step in rates]

    def _parameters_and_buffers(self) -> Tensors:
        return {**dict(self.learner.named_parameters()), **dict(self.learner.named_buffers())}

    def _by_chunks(self, episodes: Episodes, plan: Plan) -> QueryLoss:
        parameters = self._parameters_and_buffers()
        names, features = list(parameters), list(episodes.rows)
        support, query = episodes.support, episodes.query

        def part(shared: list[Tensor], own: list[Tensor], start: int, stop: int) -> QueryLoss:
            rates, *values = shared
            x_support, x_query, *rows = own
            of_support, of_query = support.tasks(start, stop), query.tasks(start, stop)
            return self._query_loss(
                dict(zip(names, values, strict=True)),
                rates,
                Episodes(
                    Examples(x_support, of_support.slots, of_support.labels, of_support.mask),
                    Examples(x_query, of_query.slots, of_query.labels, of_query.mask),
                    dict(zip(features, rows, strict=True)),
                    None if episodes.weights is None else episodes.weights[start:stop],
                ),
                plan.keep,
            )

        shared = [self.rates, *parameters.values()]
        own = [support.x, query.x, *episodes.rows.values()]
        total, after, before = _ChunkedLoss.apply(part, plan.chunk, len(shared), *shared, *own)
        return QueryLoss(total, after, before)


class _ChunkedLoss(torch.autograd.Function):
    """A sum over tasks whose gradient is taken chunk by chunk in the forward pass, and only scaled in the backward.

    Keeping each chunk's graph for one common backward would hold as much memory as no chunks at all; recomputing
    would double the work. The gradients kept are as large as the inputs.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, part: Callable[..., QueryLoss], chunk: int, count: int, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        needed = ctx.needs_input_grad[3:]
        shared = [t.detach().requires_grad_(need) for t, need in zip(tensors[:count], needed[:count], strict=True)]
        own, own_needed = tensors[count:], needed[count:]
        gradients = [torch.zeros_like(t) if need else None for t, need in zip(tensors, needed, strict=True)]
        losses: list[QueryLoss] = []
        for start in range(0, own[0].shape[0], chunk):
            stop = min(start + chunk, own[0].shape[0])
            pieces = [t[start:stop].detach().requires_grad_(need) for t, need in zip(own, own_needed, strict=True)]
            with torch.set_grad_enabled(any(needed)):
                loss = part(shared, pieces, start, stop)
            losses.append(QueryLoss(loss.total.detach(), loss.after, loss.before))
            leaves = [(i, t) for i, t in enumerate([*shared, *pieces]) if t.requires_grad]
            if not leaves:
                continue
            found = torch.autograd.grad(loss.total, [t for _, t in leaves], allow_unused=True)
            for (i, _), gradient in zip(leaves, found, strict=True):
                whole = gradients[i]
                if gradient is not None and whole is not None:
                    (whole if i < count else whole[start:stop]).add_(gradient)
        ctx.gradients = gradients
        after, before = torch.cat([loss.after for loss in losses]), torch.cat([loss.before for loss in losses])
        ctx.mark_non_differentiable(after, before)
        return torch.stack([loss.total for loss in losses]).sum(), after, before

    @staticmethod
    def backward(ctx: Any, by_total: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        scaled = [None if gradient is None else gradient * by_total for gradient in ctx.gradients]
        ctx.gradients = None
        return None, None, None, *scaled


def head_of(learner: nn.Module, method: str) -> tuple[str, ...]:
    """Names of the parameters that the base learner says are its head, in its order.

    Args:
        learner: With `head_parameters`, patterns over its parameter names.
        method: Who asks, for the message.

    Raises:
        ValueError: The base learner doesn't say.
    """
    patterns = getattr(learner, "head_parameters", None)
    if not patterns:
        raise ValueError(
            f"{method} tells the head from the rest, and {type(learner).__name__} doesn't say which parameters are its "
            "head: give it `head_parameters`, patterns over their names, or choose another base learner"
        )
    return matching_parameters(learner, patterns)


def matching_parameters(learner: nn.Module, patterns: Iterable[str]) -> tuple[str, ...]:
    """Names of the learner's parameters that match any of the shell patterns, in the learner's order.

    Raises:
        ValueError: A pattern that matches none; the message lists the names there are.
    """
    names = [name for name, _ in learner.named_parameters()]
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if fnmatchcase(name, pattern)}
        if not found:
            raise ValueError(f"the pattern {pattern!r} matches no parameter of the base learner: {', '.join(names)}")
        chosen |= found
    return tuple(name for name in names if name in chosen)
