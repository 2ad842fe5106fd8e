"""Attention over the support against the paper's sum, one task and one event at a time; and what it learns."""

from __future__ import annotations

import pytest
import torch
from contract import LAYOUT, assert_close, check_contract, made_up, meta_gradient, one_task

from metatrain.meta.episode import Episodes, Examples
from metatrain.meta.matching import Matching
from metatrain.model.learners.factorisation import Factorisation
from metatrain.model.learners.mlp import MLP


def factorisation() -> Factorisation:
    torch.manual_seed(1)
    learner = Factorisation(LAYOUT.width, layout=LAYOUT, hidden=(7,), activation="tanh", offset=0.4).double()
    torch.nn.init.normal_(learner.taste, std=0.1)
    return learner


def by_hand(meta: Matching, x: torch.Tensor, y: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Scores of one task's query, event by event."""
    learner = meta.learner
    scores = []
    for event in query:
        q = learner.represent(event)
        weights, errors = [meta.log_nothing_known.exp()], [torch.zeros((), dtype=x.dtype)]
        for one, label in zip(x, y, strict=True):
            s = learner.represent(one)
            weights.append(torch.exp((q @ s) / (q.norm() * s.norm()) / meta.log_temperature.exp()))
            known = learner(one) if meta.log_gain is None else torch.sigmoid(learner(one))
            errors.append(label - known)
        found = (torch.stack(weights) * torch.stack(errors)).sum() / torch.stack(weights).sum()
        scores.append(learner(event) + found * (1.0 if meta.log_gain is None else meta.log_gain.exp()))
    return torch.stack(scores)


@pytest.mark.parametrize("loss", ["squared", "huber", "binary_cross_entropy"])
def test_meta_gradient_is_that_of_a_loop_over_tasks(loss: str, monkeypatch: pytest.MonkeyPatch):
    # The reference has the cosine without what keeps a representation of zeros finite.
    monkeypatch.setattr("metatrain.meta.matching._LEAST_SQUARE", 1e-12)
    click = loss == "binary_cross_entropy"
    meta = Matching(factorisation(), loss=loss, temperature=0.5, nothing_known=1.5).double()
    episodes = made_up(click=click)
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
    single = Matching(factorisation(), loss=loss).float()
    single.load_state_dict(meta.state_dict())
    assert_close(meta_gradient(single, single(made_up(click=click, dtype=torch.float32)).total), expected)


@pytest.mark.parametrize("click", [False, True])
def test_contract(click: bool):
    loss = "binary_cross_entropy" if click else "squared"
    check_contract(lambda: Matching(factorisation(), loss=loss), click=click)
    check_contract(lambda: Matching(MLP(LAYOUT.width, (6,), "tanh", offset=0.3), loss=loss), click=click)


def test_a_representation_of_zeros_is_like_none_and_has_a_finite_gradient():
    meta = Matching(factorisation()).double()
    h = torch.zeros(1, 2, 8, dtype=torch.float64, requires_grad=True)
    meta._learner.represent = lambda x: h  # type: ignore[method-assign]
    episodes = made_up(1, 2, 2, least_support=2)
    found = meta(episodes)
    (gradient,) = torch.autograd.grad(found.total, h)
    assert torch.isfinite(gradient).all()
    with torch.no_grad():
        fast = meta.adapt(episodes.support, {})
        base = meta.learner.score(h, episodes.query.x)
        expected = base + (fast.weights["error"].sum(-1) / (2 + meta.log_nothing_known.exp())).unsqueeze(-1)
        torch.testing.assert_close(meta.predict(fast, episodes.query), expected)


def test_kinds_of_items_are_learned_as_bayes_would():
    """Items are of three kinds, whose representations are orthogonal; of each kind a task has a level of its own,
    normal with known variance, and labels are noisy levels. No predictor beats the posterior mean: the sum of errors of
    the query's kind over (their number + noise / prior). Attention is that where the temperature is low and "nothing
    known" weighs noise / prior events of the same kind: the meta-gradient must lead there."""
    noise, prior, tasks = 0.5, 0.4, 2000
    learner = torch.nn.Identity()
    learner.represented = 3
    learner.represent = lambda x: x
    learner.score = lambda h, x: torch.zeros_like(x[..., 0])
    meta = Matching(learner).double()
    generator = torch.Generator().manual_seed(0)
    level = prior**0.5 * torch.randn(tasks, 3, generator=generator, dtype=torch.float64)
    kind = torch.randint(0, 3, (tasks, 16), generator=generator)
    y = level.gather(1, kind) + noise**0.5 * torch.randn(tasks, 16, generator=generator, dtype=torch.float64)
    x, ones = torch.nn.functional.one_hot(kind, 3).double(), torch.ones(tasks, 16, dtype=torch.float64)
    support, query = (Examples(x[:, p], {}, y[:, p], ones[:, p]) for p in (slice(0, 6), slice(6, 16)))
    optimizer = torch.optim.LBFGS(meta.parameters(), max_iter=30, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        mean = meta(Episodes(support, query, {})).total / tasks
        mean.backward()
        return mean

    optimizer.step(loss)
    found = meta(Episodes(support, query, {}))
    sums, counts = torch.einsum("ts,tsk->tk", support.labels, support.x), support.x.sum(1)
    posterior_mean = torch.einsum("tk,tek->te", sums / (counts + noise / prior), query.x)
    best = float((posterior_mean - query.labels).square().mean())
    after = float(found.after.mean())
    assert 0.999 * best < after < 1.005 * best
    assert after < 0.9 * float(found.before.mean())
    a_known_event = torch.exp(torch.exp(-meta.log_temperature.detach()))
    assert float(meta.log_nothing_known.detach().exp() / a_known_event) == pytest.approx(noise / prior, rel=0.15)


def test_refusals():
    with pytest.raises(ValueError, match="no `represent`"):
        Matching(torch.nn.Linear(3, 1))
    with pytest.raises(ValueError, match="temperature must be above 0, got 0"):
        Matching(factorisation(), temperature=0)
    with pytest.raises(ValueError, match="nothing_known must be above 0, got -2"):
        Matching(factorisation(), nothing_known=-2)
