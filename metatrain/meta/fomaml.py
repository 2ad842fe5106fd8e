"""FOMAML: MAML without second derivatives.

Finn, Abbeel and Levine 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", section 5.2: the
inner gradients are taken as constants, so that the outer gradient at the start is the query's gradient at the adapted
weights: Σᵢ ∇L_query(θ'ᵢ). What doesn't adapt gets its gradient at these weights too, and a learned rate the gradient
that a constant inner gradient leaves it, -⟨∇L_query, ∇L_support⟩.

It is what MAML does at `order: 1`, under its own name: a recipe that says fomaml can't become second order by mistake.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from metatrain.meta.low_rank_choice import EngineName
from metatrain.meta.maml import MAML


class FOMAML(MAML):
    """First-order MAML.

    Args:
        learner, steps, rate, learn_rates, adapt, adapt_rows, chunk, memory, keep, loss, inner_loss, huber_delta,
            precision, engine: See `MAML`.

    Raises:
        ValueError: See `MAML`.
    """

    def __init__(
        self,
        learner: nn.Module,
        *,
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
            order=1,
            steps=steps,
            rate=rate,
            learn_rates=learn_rates,
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
