"""The logistic head against Newton steps in the full dimension, one task at a time; its optimum; and Bayes."""

from __future__ import annotations

import math

import pytest
import torch
from contract import LAYOUT, assert_close, check_contract, made_up, meta_gradient, one_task

from metatrain.meta import newton
from metatrain.meta.episode import Episodes, Examples
from metatrain.meta.logistic import Logistic
from metatrain.model.learners.factorisation import Factorisation
from metatrain.model.learners.mlp import MLP


def factorisation() -> Factorisation:
    torch.manual_seed(1)
    learner = Factorisation(LAYOUT.width, layout=LAYOUT, hidden=(7,), activation="tanh", offset=-0.5).double()
    torch.nn.init.normal_(learner.taste, std=0.1)
    return learner


def by_hand(meta: Logistic, x: torch.Tensor, y: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Logits of one task's query: Newton's steps as they are written in books, on all K weights, halved by Armijo."""
    learner = meta.learner
    strengths = torch.cat([meta.log_strength.exp().expand(learner.represented), meta.log_bias_strength.exp()[None]])

    def regressors(of: torch.Tensor) -> torch.Tensor:
        return torch.cat([learner.represent(of), torch.ones(len(of), 1, dtype=of.dtype)], 1)

    around = torch.zeros_like(strengths)
    if meta.rated is not None:
        mean = learner.represent(x).sum(0) / (len(x) + 3)
        around = meta.rated.weight @ mean / strengths.sqrt()
    a = regressors(x)
    offset = learner(x) + a @ around

    def objective(w: torch.Tensor) -> float:
        logits = offset + a @ w
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, y, reduction="sum")
        return float((losses + 0.5 * (strengths * w.square()).sum()).detach())

    w = torch.zeros_like(strengths)
    for _ in range(meta.newton_steps):
        p = torch.sigmoid(offset + a @ w)
        gradient = a.T @ (p - y) + strengths * w
        hessian = a.T @ torch.diag(p * (1 - p)) @ a + torch.diag(strengths)
        d = -torch.linalg.inv(hessian) @ gradient
        t, slope = 1.0, float((gradient * d).sum().detach())
        while objective(w + t * d) > objective(w) + 1e-4 * t * slope + 1e-12:
            t /= 2
        w = w + t * d
    return learner(query) + regressors(query) @ (around + w)


def around_what_was_clicked(**settings: object) -> Logistic:
    """Whose map of what was clicked or shown is one."""
    meta = Logistic(factorisation(), rated=True, **settings)
    assert meta.rated is not None
    torch.nn.init.normal_(meta.rated.weight, std=0.3)  # zero at the start, and then nothing moves
    return meta


@pytest.mark.parametrize("support", [3, 20], ids=["fewer events than regressors", "more"])
@pytest.mark.parametrize(("steps", "rated"), [(1, False), (5, False), (5, True)])
def test_meta_gradient_is_that_of_a_loop_over_tasks(support: int, steps: int, rated: bool):
    settings = {"strength": 0.7, "bias_strength": 0.3, "newton_steps": steps}
    meta = (around_what_was_clicked(**settings) if rated else Logistic(factorisation(), **settings)).double()
    episodes = made_up(support=support, click=True)
    losses = []
    for task in range(episodes.size):
        alone = one_task(episodes, task)
        events = int(episodes.support.mask[task].sum())
        scores = by_hand(meta, alone.support.x[0, :events], alone.support.labels[0, :events], alone.query.x[0])
        losses.append(meta.event_loss(scores, alone.query.labels[0]).mean())
    found = meta(episodes)
    torch.testing.assert_close(found.after, torch.stack(losses).detach())
    expected = meta_gradient(meta, torch.stack(losses).sum())
    assert_close(meta_gradient(meta, found.total), expected)
    # In float32, where training runs.
    single = Logistic(factorisation(), rated=rated, **settings).float()
    single.load_state_dict(meta.state_dict())
    narrow = single(made_up(support=support, click=True, dtype=torch.float32))
    assert_close(meta_gradient(single, narrow.total), expected)


def hard(events: int, width: int) -> tuple[torch.Tensor, ...]:
    """Tasks with large regressors and offsets of up to 12 that the labels contradict: x, labels, mask, offset."""
    generator = torch.Generator().manual_seed(0)
    x = 5 * torch.randn(6, events, width, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 2, (6, events), generator=generator).double()
    mask = (torch.arange(events) < torch.tensor([[0], [1], [2], [events], [events], [events]])).double()
    offset = 12 * (2 * torch.rand(6, events, generator=generator, dtype=torch.float64) - 1)
    return x, labels, mask, offset


@pytest.mark.parametrize(("events", "width"), [(5, 9), (9, 9), (30, 4)])
def test_steps_reach_the_optimum_where_undamped_ones_do_not(events: int, width: int):
    """The objective's curvature is at least 1, so a gradient of 1e-9 is a distance of at most 1e-9."""
    x, labels, mask, offset = hard(events, width)
    found = newton.weights(x, labels, mask, offset, 40)

    def gradient(w: torch.Tensor) -> torch.Tensor:
        w = w.detach().requires_grad_()
        logits = offset + torch.einsum("tsk,tk->ts", x, w)
        losses = torch.nn.functional.binary_cross_entropy_with_logits(logits, labels, reduction="none")
        return torch.autograd.grad((losses * mask).sum() + 0.5 * w.square().sum(), w)[0]

    assert gradient(found).norm(dim=-1).max() < 1e-9
    single = newton.weights(*(t.float() for t in (x, labels, mask, offset)), 40)
    assert gradient(single.double()).norm(dim=-1).max() < 1e-3
    # That the tasks are hard: of undamped steps one at least doesn't arrive.
    w = torch.zeros_like(found)
    for _ in range(40):
        p = torch.sigmoid(offset + torch.einsum("tsk,tk->ts", x, w))
        hessian = torch.einsum("tsk,ts,tsj->tkj", x, p * (1 - p) * mask, x) + torch.eye(width, dtype=x.dtype)
        w = w - torch.linalg.solve(hessian, gradient(w).unsqueeze(-1)).squeeze(-1)
    assert gradient(w).norm(dim=-1).max() > 0.1


@pytest.mark.parametrize(("events", "width"), [(4, 5), (6, 3)])
def test_gradient_through_damped_steps_is_that_of_finite_differences(events: int, width: int):
    x, labels, mask, offset = hard(events, width)
    mask = mask[1:4].clone()
    inputs = tuple(t[1:4].clone().requires_grad_() for t in (x, labels, offset))
    assert torch.autograd.gradcheck(lambda x, labels, offset: newton.weights(x, labels, mask, offset, 3), inputs)


def test_contract():
    check_contract(lambda: Logistic(factorisation()), click=True)
    check_contract(around_what_was_clicked, click=True)
    check_contract(lambda: Logistic(MLP(LAYOUT.width, (6,), "tanh", offset=0.3)), click=True)


def test_logistic_tasks_are_learned_nearly_as_bayes_would():
    """Clicks are drawn from logistic models with normal weights in the plane, of known variance: no predictor beats the
    posterior predictive, which a grid over the plane gives. The most probable weights come within 1% of its loss, for a
    λ somewhat above 1 / variance: one point of the posterior is surer than all of it."""
    prior, tasks, events = 4.0, 600, 20
    learner = torch.nn.Identity()
    learner.represented = 2
    learner.represent = lambda x: x
    learner.score = lambda h, x: torch.zeros_like(x[..., 0])
    meta = Logistic(learner, strength=1.0, bias_strength=1e6).double()
    meta.log_bias_strength.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    w = prior**0.5 * torch.randn(tasks, 2, 1, generator=generator, dtype=torch.float64)
    x = torch.randn(tasks, events, 2, generator=generator, dtype=torch.float64)
    y = torch.bernoulli(torch.sigmoid((x @ w).squeeze(-1)), generator=generator)
    ones = torch.ones(tasks, events, dtype=torch.float64)
    support, query = (Examples(x[:, p], {}, y[:, p], ones[:, p]) for p in (slice(0, 8), slice(8, events)))
    optimizer = torch.optim.LBFGS([meta.log_strength], max_iter=6, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        mean = meta(Episodes(support, query, {})).total / tasks
        mean.backward()
        return mean

    optimizer.step(loss)
    after = float(loss().detach())
    axis = torch.linspace(-8, 8, 33, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    log_prior = -0.5 * grid.square().sum(-1) / prior
    logits = support.x @ grid.T
    log_posterior = log_prior - torch.nn.functional.softplus(-(2 * support.labels - 1).unsqueeze(-1) * logits).sum(1)
    posterior = torch.softmax(log_posterior, -1)
    p = (torch.sigmoid(query.x @ grid.T) @ posterior.unsqueeze(-1)).squeeze(-1)
    best = float(torch.nn.functional.binary_cross_entropy(p, query.labels))
    assert 0.999 * best < after < 1.01 * best
    assert best < 0.8 * math.log(2)
    assert 1 / prior < float(meta.log_strength.detach().exp()) < 2 / prior


def test_refusals():
    with pytest.raises(ValueError, match="use binary_cross_entropy"):
        Logistic(factorisation(), loss="squared")
    with pytest.raises(ValueError, match="no `represent`"):
        Logistic(torch.nn.Linear(3, 1))
    with pytest.raises(ValueError, match="bias_strength must be above 0, got -1"):
        Logistic(factorisation(), bias_strength=-1)
    with pytest.raises(ValueError, match="newton_steps must be at least 1, got 0"):
        Logistic(factorisation(), newton_steps=0)
