"""Kernel regression over a task's support: a smoother, or the posterior mean of a Gaussian process.

Both are on what the base learner's own scores leave of the support's labels, r, so that a task without support keeps
these scores, and both add to a query event's score a sum over the support, k(q) the kernel of the query with it:

- `smoother` (Nadaraya 1964, "On estimating regression"; Watson 1964, "Smooth regression analysis"):
  Σₛ k(q, s) rₛ / (κ + Σₛ k(q, s)), k(q, s) = exp(−|q − s|² / 2ℓ²). κ is an event without error that is like every
  query; without it a query far from all support would get the nearest event's error in full.
- `gaussian_process` (Rasmussen and Williams 2006, "Gaussian Processes for Machine Learning", equation 2.25):
  k(q)ᵀ (K + σ² I)⁻¹ r, with k(q, s) = a q·s + b + c exp(−|q − s|² / 2ℓ²). Without the last term it is a ridge
  regression with λ = σ²/a and, for the bias, σ²/b (see `ridge`); the last term adds what is not linear. The mean
  depends on a, b, c and σ² by their ratios alone; all are learned.

Kernels are of the base learner's representations: deep kernels, learned over tasks (Patacchiola et al. 2020, "Bayesian
Meta-Learning for the Few-Shot Setting via Deep Kernels"). That paper maximises the marginal likelihood; here, as in
every other method of this package, the query's loss is what is minimised.

Where scores are logits, the process is a Gaussian process classifier's: Newton steps reach the most probable logits
(their algorithm 3.1; see `newton`), labels are its noise, and σ² has no place. The smoother then sums y − p, and a
learned gain takes the sum to logits, as in `matching`.

Symbols: T tasks, S support events, E events, H width of a representation.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor, nn

from metatrain.meta import newton
from metatrain.meta.engine import FastWeights, Tensors
from metatrain.meta.episode import Examples
from metatrain.meta.learner import MetaLearner, representing
from metatrain.meta.solve import solve

#: Option → what it is at the start where it is not given, of each kind.
_SMOOTHER = {"lengthscale": 1.0, "nothing_known": 2.0}
_PROCESS = {"lengthscale": 1.0, "linear": 0.2, "bias": 0.5, "rbf": 0.2, "noise": 1.0}
_MAY_BE_0 = ("linear", "bias", "rbf")


class Kernel(MetaLearner):
    """Kernel regression over the support, for ratings and clicks. Options are what is learned, at the start.

    Args:
        learner: A base learner that represents.
        loss, huber_delta, memory, precision: See `MetaLearner`.
        kind: smoother, or gaussian_process.
        lengthscale: ℓ, a distance between representations (1 where it is not given).
        nothing_known: κ of the smoother, in events (2).
        linear, bias, rbf: a, b and c of the process, in squared units of the score (0.2, 0.5, 0.2); 0 leaves the term
            out for good.
        noise: σ² of the process, in squared units of the label (1).
        newton_steps: Newton steps of the process where scores are logits (5).

    Raises:
        ValueError: The base learner doesn't represent, an option is the other kind's, or out of its range.
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
        kind: Literal["smoother", "gaussian_process"] = "gaussian_process",
        lengthscale: float | None = None,
        nothing_known: float | None = None,
        linear: float | None = None,
        bias: float | None = None,
        rbf: float | None = None,
        noise: float | None = None,
        newton_steps: int | None = None,
    ) -> None:
        super().__init__(learner, memory=memory, loss=loss, huber_delta=huber_delta, precision=precision)
        self._learner = representing(learner, "kernel")
        if kind not in ("smoother", "gaussian_process"):
            raise ValueError(f"unknown kind {kind!r}: smoother, gaussian_process")
        self.kind, self._logits = kind, loss == "binary_cross_entropy"
        given = {"lengthscale": lengthscale, "nothing_known": nothing_known, "linear": linear, "bias": bias}
        given |= {"rbf": rbf, "noise": noise, "newton_steps": newton_steps}
        start = self._start({name: value for name, value in given.items() if value is not None})
        self.newton_steps = int(start.pop("newton_steps", 0))
        #: Logarithms of what is learned, by name; a term that was left out has none.
        self.logs = nn.ParameterDict({n: nn.Parameter(torch.tensor(math.log(v))) for n, v in start.items() if v > 0})
        if kind == "smoother" and self._logits:
            self.logs["gain"] = nn.Parameter(torch.tensor(math.log(4.0)))  # why 4: see `matching`

    def adapt(self, support: Examples, rows: Tensors) -> FastWeights:
        """See `MetaLearner.adapt`: the support's `representation` [T, S, H], its `coefficient` [T, S],
        and of a smoother `mask` [T, S]."""
        h, scores = self.represented(self._learner, self.inputs(support, rows), support.represented)
        expected = torch.sigmoid(scores) if self._logits else scores
        error_TS = (support.labels - expected) * support.mask
        if self.kind == "smoother":
            return FastWeights({"representation": h, "coefficient": error_TS, "mask": support.mask}, rows)
        gram_TSS = self._kernel(h, h) * (support.mask.unsqueeze(-1) * support.mask.unsqueeze(-2))
        if self._logits:
            coefficient_TS = newton.duals(gram_TSS, support.labels, support.mask, scores, self.newton_steps)
        else:
            precision = torch.exp(-self.logs["noise"])
            unit = torch.eye(h.shape[1], dtype=h.dtype, device=h.device)
            coefficient_TS = solve(gram_TSS * precision + unit, error_TS * precision)
        return FastWeights({"representation": h, "coefficient": coefficient_TS}, rows)

    def predict(self, fast: FastWeights, examples: Examples) -> Tensor:
        """See `MetaLearner.predict`."""
        h, scores = self.represented(self._learner, self.inputs(examples, fast.rows), examples.represented)
        known, coefficient_TS = fast.weights["representation"], fast.weights["coefficient"]
        if self.kind == "gaussian_process":
            return scores + (self._kernel(h, known) @ coefficient_TS.unsqueeze(-1)).squeeze(-1)
        # A softmax with κ as one event more: far from all support the exponentials themselves would be 0.
        logits_TES = self._closeness(h, known).masked_fill(fast.weights["mask"].unsqueeze(-2) == 0, -torch.inf)
        nothing_TE1 = self.logs["nothing_known"].to(h.dtype).expand(*scores.shape, 1)
        share_TES = torch.cat([logits_TES, nothing_TE1], dim=-1).softmax(-1)[..., :-1]
        change_TE = (share_TES @ coefficient_TS.unsqueeze(-1)).squeeze(-1)
        return scores + (self.logs["gain"].exp() * change_TE if self._logits else change_TE)

    def unadapted(self, support: Examples, rows: Tensors) -> FastWeights:
        """See `MetaLearner.unadapted`: no events to look at."""
        x, tasks = support.x, support.x.shape[0]
        none, nothing = x.new_zeros(tasks, 0), x.new_zeros(tasks, 0, self._learner.represented)
        return FastWeights({"representation": nothing, "coefficient": none, "mask": none}, rows)

    def curves(self) -> dict[str, float]:
        """All that is learned of the kernel."""
        return {f"meta/kernel {name.replace('_', ' ')}": float(log.detach().exp()) for name, log in self.logs.items()}

    def _start(self, given: dict[str, float]) -> dict[str, float]:
        """What is learned, at the start, and `newton_steps` where there are any."""
        defaults: dict[str, float] = dict(_SMOOTHER if self.kind == "smoother" else _PROCESS)
        if self.kind == "gaussian_process" and self._logits:
            del defaults["noise"]
            defaults["newton_steps"] = 5
        for name, value in given.items():
            if name not in defaults:
                raise ValueError(f"a {self.kind} under the loss {self.loss!r} has no {name}: leave it out")
            least = 1 if name == "newton_steps" else 0
            if value < least or (value == 0 and name not in _MAY_BE_0):
                bound = "above 0" if name not in (*_MAY_BE_0, "newton_steps") else f"at least {least}"
                raise ValueError(f"{name} must be {bound}, got {value}")
        start = defaults | given
        if self.kind == "gaussian_process":
            if not any(start[name] for name in _MAY_BE_0):
                raise ValueError("linear, bias and rbf are all 0, so the kernel is; set one of them above 0")
            if start["rbf"] == 0:
                if "lengthscale" in given:
                    raise ValueError("lengthscale is of the term that `rbf: 0` leaves out; leave it out too")
                del start["lengthscale"]
        return start

    def _kernel(self, one: Tensor, other: Tensor) -> Tensor:
        """The process's kernel: [T, E, H], [T, S, H] → [T, E, S]."""
        terms: list[Tensor] = []
        if "linear" in self.logs:
            terms.append(self.logs["linear"].exp() * (one @ other.mT))
        if "rbf" in self.logs:
            terms.append(torch.exp(self._closeness(one, other) + self.logs["rbf"]))
        if "bias" in self.logs:
            terms.append(self.logs["bias"].exp().expand(*one.shape[:-1], other.shape[1]))
        return torch.stack(terms).sum(0) if len(terms) > 1 else terms[0]

    def _closeness(self, one: Tensor, other: Tensor) -> Tensor:
        """−|q − s|² / 2ℓ²: [T, E, H], [T, S, H] → [T, E, S], by one product: differences would be H times as large."""
        scale = torch.exp(-self.logs["lengthscale"])
        one, other = one * scale, other * scale
        squares = one.square().sum(-1).unsqueeze(-1) + other.square().sum(-1).unsqueeze(-2)
        return one @ other.mT - 0.5 * squares
