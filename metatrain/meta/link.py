"""From scores to predictions of a label that has few levels, for losses in which the median is best.

Under absolute error the best prediction is the median of what a label may be, and the median of stars is a whole number
of stars; a base learner's score is nearer to a mean. Between them stands a learned staircase,

    g(s) = ε s + (1 - ε) (l₀ + Σₖ (lₖ₊₁ - lₖ) σ((s - tₖ) / τₖ))

with levels l, thresholds t and widths τ, near the identity at the start. ε keeps it rising where the steps are flat, so
that no order changes and no two scores become one. Ordered thresholds on one score go back to McCullagh 1980,
"Regression models for ordinal data"; here the whole is trained by the error of the prediction itself.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from metatrain.meta.losses import mean_over_events

#: Share of the scores' own squared error in the loss. Without it what lies on one step is in no order: on
#: MovieLens-1M it brings both errors down and nDCG up.
ORDER_SHARE = 0.3
#: ε: costs a hundredth of the gain, and is far above float32's rounding.
SLOPE = 0.01


class Staircase(nn.Module):
    """Scores → predictions.

    Args:
        low, high: The least and the greatest label.
        levels: Number of levels, evenly spaced from `low` to `high`.

    Raises:
        ValueError: Fewer than two levels.
    """

    low: Tensor
    gap: Tensor

    def __init__(self, low: float, high: float, levels: int) -> None:
        super().__init__()
        if levels < 2 or not high > low:
            raise ValueError(f"a staircase needs two levels at least, got {levels} from {low:g} to {high:g}")
        gap = (high - low) / (levels - 1)
        self.register_buffer("low", torch.tensor(float(low)), persistent=False)
        self.register_buffer("gap", torch.tensor(gap), persistent=False)
        self.thresholds = nn.Parameter(low + gap * (torch.arange(levels - 1) + 0.5))
        # Sigmoids a third of a gap wide add up to nearly the identity between the first and the last threshold.
        self.log_widths = nn.Parameter(torch.full((levels - 1,), gap / 3).log())

    def forward(self, scores: Tensor) -> Tensor:
        """Predictions of scores of any shape."""
        steps = torch.sigmoid((scores.unsqueeze(-1) - self.thresholds) * torch.exp(-self.log_widths))
        return SLOPE * scores + (1 - SLOPE) * (self.low + self.gap * steps.sum(-1))

    def order_loss(self, scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """What keeps scores themselves near the labels, and so events of one step in order: [T, E] → [T]."""
        return ORDER_SHARE * mean_over_events((scores - labels).square(), mask)
