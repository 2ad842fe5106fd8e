"""A ridge regression a task, solved in closed form on its support, over what the base learner represents events by.

Bertinetto, Henriques, Torr and Vedaldi 2019, "Meta-learning with differentiable closed-form solvers" (R2-D2): a task's
weights are their equation 4, W = (XᵀX + λI)⁻¹ Xᵀ Y, or where the support is the smaller dimension their equation 5,
W = Xᵀ (XXᵀ + λI)⁻¹ Y, by Woodbury's identity; λ is learned by the outer loop.

Here Y is what the base learner's own scores leave of the support's labels; see `regression` for the rest.

Symbols: T tasks, S support events, K width of a regressor.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metatrain.meta.episode import Examples
from metatrain.meta.regression import Regression
from metatrain.meta.solve import solve


class Ridge(Regression):
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
        if loss == "binary_cross_entropy":
            raise ValueError("a ridge regression is on labels, and under binary cross-entropy scores are logits")
        shared = {"memory": memory, "huber_delta": huber_delta, "precision": precision}
        super().__init__(
            learner, "ridge", strength=strength, bias_strength=bias_strength, rated=rated, loss=loss, **shared
        )

    def solved(self, x: Tensor, support: Examples, scores: Tensor) -> Tensor:
        """See `Regression.solved`."""
        return ridge(x * support.mask.unsqueeze(-1), (support.labels - scores) * support.mask)


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
