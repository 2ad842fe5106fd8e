"""A ridge regression a task, solved in closed form on its support, over what the base learner represents events by.

Bertinetto, Henriques, Torr and Vedaldi 2019, "Meta-learning with differentiable closed-form solvers" (R2-D2): a task's
weights are their equation 4, W = (XᵀX + λI)⁻¹ Xᵀ Y, or where the support is the smaller dimension their equation 5,
W = Xᵀ (XXᵀ + λI)⁻¹ Y, by Woodbury's identity; λ is learned by the outer loop.

Here Y is what the base learner's own scores leave of the support's labels, so that a task without support keeps these
scores, and the regression has a bias with a λ of its own: recommenders know users by how they rate as much as by what.
In terms of Bayes it is the posterior mean of a linear model's weights around a learned prior: a new user's fold-in.

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
from metatrain.meta.solve import solve

#: Events at which the mean of what was rated counts half.
_HALF_KNOWN = 3.0


class Ridge(MetaLearner):
    """A ridge regression a task, for ratings.

    Args:
        learner: A base learner that represents.
        loss, huber_delta, memory, precision: See `MetaLearner`.
        strength: λ of the weights at the start.
        bias_strength: λ of the bias at the start.
        rated: Whether what a task has rated moves the weights that the regression is around.

    Raises:
        ValueError: The base learner doesn't represent, or scores are logits.
    """

    by_items = True

    def __init__(
        self,
        learner: nn.Module,
        *,
        loss: str = "squared",
        huber_delta: float = 1.0,
        memory: int = 1 << 30,
        precision: torch.dtype | None = None,
        strength: float = 5.0,
        bias_strength: float = 2.0,
        rated: bool = False,
    ) -> None:
        super().__init__(learner, memory=memory, loss=loss, huber_delta=huber_delta, precision=precision)
        if loss == "binary_cross_entropy":
            raise ValueError("a ridge regression is on labels, and under binary cross-entropy scores are logits")
        self._learner = representing(learner, "ridge")
        for name, value in (("strength", strength), ("bias_strength", bias_strength)):
            if value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        self.log_strength = nn.Parameter(torch.tensor(math.log(strength)))
        self.log_bias_strength = nn.Parameter(torch.tensor(math.log(bias_strength)))
        width = self._learner.represented
        self.rated = nn.Linear(width, width + 1, bias=False) if rated else None
        if self.rated is not None:
            nn.init.zeros_(self.rated.weight)

    def adapt(self, support: Examples, rows: Tensors) -> FastWeights:
        """See `MetaLearner.adapt`: the regressions' `weight` [T, K], in units of `_regressors`."""
        h, scores = self.represented(self._learner, self.inputs(support, rows), support.represented)
        x_TSK = self._regressors(h) * support.mask.unsqueeze(-1)
        y_TS = (support.labels - scores) * support.mask
        if self.rated is None:
            return FastWeights({"weight": ridge(x_TSK, y_TS)}, rows)
        around_TK = self.rated(_shrunk_mean(h, support.mask))
        around_TS = torch.einsum("tsk,tk->ts", x_TSK, around_TK)
        return FastWeights({"weight": around_TK + ridge(x_TSK, y_TS - around_TS)}, rows)

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
            "meta/ridge strength": float(self.log_strength.detach().exp()),
            "meta/ridge bias strength": float(self.log_bias_strength.detach().exp()),
        }

    def _regressors(self, h: Tensor) -> Tensor:
        """[T, E, H] → [T, E, K], divided by the roots of their λ: the regression's own is then 1 throughout."""
        bias = torch.exp(-0.5 * self.log_bias_strength).expand(*h.shape[:-1], 1)
        return torch.cat([h * torch.exp(-0.5 * self.log_strength), bias], dim=-1)


def _shrunk_mean(h: Tensor, mask: Tensor) -> Tensor:
    """[T, S, H], [T, S] → [T, H]."""
    return torch.einsum("tsh,ts->th", h, mask) / (mask.sum(-1, keepdim=True) + _HALF_KNOWN)


def ridge(x: Tensor, y: Tensor) -> Tensor:
    """The minimum of |X w - y|² + |w|² of each task: [T, S, K], [T, S] → [T, K]; rows of zeros count for nothing.

    Solved in the smaller dimension.
    """
    _, events, width = x.shape
    x_TKS = x.transpose(1, 2)
    if events <= width:
        a_TS = solve(x @ x_TKS + torch.eye(events, dtype=x.dtype, device=x.device), y)
        return (x_TKS @ a_TS.unsqueeze(-1)).squeeze(-1)
    right_TK = (x_TKS @ y.unsqueeze(-1)).squeeze(-1)
    return solve(x_TKS @ x + torch.eye(width, dtype=x.dtype, device=x.device), right_TK)
