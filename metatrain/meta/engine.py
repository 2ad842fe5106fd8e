"""Inner-loop engines: adapt all tasks of a batch at once, each as if it were alone.

An engine is pure: it is given every tensor it reads (no hidden module state) and returns new ones, differentiable to
them. So a meta-learner may call it on parts of a batch, under `torch.no_grad`, or on one rank of many.

Symbols: T tasks, E events (padded), R rows of an adapted feature in a task (padded), D embedding width.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.func import functional_call, grad, vmap

from metatrain.meta.episode import Examples, Slots, concatenate
from metatrain.meta.losses import EventLoss, mean_over_events

#: Name → tensor: parameters and buffers of a base learner, or fast weights with a leading axis of tasks.
Tensors = dict[str, Tensor]


@dataclass(frozen=True)
class FastWeights:
    """Adapted copies, one a task: `weights` of the parameters that adapt, `rows` of the adapted embedding rows.

    What does not adapt is absent from `weights`; `rows` always has every adapted feature, `[T, R, D]`. `steps` is what
    a link between scores and predictions has of each task.
    """

    weights: Tensors  # parameter name → [T, *shape]
    rows: Tensors  # adapted feature → [T, R, D]
    steps: Tensor | None = None  # see `link.Staircase.steps_of`; None: those that all tasks share

    def tasks(self, start: int, stop: int) -> FastWeights:
        """The tasks from `start` to `stop`."""
        return FastWeights(
            {name: weight[start:stop] for name, weight in self.weights.items()},
            {name: rows[start:stop] for name, rows in self.rows.items()},
            None if self.steps is None else self.steps[start:stop],
        )


class Engine(Protocol):
    """What a meta-learner asks of an inner loop. Implement it to add another engine (see `VmapEngine`)."""

    def adapt(
        self,
        parameters: Tensors,
        adapted: tuple[str, ...],
        rates: list[dict[str, Tensor]],
        support: Examples,
        rows: Tensors,
    ) -> FastWeights:
        """Gradient steps on each task's mean support loss, from the shared parameters.

        Args:
            parameters: All parameters and buffers of the base learner.
            adapted: Names of those that adapt.
            rates: One entry a step: the rate (a scalar tensor) of each adapted parameter and, under `rows:NAME`, of
                each adapted feature. `VmapEngine` also takes a rate a weight, of the parameter's shape, and for rows
                a rate a column, [D].
            support: Support of T tasks; a task without any event keeps the shared parameters.
            rows: Adapted feature → initial rows [T, R, D].
        """
        ...

    def predict(self, parameters: Tensors, fast: FastWeights, examples: Examples) -> Tensor:
        """Scores [T, E] of each task's events with its fast weights."""
        ...


def rows_key(feature: str) -> str:
    """The name under which the rates hold an adapted feature's rows."""
    return f"rows:{feature}"


class VmapEngine:
    """Any base learner, through torch.func: `vmap` over tasks of `grad` of `functional_call`.

    Args:
        learner: Maps inputs [..., E, F + ΣD] to scores [..., E].
        loss: Loss of a support event.
        order: 2 differentiates through the inner gradients; 1 takes them as constants, which is exactly the
            first-order approximation of Finn et al. 2017, section 5.2.
        precision: Type in which the base learner's products run (torch.autocast); None: as its weights.
    """

    def __init__(
        self, learner: nn.Module, loss: EventLoss, order: int = 2, precision: torch.dtype | None = None
    ) -> None:
        self._learner, self._loss, self._order, self._precision = learner, loss, order, precision
        self._fused_gains = fused_gains(learner) if order == 2 else set()

    def adapt(
        self,
        parameters: Tensors,
        adapted: tuple[str, ...],
        rates: list[dict[str, Tensor]],
        support: Examples,
        rows: Tensors,
        keep: int = 0,
        start: Tensors | None = None,
    ) -> FastWeights:
        """See `Engine.adapt`.

        Args:
            keep: Steps of which intermediate results are kept at a time; those of the others are computed again in
                the backward, from the weights between. The gradient is the same. 0: all are kept.
            start: What each task starts from, [T, *shape] of each adapted parameter. Default: the shared parameters.

        Raises:
            ValueError: The gain of a torch.nn.LayerNorm would adapt, whose second-order gradient would be wrong.
        """
        if self._fused_gains.intersection(adapted):
            gains = ", ".join(sorted(self._fused_gains))
            raise ValueError(
                f"the gain of a torch.nn.LayerNorm can't adapt in second order: {gains}; take "
                "metatrain.model.learners.mlp.LayerNorm, or order 1, or leave it out of what adapts"
            )
        tasks = support.labels.shape[0]
        if not rates:
            return FastWeights(start or {name: _a_copy_each(parameters[name], tasks) for name in adapted}, dict(rows))
        if self._order == 1:
            # The inner gradients are taken at detached points, so no graph of them is ever built.
            support = Examples(support.x.detach(), support.slots, support.labels, support.mask)
        weights: Tensors = start or {name: parameters[name] for name in adapted}
        # Where the first step starts from weights that all tasks share it takes one product, not T.
        shared = start is None
        keep = keep or len(rates)
        for first in range(0, len(rates), keep):
            few = rates[first : first + keep]
            if keep >= len(rates):
                weights, rows = self._steps(parameters, weights, dict(rows), few, support, shared)
            else:
                weights, rows = self._recomputed(parameters, weights, dict(rows), few, support, shared)
            shared = False
        return FastWeights(weights, dict(rows))

    def _steps(
        self,
        parameters: Tensors,
        weights: Tensors,
        rows: Tensors,
        rates: list[Tensors],
        support: Examples,
        shared: bool,
    ) -> tuple[Tensors, Tensors]:
        """Some steps from `weights`, which are `shared` by all tasks or a copy each."""
        inner = parameters if self._order == 2 else _detached(parameters)

        def task_loss(
            weights: Tensors, rows: Tensors, x: Tensor, slots: dict[str, Slots], labels: Tensor, mask: Tensor
        ) -> Tensor:
            scores = self._scores({**inner, **weights}, rows, x, slots)
            return mean_over_events(self._loss(scores.to(labels.dtype), labels), mask)

        gradient = grad(task_loss, argnums=(0, 1))
        events = (support.x, support.slots, support.labels, support.mask)
        for step_rates in rates:
            at = (weights, rows) if self._order == 2 else (_detached(weights), _detached(rows))
            by_weight, by_row = vmap(gradient, in_dims=(None if shared else 0, 0, 0, 0, 0, 0))(*at, *events)
            weights = {name: weights[name] - step_rates[name] * by_weight[name] for name in weights}
            rows = {name: rows[name] - step_rates[rows_key(name)] * by_row[name] for name in rows}
            shared = False
        return weights, rows

    def _recomputed(
        self,
        parameters: Tensors,
        weights: Tensors,
        rows: Tensors,
        rates: list[Tensors],
        support: Examples,
        shared: bool,
    ) -> tuple[Tensors, Tensors]:
        """`_steps`, computed again in the backward in place of being kept."""
        rest = {name: parameter for name, parameter in parameters.items() if name not in weights}
        names = [list(tensors) for tensors in (weights, rows, rest, *rates)]

        def run(x: Tensor, *flat: Tensor) -> list[Tensor]:
            left = iter(flat)
            weights, rows, rest, *rates = ({name: next(left) for name in of} for of in names)
            events = Examples(x, support.slots, support.labels, support.mask)
            found = self._steps({**rest, **weights}, weights, rows, rates, events, shared)
            return [tensor for tensors in found for tensor in tensors.values()]

        flat = [tensor for tensors in (weights, rows, rest, *rates) for tensor in tensors.values()]
        found = iter(_Recomputed.apply(run, support.x, *flat))
        return {name: next(found) for name in weights}, {name: next(found) for name in rows}

    def predict(self, parameters: Tensors, fast: FastWeights, examples: Examples) -> Tensor:
        """See `Engine.predict`."""

        def task_scores(weights: Tensors, rows: Tensors, x: Tensor, slots: dict[str, Slots]) -> Tensor:
            return self._scores({**parameters, **weights}, rows, x, slots)

        return vmap(task_scores)(fast.weights, fast.rows, examples.x, examples.slots).to(examples.labels.dtype)

    def _scores(self, parameters: Tensors, rows: Tensors, x: Tensor, slots: dict[str, Slots]) -> Tensor:
        inputs = concatenate(x, rows, slots)
        with self._autocast(x.device.type):
            return functional_call(self._learner, parameters, (inputs,))

    def _autocast(self, device: str) -> contextlib.AbstractContextManager[object]:
        if self._precision is None:
            return contextlib.nullcontext()
        # The cache of casts would hold tensors of one vmap level into the next.
        return torch.autocast(device, dtype=self._precision, cache_enabled=False)


class _Recomputed(torch.autograd.Function):
    """(function, tensors…) → what the function returns, with nothing kept but the tensors.

    torch.utils.checkpoint needs saved-tensor hooks, which torch.func refuses.
    """

    @staticmethod
    def forward(ctx: Any, run: Callable[..., list[Tensor]], *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.run = run
        ctx.save_for_backward(*tensors)
        return tuple(run(*tensors))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *by_output: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        needed = ctx.needs_input_grad[1:]
        leaves = [t.detach().requires_grad_(need) for t, need in zip(ctx.saved_tensors, needed, strict=True)]
        with torch.enable_grad():
            outputs = ctx.run(*leaves)
        pairs = [(out, by) for out, by in zip(outputs, by_output, strict=True) if out.requires_grad]
        wanted = [leaf for leaf in leaves if leaf.requires_grad]
        found = iter(
            torch.autograd.grad([out for out, _ in pairs], wanted, [by for _, by in pairs], allow_unused=True)
            if wanted and pairs
            else [None] * len(wanted)
        )
        return None, *(next(found) if leaf.requires_grad else None for leaf in leaves)


def fused_gains(learner: nn.Module) -> set[str]:
    """Gains whose second derivative torch.func gets wrong where they are a task's own (seen in torch 2.13)."""
    fused = [n for n, m in learner.named_modules() if type(m) is nn.LayerNorm and m.elementwise_affine]
    return {f"{name}.weight".lstrip(".") for name in fused}


def _a_copy_each(parameter: Tensor, tasks: int) -> Tensor:
    return parameter.unsqueeze(0).expand(tasks, *parameter.shape)


def _detached(tensors: Tensors) -> Tensors:
    return {name: tensor.detach() for name, tensor in tensors.items()}
