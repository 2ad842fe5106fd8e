"""ANIL (almost no inner loop): MAML in which only the head adapts, in training and in use.

Raghu, Raghu, Bengio and Vinyals 2020, "Rapid Learning or Feature Reuse? Towards Understanding the Effectiveness of
MAML", section "The ANIL algorithm": what lies below the head is learned by the outer loop alone, which also
differentiates through the head's steps. The same paper shows that MAML's own features hardly move in the inner loop.

Which parameters are the head the base learner says (`head_parameters`). Embedding rows are features, so none adapt:
there is no `adapt_rows`, and no `adapt`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from metatrain.meta.low_rank_choice import EngineName
from metatrain.meta.maml import MAML, head_of


class ANIL(MAML):
    """MAML of the head alone.

    Args:
        learner: A base learner that says what its head is.
        order, steps, rate, learn_rates, chunk, memory, keep, loss, inner_loss, huber_delta, precision, engine: See
            `MAML`.

    Raises:
        ValueError: The base learner doesn't say what its head is; or see `MAML`.
    """

    def __init__(
        self,
        learner: nn.Module,
        *,
        order: int = 2,
        steps: int = 1,
        rate: float = 0.01,
        learn_rates: bool = False,
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
            order=order,
            steps=steps,
            rate=rate,
            learn_rates=learn_rates,
            adapt=head_of(learner, "ANIL"),
            chunk=chunk,
            memory=memory,
            keep=keep,
            loss=loss,
            inner_loss=inner_loss,
            huber_delta=huber_delta,
            precision=precision,
            engine=engine,
        )
