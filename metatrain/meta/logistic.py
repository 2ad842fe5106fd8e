"""A logistic regression a task, solved by Newton steps on its support, over what the base learner represents events by.

Bertinetto, Henriques, Torr and Vedaldi 2019, "Meta-learning with differentiable closed-form solvers" (LR-D2): a task's
weights are those of a regularised logistic regression, found by a few steps of iteratively reweighted least squares,
each a ridge regression that Woodbury's identity solves in the smaller dimension; gradients flow through all steps, and
the regularisation λ is learned by the outer loop.

Departures. The regression is on top of the base learner's own logits and has a bias; see `regression`. Steps are
damped (see `newton`): offsets may be far from the labels, where undamped steps go to and fro. The paper's learned scale
and bias of the scores (which a ridge regression on ±1 labels needs to become probabilities) have no use here: scores
are logits.

In terms of Bayes it is the most probable weights of a logistic model around a learned prior.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metatrain.meta import newton
from metatrain.meta.episode import Examples
from metatrain.meta.regression import Regression


class Logistic(Regression):
    """A logistic regression a task, for clicks.

    Args:
        learner: A base learner that represents.
        loss: binary_cross_entropy.
        memory, precision: See `MetaLearner`.
        strength: λ of the weights at the start.
        bias_strength: λ of the bias at the start.
        newton_steps: Newton steps on the support.
        rated: Whether what a task has an event on moves the weights that the regression is around.

    Raises:
        ValueError: The base learner doesn't represent, scores are no logits, or a setting is out of its range.
    """

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
        rated: bool = False,
    ) -> None:
        if loss != "binary_cross_entropy":
            raise ValueError(
                f"a logistic regression gives logits, and the loss {loss!r} is of labels; "
                "use binary_cross_entropy, or ridge in its place"
            )
        if newton_steps < 1:
            raise ValueError(f"newton_steps must be at least 1, got {newton_steps}")
        strengths = {"strength": strength, "bias_strength": bias_strength}
        super().__init__(learner, "logistic", rated=rated, memory=memory, loss=loss, precision=precision, **strengths)
        self.newton_steps = newton_steps

    def solved(self, x: Tensor, support: Examples, scores: Tensor) -> Tensor:
        """See `Regression.solved`."""
        return newton.weights(x, support.labels, support.mask, scores, self.newton_steps)
