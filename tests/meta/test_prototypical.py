"""Prototypes against the paper's distances, one task and one event at a time; and against Bayes."""

from __future__ import annotations

import pytest
import torch
from contract import LAYOUT, assert_close, check_contract, made_up, meta_gradient, one_task

from metatrain.meta.episode import Episodes, Examples
from metatrain.meta.prototypical import Prototypical
from metatrain.model.learners.factorisation import Factorisation
from metatrain.model.learners.mlp import MLP


def factorisation() -> Factorisation:
    torch.manual_seed(1)
    learner = Factorisation(LAYOUT.width, layout=LAYOUT, hidden=(7,), activation="tanh", offset=0.4).double()
    torch.nn.init.normal_(learner.taste, std=0.1)
    return learner


def made(learner: torch.nn.Module, **settings: object) -> Prototypical:
    """With shared prototypes that are not 0, as they are after a step."""
    meta = Prototypical(learner, **settings)
    torch.manual_seed(2)
    torch.nn.init.normal_(meta.shared, std=0.3)
    with torch.no_grad():
        meta.log_prior_events.add_(torch.tensor([0.2, -0.4]))
    return meta


def by_hand(meta: Prototypical, x: torch.Tensor, y: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """Scores of one task's query, by squared distances to each prototype."""
    learner, shrinkage = meta.learner, meta.log_shrinkage.exp()
    distances, counts = [], []
    for shared, of_kind in zip(meta.shared, (y >= meta.relevant_from, y < meta.relevant_from), strict=True):
        events = [learner.represent(event) for event in x[of_kind]]
        prototype = (sum(events) + shrinkage * shared) / (len(events) + shrinkage)
        distances.append(torch.stack([(learner.represent(q) - prototype).square().mean() for q in query]))
        counts.append(len(events))
    alpha = meta.log_prior_events.exp()
    odds = meta.level * torch.log((counts[0] + alpha[0]) / (counts[1] + alpha[1]))
    return learner(query) + meta.log_scale.exp() * (distances[1] - distances[0]) + odds


@pytest.mark.parametrize("loss", ["squared", "huber", "binary_cross_entropy"])
def test_meta_gradient_is_that_of_a_loop_over_tasks(loss: str):
    click = loss == "binary_cross_entropy"
    settings = {"loss": loss, "relevant_from": 0.5 if click else 3.3, "scale": 0.7, "shrinkage": 1.5, "level": 0.8}
    meta = made(factorisation(), **settings).double()
    episodes = made_up(click=click)
    losses, kinds = [], set()
    for task in range(episodes.size):
        alone = one_task(episodes, task)
        events = int(episodes.support.mask[task].sum())
        labels = alone.support.labels[0, :events]
        kinds.add((bool((labels >= meta.relevant_from).any()), bool((labels < meta.relevant_from).any())))
        scores = by_hand(meta, alone.support.x[0, :events], labels, alone.query.x[0])
        losses.append(meta.event_loss(scores, alone.query.labels[0]).mean())
    # Among the tasks are some without support, and with events of both kinds.
    assert {(False, False), (True, True)} <= kinds
    found = meta(episodes)
    torch.testing.assert_close(found.after, torch.stack(losses).detach())
    expected = meta_gradient(meta, torch.stack(losses).sum())
    assert_close(meta_gradient(meta, found.total), expected)
    # In float32, where training runs.
    single = Prototypical(factorisation(), **settings).float()
    single.load_state_dict(meta.state_dict())
    assert_close(meta_gradient(single, single(made_up(click=click, dtype=torch.float32)).total), expected)


@pytest.mark.parametrize("liked", [0.0, 1.0])
def test_a_task_with_one_kind_of_events_alone(liked: float):
    meta, episodes = made(factorisation(), loss="binary_cross_entropy").double(), made_up(1, 4, 3, least_support=4)
    support = Examples(episodes.support.x, {}, torch.full_like(episodes.support.labels, liked), episodes.support.mask)
    scores = meta.predict(meta.adapt(support, {}), episodes.query)
    torch.testing.assert_close(scores[0], by_hand(meta, support.x[0], support.labels[0], episodes.query.x[0]))
    prior = meta.predict(meta.unadapted(support, {}), episodes.query)
    torch.testing.assert_close(prior[0], by_hand(meta, support.x[0, :0], support.labels[0, :0], episodes.query.x[0]))


@pytest.mark.parametrize("click", [False, True])
def test_contract(click: bool):
    settings = {"loss": "binary_cross_entropy"} if click else {"relevant_from": 3.0}
    check_contract(lambda: made(factorisation(), **settings), click=click)
    check_contract(lambda: made(MLP(LAYOUT.width, (6,), "tanh", offset=0.3), **settings), click=click)


def bare(width: int) -> torch.nn.Module:
    """A base learner that represents an event by its inputs, and knows nothing."""
    learner = torch.nn.Identity()
    learner.represented = width
    learner.represent = lambda x: x
    learner.score = lambda h, x: torch.zeros_like(x[..., 0])
    return learner


def trained(meta: Prototypical, episodes: Episodes) -> float:
    """The mean loss where the meta-gradient of all parameters has led."""
    optimizer = torch.optim.LBFGS(meta.parameters(), max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> torch.Tensor:
        optimizer.zero_grad()
        mean = meta(episodes).total / episodes.size
        mean.backward()
        return mean

    optimizer.step(loss)
    return float(loss().detach())


def test_gaussian_clusters_are_told_apart_as_bayes_would():
    """A task is two normal clusters whose centres are normal around shared ones; all variances are known, and the
    support has as many events of each. No predictor beats Bayes' rule with each cluster's posterior predictive, which
    has the shrunk prototype as its mean: gradient steps must find shrinkage σ²/τ² and scale H / 2(σ² + v)."""
    width, sigma2, tau2, each, tasks = 2, 1.0, 0.5, 3, 2500
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    shared = torch.tensor([[0.8, 0.0], [-0.2, 0.6]], dtype=torch.float64)  # liked, not
    centres = shared + tau2**0.5 * normal(tasks, 2, width)
    labels = torch.cat([torch.tensor([1.0, 0.0]).repeat(each).expand(tasks, -1), (normal(tasks, 14) > 0)], 1).double()
    x = centres.gather(1, (1 - labels).long().unsqueeze(-1).expand(-1, -1, width))
    x = x + sigma2**0.5 * normal(*x.shape)
    ones, cut = torch.ones_like(labels), 2 * each
    support, query = (Examples(x[:, p], {}, labels[:, p], ones[:, p]) for p in (slice(0, cut), slice(cut, None)))
    meta = Prototypical(bare(width), loss="binary_cross_entropy").double()
    after = trained(meta, Episodes(support, query, {}))
    kappa = sigma2 / tau2
    kinds = torch.stack([support.labels, 1 - support.labels], 1)
    means = (kinds @ support.x + kappa * shared) / (each + kappa)
    variance = sigma2 + sigma2 / (each + kappa)
    distances = (query.x.unsqueeze(2) - means.unsqueeze(1)).square().sum(-1)
    best = float(meta.event_loss((distances[..., 1] - distances[..., 0]) / (2 * variance), query.labels).mean())
    assert 0.999 * best < after < 1.005 * best
    assert float(meta.log_shrinkage.detach().exp()) == pytest.approx(kappa, rel=0.2)
    assert float(meta.log_scale.detach().exp()) == pytest.approx(width / (2 * variance), rel=0.1)
    torch.testing.assert_close(meta.shared.detach(), shared, rtol=0, atol=0.15)


def test_rates_of_liking_are_learned_as_bayes_would():
    """A task likes a share of events that is Beta(4, 2), and events say nothing: the posterior's odds are
    (n⁺ + 4) / (n⁻ + 2), which must be found for every number of likes."""
    tasks, generator = 6000, torch.Generator().manual_seed(0)
    draws = -torch.rand(tasks, 6, generator=generator, dtype=torch.float64).log()
    share = draws[:, :4].sum(1) / draws.sum(1)  # of exponential draws: Beta(4, 2)
    labels = torch.bernoulli(share.unsqueeze(1).expand(-1, 16), generator=generator)
    x, ones = torch.zeros(tasks, 16, 2, dtype=torch.float64), torch.ones_like(labels)
    support, query = (Examples(x[:, p], {}, labels[:, p], ones[:, p]) for p in (slice(0, 6), slice(6, 16)))
    meta = Prototypical(bare(2), loss="binary_cross_entropy").double()
    after = trained(meta, Episodes(support, query, {}))
    likes = support.labels.sum(1, keepdim=True)
    best = float(meta.event_loss(((likes + 4) / (6 - likes + 2)).log().expand(-1, 10), query.labels).mean())
    assert 0.999 * best < after < 1.001 * best
    n = torch.arange(7, dtype=torch.float64)
    learned = meta._linear(torch.zeros(7, 2, 2, dtype=torch.float64), torch.stack([n, 6 - n], 1))["bias"].detach()
    torch.testing.assert_close(learned, ((n + 4) / (6 - n + 2)).log(), rtol=0, atol=0.1)


def test_refusals():
    with pytest.raises(ValueError, match="no `represent`"):
        Prototypical(torch.nn.Linear(3, 1))
    for name in ("scale", "shrinkage", "prior_events"):
        with pytest.raises(ValueError, match=f"{name} must be above 0, got 0"):
            Prototypical(factorisation(), **{name: 0})
