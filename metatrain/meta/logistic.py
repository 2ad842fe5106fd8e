"""A logistic regression a task, solved by Newton steps on its support, over what the base learner represents events by.

Bertinetto, Henriques, Torr and Vedaldi 2019, "Meta-learning with differentiable closed-form solvers" (LR-D2): a task's
weights are those of a regularised logistic regression, found by a few steps of iteratively reweighted least squares,
each a ridge regression that Woodbury's identity solves in the smaller dimension; gradients flow through all steps, and
the regularisation λ is learned by the outer loop.

Departures. The regression is on top of the base learner's own logits, so a task without support keeps these, and it has
a bias with a λ of its own: users differ in how much they click as much as in what. Steps are damped (see `newton`):
offsets may be far from the labels, where undamped steps go to and fro. The paper's learned scale and bias of the
scores (which a ridge regression on ±1 labels needs to become probabilities) have no use here: scores are logits.

In terms of Bayes it is the most probable weights of a logistic model around a learned prior.

Symbols: T tasks, S support events, E events, H width of a representation, K = H + 1 with the bias.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from metatrain.meta import newton
from metatrain.meta.engine import FastWeights, Tensors
from metatrain.meta.episode import Examples
from metatrain.meta.learner import MetaLearner, representing


class Logistic(MetaLearner):
    """A logistic regression a task, for clicks.

    Args:
        learner: A base learner that represents.
        loss: binary_cross_entropy.
        memory, precision: See `MetaLearner`.
        strength: λ of the weights at the start.
        bias_strength: λ of the bias at the start.
        newton_steps: Newton steps on the support.

    Raises:
        ValueError: The base learner doesn't represent, scores are no logits, or a setting is out of its range.
    """

    by_items = True

    def __init__(
        self,
        learner: nn.Module,
        *,
        loss: str = "binary_cross_entropy",
        memory: int = 1 << 30,
        precision: torch.dtype | None = None,
        strength: float = 5.0,
        bias_strength: float = 2.0,
        newton_steps: int = 5,
    ) -> None:
        super().__init__(learner, memory=memory, loss=loss, precision=precision)
        if loss != "binary_cross_entropy":
            raise ValueError(
                f"a logistic regression gives logits, and the loss {loss!r} is of labels; "
                "use binary_cross_entropy, or ridge in its place"
            )
        self._learner = representing(learner, "logistic")
        for name, value in (("strength", strength), ("bias_strength", bias_strength)):
            if value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if newton_steps < 1:
            raise ValueError(f"newton_steps must be at least 1, got {newton_steps}")
        self.newton_steps = newton_steps
        self.log_strength = nn.Parameter(torch.tensor(math.log(strength)))
        self.log_bias_strength = nn.Parameter(torch.tensor(math.log(bias_strength)))

    def adapt(self, support: Examples, rows: Tensors) -> FastWeights:
        """See `MetaLearner.adapt`: the regressions' `weight` [T, K], in units of `_regressors`."""
        h, scores = self.represented(self._learner, self.inputs(support, rows), support.represented)
        weight = newton.weights(self._regressors(h), support.labels, support.mask, scores, self.newton_steps)
        return FastWeights({"weight": weight}, rows)

    def predict(self, fast: FastWeights, examples: Examples) -> Tensor:
        """See `MetaLearner.predict`: logits."""
        h, scores = self.represented(self._learner, self.inputs(examples, fast.rows), examples.represented)
        return scores + torch.einsum("tek,tk->te", self._regressors(h), fast.weights["weight"])

    def unadapted(self, support: Examples, rows: Tensors) -> FastWeights:
        """See `MetaLearner.unadapted`."""
        return FastWeights({"weight": support.x.new_zeros(support.x.shape[0], self._learner.represented + 1)}, rows)

    def curves(self) -> dict[str, float]:
        """λ of the weights and of the bias."""
        return {
            "meta/logistic strength": float(self.log_strength.detach().exp()),
            "meta/logistic bias strength": float(self.log_bias_strength.detach().exp()),
        }

    def _regressors(self, h: Tensor) -> Tensor:
        """[T, E, H] → [T, E, K], divided by the roots of their λ: the regression's own is then 1 throughout."""
        bias = torch.exp(-0.5 * self.log_bias_strength).expand(*h.shape[:-1], 1)
        return torch.cat([h * torch.exp(-0.5 * self.log_strength), bias], dim=-1)
