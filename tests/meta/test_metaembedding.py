"""Meta-Embedding against plain autograd, one task at a time; what is optimal on a family that is known; promises."""

from __future__ import annotations

import pytest
import torch
from contract import LAYOUT, assert_close, check_contract, made_up, meta_gradient, one_task
from torch import Tensor

from metatrain.meta.episode import Episodes, Examples
from metatrain.meta.layout import Columns, Layout
from metatrain.meta.metaembedding import MetaEmbedding
from metatrain.model.learners.factorisation import Factorisation
from metatrain.model.learners.mlp import MLP


def factorisation(offset: float = 3.5) -> Factorisation:
    torch.manual_seed(1)
    learner = Factorisation(LAYOUT.width, layout=LAYOUT, hidden=(7,), activation="tanh", offset=offset).double()
    torch.nn.init.normal_(learner.taste, std=0.1)
    return learner


def made(learner: torch.nn.Module | None = None, **settings) -> MetaEmbedding:
    """With a generator that already says something."""
    meta = MetaEmbedding(learner or factorisation(), layout=LAYOUT, **{"hidden": (5,), **settings}).double()
    for parameter in meta.generator.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return meta


def by_hand(meta: MetaEmbedding, x: Tensor, y: Tensor, query: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """One task's meta-loss and its query loss after the steps: no mask, no vmap, the embedding in plain sight."""
    learner = meta.learner

    def loss(embedding: Tensor, x: Tensor, y: Tensor) -> Tensor:
        h = learner.represent(x)
        return meta.event_loss(learner(x) + h @ embedding[:-1] + embedding[-1], y).mean()

    features = query[0, LAYOUT.of("task")]
    first, (_, second) = meta.generator[0], (meta.generator[1], meta.generator[2])
    embedding = second.weight @ torch.tanh(first.weight @ features + first.bias) + second.bias
    if not len(x):
        after = loss(embedding, query, labels)
        return after, after
    cold = loss(embedding, x, y)
    for rate in meta.rates:
        (by,) = torch.autograd.grad(loss(embedding, x, y), embedding, create_graph=True)
        embedding = embedding - rate * (by if meta._order == 2 else by.detach())
    after = loss(embedding, query, labels)
    return meta.alpha * cold + (1 - meta.alpha) * after, after


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    ("loss", "steps", "alpha"), [("squared", 1, 0.1), ("huber", 3, 0.5), ("binary_cross_entropy", 2, 0)]
)
def test_meta_gradient_is_that_of_a_loop_over_tasks(order: int, loss: str, steps: int, alpha: float):
    click = loss == "binary_cross_entropy"
    settings = {"loss": loss, "steps": steps, "alpha": alpha, "order": order, "rate": 0.2, "learn_rates": True}
    meta, episodes = made(factorisation(0.0 if click else 3.5), **settings), made_up(click=click)
    totals, losses = [], []
    for task in range(episodes.size):
        alone, events = one_task(episodes, task), int(episodes.support.mask[task].sum())
        support = alone.support.x[0, :events], alone.support.labels[0, :events]
        total, after = by_hand(meta, *support, alone.query.x[0], alone.query.labels[0])
        totals.append(total)
        losses.append(after)
    found = meta(episodes)
    torch.testing.assert_close(found.after, torch.stack(losses).detach())
    torch.testing.assert_close(found.total, torch.stack(totals).sum())
    if order == 2:
        expected = meta_gradient(meta, torch.stack(totals).sum())
        assert_close(meta_gradient(meta, found.total), expected)
        # In float32, where training runs.
        single = made(factorisation(0.0 if click else 3.5), **settings).float()
        single.load_state_dict(meta.state_dict())
        narrow = single(made_up(click=click, dtype=torch.float32))
        assert_close(meta_gradient(single, narrow.total), expected, 3e-5 if click else 1e-5)


def test_first_order_takes_the_inner_gradient_as_a_constant():
    """Of the second order's gradient all is left but what runs through the inner gradients themselves."""
    meta, episodes = made(order=1, rate=0.2, alpha=0.3), made_up(least_support=2)
    totals = []
    for task in range(episodes.size):
        alone = one_task(episodes, task)
        totals.append(
            by_hand(meta, alone.support.x[0], alone.support.labels[0], alone.query.x[0], alone.query.labels[0])[0]
        )
    found = meta_gradient(meta, meta(episodes).total)
    assert_close(found, meta_gradient(meta, torch.stack(totals).sum()))
    second = made(order=2, rate=0.2, alpha=0.3)
    second.load_state_dict(meta.state_dict())
    assert (
        meta_gradient(second, second(episodes).total)["generator.0.weight"] - found["generator.0.weight"]
    ).norm() > 1e-3


def test_contract():
    check_contract(lambda: made(alpha=0))
    check_contract(lambda: made(alpha=0.1, steps=3), own_losses=True)
    check_contract(lambda: made(MLP(LAYOUT.width, (6,), "tanh", offset=3.0), order=1), own_losses=True)
    check_contract(lambda: made(factorisation(0.0), loss="binary_cross_entropy"), click=True, own_losses=True)


def test_a_task_without_support_has_the_embedding_of_its_features():
    meta, query = made(), made_up().query
    nothing = made_up().support
    x = query.x.clone()
    x[..., LAYOUT.of("task")] += 1.0
    meta.learner.user.weight.data.zero_()  # the base learner reads the task's features too
    before, other = (
        meta.predict(meta.unadapted(nothing, {}), Examples(of, {}, query.labels, query.mask)) for of in (query.x, x)
    )
    assert ((before - other) * query.mask).abs().amax(-1).min() > 1e-3


# --- a family of tasks of which the best is known ---------------------------------------------------------------------

H, C, S, TAU2, NOISE2 = 3, 4, 4, 0.3, 0.5
FAMILY = Layout((Columns("genre", "task", 0, C), Columns("item", "item", C, C + H)))


class Known(torch.nn.Module):
    """A base learner that knows nothing but the other side's vectors."""

    represented = H

    def represent(self, x: Tensor) -> Tensor:
        return x[..., C:]

    def score(self, represented: Tensor, x: Tensor) -> Tensor:
        return torch.zeros_like(represented[..., 0])


def family(tasks: int, map_: Tensor, generator: torch.Generator) -> Episodes:
    """Labels w · h + noise, where w = map z + r: of the features z, and a rest of the task's own."""
    z = torch.randn(tasks, 1, C, generator=generator, dtype=torch.float64)
    w = z @ map_.T + TAU2**0.5 * torch.randn(tasks, 1, H, generator=generator, dtype=torch.float64)
    h = torch.randn(tasks, S + 12, H, generator=generator, dtype=torch.float64)
    y = (h * w).sum(-1) + NOISE2**0.5 * torch.randn(tasks, S + 12, generator=generator, dtype=torch.float64)
    x, ones = torch.cat([z.expand(-1, S + 12, -1), h], -1), torch.ones_like(y)
    support, query = (Examples(x[:, p], {}, y[:, p], ones[:, p]) for p in (slice(0, S), slice(S, None)))
    return Episodes(support, query, {})


def test_the_generator_and_the_rate_become_the_best_there_are():
    """The generator must become the map itself, for it is the mean of w given z. Then a step of rate ρ leaves, of
    K = H + 1 regressors of mean 0 and variance 1, E|error|² = H τ² (1 - 4 ρ + 4 ρ² (1 + (H + 2) / S)) + 4 ρ² σ² K / S:
    the best rate is ½ H τ² / (H τ² (1 + (H + 2) / S) + σ² K / S)."""
    generator = torch.Generator().manual_seed(0)
    map_ = 0.5 * torch.randn(H, C, generator=generator, dtype=torch.float64)
    torch.manual_seed(0)
    meta = MetaEmbedding(Known(), layout=FAMILY, hidden=(), rate=0.02, learn_rates=True, alpha=0.1).double()
    episodes = family(2500, map_, generator)
    optimizer = torch.optim.Adam(meta.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 120)
    for _ in range(120):
        optimizer.zero_grad()
        (meta(episodes).total / 2500).backward()
        optimizer.step()
        schedule.step()
    assert (meta.generator[0].weight[:H] - map_).abs().max() < 0.08
    assert meta.generator[0].weight[H].abs().max() < 0.08  # no bias in the family
    spread = H * TAU2
    best = 0.5 * spread / (spread * (1 + (H + 2) / S) + NOISE2 * (H + 1) / S)
    assert float(meta.rates.detach()) == pytest.approx(best, rel=0.1)
    fresh = meta(family(2500, map_, generator))
    left = spread * (1 - 4 * best + 4 * best**2 * (1 + (H + 2) / S)) + 4 * best**2 * NOISE2 * (H + 1) / S
    assert float(fresh.before.mean()) == pytest.approx(NOISE2 + spread, rel=0.05)
    assert float(fresh.after.mean()) == pytest.approx(NOISE2 + left, rel=0.05)


def test_refusals():
    nobody = Layout(tuple(c for c in LAYOUT.features if c.owner != "task"))
    with pytest.raises(ValueError, match=r"none: name features of level task in model\.features"):
        MetaEmbedding(factorisation(), layout=nobody)
    with pytest.raises(ValueError, match="no `represent`"):
        MetaEmbedding(torch.nn.Linear(21, 1), layout=LAYOUT)
    for settings, message in (
        ({"alpha": 1.5}, "alpha weighs two losses.*got 1.5"),
        ({"steps": 0}, "steps must be 1 or more, got 0"),
        ({"rate": 0}, "rate must be above 0, got 0"),
        ({"order": 3}, "order must be 1 or 2, got 3"),
        ({"hidden": (0,)}, "width of 1 or more"),
    ):
        with pytest.raises(ValueError, match=message):
            MetaEmbedding(factorisation(), layout=LAYOUT, **settings)
