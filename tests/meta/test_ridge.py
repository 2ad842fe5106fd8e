"""The ridge head against numpy's least squares, one task at a time; and what it promises as a meta-learner."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from contract import LAYOUT, assert_close, check_contract, made_up, meta_gradient, one_task

from metatrain.meta.ridge import Ridge, ridge
from metatrain.model.learners.factorisation import Factorisation
from metatrain.model.learners.mlp import MLP


def factorisation() -> Factorisation:
    torch.manual_seed(1)
    learner = Factorisation(LAYOUT.width, layout=LAYOUT, hidden=(7,), activation="tanh", offset=3.5).double()
    torch.nn.init.normal_(learner.taste, std=0.1)
    return learner


def by_hand(meta: Ridge, x: torch.Tensor, y: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Scores of one task's query: equation 4 as it stands, never that of the smaller dimension."""
    learner = meta.learner
    strengths = torch.cat([meta.log_strength.exp().expand(learner.represented), meta.log_bias_strength.exp()[None]])

    def regressors(of: torch.Tensor) -> torch.Tensor:
        return torch.cat([learner.represent(of), torch.ones(len(of), 1, dtype=of.dtype)], 1)

    a = regressors(x)
    around = torch.zeros_like(strengths)
    if meta.rated is not None:
        mean = learner.represent(x).sum(0) / (len(x) + 3)
        around = meta.rated.weight @ mean / strengths.sqrt()
    w = around + torch.linalg.inv(a.T @ a + torch.diag(strengths)) @ a.T @ (y - learner(x) - a @ around)
    return learner(query) + regressors(query) @ w


def around_what_was_rated(**settings: object) -> Ridge:
    torch.manual_seed(2)
    meta = Ridge(factorisation(), rated=True, **settings)
    assert meta.rated is not None
    torch.nn.init.normal_(meta.rated.weight, std=0.3)  # zero at the start, and then nothing moves
    return meta


@pytest.mark.parametrize("support", [3, 20], ids=["fewer events than regressors", "more"])
@pytest.mark.parametrize(("loss", "rated"), [("squared", False), ("huber", False), ("squared", True)])
def test_meta_gradient_is_that_of_a_loop_over_tasks(support: int, loss: str, rated: bool):
    settings = {"loss": loss, "strength": 0.7, "bias_strength": 0.3}
    meta = (around_what_was_rated(**settings) if rated else Ridge(factorisation(), **settings)).double()
    episodes = made_up(support=support)
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
    single = Ridge(factorisation(), loss=loss, rated=rated).float()
    single.load_state_dict(meta.state_dict())
    assert_close(meta_gradient(single, single(made_up(support=support, dtype=torch.float32)).total), expected)


@pytest.mark.parametrize(("events", "width"), [(1, 5), (4, 5), (5, 5), (40, 5)])
def test_a_ridge_is_least_squares_of_the_augmented_system(events: int, width: int):
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(3, events, width)), draw.normal(size=(3, events))
    found = ridge(torch.from_numpy(x), torch.from_numpy(y)).numpy()
    for task in range(3):
        whole = np.vstack([x[task], np.eye(width)]), np.concatenate([y[task], np.zeros(width)])
        np.testing.assert_allclose(found[task], np.linalg.lstsq(*whole, rcond=None)[0], rtol=1e-9, atol=1e-12)


def test_contract():
    check_contract(lambda: Ridge(factorisation()))
    check_contract(around_what_was_rated)
    check_contract(lambda: Ridge(MLP(LAYOUT.width, (6,), "tanh", offset=3.0)))


def test_linear_tasks_are_learned_as_bayes_would():
    """Labels are linear in the items' vectors with normal weights: no predictor beats the posterior mean, which ridge
    is where λ is noise over prior variance. Gradient steps on λ alone must find it."""
    width, noise, prior, tasks = 4, 0.5, 2.0, 4000
    learner = torch.nn.Identity()
    learner.represented = width
    learner.represent = lambda x: x
    learner.score = lambda h, x: torch.zeros_like(x[..., 0])
    meta = Ridge(learner, strength=5.0, bias_strength=1e6).double()
    meta.log_bias_strength.requires_grad_(False)
    generator = torch.Generator().manual_seed(0)
    w = prior**0.5 * torch.randn(tasks, width, 1, generator=generator, dtype=torch.float64)
    x = torch.randn(tasks, 30, width, generator=generator, dtype=torch.float64)
    y = (x @ w).squeeze(-1) + noise**0.5 * torch.randn(tasks, 30, generator=generator, dtype=torch.float64)
    from metatrain.meta.episode import Episodes, Examples

    ones = torch.ones(tasks, 30, dtype=torch.float64)
    support, query = (Examples(x[:, p], {}, y[:, p], ones[:, p]) for p in (slice(0, 6), slice(6, 30)))
    optimizer = torch.optim.Adam([meta.log_strength], lr=0.1)
    for _ in range(80):
        optimizer.zero_grad()
        (meta(Episodes(support, query, {})).total / tasks).backward()
        optimizer.step()
    assert float(meta.log_strength.detach().exp()) == pytest.approx(noise / prior, rel=0.1)


def test_refusals():
    with pytest.raises(ValueError, match="scores are logits"):
        Ridge(factorisation(), loss="binary_cross_entropy")
    with pytest.raises(ValueError, match="no `represent`"):
        Ridge(torch.nn.Linear(3, 1))
    with pytest.raises(ValueError, match="strength must be above 0"):
        Ridge(factorisation(), strength=0)
