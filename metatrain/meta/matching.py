"""Attention over a task's support: what its events say of others that are like them.

Vinyals, Blundell, Lillicrap, Kavukcuoglu and Wierstra 2016, "Matching Networks for One Shot Learning": their
equation 1, ŷ = Σₛ a(x̂, xₛ) yₛ, with the attention of section 2.1.1, a softmax over the support of the cosine of
representations. Nothing is solved and no weight changes: support events are kept, and a query event looks at them.

Departures, each because a recommender is no classifier of balanced classes:

- yₛ are what the base learner's own scores leave of the labels, and ŷ is added to the query's score: the items' and the
  task's own part is known without any support.
- The softmax holds one event more, without error, of learned weight: "nothing known". A task without support has this
  one alone, so it keeps the base learner's scores; one whose events are all unlike the query nearly keeps them.
- The cosine is divided by a learned temperature. In the paper the representation learns how sharp attention is; here it
  also serves the base learner.
- Where scores are logits, what the scores leave is y − p, a probability, and ŷ is added to the logit times a learned
  gain: a step of gradient descent on the support's losses in the space of functions, with attention as the kernel. The
  gain starts at 4, where the logistic function at ½ turns it into y − p again. Labels themselves have no finite logits,
  and probabilities that one adds to would leave 0 to 1.
- The paper's full context embeddings (an LSTM over the support) are left out: they depend on the support's order.

Symbols: T tasks, S support events, E events, H width of a representation.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from metatrain.meta.engine import FastWeights, Tensors
from metatrain.meta.episode import Examples
from metatrain.meta.learner import MetaLearner, representing

# Added to a squared length: a representation of zeros (an item about which nothing is known) has no direction, and
# without this an infinite slope. Its cosine with all others is 0.
_LEAST_SQUARE = 1e-6


class Matching(MetaLearner):
    """Attention over the support, for ratings and clicks.

    Args:
        learner: A base learner that represents.
        loss, huber_delta, memory, precision: See `MetaLearner`.
        temperature: What cosines are divided by, at the start.
        nothing_known: Weight of "nothing known" at the start, in support events whose cosine with the query is 0.

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
        temperature: float = 0.3,
        nothing_known: float = 2.0,
    ) -> None:
        super().__init__(learner, memory=memory, loss=loss, huber_delta=huber_delta, precision=precision)
        self._learner = representing(learner, "matching")
        for name, value in (("temperature", temperature), ("nothing_known", nothing_known)):
            if value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        self.log_temperature = nn.Parameter(torch.tensor(math.log(temperature)))
        self.log_nothing_known = nn.Parameter(torch.tensor(math.log(nothing_known)))
        self.log_gain = nn.Parameter(torch.tensor(math.log(4.0))) if loss == "binary_cross_entropy" else None

    def adapt(self, support: Examples, rows: Tensors) -> FastWeights:
        """See `MetaLearner.adapt`: the support's `direction` [T, S, H], `error` [T, S] and `mask` [T, S]."""
        h, scores = self.represented(self._learner, self.inputs(support, rows), support.represented)
        expected = scores if self.log_gain is None else torch.sigmoid(scores)
        error_TS = (support.labels - expected) * support.mask
        return FastWeights({"direction": _direction(h), "error": error_TS, "mask": support.mask}, rows)

    def predict(self, fast: FastWeights, examples: Examples) -> Tensor:
        """See `MetaLearner.predict`."""
        h, scores = self.represented(self._learner, self.inputs(examples, fast.rows), examples.represented)
        cosine_TES = _direction(h) @ fast.weights["direction"].mT
        logits_TES = (cosine_TES * torch.exp(-self.log_temperature)).masked_fill(
            fast.weights["mask"].unsqueeze(-2) == 0, -torch.inf
        )
        nothing_TE1 = self.log_nothing_known.to(h.dtype).expand(*scores.shape, 1)
        attention_TES = torch.cat([logits_TES, nothing_TE1], dim=-1).softmax(-1)[..., :-1]
        change_TE = torch.einsum("tes,ts->te", attention_TES, fast.weights["error"])
        return scores + (change_TE if self.log_gain is None else self.log_gain.exp() * change_TE)

    def unadapted(self, support: Examples, rows: Tensors) -> FastWeights:
        """See `MetaLearner.unadapted`: no events to look at."""
        x, tasks = support.x, support.x.shape[0]
        none, no_directions = x.new_zeros(tasks, 0), x.new_zeros(tasks, 0, self._learner.represented)
        return FastWeights({"direction": no_directions, "error": none, "mask": none}, rows)

    def curves(self) -> dict[str, float]:
        """Temperature, the weight of "nothing known", and for clicks the gain."""
        found = {
            "meta/matching temperature": float(self.log_temperature.detach().exp()),
            "meta/matching nothing known": float(self.log_nothing_known.detach().exp()),
        }
        if self.log_gain is not None:
            found["meta/matching gain"] = float(self.log_gain.detach().exp())
        return found


def _direction(h: Tensor) -> Tensor:
    """[T, E, H] → the same, of length 1."""
    return h * torch.rsqrt(h.square().sum(-1, keepdim=True) + _LEAST_SQUARE)
