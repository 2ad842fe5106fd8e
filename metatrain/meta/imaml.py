"""Implicit MAML: a task's weights solve a regularised problem, and the meta-gradient follows from what they solve.

Rajeswaran, Finn, Kakade and Levine 2019, "Meta-Learning with Implicit Gradients". A task's weights are (section
"Proximal regularization in the inner level")

    φ = argmin over φ' of  L_support(φ') + λ/2 |φ' - θ|²

and at the minimum ∇L_support(φ) + λ (φ - θ) = 0, which says how φ moves with all that stands in it, however it was
found. With H the Hessian of L_support at φ and b = ∇L_query(φ), let u solve (I + H/λ) u = b. Then the meta-gradient is

    in θ    u                                        section "Implicit MAML algorithm"
    in ψ    ∂L_query/∂ψ - 1/λ ∂/∂ψ ⟨u, ∇_φ L_support⟩

where ψ is all that the support loss reads and that doesn't adapt: the other parameters and the inputs, which are
embeddings. The paper adapts every weight and has fixed inputs, so it has no such ψ; its line follows from the same
condition. Adapted embedding rows are part of φ, and their looked-up values part of θ.

φ is found by gradient steps and u by conjugate gradients, with products of H and a vector through the gradient's own
graph, for all tasks at once. Nothing of the inner steps is kept: memory doesn't grow with their number, and the
gradient doesn't depend on how they got there. Both are approximations that converge: `curves` tells how far they are.

Where a loss is not convex, I + H/λ may have a direction of negative curvature, where φ is no minimum. A task's
conjugate gradients then end before it; where already the first direction is one, u = b, as if H were 0.

Symbols: T tasks, E events (padded), N weights that adapt in a task, rows included.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from metatrain.meta.engine import FastWeights, Tensors, fused_gains
from metatrain.meta.episode import Episodes, Examples, Sizes
from metatrain.meta.learner import QueryLoss
from metatrain.meta.losses import event_loss, mean_over_events
from metatrain.meta.maml import MAML
from metatrain.meta.memory import Loop, Plan, plan


class IMAML(MAML):
    """Implicit MAML around any base learner.

    Args:
        learner, adapt, adapt_rows, chunk, memory, loss, inner_loss, huber_delta, precision: See `MAML`.
        steps: Gradient steps on the regularised problem. Many cost time alone, no memory.
        rate: Their rate; below 2 / (λ + the greatest curvature of the support loss), or they diverge.
        strength: λ: how strongly a task's weights are held to the start.
        cg_steps: Steps of conjugate gradients, each a product with the Hessian; N of them are exact.

    Raises:
        ValueError: No steps; a strength that isn't positive, or with which the steps diverge; a support loss without
            curvature; the gain of a torch.nn.LayerNorm would adapt; or see `MAML`.
    """

    def __init__(
        self,
        learner: nn.Module,
        *,
        steps: int = 16,
        rate: float = 0.05,
        adapt: Iterable[str] = ("*",),
        adapt_rows: Iterable[str] = (),
        chunk: int = 0,
        memory: int = 1 << 30,
        loss: str = "squared",
        inner_loss: str | None = None,
        huber_delta: float = 1.0,
        precision: torch.dtype | None = None,
        strength: float = 1.0,
        cg_steps: int = 5,
    ) -> None:
        for name, count in (("steps", steps), ("cg_steps", cg_steps)):
            if count < 1:
                raise ValueError(f"{name} must be at least 1, got {count}: unsolved, the problem has no such gradient")
        if not strength > 0:
            raise ValueError(f"strength must be above 0, got {strength}: it is what ties a task's weights to the start")
        if rate * strength >= 2:
            raise ValueError(
                f"rate × strength must be below 2, got {rate} × {strength}: the regularisation alone makes such steps "
                "diverge; lower either"
            )
        if (inner_loss or loss) == "absolute":
            raise ValueError(
                "the absolute loss has no curvature, so the implicit gradient would not see the support: "
                "set inner_loss to huber or squared"
            )
        super().__init__(
            learner,
            order=1,
            steps=steps,
            rate=rate,
            adapt=adapt,
            adapt_rows=adapt_rows,
            chunk=chunk,
            memory=memory,
            keep=0,
            loss=loss,
            inner_loss=inner_loss,
            huber_delta=huber_delta,
            precision=precision,
            engine="vmap",
        )
        if not self.rate_names:
            raise ValueError("nothing adapts, so there is nothing to solve: name parameters in adapt, or adapt_rows")
        if gains := fused_gains(learner).intersection(self.adapted):
            raise ValueError(
                f"the gain of a torch.nn.LayerNorm has no right second derivative a task: {', '.join(sorted(gains))}; "
                "take metatrain.model.learners.mlp.LayerNorm, or leave it out of what adapts"
            )
        self.strength, self.cg_steps, self._rate = strength, cg_steps, rate
        self._inner_loss = event_loss(inner_loss or loss, huber_delta)
        # Kept as tensors: reading a number off a device at every step would wait for it.
        self._residuals: dict[str, Tensor] = {}

    def adapt(self, support: Examples, rows: Tensors) -> FastWeights:
        """See `MetaLearner.adapt`; differentiable by the implicit function theorem."""
        return self._solved(self._parameters_and_buffers(), support, rows)

    def plan(self, sizes: Sizes) -> Plan:
        """How many tasks are taken at a time."""
        # As two steps of second order, whatever `steps` is: the support loss' graph, and the vectors of its solver.
        loop = Loop.of(self.learner, self.adapted, 2, 2, True)
        itemsize = sizes.itemsize * 3 // 2 if self.precision is not None else sizes.itemsize
        rows = sum(count * width for count, width in sizes.rows.values())
        return plan(loop, *sizes[:3], self.memory, rows=rows, itemsize=itemsize, chunk=self.chunk, keep=0)

    def curves(self) -> dict[str, float]:
        """Of the last tasks that were trained, means of what the solvers leave: 0 is solved, 1 is nothing gained.

        `inner residual`: |∇L_support(φ) + λ (φ - θ)| over |∇L_support(φ)|. `CG residual`: |b - (I + H/λ) u| over |b|.
        """
        return {f"meta/imaml {name}": float(value) for name, value in self._residuals.items()}

    def _counted_seconds(self, sizes: Sizes) -> float:
        # A product with the Hessian goes through the gradient's graph and back: about two gradients.
        return self._engine.seconds(self.adapted, self.steps + 2 * self.cg_steps, sizes)

    def _query_loss(self, parameters: Tensors, rates: Tensor, episodes: Episodes, keep: int) -> QueryLoss:
        query = episodes.query
        fast = self._solved(parameters, episodes.support, episodes.rows)
        after = self.task_losses(self._engine.predict(parameters, fast, query), query)
        with torch.no_grad():
            unadapted = self._engine.predict(parameters, FastWeights({}, episodes.rows), query)
            before = self.task_losses(unadapted, query)
        return QueryLoss(episodes.summed(after), after.detach(), before)

    def _solved(self, parameters: Tensors, support: Examples, rows: Tensors) -> FastWeights:
        others = [name for name in parameters if name not in self.adapted]

        def losses(phi: list[Tensor], psi: list[Tensor]) -> Tensor:
            """Each task's support loss [T]; `phi` a tensor a task each, `psi` the other parameters and the inputs."""
            *values, x = psi
            fast = FastWeights(
                dict(zip(self.adapted, phi, strict=False)), dict(zip(rows, phi[len(self.adapted) :], strict=True))
            )
            examples = Examples(x, support.slots, support.labels, support.mask)
            scores = self._engine.predict(dict(zip(others, values, strict=True)), fast, examples)
            return mean_over_events(self._inner_loss(scores, support.labels), support.mask)

        problem = Problem(
            losses,
            len(self.adapted),
            len(rows),
            support.labels.shape[0],
            self.steps,
            self._rate,
            self.strength,
            self.cg_steps,
            self._residuals,
        )
        flat = [parameters[name] for name in self.adapted] + list(rows.values())
        psi = [parameters[name] for name in others] + [support.x]
        phi = iter(ImplicitSolution.apply(problem, *flat, *psi))
        return FastWeights({name: next(phi) for name in self.adapted}, {name: next(phi) for name in rows})


@dataclass
class Problem:
    """The regularised problems of T tasks."""

    losses: Callable[[list[Tensor], list[Tensor]], Tensor]  # φ, ψ → [T]
    shared: int  # how many tensors of θ all tasks share; the others are a task's own
    own: int
    tasks: int
    steps: int
    rate: float
    strength: float
    cg_steps: int
    residuals: dict[str, Tensor]  # filled in by the backward

    def start(self, theta: tuple[Tensor, ...]) -> list[Tensor]:
        """θ, a copy a task (without copying)."""
        few = theta[: self.shared]
        return [t.detach().expand(self.tasks, *t.shape) for t in few] + [t.detach() for t in theta[self.shared :]]

    def gradient(self, phi: list[Tensor], psi: list[Tensor], graph: bool = False) -> list[Tensor]:
        """∇_φ of each task's support loss; `phi` are leaves."""
        with torch.enable_grad():
            losses = self.losses(phi, psi)
            return list(torch.autograd.grad(losses.sum(), phi, create_graph=graph, materialize_grads=True))


class ImplicitSolution(torch.autograd.Function):
    """(problem, θ…, ψ…) → φ…, [T, …] each, with the implicit gradient; keeps φ and what it was given."""

    @staticmethod
    def forward(ctx: Any, problem: Problem, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        count = problem.shared + problem.own
        start, psi = problem.start(tensors[:count]), [t.detach() for t in tensors[count:]]
        phi, pull = start, problem.rate * problem.strength
        for _ in range(problem.steps):
            phi = [p.detach().requires_grad_() for p in phi]
            by_phi = problem.gradient(phi, psi)
            phi = [
                torch.lerp(p.detach(), s, pull).sub_(g, alpha=problem.rate)
                for p, s, g in zip(phi, start, by_phi, strict=True)
            ]
        ctx.problem = problem
        ctx.save_for_backward(*tensors, *phi)
        return tuple(phi)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *by_phi: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        problem, needed = ctx.problem, ctx.needs_input_grad[1:]
        count, total = problem.shared + problem.own, len(needed)
        theta, psi, phi = (ctx.saved_tensors[a:b] for a, b in itertools.pairwise((0, count, total, total + count)))
        phi = [p.detach().requires_grad_() for p in phi]
        psi = [t.detach().requires_grad_(need) for t, need in zip(psi, needed[count:], strict=True)]
        # One graph serves every product with H, and the derivative in ψ.
        gradient = problem.gradient(phi, psi, graph=True)
        moved = [g for g in gradient if g.requires_grad]
        sizes = [p[0].numel() for p in phi]

        def split(flat: Tensor) -> list[Tensor]:
            return [part.reshape(p.shape) for part, p in zip(flat.split(sizes, 1), phi, strict=True)]

        def along(vector: Tensor, of: list[Tensor]) -> list[Tensor | None]:
            """∂/∂`of` of ⟨vector, ∇_φ L_support⟩."""
            parts = [v for v, g in zip(split(vector), gradient, strict=True) if g.requires_grad]
            if not (moved and of):
                return [None] * len(of)
            return list(torch.autograd.grad(moved, of, parts, retain_graph=True, allow_unused=True))

        def times(vector: Tensor) -> Tensor:
            found = [torch.zeros_like(p) if h is None else h for h, p in zip(along(vector, phi), phi, strict=True)]
            return vector + _flat(found) / problem.strength

        b = _flat(list(by_phi))
        u, left = conjugate_gradients(times, b, problem.cg_steps)
        with torch.no_grad():
            slopes = _flat([g.detach() for g in gradient])
            away = _flat([p - s for p, s in zip(phi, problem.start(theta), strict=True)])
            unsolved = (slopes + problem.strength * away).norm(dim=1) / slopes.norm(dim=1).clamp(min=1e-12)
            problem.residuals.update({"inner residual": unsolved.mean(), "CG residual": left.mean()})
        wanted = [t for t in psi if t.requires_grad]
        by_psi = iter([None if d is None else d / -problem.strength for d in along(u, wanted)])
        by_theta = [part.sum(0) if i < problem.shared else part for i, part in enumerate(split(u))]
        return None, *by_theta, *(next(by_psi) if t.requires_grad else None for t in psi)


def conjugate_gradients(times: Callable[[Tensor], Tensor], b: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """Solves a symmetric system a task: `times` is the product with its matrix.

    A task whose direction has no positive curvature ends there; at the first direction its solution is `b`.

    Args:
        times: [T, N] → [T, N].
        b: Right-hand sides [T, N].
        steps: At most so many products.

    Returns:
        The solutions [T, N], and |b - times(solution)| / |b| as the recurrence has it, [T].
    """
    u, r, p = torch.zeros_like(b), b, b
    first = square = (b * b).sum(1, keepdim=True)
    solved = torch.finfo(b.dtype).eps ** 2 * first
    for step in range(steps):
        q = times(p)
        curvature = (p * q).sum(1, keepdim=True)
        alive = (square > solved) & (curvature > 0)
        if step == 0:
            bent = (square > solved) & ~alive
        size = torch.where(alive, square / curvature, 0.0)
        u, r = u + size * p, r - size * q
        now = (r * r).sum(1, keepdim=True)
        # A task that has ended has a direction of 0, and so no curvature ever after.
        p = torch.where(alive, r + now / square * p, 0.0)
        square = now
    return torch.where(bent, b, u), (square / first.clamp(min=torch.finfo(b.dtype).tiny)).sqrt().squeeze(1)


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.reshape(len(t), -1) for t in tensors], 1)
