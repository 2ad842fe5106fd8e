"""Two prototypes a task, of what it liked and of what it didn't: an event is scored by which of them it is nearer to.

Snell, Swersky and Zemel 2017, "Prototypical Networks for Few-shot Learning": a class's prototype is the mean of its
support events' representations (their equation 1), and the probability of a class is a softmax over the negative
squared distances to the prototypes (equation 2). Of two classes that is a logistic function of |q − c⁻|² − |q − c⁺|²,
which is linear in q: their section on the method as a linear model. This linear form is what a task keeps.

Departures, each because a recommender's tasks are not balanced episodes of known classes:

- The classes are liked (label ≥ `relevant_from`) and not. The difference of distances is added to the base learner's
  score times a learned scale: for clicks a logit, as in the paper, for ratings a number of stars. Distances are means
  over the H dimensions, so that one scale suits representations of any width.
- A prototype is shrunk towards a learned one that all tasks share, which counts as `shrinkage` events. So a task with
  few events of a kind, or none, has both prototypes. If events are normal around their prototype with variance σ², and
  prototypes around the shared one with variance τ², it is the posterior mean with `shrinkage` = σ²/τ².
- Classes have prior odds, as Bayes' rule wants them: `level` × log ((n⁺ + α⁺) / (n⁻ + α⁻)) with learned α. The paper's
  episodes have as many events of each class, so there it would be 0; users differ in how often they like.

Symbols: T tasks, S support events, E events, H width of a representation; two kinds: liked, not liked.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from metatrain.meta.engine import FastWeights, Tensors
from metatrain.meta.episode import Examples
from metatrain.meta.learner import MetaLearner, representing


class Prototypical(MetaLearner):
    """A liked and a disliked prototype a task, for ratings and clicks.

    Args:
        learner: A base learner that represents.
        loss, huber_delta, memory, precision: See `MetaLearner`.
        relevant_from: The least label of an event that is liked.
        scale: What the difference of mean squared distances is multiplied by, at the start.
        shrinkage: Support events that a shared prototype counts as, at the start.
        level: What the log odds of liking are multiplied by, at the start.
        prior_events: Events of each kind that are added to a task's counts for these odds, at the start.

    Raises:
        ValueError: The base learner doesn't represent, or a setting is out of its range.
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
        relevant_from: float = 0.5,
        scale: float = 1.0,
        shrinkage: float = 3.0,
        level: float = 0.3,
        prior_events: float = 3.0,
    ) -> None:
        super().__init__(learner, memory=memory, loss=loss, huber_delta=huber_delta, precision=precision)
        self._learner = representing(learner, "prototypical")
        for name, value in (("scale", scale), ("shrinkage", shrinkage), ("prior_events", prior_events)):
            if value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        self.relevant_from = relevant_from
        #: The shared prototypes [2, H]: liked, not liked.
        self.shared = nn.Parameter(torch.zeros(2, self._learner.represented))
        self.log_scale = nn.Parameter(torch.tensor(math.log(scale)))
        self.log_shrinkage = nn.Parameter(torch.tensor(math.log(shrinkage)))
        self.level = nn.Parameter(torch.tensor(float(level)))
        self.log_prior_events = nn.Parameter(torch.full((2,), math.log(prior_events)))

    def adapt(self, support: Examples, rows: Tensors) -> FastWeights:
        """See `MetaLearner.adapt`: the linear form, `weight` [T, H] and `bias` [T]."""
        h_TSH, _ = self.represented(self._learner, self.inputs(support, rows), support.represented)
        liked_TS = (support.labels >= self.relevant_from).to(h_TSH.dtype) * support.mask
        kinds_T2S = torch.stack([liked_TS, support.mask - liked_TS], dim=1)
        return FastWeights(self._linear(kinds_T2S @ h_TSH, kinds_T2S.sum(-1)), rows)

    def predict(self, fast: FastWeights, examples: Examples) -> Tensor:
        """See `MetaLearner.predict`."""
        h, scores = self.represented(self._learner, self.inputs(examples, fast.rows), examples.represented)
        return scores + torch.einsum("teh,th->te", h, fast.weights["weight"]) + fast.weights["bias"].unsqueeze(-1)

    def unadapted(self, support: Examples, rows: Tensors) -> FastWeights:
        """See `MetaLearner.unadapted`: the shared prototypes."""
        x, tasks = support.x, support.x.shape[0]
        return FastWeights(self._linear(x.new_zeros(tasks, *self.shared.shape), x.new_zeros(tasks, 2)), rows)

    def curves(self) -> dict[str, float]:
        """Scale, shrinkage, the odds' weight, and the distance between the shared prototypes."""
        liked, other = self.shared.detach()
        return {
            "meta/prototypical scale": float(self.log_scale.detach().exp()),
            "meta/prototypical shrinkage": float(self.log_shrinkage.detach().exp()),
            "meta/prototypical level": float(self.level.detach()),
            "meta/prototypical shared distance": float((liked - other).norm()),
        }

    def _linear(self, sums: Tensor, counts: Tensor) -> Tensors:
        """Of sums [T, 2, H] and numbers [T, 2] of each kind: scale × (|q − c⁻|² − |q − c⁺|²) / H + level × log odds, as
        `weight`·q + `bias`."""
        shrinkage = self.log_shrinkage.exp()
        prototypes_T2H = (sums + shrinkage * self.shared) / (counts + shrinkage).unsqueeze(-1)
        liked_TH, other_TH = prototypes_T2H.unbind(1)
        # |q − c⁻|² − |q − c⁺|² = (2 q − c⁺ − c⁻)·(c⁺ − c⁻): without the squares, whose difference would cancel.
        apart_TH = (liked_TH - other_TH) * (self.log_scale.exp() / self._learner.represented)
        odds_T2 = torch.log(counts + self.log_prior_events.exp())
        bias_T = self.level * (odds_T2[:, 0] - odds_T2[:, 1]) - ((liked_TH + other_TH) * apart_TH).sum(-1)
        return {"weight": 2 * apart_TH, "bias": bias_T}
