"""The slow reference of gradient-based methods: one task at a time, its events without padding, by plain autograd."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from contract import LAYOUT, made_up
from torch import Tensor, nn
from torch.func import functional_call

from metatrain.meta.engine import Tensors
from metatrain.meta.episode import Episodes, Examples, Slots
from metatrain.meta.layout import Columns, Layout
from metatrain.meta.learner import MetaLearner
from metatrain.meta.losses import event_loss

#: An adapted feature `zone` behind `LAYOUT`: 3 rows a task of width 4.
ROWS, ROW_WIDTH = 3, 4
LAYOUT_WITH_ROWS = Layout((*LAYOUT.features, Columns("zone", "item", LAYOUT.width, LAYOUT.width + ROW_WIDTH)))


def made_up_with_rows(
    tasks: int = 5, support: int = 6, *, click: bool = False, seed: int = 0, scale: float = 1.0
) -> Episodes:
    """Episodes of `contract.made_up`, whose events also read one or two of their task's rows; every input a leaf.

    Inputs and rows are `scale` times normal.
    """
    episodes = made_up(tasks, support, click=click, seed=seed)
    draw = torch.Generator().manual_seed(seed + 1)

    def with_slots(examples: Examples) -> Examples:
        shape = (*examples.labels.shape, 2)
        mask = torch.stack([torch.ones(shape[:2]), torch.randint(0, 2, shape[:2], generator=draw).float()], -1)
        slots = Slots(torch.randint(0, ROWS, shape, generator=draw), mask.to(examples.x))
        return replace(examples, x=(scale * examples.x).requires_grad_(), slots={"zone": slots})

    rows = scale * torch.randn(episodes.size, ROWS, ROW_WIDTH, generator=draw).to(episodes.support.x)
    return Episodes(with_slots(episodes.support), with_slots(episodes.query), {"zone": rows.requires_grad_()})


@dataclass
class Task:
    """One task's events."""

    learner: nn.Module
    rows: Tensors  # [R, D]
    support: tuple[Tensor, dict[str, Slots], Tensor]  # x [E, F], slots, labels [E]; no event has mask 0
    query: tuple[Tensor, dict[str, Slots], Tensor]
    inner_loss: str
    loss_name: str

    @classmethod
    def of(cls, meta: MetaLearner, episodes: Episodes, task: int, inner_loss: str | None = None) -> Task:
        """That task of the episodes."""

        def side(examples: Examples) -> tuple[Tensor, dict[str, Slots], Tensor]:
            kept = examples.mask[task].bool()
            slots = {n: Slots(s.index[task][kept], s.mask[task][kept]) for n, s in examples.slots.items()}
            return examples.x[task][kept], slots, examples.labels[task][kept]

        rows = {name: own[task] for name, own in episodes.rows.items()}
        sides = side(episodes.support), side(episodes.query)
        return cls(meta.learner, rows, *sides, inner_loss or meta.loss, meta.loss)

    @property
    def both(self) -> tuple[Tensor, dict[str, Slots], Tensor]:
        """Support and query together."""
        (x, slots, y), (x2, slots2, y2) = self.support, self.query
        joint = {n: Slots(*(torch.cat(pair) for pair in zip(s, slots2[n], strict=True))) for n, s in slots.items()}
        return torch.cat([x, x2]), joint, torch.cat([y, y2])

    def loss(
        self, events: tuple[Tensor, dict[str, Slots], Tensor], weights: Tensors, rows: Tensors, name: str
    ) -> Tensor:
        """Mean loss of events with the learner's parameters but `weights`; 0 where there is no event."""
        x, slots, labels = events
        if not len(labels):
            return sum(w.sum() for w in (*weights.values(), *rows.values())) * 0.0
        parts = [x]
        for feature in sorted(rows):
            index, mask = slots[feature]
            of_event = [
                torch.stack([rows[feature][i] for i, m in zip(*event, strict=True) if m]).mean(0)
                for event in zip(index.tolist(), mask.tolist(), strict=True)
            ]
            parts.append(torch.stack(of_event))
        parameters = {**dict(self.learner.named_parameters()), **weights}
        scores = functional_call(self.learner, parameters, (torch.cat(parts, -1),))
        return event_loss(name)(scores, labels).mean()

    def adapted(
        self,
        names: tuple[str, ...],
        steps: int,
        rate: Callable[[int, str], Tensor | float],
        *,
        order: int = 2,
        strength: float = 0.0,
        on: str = "support",
    ) -> tuple[Tensors, Tensors]:
        """Weights and rows after gradient steps on the mean loss of the task's events, plus ½ `strength` times the
        squared distance from the start; `rate` of a step and a name (`rows:NAME` for rows)."""
        start = {name: self.learner.get_parameter(name) for name in names}
        weights, rows = dict(start), dict(self.rows)
        events = self.support if on == "support" else self.both
        for step in range(steps):
            flat = [*weights.values(), *rows.values()]
            loss = self.loss(events, weights, rows, self.inner_loss)
            found = torch.autograd.grad(loss, flat, create_graph=order == 2, retain_graph=True, materialize_grads=True)
            by = iter(found)
            pulled = {n: next(by) + strength * (w - start[n]) for n, w in weights.items()}
            rows_pulled = {n: next(by) + strength * (r - self.rows[n]) for n, r in rows.items()}
            weights = {n: w - rate(step, n) * pulled[n] for n, w in weights.items()}
            rows = {n: r - rate(step, f"rows:{n}") * rows_pulled[n] for n, r in rows.items()}
        return weights, rows

    def query_loss(self, weights: Tensors, rows: Tensors) -> Tensor:
        """Mean query loss."""
        return self.loss(self.query, weights, rows, self.loss_name)


def all_gradients(meta: MetaLearner, episodes: Episodes, total: Tensor) -> dict[str, Tensor]:
    """The gradient of every parameter, of the rows and of the inputs that are leaves; zero where there is none."""
    leaves = dict(meta.named_parameters())
    leaves |= {f"rows:{name}": rows for name, rows in episodes.rows.items()}
    leaves |= {f"x of {side}": getattr(episodes, side).x for side in ("support", "query")}
    leaves = {name: t for name, t in leaves.items() if t.requires_grad}
    found = torch.autograd.grad(total, list(leaves.values()), allow_unused=True, materialize_grads=True)
    return dict(zip(leaves, found, strict=True))
