"""Joint training: the base learner trained on all events without an inner loop, and fine-tuned a task afterwards.

No meta-learning: what meta-learners are compared with, to tell what the inner loop in training is worth. Finn, Abbeel
and Levine 2017, "Model-Agnostic Meta-Learning for Fast Adaptation of Deep Networks", compare with such a network in
their experiments: pretrained on all tasks, fine-tuned at test time with a tuned step size.

- Training: L = Σᵢ mean over the support and query events of task i of loss(f_θ(x), y). Each task weighs the same,
  however many events it has, as in the meta-learners' losses and in the metrics.
- `unadapted`: f_θ as it is.
- `adapt`: θᵢ = θ − rate ∇ L_support(θ), taken `steps` times. Training knows nothing of these two, so evaluation
  chooses them on validation tasks from `candidates`; until then they are those of the constructor.

What adapts, with which loss and by which engine is as in MAML, whose inner loop this is. Symbols: T tasks, E events
(padded).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor, nn

from metatrain.meta.buckets import Bucket
from metatrain.meta.episode import Episodes
from metatrain.meta.learner import MetaLearner, QueryLoss
from metatrain.meta.low_rank_choice import EngineName
from metatrain.meta.maml import MAML

#: Tried on validation tasks, each with each.
STEPS_TRIED = (1, 5, 20)
RATES_TRIED = (0.003, 0.01, 0.03, 0.1, 0.3)


class Joint(MAML):
    """A shared model that is fine-tuned at test time.

    Args:
        learner: Maps inputs [..., E, F + ΣD] to scores [..., E].
        steps, rate: Of fine-tuning, where nothing was chosen on validation tasks.
        adapt, adapt_rows, chunk, memory, inner_loss, huber_delta, precision, engine: Of fine-tuning; see `MAML`.
        loss: Name of an event's loss in training (see `losses.event_loss`).

    Raises:
        ValueError: A pattern that matches no parameter, or an unknown loss.
    """

    def __init__(
        self,
        learner: nn.Module,
        *,
        steps: int = 5,
        rate: float = 0.03,
        adapt: Iterable[str] = ("*",),
        adapt_rows: Iterable[str] = (),
        chunk: int = 0,
        memory: int = 1 << 30,
        loss: str = "squared",
        inner_loss: str | None = None,
        huber_delta: float = 1.0,
        precision: torch.dtype | None = None,
        engine: EngineName = "auto",
    ) -> None:
        super().__init__(
            learner,
            order=1,  # nothing is ever differentiated through fine-tuning
            steps=steps,
            rate=rate,
            adapt=adapt,
            adapt_rows=adapt_rows,
            chunk=chunk,
            memory=memory,
            loss=loss,
            inner_loss=inner_loss,
            huber_delta=huber_delta,
            precision=precision,
            engine=engine,
        )

    def forward(self, episodes: Episodes) -> QueryLoss:
        """The sum over tasks of the mean loss of all their events; `before` and `after` are the query's, both of the
        shared model: a checkpoint is the best by what was trained."""
        losses, counts = [], []
        for examples in (episodes.support, episodes.query):
            # A product in a type of few digits ends here: sums and losses are in the labels' type.
            scores = self.scores(self.inputs(examples, episodes.rows)).to(examples.labels.dtype)
            losses.append(self.event_loss(scores, examples.labels) * examples.mask)
            counts.append(examples.mask.sum(-1))
        each = (losses[0].sum(-1) + losses[1].sum(-1)) / (counts[0] + counts[1]).clamp(min=1.0)
        query = (losses[1].sum(-1) / counts[1].clamp(min=1.0)).detach()
        return QueryLoss(episodes.summed(each) + self.untouched(), query, query)

    def candidates(self) -> Sequence[Mapping[str, float]]:
        """See `MetaLearner.candidates`."""
        return [{"steps": steps, "rate": rate} for steps in STEPS_TRIED for rate in RATES_TRIED]

    def choose(self, settings: Mapping[str, float]) -> None:
        """See `MetaLearner.choose`."""
        self.steps = int(settings["steps"])
        self.rates = self.rates.new_full((self.steps, len(self.rate_names)), float(settings["rate"]))

    def curves(self) -> dict[str, float]:
        """None: nothing of fine-tuning changes while training."""
        return {}

    def buckets(self, support: Tensor, query: Tensor, inputs: int, row_widths: Mapping[str, int]) -> list[Bucket]:
        """See `MetaLearner.buckets`: by the cost of scoring, which is all that training does."""
        return MetaLearner.buckets(self, support, query, inputs, row_widths)
