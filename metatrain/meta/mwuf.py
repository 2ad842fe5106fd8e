"""Meta warm-up: a task's cold embedding, scaled by what its features say and shifted by who interacted with it.

Zhu, Xie, Zhuang, Ge, Sun, Zhang, Lin and Cao 2021, "Learning to Warm Up Cold Item Embeddings for Cold-start
Recommendation with Meta Scaling and Shifting Networks" (SIGIR). All new items start from a common initial embedding; a
cold embedding becomes a warm one by

    warm = scale(item's features) ⊙ cold + shift(mean of the embeddings of the users that interacted with it)

with one meta network for the scale and one for the shift. The shift answers the noise of a few interactions, the scale
brings an embedding that few events have trained to where those of well-known items of such features are.

Here the cold embedding is the common one after `steps` gradient steps on the support: the interactions that warm it up.
Labels enter by these alone: with 0 steps only who interacted counts, not what they thought. An interacting user's
embedding is what the base learner reads of the catalogue's side: its id's and its features' columns. Departures from
the paper: the embedding is a vector over what the base learner represents (see `task_vector`), where the paper's is an
input of its network; the common embedding is a parameter of the outer loop, where the paper's is the mean of the known
items'; all is trained together by the query loss of the warm embedding, where the paper trains the base learner first
and the networks then; the scale is 1 plus its network, so that at the start it changes nothing; the shift is what its
network says of the users less what it says of nobody (zeros), so that a task without support is scaled alone, and what
all tasks have in common belongs to the cold embedding.

Symbols: T tasks, E events, S support events, C width of a task's own columns, U width of the catalogue's columns, K
width of a task's vector.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metatrain.meta.engine import FastWeights, Tensors
from metatrain.meta.episode import Examples
from metatrain.meta.layout import Layout
from metatrain.meta.task_vector import TaskVectorLearner, network, scored

#: Standard deviation of the common embedding at the start: of zeros a scale would make nothing.
_COMMON_STD = 0.1


class MWUF(TaskVectorLearner):
    """A common embedding, scaled and shifted for each task.

    Args:
        learner: A base learner that represents.
        layout, order, steps, rate, learn_rates: See `TaskVectorLearner`; some columns must be the catalogue's.
        loss, huber_delta, memory, precision, adapt_rows: See `MetaLearner`.
        hidden: Widths of both networks' hidden layers; empty: they are linear.

    Raises:
        ValueError: No feature of the task or of the catalogue's side, a base learner that doesn't represent, or a
            setting out of its range.
    """

    user_columns: Tensor

    def __init__(
        self,
        learner: nn.Module,
        *,
        layout: Layout,
        order: int = 2,
        steps: int = 0,
        rate: float = 0.05,
        learn_rates: bool = False,
        loss: str = "squared",
        huber_delta: float = 1.0,
        memory: int = 1 << 30,
        precision: torch.dtype | None = None,
        adapt_rows: tuple[str, ...] = (),
        hidden: tuple[int, ...] = (16,),
    ) -> None:
        super().__init__(
            learner,
            "mwuf",
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
        columns = layout.of("item")
        if not len(columns):
            raise ValueError(
                "mwuf shifts a task by the embeddings of those that interacted with it, and the model reads none: add "
                "`item`, the id on the catalogue's side, or features of level item to model.features"
            )
        self.register_buffer("user_columns", columns, persistent=False)
        self.cold = nn.Parameter(_COMMON_STD * torch.randn(self.vector_width))
        self.scale = network(len(self.task_columns), hidden, self.vector_width)
        self.shift = network(len(columns), hidden, self.vector_width)

    def adapt(self, support: Examples, rows: Tensors) -> FastWeights:
        """See `MetaLearner.adapt`: how far each cold embedding is `moved` and its `shift`, both [T, K]."""
        x = self.inputs(support, rows)
        cold = self.cold.expand(len(x), -1)
        moved = self.descended(cold, *self.regressors(x), support) if len(self.rates) else torch.zeros_like(cold)
        count = support.mask.sum(-1, keepdim=True)
        users = torch.einsum("tsu,ts->tu", x[..., self.user_columns], support.mask) / count.clamp(min=1.0)
        return FastWeights({"moved": moved, "shift": self.shift(users) - self.shift(torch.zeros_like(users[:1]))}, rows)

    def predict(self, fast: FastWeights, examples: Examples) -> Tensor:
        """See `MetaLearner.predict`."""
        x = self.inputs(examples, fast.rows)
        scale = 1.0 + self.scale(self.task_features(x, examples.mask))
        warm = scale * (self.cold + fast.weights["moved"]) + fast.weights["shift"]
        return scored(warm, *self.regressors(x))

    def unadapted(self, support: Examples, rows: Tensors) -> FastWeights:
        """See `MetaLearner.unadapted`: the common embedding, scaled by the features, known before any event."""
        nothing = support.x.new_zeros(support.x.shape[0], self.vector_width)
        return FastWeights({"moved": nothing, "shift": nothing}, rows)
