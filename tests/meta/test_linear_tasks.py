"""Where the best start is known: tasks y = w·x + noise with w ~ N(w₀, σ²I).

After a task's steps on its support, φ - w = M (θ - w) + what the noise moves, with M a function of the support's
inputs alone. So the expected query loss is σ² E[tr M²] + (θ - w₀)ᵀ E[M²] (θ - w₀) + a part of the noise that θ doesn't
change: of all starts w₀ is the best, by

    gradient steps      M = (I - 2α A)ᵏ          A = Xᵀ X / S
    the regularised     M = λ (2A + λ I)⁻¹
"""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from metatrain.meta.anil import ANIL
from metatrain.meta.boil import BOIL
from metatrain.meta.episode import Episodes, Examples
from metatrain.meta.fomaml import FOMAML
from metatrain.meta.imaml import IMAML
from metatrain.meta.learner import MetaLearner
from metatrain.meta.maml import MAML
from metatrain.meta.meta_sgd import MetaSGD
from metatrain.meta.reptile import Reptile

BEST = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
WIDTH, DEVIATION, NOISE, SUPPORT, QUERY = 3, 0.5, 0.3, 8, 8
RATE, STEPS, STRENGTH = 0.1, 2, 1.0


class Plane(nn.Module):
    """score = scale (weight · x). The scale is fixed but where it is the head."""

    head_parameters = ("weight",)

    def __init__(self, head: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([-2.0, 2.0, 3.0], dtype=torch.float64))
        self.scale = nn.Parameter(torch.tensor(0.8 if head else 1.0, dtype=torch.float64), requires_grad=head)
        if head:
            self.head_parameters = ("scale",)

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * (x @ self.weight)


def tasks(count: int, seed: int) -> Episodes:
    """Such tasks."""
    draw = torch.Generator().manual_seed(seed)
    w = BEST + DEVIATION * torch.randn(count, WIDTH, generator=draw, dtype=torch.float64)

    def side(events: int) -> Examples:
        x = torch.randn(count, events, WIDTH, generator=draw, dtype=torch.float64)
        noise = NOISE * torch.randn(count, events, generator=draw, dtype=torch.float64)
        return Examples(x, {}, torch.einsum("tef,tf->te", x, w) + noise, torch.ones(count, events).double())

    return Episodes(side(SUPPORT), side(QUERY), {})


def trained(meta: MetaLearner, episodes: Episodes, steps: int = 100) -> Tensor:
    """The start that the outer loop comes to, [F]."""
    learner = list(meta.learner.parameters())
    others = [p for p in meta.parameters() if all(p is not own for own in learner)]
    optimizer = torch.optim.Adam([{"params": learner, "lr": 0.4}, {"params": others, "lr": 0.01}])
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        (meta(episodes).total / episodes.size).backward()
        optimizer.step()
        schedule.step()
    return (meta.learner.scale * meta.learner.weight).detach()


WEIGHT = {"adapt": ("weight",)}
METHODS: dict[str, Callable[[], MetaLearner]] = {
    "maml": lambda: MAML(Plane(), steps=STEPS, rate=RATE, **WEIGHT),
    "fomaml": lambda: FOMAML(Plane(), steps=STEPS, rate=RATE, **WEIGHT),
    "anil": lambda: ANIL(Plane(), steps=STEPS, rate=RATE),
    "boil": lambda: BOIL(Plane(head=True), steps=STEPS, rate=RATE),
    "meta_sgd": lambda: MetaSGD(Plane(), steps=STEPS, rate=RATE, **WEIGHT),
    "imaml": lambda: IMAML(Plane(), steps=8, rate=0.15, strength=STRENGTH, cg_steps=WIDTH, **WEIGHT),
    "reptile on all": lambda: Reptile(Plane(), steps=STEPS, rate=RATE, **WEIGHT),
    "reptile on support": lambda: Reptile(Plane(), steps=STEPS, rate=RATE, sees="support", **WEIGHT),
}


@pytest.mark.parametrize("name", METHODS)
def test_the_outer_loop_finds_the_best_start(name: str):
    """From more than 4 away to within 0.16 of w₀: four times σ √(3 / 500), the distance of the mean w of 500 tasks."""
    episodes = tasks(500, seed=0)
    meta = METHODS[name]().double()
    assert (meta.learner.scale * meta.learner.weight - BEST).norm() > 4
    assert (trained(meta, episodes) - BEST).norm() < 0.16


def expected_loss(squares: Tensor, moved: Tensor, start: Tensor) -> Tensor:
    """The mean over w and noise of the query loss, for supports whose M is [T, F, F] and that turn their labels' noise
    into `moved` [T, F, S] of it."""
    away = start - BEST
    by_task = DEVIATION**2 * squares.square().sum((1, 2)) + (squares @ away).square().sum(1)
    return (by_task + NOISE**2 * moved.square().sum((1, 2)) + NOISE**2).mean()


@pytest.mark.parametrize("at", ["the best start", "elsewhere"])
@pytest.mark.parametrize("name", ["maml", "fomaml", "imaml", "reptile on all"])
def test_the_loss_after_adaptation_is_the_one_in_closed_form(name: str, at: str):
    """Within 4 standard errors of 4000 tasks, which are at most 0.1 of it."""
    episodes = tasks(4000, seed=1)
    x, one = episodes.support.x, torch.eye(WIDTH).double()
    gram = x.transpose(1, 2) @ x / SUPPORT
    if name == "imaml":
        solver = torch.linalg.inv(2 * gram + STRENGTH * one)
        left, moved = STRENGTH * solver, 2 / SUPPORT * solver @ x.transpose(1, 2)
    else:
        step = one - 2 * RATE * gram
        left, moved = step @ step, 2 * RATE / SUPPORT * (one + step) @ x.transpose(1, 2)
    meta = METHODS[name]().double()
    if name == "imaml":
        meta.steps = 100  # solved
    with torch.no_grad():
        if at == "the best start":
            meta.learner.weight.copy_(BEST)
        found = meta(episodes).after
    error = found.std() / len(found) ** 0.5
    expected = expected_loss(left, moved, meta.learner.weight.detach())
    assert 4 * error < 0.1 * expected
    assert abs(found.mean() - expected) < 4 * error
