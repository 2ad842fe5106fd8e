"""What regressions a task have in common: over what, around which weights, and how their scores come about.

A regression is on top of the base learner's own scores, so that a task without support keeps these, and it has a bias
with a λ of its own: recommenders know users by how they rate, or how much they click, as much as by what. In terms of
Bayes it is a linear model's weights around a learned prior: a new user's fold-in.

What a task has rated at all tells of its taste, whatever the labels. With `rated` the regression is around weights that
a learned map makes of the mean of the support's representations, shrunk towards 0 where events are few: the implicit
feedback of Koren 2008, "Factorization meets the neighborhood" (SVD++), whose second set of item vectors is that map of
the first here. A support without labels would tell as much.

Symbols: T tasks, S support events, E events, H width of a representation, K = H + 1 with the bias.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from metatrain.meta.engine import FastWeights, Tensors
from metatrain.meta.episode import Examples
from metatrain.meta.learner import MetaLearner, representing

#: Events at which the mean of what was rated counts half.
_HALF_KNOWN = 3.0


class Regression(MetaLearner):
    """A regression a task over what the base learner represents events by.

    Args:
        learner: A base learner that represents.
        name: Of the method, in messages and curves.
        strength: λ of the weights at the start.
        bias_strength: λ of the bias at the start.
        rated: Whether what a task has rated moves the weights that the regression is around.
        memory, loss, huber_delta, precision: See `MetaLearner`.

    Raises:
        ValueError: The base learner doesn't represent, or a strength is not above 0.
    """

    by_items = True

    def __init__(
        self,
        learner: nn.Module,
        name: str,
        *,
        strength: float,
        bias_strength: float,
        rated: bool,
        memory: int,
        loss: str,
        huber_delta: float = 1.0,
        precision: torch.dtype | None = None,
    ) -> None:
        super().__init__(learner, memory=memory, loss=loss, huber_delta=huber_delta, precision=precision)
        self._learner, self._name = representing(learner, name), name
        for setting, value in (("strength", strength), ("bias_strength", bias_strength)):
            if value <= 0:
                raise ValueError(f"{setting} must be above 0, got {value}")
        self.log_strength = nn.Parameter(torch.tensor(math.log(strength)))
        self.log_bias_strength = nn.Parameter(torch.tensor(math.log(bias_strength)))
        width = self._learner.represented
        self.rated = nn.Linear(width, width + 1, bias=False) if rated else None
        if self.rated is not None:
            nn.init.zeros_(self.rated.weight)

    def adapt(self, support: Examples, rows: Tensors) -> FastWeights:
        """See `MetaLearner.adapt`: the regressions' `weight` [T, K], in units of `_regressors`."""
        h, scores = self.represented(self._learner, self.inputs(support, rows), support.represented)
        x_TSK = self._regressors(h)
        if self.rated is None:
            return FastWeights({"weight": self.solved(x_TSK, support, scores)}, rows)
        around_TK = self.rated(_shrunk_mean(h, support.mask))
        scores = scores + torch.einsum("tsk,tk->ts", x_TSK, around_TK)
        return FastWeights({"weight": around_TK + self.solved(x_TSK, support, scores)}, rows)

    def solved(self, x: Tensor, support: Examples, scores: Tensor) -> Tensor:
        """The regressions' weights [T, K], of λ 1, on top of `scores` [T, S]; x: [T, S, K]."""
        raise NotImplementedError

    def predict(self, fast: FastWeights, examples: Examples) -> Tensor:
        """See `MetaLearner.predict`."""
        h, scores = self.represented(self._learner, self.inputs(examples, fast.rows), examples.represented)
        return scores + torch.einsum("tek,tk->te", self._regressors(h), fast.weights["weight"])

    def unadapted(self, support: Examples, rows: Tensors) -> FastWeights:
        """See `MetaLearner.unadapted`."""
        return FastWeights({"weight": support.x.new_zeros(support.x.shape[0], self._learner.represented + 1)}, rows)

    def curves(self) -> dict[str, float]:
        """λ of the weights and of the bias."""
        return {
            f"meta/{self._name} strength": float(self.log_strength.detach().exp()),
            f"meta/{self._name} bias strength": float(self.log_bias_strength.detach().exp()),
        }

    def _regressors(self, h: Tensor) -> Tensor:
        """[T, E, H] → [T, E, K], divided by the roots of their λ: the regression's own is then 1 throughout."""
        bias = torch.exp(-0.5 * self.log_bias_strength).expand(*h.shape[:-1], 1)
        return torch.cat([h * torch.exp(-0.5 * self.log_strength), bias], dim=-1)


def _shrunk_mean(h: Tensor, mask: Tensor) -> Tensor:
    """[T, S, H], [T, S] → [T, H]."""
    return torch.einsum("tsh,ts->th", h, mask) / (mask.sum(-1, keepdim=True) + _HALF_KNOWN)
