"""Attention over the support against a written-out one, a task and an event at a time; what it learns; its contract."""

from __future__ import annotations

import math
import re

import pytest
import torch
from contract import LAYOUT, assert_close, check_contract, made_up, meta_gradient
from torch import Tensor, nn

from metatrain.meta.episode import Episodes, Examples
from metatrain.meta.sequence import SequenceAttention, ages
from metatrain.model.learners.factorisation import Factorisation
from metatrain.model.learners.mlp import MLP


def factorisation() -> Factorisation:
    torch.manual_seed(1)
    learner = Factorisation(LAYOUT.width, layout=LAYOUT, hidden=(7,), activation="tanh", offset=0.5).double()
    nn.init.normal_(learner.taste, std=0.1)
    return learner


def made(**options: object) -> SequenceAttention:
    """With every parameter away from its start, so that none is without effect."""
    meta = SequenceAttention(factorisation(), width=6, heads=3, positions=4, **options).double()
    torch.manual_seed(2)
    for name, parameter in meta.named_parameters():
        if not name.startswith("learner."):
            nn.init.normal_(parameter, mean=float("norms" in name), std=0.5)
    return meta


def by_hand(meta: SequenceAttention, x: Tensor, y: Tensor, query: Tensor) -> Tensor:
    """Scores of one task's query [Q, F], from support [S, F] and [S] in time order: event by event, head by head."""
    learner, p = meta.learner, dict(meta.named_parameters())

    def linear(name: str, v: Tensor) -> Tensor:
        w = p[f"{name}.weight"] @ v
        return w + p[f"{name}.bias"] if f"{name}.bias" in p else w

    def attended(name: str, asking: Tensor, events: list[Tensor]) -> Tensor:
        q = linear(f"{name}.query", asking)
        keys = [p[f"{name}.null"], *(linear(f"{name}.key", z) for z in events)]
        values = [torch.zeros_like(q), *(linear(f"{name}.value", z) for z in events)]
        parts, size = [], len(q) // meta.heads
        for n in range(meta.heads):
            of = slice(n * size, (n + 1) * size)
            likeness = [torch.exp((q[of] * k[of]).sum() / math.sqrt(size)) for k in keys]
            parts.append(sum(w / sum(likeness) * v[of] for w, v in zip(likeness, values, strict=True)))
        return torch.cat(parts)

    def normed(name: str, z: Tensor) -> Tensor:
        z = z - z.mean()
        return z / torch.sqrt((z * z).mean() + 1e-5) * p[f"{name}.weight"] + p[f"{name}.bias"]

    events = []
    for s in range(len(x)):
        score = learner(x[s])
        expected = 1 / (1 + torch.exp(-score)) if meta.loss == "binary_cross_entropy" else score
        h = learner.represent(x[s])
        age = min(len(x) - 1 - s, len(p["position"]) - 1)
        events.append(linear("event", torch.cat([h, (y[s] - expected)[None]])) + p["position"][age])
    for b in range(len(meta.blocks)):
        before = [normed(f"blocks.{b}.norms.0", z) for z in events]
        events = [z + attended(f"blocks.{b}.attention", n, before) for z, n in zip(events, before, strict=True)]
        inner = [linear(f"blocks.{b}.inner", normed(f"blocks.{b}.norms.1", z)).clamp(min=0) for z in events]
        events = [z + linear(f"blocks.{b}.outer", i) for z, i in zip(events, inner, strict=True)]
    scores = []
    for event in query:
        h = learner.represent(event)
        w = linear("weights", attended("attention", h, events))
        scores.append(learner(event) + (w[:-1] * h).sum() + w[-1])
    return torch.stack(scores)


@pytest.mark.parametrize("blocks", [0, 2])
@pytest.mark.parametrize("loss", ["squared", "binary_cross_entropy"])
def test_meta_gradient_is_that_of_a_loop_over_tasks_and_events(blocks: int, loss: str):
    meta, click = made(loss=loss, blocks=blocks), loss == "binary_cross_entropy"
    episodes = made_up(click=click)
    support, query, losses = episodes.support, episodes.query, []
    for task in range(episodes.size):
        s, q = int(support.mask[task].sum()), int(query.mask[task].sum())
        scores = by_hand(meta, support.x[task, :s], support.labels[task, :s], query.x[task, :q])
        losses.append(meta.event_loss(scores, query.labels[task, :q]).mean())
    found = meta(episodes)
    torch.testing.assert_close(found.after, torch.stack(losses).detach())
    expected = meta_gradient(meta, torch.stack(losses).sum())
    assert all(gradient.abs().max() > 0 for gradient in expected.values())
    assert_close(meta_gradient(meta, found.total), expected)
    # In float32, where training runs.
    single = made(loss=loss, blocks=blocks).float()
    single.load_state_dict(meta.state_dict())
    assert_close(meta_gradient(single, single(made_up(click=click, dtype=torch.float32)).total), expected)


def test_contract():
    check_contract(made, ordered=True)
    check_contract(lambda: made(loss="binary_cross_entropy", blocks=0), click=True, ordered=True)
    check_contract(lambda: SequenceAttention(MLP(LAYOUT.width, (6,), "tanh", offset=3.0)), ordered=True)
    # One age for all events, and attention looks both ways: the order says nothing.
    check_contract(lambda: SequenceAttention(factorisation(), positions=1))


def test_a_task_without_support_keeps_the_base_learners_scores():
    meta, query = made(), made_up().query
    fast = meta.unadapted(made_up().support, {})
    torch.testing.assert_close(meta.predict(fast, query), meta.learner(query.x))


def test_ages_count_from_the_newest_event():
    mask = torch.tensor([[1.0, 1, 1, 1, 0], [1, 0, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]])
    expected = torch.tensor([[2, 2, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 0, 0], [2, 2, 2, 1, 0]])
    assert torch.equal(ages(mask, 3), expected)


def test_the_newest_event_is_found_where_it_alone_matters():
    """A click's chance depends on the newest support event alone, which only its age tells from the others."""
    generator = torch.Generator().manual_seed(0)

    class Same(nn.Module):
        represented = 4

        def represent(self, x: Tensor) -> Tensor:
            return x

        def score(self, represented: Tensor, x: Tensor) -> Tensor:
            return torch.zeros_like(x[..., 0])

    def episodes(tasks: int) -> Episodes:
        x, q = (torch.randn(tasks, events, 4, generator=generator).sign() for events in (6, 5))
        lengths = torch.randint(1, 7, (tasks,), generator=generator)
        mask = (torch.arange(6) < lengths[:, None]).float()
        newest = x[torch.arange(tasks), lengths - 1]
        clicked = (q @ newest.unsqueeze(-1)).squeeze(-1).gt(0).float()
        support = Examples(x * mask[..., None], {}, mask, mask)
        return Episodes(support, Examples(q, {}, clicked, torch.ones(tasks, 5)), {})

    def loss_of(positions: int) -> float:
        torch.manual_seed(0)
        meta = SequenceAttention(Same(), loss="binary_cross_entropy", width=16, blocks=0, positions=positions)
        optimizer = torch.optim.Adam(meta.parameters(), lr=0.02)
        for _ in range(60):
            batch = episodes(256)
            optimizer.zero_grad()
            (meta(batch).total / 256).backward()
            optimizer.step()
        return float(meta(episodes(1000)).after.mean())

    assert loss_of(8) < 0.1 < 0.4 < loss_of(1)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"width": 6, "heads": 4}, "width (6) must be a multiple of heads (4)"),
        ({"heads": 0}, "heads must be at least 1, got 0"),
        ({"width": 0}, "width must be at least 1, got 0"),
        ({"blocks": -1}, "blocks must be at least 0, got -1"),
        ({"positions": 0}, "positions must be at least 1, got 0"),
    ],
)
def test_refusals(options: dict, message: str):
    with pytest.raises(ValueError, match=re.escape(message)):
        SequenceAttention(factorisation(), **options)


def test_a_learner_that_does_not_represent_is_refused():
    with pytest.raises(ValueError, match="no `represent`"):
        SequenceAttention(nn.Linear(3, 1))
