"""Meta warm-up against plain tensors, one task at a time; what is optimal on a family that is known; promises."""

from __future__ import annotations

import pytest
import torch
from contract import LAYOUT, assert_close, check_contract, made_up, meta_gradient, one_task
from torch import Tensor

from metatrain.meta.episode import Episodes, Examples
from metatrain.meta.layout import Columns, Layout
from metatrain.meta.mwuf import MWUF
from metatrain.model.learners.factorisation import Factorisation
from metatrain.model.learners.mlp import MLP


def factorisation(offset: float = 3.5) -> Factorisation:
    torch.manual_seed(1)
    learner = Factorisation(LAYOUT.width, layout=LAYOUT, hidden=(7,), activation="tanh", offset=offset).double()
    torch.nn.init.normal_(learner.taste, std=0.1)
    return learner


def made(learner: torch.nn.Module | None = None, **settings) -> MWUF:
    """With networks that already say something."""
    meta = MWUF(learner or factorisation(), layout=LAYOUT, **{"hidden": (5,), **settings}).double()
    for parameter in (*meta.scale.parameters(), *meta.shift.parameters()):
        torch.nn.init.normal_(parameter, std=0.3)
    return meta


def by_hand(meta: MWUF, x: Tensor, y: Tensor, query: Tensor, labels: Tensor) -> Tensor:
    """One task's query loss: no mask, no vmap, the embeddings in plain sight."""
    learner = meta.learner

    def loss(embedding: Tensor, x: Tensor, y: Tensor) -> Tensor:
        h = learner.represent(x)
        return meta.event_loss(learner(x) + h @ embedding[:-1] + embedding[-1], y).mean()

    def two_layers(network: torch.nn.Sequential, of: Tensor) -> Tensor:
        return network[2].weight @ torch.tanh(network[0].weight @ of + network[0].bias) + network[2].bias

    cold = meta.cold
    scale = 1 + two_layers(meta.scale, query[0, LAYOUT.of("task")])
    if not len(x):
        return loss(scale * cold, query, labels)
    for rate in meta.rates:
        (by,) = torch.autograd.grad(loss(cold, x, y), cold, create_graph=True)
        cold = cold - rate * (by if meta._order == 2 else by.detach())
    users = torch.stack([event[LAYOUT.of("item")] for event in x]).mean(0)
    shift = two_layers(meta.shift, users) - two_layers(meta.shift, torch.zeros_like(users))
    return loss(scale * cold + shift, query, labels)


@pytest.mark.parametrize(
    ("loss", "steps", "order"), [("squared", 0, 2), ("squared", 1, 1), ("huber", 3, 2), ("binary_cross_entropy", 2, 2)]
)
def test_meta_gradient_is_that_of_a_loop_over_tasks(loss: str, steps: int, order: int):
    click = loss == "binary_cross_entropy"
    settings = {"loss": loss, "steps": steps, "order": order, "rate": 0.2, "learn_rates": True}
    meta, episodes = made(factorisation(0.0 if click else 3.5), **settings), made_up(click=click)
    losses = []
    for task in range(episodes.size):
        alone, events = one_task(episodes, task), int(episodes.support.mask[task].sum())
        support = alone.support.x[0, :events], alone.support.labels[0, :events]
        losses.append(by_hand(meta, *support, alone.query.x[0], alone.query.labels[0]))
    found = meta(episodes)
    torch.testing.assert_close(found.after, torch.stack(losses).detach())
    expected = meta_gradient(meta, torch.stack(losses).sum())
    assert_close(meta_gradient(meta, found.total), expected)
    # In float32, where training runs.
    single = made(factorisation(0.0 if click else 3.5), **settings).float()
    single.load_state_dict(meta.state_dict())
    assert_close(meta_gradient(single, single(made_up(click=click, dtype=torch.float32)).total), expected)


def test_contract():
    check_contract(made)
    check_contract(lambda: made(steps=3, learn_rates=True))
    check_contract(lambda: made(MLP(LAYOUT.width, (6,), "tanh", offset=3.0), steps=1, order=1))
    check_contract(lambda: made(factorisation(0.0), loss="binary_cross_entropy", steps=1), click=True)


def test_without_steps_labels_say_nothing():
    meta, episodes = made(), made_up(least_support=2)
    support = episodes.support
    other = Examples(support.x, {}, support.labels + 1, support.mask)
    torch.testing.assert_close(meta.adapt(other, {}).weights, meta.adapt(support, {}).weights)
    meta = made(steps=1)
    assert (meta.adapt(other, {}).weights["moved"] - meta.adapt(support, {}).weights["moved"]).abs().max() > 1e-3


# --- a family of tasks of which the best is known ---------------------------------------------------------------------

H, C, S, NOISE2 = 3, 2, 4, 0.2
FAMILY = Layout((Columns("genre", "task", 0, C), Columns("item", "item", C, C + H)))


class Known(torch.nn.Module):
    """A base learner that knows nothing but the other side's vectors."""

    represented = H

    def represent(self, x: Tensor) -> Tensor:
        return x[..., C:]

    def score(self, represented: Tensor, x: Tensor) -> Tensor:
        return torch.zeros_like(represented[..., 0])


def test_scale_and_shift_find_what_made_the_labels():
    """A task's vector is (1 + A z) ⊙ common + B m, of its features z and of m, the mean of its S supporters' vectors.
    Nothing but the noise need be left after adaptation; before it, what B m adds: tr(B Bᵀ) / S."""
    generator = torch.Generator().manual_seed(0)
    tasks = 1500

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    common, a, b = 1 + 0.2 * normal(H), 0.5 * normal(H, C), normal(H, H)

    def family() -> Episodes:
        z, h = normal(tasks, 1, C), normal(tasks, S + 12, H)
        w = (1 + z @ a.T) * common + h[:, :S].mean(1, keepdim=True) @ b.T
        y = (h * w).sum(-1) + NOISE2**0.5 * normal(tasks, S + 12)
        x, ones = torch.cat([z.expand(-1, S + 12, -1), h], -1), torch.ones_like(y)
        support, query = (Examples(x[:, p], {}, y[:, p], ones[:, p]) for p in (slice(0, S), slice(S, None)))
        return Episodes(support, query, {})

    torch.manual_seed(0)
    meta, episodes = MWUF(Known(), layout=FAMILY, hidden=()).double(), family()
    optimizer = torch.optim.Adam(meta.parameters(), lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 150)
    for _ in range(150):
        optimizer.zero_grad()
        (meta(episodes).total / tasks).backward()
        optimizer.step()
        schedule.step()
    fresh = meta(family())
    assert float(fresh.after.mean()) == pytest.approx(NOISE2, rel=0.05)
    torch.testing.assert_close(meta.shift[0].weight.detach()[:H], b, rtol=0, atol=0.05)
    # What scales is known up to how it is dealt between the common vector and the network: their product is known.
    scaled = meta.scale[0].weight.detach()[:H] * meta.cold.detach()[:H, None]
    torch.testing.assert_close(scaled, a * common[:, None], rtol=0, atol=0.05)
    assert float(fresh.before.mean()) == pytest.approx(NOISE2 + float((b**2).sum()) / S, rel=0.15)


def test_refusals():
    for lacking, message in (
        ("task", r"none: name features of level task in model\.features"),
        ("item", r"the model reads none: add `item`"),
    ):
        layout = Layout(tuple(c for c in LAYOUT.features if c.owner != lacking))
        with pytest.raises(ValueError, match=message):
            MWUF(factorisation(), layout=layout)
    with pytest.raises(ValueError, match="no `represent`"):
        MWUF(torch.nn.Linear(21, 1), layout=LAYOUT)
    with pytest.raises(ValueError, match="steps must be 0 or more, got -1"):
        MWUF(factorisation(), layout=LAYOUT, steps=-1)
    with pytest.raises(ValueError, match="width of 1 or more"):
        MWUF(factorisation(), layout=LAYOUT, hidden=(0,))
