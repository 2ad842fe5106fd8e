"""Hypernetworks: what a task's support likes and dislikes gives the weights or biases of a correction to the score.

Vartak, Thiagarajan, Miranda, Bratman and Larochelle 2017, "A Meta-Learning Perspective on Cold-Start Recommendations
for Items". A task is summed up by the mean representation of its positive events and that of its negative ones, R₊ and
R₋, and from these a network that is learned once makes what is the task's own:

    linear_weights     their LWA: the weights of a linear model are w = a₊ R₊ + a₋ R₋; a₊ and a₋ are learned scalars
    nonlinear_biases   their NLBA: a network over an event's representation h whose weights all tasks share, and whose
                       layers' biases, and its output's, are linear in both: lₖ = relu(Wₖ lₖ₋₁ + bₖ + V₊ₖ R₊ + V₋ₖ R₋)
    full               an MLP maps both to the weights of a linear model (a hypernetwork: Ha, Dai and Le 2017)

Here it corrects the base learner's score, and says nothing about a task without support: of a network, what counts is
the difference to the same network where R₊ and R₋ are 0. Where this departs from the paper:

- Ratings are graded. An event counts with v = label - relevant_from, positive where v ≥ 0: R₊ is the mean of v h over
  the positive ones, R₋ that of -v h over the negative ones. For clicks v is ±½: the paper's means, halved.
- h has a 1 at its end: so the linear model has a bias a task, with scalars of its own in LWA. Users differ in how they
  rate as much as in what.
- The mean has κ more events, which say nothing; κ is learned. It is over all of a task's events by default
  (`means: task`): with means over a class (`means: class`, as in the paper) a user of nine fives and a one would look
  like one of a five and nine ones. For clicks from two Gaussian classes around ±μ, μ normal over tasks, the default's
  LWA is the Bayes-optimal classifier.

Symbols: T tasks, S support events, E events, H width of a representation, K = H + 1, N width of a layer.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
from torch import Tensor, nn

from metatrain.meta.engine import FastWeights, Tensors
from metatrain.meta.episode import Examples
from metatrain.meta.learner import MetaLearner, representing

Kind = Literal["linear_weights", "nonlinear_biases", "full"]
Means = Literal["task", "class"]


class Hypernetwork(MetaLearner):
    """A correction of the base learner's score whose weights or biases come from the support at one go.

    Args:
        learner: A base learner that represents.
        relevant_from: Least label that is a liked item.
        loss, huber_delta, memory, precision, adapt_rows: See `MetaLearner`.
        kind: linear_weights, nonlinear_biases or full.
        widths: Of the hidden layers of the network, at least one; without effect on linear_weights.
        means: task or class: what R₊ and R₋ are means over.
        shrinkage: κ at the start, in events.

    Raises:
        ValueError: The base learner doesn't represent, or a setting that can't be.
    """

    def __init__(
        self,
        learner: nn.Module,
        *,
        relevant_from: float,
        loss: str = "squared",
        huber_delta: float = 1.0,
        memory: int = 1 << 30,
        precision: torch.dtype | None = None,
        adapt_rows: tuple[str, ...] = (),
        kind: Kind = "linear_weights",
        widths: tuple[int, ...] = (64,),
        means: Means = "task",
        shrinkage: float = 2.0,
    ) -> None:
        super().__init__(
            learner, adapt_rows=adapt_rows, memory=memory, loss=loss, huber_delta=huber_delta, precision=precision
        )
        self._learner = representing(learner, "a hypernetwork")
        if means not in ("task", "class"):
            raise ValueError(f"unknown means {means!r}: task or class")
        if shrinkage <= 0:
            raise ValueError(f"shrinkage must be above 0, got {shrinkage}")
        if kind != "linear_weights" and (not widths or min(widths) < 1):
            raise ValueError(f"{kind} needs widths of at least 1, and at least one of them, got {widths}")
        self.kind, self._relevant_from, self._per_class = kind, relevant_from, means == "class"
        self.log_shrinkage = nn.Parameter(torch.tensor(math.log(shrinkage)))
        inputs, regressors = self._learner.represented, self._learner.represented + 1
        if kind == "linear_weights":
            #: a₊ and a₋, below them those of the bias.
            self.shares = nn.Parameter(torch.tensor([[1.0, -1.0], [0.5, -0.5]]))
        elif kind == "nonlinear_biases":
            self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise((inputs, *widths)))
            #: V₊ and V₋ of each layer, and of the output.
            self.biases = nn.ModuleList(nn.Linear(2 * regressors, n, bias=False) for n in (*widths, 1))
            # A bias of its own would be the same with R₊ and R₋ of 0.
            self.head = nn.Linear(widths[-1], 1, bias=False)
        elif kind == "full":
            self.layers = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise((2 * regressors, *widths)))
            # A bias would be the same with R₊ and R₋ of 0.
            self.head = nn.Linear(widths[-1], regressors, bias=False)
        else:
            raise ValueError(f"unknown kind {kind!r}: linear_weights, nonlinear_biases or full")

    def adapt(self, support: Examples, rows: Tensors) -> FastWeights:
        """See `MetaLearner.adapt`: `weight` [T, K] of a linear model; where biases are generated, `means` [T, 2 K]."""
        h = self._represented(support, rows)[0]
        means_T2K = self._means(h, support)
        if self.kind == "nonlinear_biases":
            return FastWeights({"means": means_T2K.flatten(1)}, rows)
        return FastWeights({"weight": self._weight(means_T2K)}, rows)

    def predict(self, fast: FastWeights, examples: Examples) -> Tensor:
        """See `MetaLearner.predict`."""
        h, scores = self._represented(examples, fast.rows)
        if self.kind == "nonlinear_biases":
            return scores + self._biased(h, fast.weights["means"])
        weight = fast.weights["weight"]
        return scores + torch.einsum("teh,th->te", h, weight[:, :-1]) + weight[:, -1:]

    def unadapted(self, support: Examples, rows: Tensors) -> FastWeights:
        """See `MetaLearner.unadapted`."""
        tasks, regressors = support.x.shape[0], self._learner.represented + 1
        if self.kind == "nonlinear_biases":
            return FastWeights({"means": support.x.new_zeros(tasks, 2 * regressors)}, rows)
        return FastWeights({"weight": support.x.new_zeros(tasks, regressors)}, rows)

    def curves(self) -> dict[str, float]:
        """κ, and the scalars of LWA."""
        found = {"meta/shrinkage": float(self.log_shrinkage.detach().exp())}
        if self.kind == "linear_weights":
            names = ("liked", "disliked", "bias liked", "bias disliked")
            values = self.shares.detach().flatten().tolist()
            found |= {f"meta/share {name}": value for name, value in zip(names, values, strict=True)}
        return found

    def _represented(self, examples: Examples, rows: Tensors) -> tuple[Tensor, Tensor]:
        return self.represented(self._learner, self.inputs(examples, rows))

    def _means(self, h: Tensor, support: Examples) -> Tensor:
        """R₊ and R₋ of each task, the 1 of h in the last place: [T, S, H] → [T, 2, K]."""
        v_TS = support.labels - self._relevant_from
        liked_TS = v_TS >= 0
        classes_TS2 = torch.stack([liked_TS, ~liked_TS], dim=-1) * support.mask.unsqueeze(-1)
        counts = classes_TS2.sum(1) if self._per_class else support.mask.sum(-1, keepdim=True)
        shares_TS2 = classes_TS2 * v_TS.abs().unsqueeze(-1) / (counts + self.log_shrinkage.exp()).unsqueeze(1)
        return torch.cat([torch.einsum("tsc,tsh->tch", shares_TS2, h), shares_TS2.sum(1).unsqueeze(-1)], dim=-1)

    def _weight(self, means: Tensor) -> Tensor:
        """[T, 2, K] → a linear model's weights and bias [T, K]."""
        if self.kind == "linear_weights":
            shares_2K = self.shares.repeat_interleave(
                torch.tensor([means.shape[-1] - 1, 1], device=means.device), dim=0, output_size=means.shape[-1]
            ).T
            return (means * shares_2K).sum(1)
        # The last row's means are 0: what it gives is what a task without support would get.
        h = torch.cat([means.flatten(1), means.new_zeros(1, 2 * means.shape[-1])])
        for layer in self.layers:
            h = torch.relu(layer(h))
        return self.head(h[:-1] - h[-1:])

    def _biased(self, h: Tensor, means: Tensor) -> Tensor:
        """What the generated biases change in the network's output: [T, E, H], [T, 2 K] → [T, E]."""
        before = self.layers[0](h)
        moved, still = torch.relu(before + self.biases[0](means).unsqueeze(1)), torch.relu(before)
        for layer, bias in zip(self.layers[1:], self.biases[1:-1], strict=True):
            moved, still = torch.relu(layer(moved) + bias(means).unsqueeze(1)), torch.relu(layer(still))
        return self.head(moved - still).squeeze(-1) + self.biases[-1](means)
