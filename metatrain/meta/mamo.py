"""MAMO: gradient steps from a start that a memory makes of what is known about the task before its first event.

Dong, Yuan, Yao, Xu and Zhu 2020, "MAMO: Memory-Augmented Meta-Optimization for Cold-start Recommendation". Two memories
of K slots are read by one attention of the task's own features p over the slots' prototypes P:

    a = softmax(s · cos(p, P_k))                        the share of each slot
    start = θ - τ Σ_k a_k B_k                           the feature-specific memory: B_k is a bias on what adapts
    M = Σ_k a_k M_k                                     the task-specific memory: a matrix of preferences

From the start each task takes gradient steps on its support, as in MAML, whose rates, orders, patterns, chunks and
recomputed steps it has. With `preference` the base learner reads x + M x in place of an event's input x; M adapts with
the rest. It is exact and costs no code of its own: M is one more parameter that adapts, whose shared value is 0 and of
which B_k's part is -M_k / τ.

A task without support is at its start. A task's features are its columns of any of its events, so the start is made
anew where events are scored, and the fast weights hold how far the steps went from it.

Where this departs from the paper:

- P and B (so M_k, too) are learned by the outer loop, through the start. The paper writes them by hand: moving averages
  of a pᵀ, of a times the support's gradient, and of a Mᵀ, task after task, which is no function of a batch.
- B_k is a bias on all that adapts, not on the user's embedding layer alone: `adapt` chooses.
- The base learner reads x + M x, the paper M x in its embeddings' place; so a run starts as MAML would, with B of 0.
- s is learned. The paper's softmax of bare cosines, none of them below -1 or above 1, can't tell slots well apart.

Symbols: T tasks, E events, F width of an input, P width of the task's own features, K slots, N weights that adapt.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, normalize

from metatrain.meta.engine import FastWeights, Tensors, VmapEngine
from metatrain.meta.episode import Episodes, Examples
from metatrain.meta.layout import Layout
from metatrain.meta.learner import QueryLoss
from metatrain.meta.losses import event_loss
from metatrain.meta.maml import MAML, matching_parameters

#: Names of the memory's tensors beside the learner's, which no parameter of a module can have.
_MEMORY = {"memory:prototypes": "prototypes", "memory:biases": "biases", "memory:sharpness": "log_sharpness"}
#: Squares of features below this have no direction: those of a task about which nothing is known are 0.
_LEAST_NORM = 1e-6


class Preferring(nn.Module):
    """A base learner over x + M x: its parameters are M, `preference` [F, F], and those of `learner`."""

    def __init__(self, learner: nn.Module, inputs: int) -> None:
        super().__init__()
        self.preference = nn.Parameter(torch.zeros(inputs, inputs))
        self.learner = learner

    def forward(self, x: Tensor) -> Tensor:
        """Inputs [..., E, F] → scores [..., E]."""
        return self.learner(x + linear(x, self.preference).to(x.dtype))


class MAMO(MAML):
    """Gradient steps from a start a task, read from a memory by the task's own features.

    Args:
        learner: Any base learner.
        layout: Whose the columns of its input are.
        order, steps, rate, learn_rates, adapt, adapt_rows, chunk, memory, keep: See `MAML`; the engine is vmap, since
            the low-rank form needs a start that tasks share.
        loss, inner_loss, huber_delta, precision: See `MAML`.
        slots: K.
        tau: τ.
        sharpness: s at the start.
        preference: Whether there is the task-specific memory: F² numbers a slot, and as many a task while it adapts.

    Raises:
        ValueError: Nothing is known of tasks but their events, or a setting that can't be.
    """

    own_start = True

    def __init__(
        self,
        learner: nn.Module,
        *,
        layout: Layout,
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
        slots: int = 8,
        tau: float = 1.0,
        sharpness: float = 5.0,
        preference: bool = False,
    ) -> None:
        adapt_rows = tuple(adapt_rows)
        # Rows that adapt would move the task's address in the memory from step to step.
        columns = layout.where(lambda c: c.owner == "task" and c.feature not in adapt_rows)
        if not len(columns):
            raise ValueError(
                "MAMO's memory is addressed by the task's own features, and there is none that does not adapt; add a "
                "task-level feature to model.features (prepare the dataset with a user table), leave it out of "
                "meta.adapt_rows, or choose maml"
            )
        for name, value in (("tau", tau), ("sharpness", sharpness), ("slots", slots)):
            if value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        adapted = matching_parameters(learner, adapt)
        if not adapted:
            raise ValueError("MAMO's memory holds biases of what adapts, and meta.adapt is empty; give it a pattern")
        if preference:
            learner = Preferring(learner, layout.width)
            adapted = ("preference", *(f"learner.{name}" for name in adapted))
        super().__init__(
            learner,
            order=order,
            steps=steps,
            rate=rate,
            learn_rates=learn_rates,
            adapt=adapted,
            adapt_rows=adapt_rows,
            chunk=chunk,
            memory=memory,
            keep=keep,
            loss=loss,
            inner_loss=inner_loss,
            huber_delta=huber_delta,
            precision=precision,
            engine="vmap",
        )
        self._vmap = VmapEngine(learner, event_loss(inner_loss or loss, huber_delta), order, precision)
        self.tau = tau
        self.register_buffer("columns", columns, persistent=False)
        self._shapes = {name: p.shape for name, p in learner.named_parameters() if name in self.adapted}
        self.prototypes = nn.Parameter(torch.randn(slots, len(columns)))
        #: B, all that adapts in one row.
        self.biases = nn.Parameter(torch.zeros(slots, sum(shape.numel() for shape in self._shapes.values())))
        self.log_sharpness = nn.Parameter(torch.tensor(math.log(sharpness)))

    columns: Tensor

    def adapt(self, support: Examples, rows: Tensors) -> FastWeights:
        """See `MetaLearner.adapt`: how far each adapted parameter went from its start, [T, *shape]."""
        parameters = self._parameters_and_buffers()
        start = self._start(parameters, support)
        steps = self._step_rates(self.rates)
        fast = self._vmap.adapt(self._of_learner(parameters), self.adapted, steps, support, rows, start=start)
        return FastWeights({name: fast.weights[name] - start[name] for name in start}, fast.rows)

    def predict(self, fast: FastWeights, examples: Examples) -> Tensor:
        """See `MetaLearner.predict`; the start is that of the features in `examples`."""
        parameters = self._parameters_and_buffers()
        start = self._start(parameters, examples)
        weights = {name: own + fast.weights[name] if fast.weights else own for name, own in start.items()}
        return self._vmap.predict(self._of_learner(parameters), FastWeights(weights, fast.rows), examples)

    def curves(self) -> dict[str, float]:
        """MAML's, and s."""
        return {**super().curves(), "meta/memory sharpness": float(self.log_sharpness.detach().exp())}

    def slots_of(self, examples: Examples) -> Tensor:
        """The share of each slot in each task's start: [T, K]."""
        return self._slots(self._parameters_and_buffers(), examples)

    def _query_loss(self, parameters: Tensors, rates: Tensor, episodes: Episodes, keep: int) -> QueryLoss:
        query, rows, of_learner = episodes.query, episodes.rows, self._of_learner(parameters)
        # The query has the features even of a task without support.
        start = self._start(parameters, query)
        steps = self._step_rates(rates)
        fast = self._vmap.adapt(of_learner, self.adapted, steps, episodes.support, rows, keep, start)
        after = self.task_losses(self._vmap.predict(of_learner, fast, query), query)
        with torch.no_grad():
            before = self.task_losses(self._vmap.predict(of_learner, FastWeights(start, rows), query), query)
        return QueryLoss(episodes.summed(after), after.detach(), before)

    def _slots(self, parameters: Tensors, examples: Examples) -> Tensor:
        # Each of a task's events has its features; a mean would depend, in the last bit, on how many there are.
        tasks = torch.arange(examples.x.shape[0], device=examples.x.device)
        p_TP = examples.x[tasks, examples.mask.argmax(-1)][:, self.columns]
        length = (p_TP.square().sum(-1, keepdim=True) + _LEAST_NORM).sqrt()
        cosines = (p_TP / length) @ normalize(parameters["memory:prototypes"], dim=-1).T
        return torch.softmax(parameters["memory:sharpness"].exp() * cosines, dim=-1)

    def _start(self, parameters: Tensors, examples: Examples) -> Tensors:
        """What each task starts from: adapted parameter → [T, *shape]."""
        bias_TN = self._slots(parameters, examples) @ parameters["memory:biases"]
        parts = bias_TN.split([shape.numel() for shape in self._shapes.values()], dim=-1)
        return {
            name: parameters[name] - self.tau * part.reshape(-1, *shape)
            for (name, shape), part in zip(self._shapes.items(), parts, strict=True)
        }

    def _parameters_and_buffers(self) -> Tensors:
        # With the memory's, since chunks are differentiated to what is named here.
        return {**super()._parameters_and_buffers(), **{name: getattr(self, own) for name, own in _MEMORY.items()}}

    def _of_learner(self, parameters: Tensors) -> Tensors:
        return {name: tensor for name, tensor in parameters.items() if name not in _MEMORY}
