"""TaNP: a neural process whose decoder is modulated by what a task's support says, without any inner loop.

Lin, Wu, Zhou, Pan, Cao and Wang 2021, "Task-adaptive Neural Process for User Cold-Start Recommendation": an encoder
reads the support's events with their labels, one at a time; the mean of what it says, r, represents the task. Their
customisation module assigns the task softly to the centres A of a global pool, by the kernel of Student's t,

    C_k ∝ (1 + |r - A_k|² / α)^(-(α + 1) / 2),    o = r + Σ_k C_k A_k,

and o modulates each hidden layer of the decoder by FiLM (Perez et al. 2018), or by FiLM with a gate:

    film     h ← relu(γ ⊙ (W h + b) + β),    γ = 1 + tanh(W_γ o),    β = tanh(W_β o)
    gated    the same with γ = 1 + δ tanh(W_γ o) + (1 - δ) η,    β = δ tanh(W_β o) + (1 - δ) η,
             η = tanh(W_η o),    δ = σ(W_δ o)

The decoder reads an event's input beside the task's r: then this is a conditional neural process (Garnelo et al. 2018).
With `latent` it reads z ~ N(μ(r), σ(r)²) in r's place, as in the paper. In training z is drawn from the posterior,
which has also seen the query, and the divergence of this from the prior, which has seen the support, is added to the
loss; σ = 0.1 + 0.9 sigmoid(·), as is usual for neural processes. In use z is the prior's mean. Its noise is a function
of the task's labels (see `noise`): a resumed run draws the same.

Where this departs from the paper:

- The decoder corrects the base learner's score, and the encoder reads what this score leaves of a label (of a click:
  what its probability leaves). The correction is multiplied by n / (n + κ), n the support's events, κ learned: without
  support the base learner's score stands, and few events move it little. A mean forgets n, which Bayes would not; the
  factor is beside r in all that r enters.
- One encoder serves z and o, where the authors' code has two.
- γ is around 1, not around 0: at the start a decoder of several layers would otherwise hardly pass its input on.
- The clustering loss that sharpens C is left out: its target is made of the frequencies in a batch, and a task's
  loss must not depend on which tasks it meets there.

Symbols: T tasks, E events, F width of an input, R width of r with its factor, C clusters, N width of a layer.
"""

from __future__ import annotations

import itertools
import math
from typing import Literal

import torch
from torch import Tensor, nn

from metatrain.meta.engine import FastWeights, Tensors
from metatrain.meta.episode import Episodes, Examples
from metatrain.meta.layout import Layout
from metatrain.meta.learner import MetaLearner, QueryLoss
from metatrain.meta.noise import label_noise

Modulation = Literal["film", "gated"]


class TaNP(MetaLearner):
    """A neural process over any base learner, for ratings and clicks.

    Args:
        learner: Any base learner.
        layout: Whose the columns of its input are.
        loss, huber_delta, memory, precision, adapt_rows: See `MetaLearner`.
        encoder: Widths of the encoder's hidden layers, at least one.
        width: Numbers that the encoder says of an event: R - 1.
        decoder: Widths of the decoder's hidden layers, at least one; each is modulated.
        clusters: Centres of the pool; 0: none, then o is r.
        freedom: α, the degrees of freedom of Student's t.
        modulation: film or gated.
        shrinkage: κ at the start, in events.
        latent: Whether the decoder reads a Gaussian z.
        kl: Weight of the divergence a task, which is divided by its query events as the losses are; latent alone.

    Raises:
        ValueError: A width, number or modulation that can't be.
    """

    def __init__(
        self,
        learner: nn.Module,
        *,
        layout: Layout,
        loss: str = "squared",
        huber_delta: float = 1.0,
        memory: int = 1 << 30,
        precision: torch.dtype | None = None,
        adapt_rows: tuple[str, ...] = (),
        encoder: tuple[int, ...] = (64,),
        width: int = 32,
        decoder: tuple[int, ...] = (64, 64),
        clusters: int = 8,
        freedom: float = 1.0,
        modulation: Modulation = "gated",
        shrinkage: float = 1.0,
        latent: bool = False,
        kl: float = 1.0,
    ) -> None:
        super().__init__(
            learner, adapt_rows=adapt_rows, memory=memory, loss=loss, huber_delta=huber_delta, precision=precision
        )
        for name, widths in (("encoder", encoder), ("decoder", decoder), ("width", (width,))):
            if not widths or min(widths) < 1:
                raise ValueError(f"{name} must have widths of at least 1, and at least one of them, got {widths}")
        for name, value in (("freedom", freedom), ("shrinkage", shrinkage)):
            if value <= 0:
                raise ValueError(f"{name} must be above 0, got {value}")
        if clusters < 0 or kl < 0:
            raise ValueError(f"clusters and kl must be at least 0, got {clusters} and {kl}")
        if modulation not in ("film", "gated"):
            raise ValueError(f"unknown modulation {modulation!r}: film or gated")
        self.freedom, self.latent, self.kl, self._clicks = freedom, latent, kl, loss == "binary_cross_entropy"
        of_task = width + 1
        # A first layer in two: of the input, and of what stands beside it, which is then never copied to each event.
        self.encode_x, self.encode_label = nn.Linear(layout.width, encoder[0]), nn.Linear(1, encoder[0], bias=False)
        self.encoder = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise((*encoder, width)))
        self.decode_x = nn.Linear(layout.width, decoder[0])
        self.decode_task = nn.Linear(of_task, decoder[0], bias=False)
        self.decoder = nn.ModuleList(nn.Linear(i, o) for i, o in itertools.pairwise(decoder))
        self.head = nn.Linear(decoder[-1], 1)
        # Small, so that a run starts near the base learner's scores.
        nn.init.normal_(self.head.weight, std=0.1 / math.sqrt(decoder[-1]))
        nn.init.zeros_(self.head.bias)
        #: Of each layer W_γ and W_β, then W_η and W_δ, one below the other.
        parts = 2 if modulation == "film" else 4
        self.film = nn.ModuleList(nn.Linear(of_task, parts * n, bias=False) for n in decoder)
        self.pool = nn.Parameter(torch.empty(clusters, of_task)) if clusters else None
        if self.pool is not None:
            nn.init.xavier_uniform_(self.pool)
        self.gaussian = nn.Linear(of_task, 2 * of_task) if latent else None
        self.log_shrinkage = nn.Parameter(torch.tensor(math.log(shrinkage)))

    def adapt(self, support: Examples, rows: Tensors) -> FastWeights:
        """See `MetaLearner.adapt`: `task` [T, R] (o), `latent` [T, R] (r, or the prior's mean of z), `factor` [T]."""
        said, count = self._sums(support, self.inputs(support, rows))
        return self._state(self._summary(said, count), rows)

    def predict(self, fast: FastWeights, examples: Examples) -> Tensor:
        """See `MetaLearner.predict`."""
        x = self.inputs(examples, fast.rows)
        return self._decoded(x, self._base(x), fast)

    def forward(self, episodes: Episodes) -> QueryLoss:
        """See `MetaLearner.forward`. Training with `latent`, `total` is of a z of the posterior, divergence and all."""
        if self.gaussian is None or not self.training:
            return super().forward(episodes)
        support, query, rows = episodes.support, episodes.query, episodes.rows
        x_query = self.inputs(query, rows)
        of_support, of_query = self._sums(support, self.inputs(support, rows)), self._sums(query, x_query)
        r = self._summary(*of_support)
        mean, deviation = self._gauss(self._summary(of_support[0] + of_query[0], of_support[1] + of_query[1]))
        z = mean + deviation * label_noise(support, query, mean.shape[-1])
        state, base = self._state(r, rows), self._base(x_query)
        drawn = FastWeights({**state.weights, "latent": z}, rows)
        divergence = gaussian_divergence(mean, deviation, *self._gauss(r)) / query.mask.sum(-1).clamp(min=1.0)
        losses = self.task_losses(self._decoded(x_query, base, drawn), query) + self.kl * divergence
        with torch.no_grad():
            after = self.task_losses(self._decoded(x_query, base, state), query)
            # Without support the factor is 0, and nothing is left but the base learner's score.
            before = self.task_losses(base, query)
        return QueryLoss(episodes.summed(losses) + self.untouched(), after, before)

    @property
    def links(self) -> bool:
        """See `MetaLearner.links`: not where the loss is of a sample."""
        return self.gaussian is None

    def curves(self) -> dict[str, float]:
        """κ."""
        return {"meta/shrinkage": float(self.log_shrinkage.detach().exp())}

    def _base(self, x: Tensor) -> Tensor:
        return self.scores(x).to(x.dtype)

    def _sums(self, examples: Examples, x: Tensor) -> tuple[Tensor, Tensor]:
        """What the encoder says of each task's events, their sum [T, R - 1], and the number of events [T, 1]."""
        scores = self._base(x)
        left = examples.labels - (torch.sigmoid(scores) if self._clicks else scores)
        h = self.encode_x(x) + self.encode_label(left.unsqueeze(-1))
        for layer in self.encoder:
            h = layer(torch.relu(h))
        return torch.einsum("ter,te->tr", h, examples.mask), examples.mask.sum(-1, keepdim=True)

    def _summary(self, said: Tensor, count: Tensor) -> Tensor:
        """r [T, R]: the mean over a task's events, and its factor."""
        factor = count / (count + self.log_shrinkage.exp())
        return torch.cat([said / count.clamp(min=1.0), factor], dim=-1)

    def _state(self, r: Tensor, rows: Tensors) -> FastWeights:
        latent = r if self.gaussian is None else self._gauss(r)[0]
        return FastWeights({"task": self._customised(r), "latent": latent, "factor": r[:, -1]}, rows)

    def _gauss(self, r: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation [T, R] of z."""
        assert self.gaussian is not None
        mean, spread = self.gaussian(r).chunk(2, dim=-1)
        return mean, 0.1 + 0.9 * torch.sigmoid(spread)

    def _customised(self, r: Tensor) -> Tensor:
        """o [T, R]."""
        if self.pool is None:
            return r
        distances = (r.unsqueeze(1) - self.pool).square().sum(-1)
        # A softmax of logarithms is the kernel's share, and does not underflow far from all centres.
        kernel = -0.5 * (self.freedom + 1) * torch.log1p(distances / self.freedom)
        return r + torch.softmax(kernel, dim=-1) @ self.pool

    def _decoded(self, x: Tensor, base: Tensor, fast: FastWeights) -> Tensor:
        """Scores [T, E]: the base learner's and the correction."""
        h = self.decode_x(x) + self.decode_task(fast.weights["latent"]).unsqueeze(1)
        for number, film in enumerate(self.film):
            if number:
                h = self.decoder[number - 1](h)
            parts = film(fast.weights["task"]).unsqueeze(1)  # [T, 1, 2 N] or [T, 1, 4 N]
            width = h.shape[-1]
            gamma, beta = torch.tanh(parts[..., : 2 * width]).chunk(2, dim=-1)
            if parts.shape[-1] > 2 * width:
                eta, gate = torch.tanh(parts[..., 2 * width : 3 * width]), torch.sigmoid(parts[..., 3 * width :])
                gamma, beta = gate * gamma + (1 - gate) * eta, gate * beta + (1 - gate) * eta
            h = torch.relu((1 + gamma) * h + beta)
        return base + fast.weights["factor"].unsqueeze(-1) * self.head(h).squeeze(-1)


def gaussian_divergence(mean: Tensor, deviation: Tensor, of_mean: Tensor, of_deviation: Tensor) -> Tensor:
    """KL(N(mean, deviation²) ‖ N(of_mean, of_deviation²)) of independent numbers: [T, R] each → [T]."""
    ratio = (deviation / of_deviation).square()
    distance = ((mean - of_mean) / of_deviation).square()
    return 0.5 * (ratio + distance - 1 - ratio.log()).sum(-1)
