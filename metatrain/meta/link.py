"""From scores to predictions of a label that has few levels, for losses in which the median is best.

Under absolute error the best prediction is the median of what a label may be, and the median of stars is a whole number
of stars; a base learner's score is nearer to a mean. Between them stands a learned staircase,

    g(s) = ε s + (1 - ε) (l₀ + Σₖ (lₖ₊₁ - lₖ) σ((s - tₖ) / τₖ))

with levels l, thresholds t and widths τ, near the identity at the start. ε keeps it rising where the steps are flat, so
that no order changes and no two scores become one. Ordered thresholds on one score go back to McCullagh 1980,
"Regression models for ordinal data"; here the whole is trained by the error of the prediction itself.

People use the levels differently: one gives threes for what another gives fours, one uses the ends of the scale, one
never does. So tasks may have thresholds and widths of their own, as in Koren and Sill 2011, "OrdRec: an ordinal model
for predicting personalized item rating distributions". There they are fitted a user; here a network learns to move them
by what the support shows: how many of its labels lie below each threshold beyond what its fitted scores would have
there (the gradient of an ordinal likelihood in tₖ), and how far labels are from scores. Tasks without support, whose
scores are furthest from the labels, have steps that they share.

Predictions on one step are ranked by their scores. What a list is worth is counted in gains, 2^r - 1 (Järvelin and
Kekäläinen 2002; Burges et al. 2005), so the score to rank by is the expected gain, not the expected label: of two items
of one mean, that which some love. Scores are therefore taught half by labels, half by gains on the labels' scale; the
way from there to a level is the staircase's to learn.

Symbols: T tasks, S support events, E events, L levels.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from metatrain.meta.losses import mean_over_events

#: Share of the scores' own squared error in the loss. Without it what lies on one step is in no order: on
#: MovieLens-1M it brings both errors down and nDCG up.
ORDER_SHARE = 0.3
#: The same where tasks have levels of their own: absolute errors then teach items' vectors so little that, with the
#: share above, they stay small and nDCG falls.
ORDER_SHARE_OWN = 1.0
#: Share of gains in what scores are taught, beside labels. On MovieLens-1M it brings nDCG up and costs no error.
GAIN_SHARE = 0.5
#: ε: costs a hundredth of the gain, and is far above float32's rounding.
SLOPE = 0.01
#: Hidden units from the support's use of the levels to a task's steps: with 16 some seeds learn slowly.
_HIDDEN = 64
#: Variance of a label around its score before anything is seen, in squared gaps between levels.
_VARIANCE = 0.8


class Staircase(nn.Module):
    """Scores → predictions.

    Args:
        low, high: The least and the greatest label.
        levels: Number of levels, evenly spaced from `low` to `high`.
        own: Whether each task has thresholds and widths of its own.

    Raises:
        ValueError: Fewer than two levels.
    """

    low: Tensor
    gap: Tensor

    def __init__(self, low: float, high: float, levels: int, *, own: bool = False) -> None:
        super().__init__()
        if levels < 2 or not high > low:
            raise ValueError(f"a staircase needs two levels at least, got {levels} from {low:g} to {high:g}")
        gap = (high - low) / (levels - 1)
        self.register_buffer("low", torch.tensor(float(low)), persistent=False)
        self.register_buffer("gap", torch.tensor(gap), persistent=False)
        self.range = float(low), float(high)
        self.thresholds = nn.Parameter(low + gap * (torch.arange(levels - 1) + 0.5))
        # Sigmoids a third of a gap wide add up to nearly the identity between the first and the last threshold.
        self.log_widths = nn.Parameter(torch.full((levels - 1,), gap / 3).log())
        self.own = own
        if own:
            #: How many events what is expected before any weighs as much as, by its logarithm.
            self.log_prior = nn.Parameter(torch.tensor(math.log(5.0)))
            last = nn.Linear(_HIDDEN, 2 * (levels - 1))
            self.personal = nn.Sequential(nn.Linear(levels + 1, _HIDDEN), nn.ReLU(), last)
            nn.init.zeros_(last.weight)
            nn.init.zeros_(last.bias)

    def forward(self, scores: Tensor, steps: Tensor | None = None) -> Tensor:
        """Predictions [T, E] of scores [T, E].

        Args:
            scores: On the labels' scale.
            steps: The tasks' own, from `steps_of`. Default: those that all tasks share.
        """
        thresholds, log_widths = self.thresholds, self.log_widths
        if steps is not None:
            moved_T1K, wider_T1K = steps.unsqueeze(-2).chunk(2, dim=-1)
            thresholds, log_widths = thresholds + self.gap * moved_T1K, log_widths + wider_T1K
        rises = torch.sigmoid((scores.unsqueeze(-1) - thresholds) * torch.exp(-log_widths))
        return SLOPE * scores + (1 - SLOPE) * (self.low + self.gap * rises.sum(-1))

    def steps_of(self, scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """How each task's thresholds (in gaps) and log widths differ from the shared ones: [T, 2 (L - 1)]. They are
        the same of all tasks without support.

        Args:
            scores: [T, S], of the support's events in the task's adapted state.
            labels, mask: [T, S], the support's.
        """
        count_T1, prior = mask.sum(-1, keepdim=True), self.log_prior.exp()
        middles = self.low + self.gap * (torch.arange(len(self.thresholds), device=scores.device) + 0.5)
        below_TSK = (labels.unsqueeze(-1) < middles).to(scores.dtype)
        expected_TSK = torch.sigmoid((self.thresholds.detach() - scores.unsqueeze(-1)) * (2 / self.gap))
        surplus_TK = ((below_TSK - expected_TSK) * mask.unsqueeze(-1)).sum(1) / (count_T1 + prior)
        squares_T1 = (((labels - scores) / self.gap).square() * mask).sum(-1, keepdim=True)
        variance_T1 = (squares_T1 + prior * _VARIANCE) / (count_T1 + prior)
        known_T1 = count_T1 / (count_T1 + prior)
        seen = torch.cat([4 * surplus_TK, variance_T1.log(), known_T1], dim=-1)
        return self.personal(seen)

    def order_loss(self, scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
        """What keeps scores themselves near what events are worth, and so those of one step in order: [T, E] → [T]."""
        share = ORDER_SHARE_OWN if self.own else ORDER_SHARE
        return share * mean_over_events((scores - self.worth(labels)).square(), mask)

    def worth(self, labels: Tensor) -> Tensor:
        """What scores are taught of events with such labels, on the labels' scale: from the least to the greatest."""
        low, high = self.range
        # Of scales within 0 to 10 gains are those of the labels as they are, as in evaluation; others are mapped to 5.
        stars = high - low if low >= 0 and high <= 10 else 5.0
        relative = (labels - low) / (high - low)
        gains = low + (high - low) * torch.expm1(relative * (stars * math.log(2.0))) / (2.0**stars - 1.0)
        return (1 - GAIN_SHARE) * labels + GAIN_SHARE * gains
