"""Meta-Embedding: a generator maps a task's own features to the embedding of its id, from which steps on the support
go on.

Pan, Li, Ao, Tang and He 2019, "Warm Up Cold-start Advertisements: Improving CTR Predictions via Learning to Learn ID
Embeddings" (SIGIR). A new ad's id embedding is φ = h_w(u), of its features u; the meta-loss is α l_a + (1 - α) l_b,
where l_a is the loss of φ on a first batch and l_b that of φ' = φ - rate ∂l_a/∂φ on a second one. So the generator is
trained to do well cold, and to be a start from which a step does well.

Here the support is the first batch and the query the second. Where items are the tasks (`prepare.task: item`), a task
is a film, its features are the film's, and who rated it are its events; it works for users with features as well.
Departures from the paper: the id's embedding is a vector over what the base learner represents (see `task_vector`),
where the paper's is an input of its network; the base learner is trained by the same loss at the same time, where the
paper trains it first and then freezes it; `steps` may be more than 1, and rates may be learned; a task without support
has no l_a, and its loss is l_b alone.

Symbols: T tasks, E events, C width of a task's own columns, K width of a task's vector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metatrain.meta.engine import FastWeights, Tensors
from metatrain.meta.episode import Episodes, Examples
from metatrain.meta.layout import Layout
from metatrain.meta.learner import QueryLoss
from metatrain.meta.task_vector import TaskVectorLearner, network, scored


class MetaEmbedding(TaskVectorLearner):
    """A generated embedding a task, and gradient steps from it.

    Args:
        learner: A base learner that represents.
        layout, order, steps, rate, learn_rates: See `TaskVectorLearner`; the paper has one step, of second order.
        loss, huber_delta, memory, precision, adapt_rows: See `MetaLearner`.
        alpha: Weight of the generated embedding's own loss on the support, from 0 to 1.
        hidden: Widths of the generator's hidden layers; empty: it is linear.

    Raises:
        ValueError: No feature of the task, a base learner that doesn't represent, or a setting out of its range.
    """

    def __init__(
        self,
        learner: nn.Module,
        *,
        layout: Layout,
        order: int = 2,
        steps: int = 1,
        rate: float = 0.05,
        learn_rates: bool = False,
        loss: str = "squared",
        huber_delta: float = 1.0,
        memory: int = 1 << 30,
        precision: torch.dtype | None = None,
        adapt_rows: tuple[str, ...] = (),
        alpha: float = 0.1,
        hidden: tuple[int, ...] = (32,),
    ) -> None:
        super().__init__(
            learner,
            "meta-embedding",
            layout,
            order=order,
            steps=steps,
            rate=rate,
            learn_rates=learn_rates,
            adapt_rows=adapt_rows,
            memory=memory,
            loss=loss,
            huber_delta=huber_delta,
            precision=precision,
        )
        if steps < 1:
            raise ValueError(f"meta-embedding steps from the generated embedding: steps must be 1 or more, got {steps}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"alpha weighs two losses: it must be from 0 to 1, got {alpha}")
        self.alpha = alpha
        self.generator = network(len(self.task_columns), hidden, self.vector_width)

    def adapt(self, support: Examples, rows: Tensors) -> FastWeights:
        """See `MetaLearner.adapt`: how far steps move each generated embedding, `moved` [T, K]."""
        return self._adapted(support, rows)[0]

    def predict(self, fast: FastWeights, examples: Examples) -> Tensor:
        """See `MetaLearner.predict`."""
        x = self.inputs(examples, fast.rows)
        regressors, scores = self.regressors(x)
        return scored(self._generated(x, examples.mask) + fast.weights["moved"], regressors, scores)

    def unadapted(self, support: Examples, rows: Tensors) -> FastWeights:
        """See `MetaLearner.unadapted`: the generated embedding, as the task's features are known before any event."""
        return FastWeights({"moved": support.x.new_zeros(support.x.shape[0], self.vector_width)}, rows)

    def forward(self, episodes: Episodes) -> QueryLoss:
        """The sum of α l_a + (1 - α) l_b over tasks; `after` and `before` are query losses, as of any method."""
        support, query, rows = episodes.support, episodes.query, episodes.rows
        fast, cold = self._adapted(support, rows)
        after = self.task_losses(self.predict(fast, query), query)
        weight = self.alpha * support.mask.amax(-1)
        with torch.no_grad():
            before = self.task_losses(self.predict(self.unadapted(support, rows), query), query)
        total = weight * self.task_losses(cold, support) + (1 - weight) * after
        return QueryLoss(episodes.summed(total) + self.untouched(), after.detach(), before)

    def _adapted(self, support: Examples, rows: Tensors) -> tuple[FastWeights, Tensor]:
        """The adapted state, and the generated embedding's scores [T, S] of the support."""
        x = self.inputs(support, rows)
        regressors, scores = self.regressors(x)
        start = self._generated(x, support.mask)
        moved = self.descended(start, regressors, scores, support)
        return FastWeights({"moved": moved}, rows), scored(start, regressors, scores)

    def _generated(self, x: Tensor, mask: Tensor) -> Tensor:
        """The embeddings [T, K] that the tasks' features give."""
        return self.generator(self.task_features(x, mask))
