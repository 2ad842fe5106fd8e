"""What methods share that know a task by one vector, made of its own features: which columns, the score, inner steps.

A task's vector, the embedding of its id, reads the base learner's representation of the other side:

    score = base learner's score + φ · [h, 1]

So φ stands where a factorisation has a task's own vector and bias, and where an MLP has its head. In the papers the
embedding of an ad's (a film's) id is an input of the network like any other; a base learner here is made before it
knows of such an input, and under a factorisation the two are the same. φ [h, 1] is linear in φ, so the inner loop
needs the base learner's forward pass once, however many steps it takes.

A task's features are read from its events' columns, of whichever events there are: with no support they come from the
query, so that a task of which nothing but its features is known has a vector too.

Symbols: T tasks, E events (padded), F width of an input, C width of a task's own columns, H width of a representation,
K = H + 1 with the bias.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.func import grad

from metatrain.meta.episode import Examples
from metatrain.meta.layout import Layout
from metatrain.meta.learner import MetaLearner, representing

#: Standard deviation of a network's last layer at the start: vectors are near what they are without it.
_LAST_STD = 0.01


class TaskVectorLearner(MetaLearner):
    """Base of meta-learners that know a task by one vector beside the base learner.

    Args:
        learner: A base learner that represents.
        method: The method's name, in messages.
        layout: Whose the input's columns are; some must be the task's.
        order: 2 differentiates through the inner gradients, 1 takes them as constants.
        steps: Gradient steps of a vector on the support's mean loss.
        rate: Their rate, or where rates are learned, its start.
        learn_rates: Whether the outer loop learns the rate of each step.
        adapt_rows, memory, loss, huber_delta, precision: See `MetaLearner`.

    Raises:
        ValueError: The base learner doesn't represent, the model has no feature of the task, or a setting is out of
            its range.
    """

    task_columns: Tensor
    rates: Tensor

    def __init__(
        self,
        learner: nn.Module,
        method: str,
        layout: Layout,
        *,
        order: int,
        steps: int,
        rate: float,
        learn_rates: bool,
        adapt_rows: tuple[str, ...],
        memory: int,
        loss: str,
        huber_delta: float,
        precision: torch.dtype | None,
    ) -> None:
        super().__init__(
            learner, adapt_rows=adapt_rows, memory=memory, loss=loss, huber_delta=huber_delta, precision=precision
        )
        self._learner = representing(learner, method)
        columns = layout.of("task")
        if not len(columns):
            raise ValueError(
                f"{method} makes a task's embedding from the task's own features, and the model has none: name "
                "features of level task in model.features, or prepare a dataset that has some (with "
                "prepare.task: item, those of the item table)"
            )
        if order not in (1, 2):
            raise ValueError(f"order must be 1 or 2, got {order}")
        if steps < 0:
            raise ValueError(f"steps must be 0 or more, got {steps}")
        if rate <= 0:
            raise ValueError(f"rate must be above 0, got {rate}")
        self.register_buffer("task_columns", columns, persistent=False)
        #: K, the width of a task's vector.
        self.vector_width = self._learner.represented + 1
        self._order, self._learned = order, learn_rates and steps > 0
        rates = torch.full((steps,), float(rate))
        if self._learned:
            self.rates = nn.Parameter(rates)
        else:
            # Not part of the state: it comes from the configuration, and nothing changes it.
            self.register_buffer("rates", rates, persistent=False)

    def task_features(self, x: Tensor, mask: Tensor) -> Tensor:
        """A task's own columns, from the first of its events that is one: [T, E, F], [T, E] → [T, C].

        Zeros where it has no event, as in padding.
        """
        first = mask.argmax(-1)
        own = x[torch.arange(len(x), device=x.device), first][:, self.task_columns]
        return own * mask.amax(-1, keepdim=True)

    def regressors(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """What a vector is multiplied by, [h, 1]: [T, E, F] → [T, E, K]; and the base learner's scores [T, E]."""
        h, scores = self.represented(self._learner, x)
        return torch.cat([h, h.new_ones(*h.shape[:-1], 1)], dim=-1), scores

    def descended(self, start: Tensor, regressors: Tensor, scores: Tensor, support: Examples) -> Tensor:
        """How far gradient steps on the mean support loss move each task's vector: [T, K] → [T, K].

        0 for a task without support.

        Args:
            start: The vectors before.
            regressors, scores: Of the support, see `regressors`.
            support: Its labels and mask.
        """
        moved = torch.zeros_like(start)
        if self._order == 1:
            start, regressors, scores = start.detach(), regressors.detach(), scores.detach()

        def loss(vector: Tensor) -> Tensor:
            # Of all tasks at once: a task's vector has a part in its own loss alone.
            return self.task_losses(scored(vector, regressors, scores), support).sum()

        for rate in self.rates.unbind():
            # torch.func's gradient is there under torch.no_grad too, where evaluation adapts.
            at = start + (moved.detach() if self._order == 1 else moved)
            moved = moved - rate * grad(loss)(at)
        return moved

    def curves(self) -> dict[str, float]:
        """The inner rate, its mean over the steps."""
        return {"rates/inner vector": float(self.rates.detach().mean())} if self._learned else {}


def scored(vector: Tensor, regressors: Tensor, scores: Tensor) -> Tensor:
    """Scores with tasks' vectors: [T, K], [T, E, K], [T, E] → [T, E]."""
    return scores + torch.einsum("tek,tk->te", regressors, vector)


def network(inputs: int, hidden: Sequence[int], outputs: int) -> nn.Sequential:
    """Linear layers with tanh between; without hidden layers a linear map. The last one is small at the start.

    Raises:
        ValueError: A hidden layer of no width.
    """
    if any(width < 1 for width in hidden):
        raise ValueError(f"hidden layers must have a width of 1 or more, got {tuple(hidden)}")
    layers: list[nn.Module] = []
    for i, o in itertools.pairwise([inputs, *hidden]):
        layers += [nn.Linear(i, o), nn.Tanh()]
    last = nn.Linear([inputs, *hidden][-1], outputs)
    nn.init.normal_(last.weight, std=_LAST_STD)
    nn.init.zeros_(last.bias)
    return nn.Sequential(*layers, last)
