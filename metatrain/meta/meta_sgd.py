"""Meta-SGD: MAML with a learned rate a weight: the outer loop learns the start, the directions and the step sizes.

Li, Zhou, Chen and Li 2017, "Meta-SGD: Learning to Learn Quickly for Few-Shot Learning", section "Meta-SGD": a task's
weights are θ' = θ - α ∘ ∇L_support(θ), with α of θ's shape and learned beside it. Its entries may become negative:
α ∘ ∇L is a direction, which need not be downhill on the support.

Where it departs from the paper:

- The paper takes one step. Here there may be more (a recipe's `meta.steps` says), and all share α: so its size, that
  of the model once more, doesn't grow with the steps.
- The paper draws the entries of α at random from a small interval. Here they all start at `rate`: the start is then
  plain MAML's.
- Adapted embedding rows have a rate a column: a table's rows are many, and a task's own are looked up by what it has
  seen, so a rate a row would be another table.

Symbols: N weights that adapt, D embedding width.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

from metatrain.meta.engine import Tensors, rows_key
from metatrain.meta.layout import Layout
from metatrain.meta.low_rank_choice import EngineName
from metatrain.meta.maml import MAML


class MetaSGD(MAML):
    """MAML with a learned rate a weight.

    Parameters: the base learner's, and `rates` [N + ΣD]: the adapted parameters' rates in the order of `adapted`, each
    as its parameter flattened, then those of adapted rows' columns in the order of `adapt_rows`.

    Args:
        learner, order, steps, adapt, adapt_rows, chunk, memory, keep, loss, inner_loss, huber_delta, precision: See
            `MAML`. At order 1 rates are learned as well: inner gradients are constants for the start alone.
        rate: Every rate's start.
        engine: auto or vmap: steps that are scaled weight by weight have no low-rank form.
        layout: Whose the input's columns are; how wide adapted rows are is read off it.

    Raises:
        ValueError: No steps, or nothing that adapts; adapted rows whose width is unknown; the low-rank engine; or see
            `MAML`.
    """

    _rates_a_weight = True

    def __init__(
        self,
        learner: nn.Module,
        *,
        order: int = 2,
        steps: int = 1,
        rate: float = 0.01,
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
        layout: Layout | None = None,
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}: without a step no rate is learned")
        super().__init__(
            learner,
            order=order,
            steps=steps,
            rate=rate,
            adapt=adapt,
            adapt_rows=adapt_rows,
            chunk=chunk,
            memory=memory,
            keep=keep,
            loss=loss,
            inner_loss=inner_loss,
            huber_delta=huber_delta,
            precision=precision,
            engine=engine,
        )
        widths = {columns.feature: columns.stop - columns.start for columns in layout.features} if layout else {}
        if unknown := [name for name in self.adapt_rows if name not in widths]:
            raise ValueError(
                f"adapted rows have a rate a column, and the layout doesn't say how wide those of "
                f"{', '.join(unknown)} are: leave them out of adapt_rows, or give a layout that has them"
            )
        self._shapes = {name: learner.get_parameter(name).shape for name in self.adapted}
        self._shapes |= {rows_key(name): torch.Size([widths[name]]) for name in self.adapt_rows}
        self._counts = [math.prod(shape) for shape in self._shapes.values()]
        if not self._counts:
            raise ValueError("nothing adapts, so there is no rate to learn: name parameters in adapt, or adapt_rows")
        self.rates = nn.Parameter(torch.full((sum(self._counts),), float(rate)))

    def curves(self) -> dict[str, float]:
        """The mean rate of each adapted tensor, and which share of all rates is negative."""
        rates = self.rates.detach()
        means = torch.stack([part.mean() for part in rates.split(self._counts)]).tolist()
        named = {f"rates/inner {name}": mean for name, mean in zip(self._shapes, means, strict=True)}
        return {**named, "rates/share below 0": float((rates < 0).float().mean())}

    def _step_rates(self, rates: Tensor) -> list[Tensors]:
        parts = zip(self._shapes.items(), rates.split(self._counts), strict=True)
        return [{name: part.view(shape) for (name, shape), part in parts}] * self.steps
