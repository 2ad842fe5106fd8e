"""BOIL (body only update in inner loop): MAML in which all but the head adapts.

Oh, Yoo, Kim and Yun 2021, "BOIL: Towards Representation Change for Few-shot Learning": the head's inner rate is 0, so
that a task must be told by what its inputs are represented as, where ANIL reuses the representation. The outer loop
learns both.

Which parameters are the head the base learner says (`head_parameters`); all others adapt, and so may embedding rows
(`adapt_rows`), which lie lowest in the body. There is no `adapt`.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import nn

from metatrain.meta.low_rank_choice import EngineName
from metatrain.meta.maml import MAML, head_of


class BOIL(MAML):
    """MAML of all but the head.

    Args:
        learner: A base learner that says what its head is, and has more than that.
        order, steps, rate, learn_rates, adapt_rows, chunk, memory, keep, loss, inner_loss, huber_delta, precision,
            engine: See `MAML`.

    Raises:
        ValueError: The base learner doesn't say what its head is, or has nothing else; or see `MAML`.
    """

    def __init__(
        self,
        learner: nn.Module,
        *,
        order: int = 2,
        steps: int = 1,
        rate: float = 0.01,
        learn_rates: bool = False,
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
        head = frozenset(head_of(learner, "BOIL"))
        body = [name for name, _ in learner.named_parameters() if name not in head]
        if not body:
            raise ValueError(
                f"BOIL adapts all but the head, and {type(learner).__name__} is nothing but its head here: give it "
                "hidden layers, or take ANIL"
            )
        super().__init__(
            learner,
            order=order,
            steps=steps,
            rate=rate,
            learn_rates=learn_rates,
            adapt=body,
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
