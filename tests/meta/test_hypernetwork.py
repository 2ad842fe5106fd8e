"""Hypernetworks against a loop over tasks and events written from their formulas; and families with a known optimum."""

from __future__ import annotations

import pytest
import torch
from contract import LAYOUT, assert_close, check_contract, made_up, meta_gradient, one_task
from torch import Tensor, nn

from metatrain.meta.episode import Episodes, Examples
from metatrain.meta.hypernetwork import Hypernetwork
from metatrain.model.learners.factorisation import Factorisation
from metatrain.model.learners.mlp import MLP

KINDS = ["linear_weights", "nonlinear_biases", "full"]


def hypernetwork(kind: str, loss: str = "squared", **options) -> Hypernetwork:
    torch.manual_seed(1)
    click = loss == "binary_cross_entropy"
    learner = Factorisation(
        LAYOUT.width, layout=LAYOUT, hidden=(7,), activation="tanh", offset=0.0 if click else 3.5
    ).double()
    nn.init.normal_(learner.taste, std=0.1)
    settings = {"relevant_from": 0.5 if click else 4.0, "loss": loss, "kind": kind, "widths": (6, 5), "shrinkage": 1.5}
    meta = Hypernetwork(learner, **{**settings, **options}).double()
    for layer in getattr(meta, "layers", ()):
        # So large that units switch between a task's means and none.
        nn.init.normal_(layer.weight)
    return meta


# --- the formulas, one task and one event at a time ----------------------------------------------------------------


def class_means(meta: Hypernetwork, support: Examples, relevant_from: float, per_class: bool) -> list[Tensor]:
    """R₊ and R₋ of one task."""
    events = int(support.mask.sum())
    found = []
    for positive in (True, False):
        total, count = torch.zeros(meta.learner.represented + 1, dtype=torch.float64), 0
        for i in range(events):
            v = float(support.labels[0, i]) - relevant_from
            if (v >= 0) == positive:
                total = total + abs(v) * with_one(meta.learner.represent(support.x[0, i]))
                count += 1
        found.append(total / ((count if per_class else events) + meta.log_shrinkage.exp()))
    return found


def with_one(h: Tensor) -> Tensor:
    return torch.cat([h, h.new_ones(1)])


def corrections(meta: Hypernetwork, h: Tensor, liked: Tensor, disliked: Tensor) -> Tensor:
    """What one event's score is changed by."""
    if meta.kind == "linear_weights":
        share, of_bias = meta.shares
        w = torch.cat(
            [share[0] * liked[:-1] + share[1] * disliked[:-1], of_bias[0] * liked[-1:] + of_bias[1] * disliked[-1:]]
        )
        return w @ with_one(h)
    both = torch.cat([liked, disliked])
    if meta.kind == "full":

        def made(s: Tensor) -> Tensor:
            for layer in meta.layers:
                s = (layer.weight @ s + layer.bias).clamp(min=0)
            return meta.head.weight @ s

        return (made(both) - made(0 * both)) @ with_one(h)

    def network(s: Tensor) -> Tensor:
        x = h
        for layer, bias in zip(meta.layers, meta.biases, strict=False):
            x = (layer.weight @ x + layer.bias + bias.weight @ s).clamp(min=0)
        return meta.head.weight[0] @ x + meta.biases[-1].weight[0] @ s

    return network(both) - network(0 * both)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("loss", "means"), [("squared", "task"), ("huber", "class"), ("binary_cross_entropy", "class")], ids=str
)
def test_meta_gradient_is_that_of_a_loop_over_tasks_and_events(kind: str, loss: str, means: str):
    meta, click = hypernetwork(kind, loss, means=means), loss == "binary_cross_entropy"
    episodes, losses = made_up(click=click), []
    for task in range(episodes.size):
        alone = one_task(episodes, task)
        both = class_means(meta, alone.support, 0.5 if click else 4.0, means == "class")
        scores = [meta.learner(x) + corrections(meta, meta.learner.represent(x), *both) for x in alone.query.x[0]]
        losses.append(meta.event_loss(torch.stack(scores), alone.query.labels[0]).mean())
    found = meta(episodes)
    torch.testing.assert_close(found.after, torch.stack(losses).detach())
    expected = meta_gradient(meta, torch.stack(losses).sum())
    assert all(gradient.any() for gradient in expected.values())
    assert_close(meta_gradient(meta, found.total), expected)
    # In float32, where training runs.
    single = hypernetwork(kind, loss, means=means).float()
    single.load_state_dict(meta.state_dict())
    assert_close(meta_gradient(single, single(made_up(click=click, dtype=torch.float32)).total), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("means", ["task", "class"])
def test_contract(kind: str, means: str):
    check_contract(lambda: hypernetwork(kind, means=means))
    check_contract(lambda: hypernetwork(kind, "binary_cross_entropy", means=means), click=True)
    check_contract(
        lambda: Hypernetwork(MLP(LAYOUT.width, (6,), "tanh", offset=3.0), relevant_from=3.0, kind=kind, means=means)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_without_support_the_base_learners_score_stands_exactly(kind: str):
    meta, episodes = hypernetwork(kind), made_up()
    nothing = Examples(episodes.support.x, {}, episodes.support.labels, torch.zeros_like(episodes.support.mask))
    expected = meta.scores(episodes.query.x)
    assert torch.equal(meta.predict(meta.adapt(nothing, {}), episodes.query), expected)
    assert torch.equal(meta.predict(meta.unadapted(nothing, {}), episodes.query), expected)


def test_means_over_classes_of_clicks_are_the_papers():
    meta, episodes = hypernetwork("nonlinear_biases", "binary_cross_entropy", means="class"), made_up(click=True)
    meta.log_shrinkage.data.fill_(-80.0)
    found = meta.adapt(episodes.support, {}).weights["means"].unflatten(1, (2, -1))
    for task in range(episodes.size):
        events = int(episodes.support.mask[task].sum())
        h, y = meta.learner.represent(episodes.support.x[task, :events]), episodes.support.labels[task, :events]
        for of_class, label in enumerate((1, 0)):
            expected = h[y == label].mean(0) / 2 if (y == label).any() else torch.zeros(meta.learner.represented)
            torch.testing.assert_close(found[task, of_class, :-1], expected.double())


# --- families of tasks with a known optimum ------------------------------------------------------------------------


class Plain(nn.Module):
    """Represents an event by its input and scores everything 0: what is learned is the method's alone."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.represented = width

    def represent(self, x: Tensor) -> Tensor:
        return x

    def score(self, represented: Tensor, x: Tensor) -> Tensor:
        return torch.zeros_like(x[..., 0])

    def forward(self, x: Tensor) -> Tensor:
        return self.score(x, x)


def two_classes(tasks: int, seed: int, width: int, spread: float) -> Episodes:
    """Clicks: x ~ N(±μ, 1) with a direction μ ~ N(0, spread) a task. Support of 1 to 12 events, query of 20."""
    draw = torch.Generator().manual_seed(seed)
    mu = spread**0.5 * torch.randn(tasks, 1, width, generator=draw)

    def side(events: int, mask: Tensor) -> Examples:
        labels = torch.randint(0, 2, (tasks, events), generator=draw).float()
        x = (2 * labels - 1).unsqueeze(-1) * mu + torch.randn(tasks, events, width, generator=draw)
        return Examples(x, {}, labels, mask)

    lengths = torch.randint(1, 13, (tasks, 1), generator=draw)
    return Episodes(side(12, (torch.arange(12) < lengths).float()), side(20, torch.ones(tasks, 20)), {})


def bayes_logits(episodes: Episodes, spread: float) -> Tensor:
    """Log odds of a query event's class after the support, μ integrated out: 2 x·Σ yᵢxᵢ / (n + 1/spread + 1), y ±1."""
    support = episodes.support
    signed = ((2 * support.labels - 1) * support.mask).unsqueeze(-1) * support.x
    evidence = support.mask.sum(-1, keepdim=True) + 1 / spread + 1
    return 2 * torch.einsum("tew,tw->te", episodes.query.x, signed.sum(1) / evidence)


@pytest.mark.parametrize(("kind", "excess"), [("linear_weights", 0.001), ("full", 0.02), ("nonlinear_biases", 0.1)])
def test_two_gaussian_classes_of_a_direction_a_task(kind: str, excess: float):
    """LWA must find the Bayes-optimal classifier and its numbers, and the others come near it: the loss above Bayes' is
    within a share of what adaptation can win."""
    width, spread = 3, 0.5
    torch.manual_seed(0)
    settings = {"relevant_from": 0.5, "loss": "binary_cross_entropy", "kind": kind, "widths": (32,)}
    meta = Hypernetwork(Plain(width), **settings)
    steps = 200
    optimizer = torch.optim.Adam(meta.parameters(), lr=0.3 if kind == "linear_weights" else 0.01)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
    for step in range(steps):
        optimizer.zero_grad()
        (meta(two_classes(128, step, width, spread)).total / 128).backward()
        optimizer.step()
        schedule.step()
    test = two_classes(5_000, -1, width, spread)
    with torch.no_grad():
        found = meta(test)
    least = meta.task_losses(bayes_logits(test, spread), test.query).mean()
    unadapted = float(found.before.mean() - least)
    assert float(found.after.mean() - least) < excess * unadapted
    assert unadapted > 0.1
    if kind == "linear_weights":
        # v is ±½, so 2 Σ yᵢxᵢ are 4 times the sum of the means' terms, and κ is 1 / spread + 1.
        assert meta.shares[0].tolist() == pytest.approx([4.0, -4.0], rel=0.1)
        assert float(meta.log_shrinkage.detach().exp()) == pytest.approx(1 / spread + 1, rel=0.25)


def test_graded_ratings_are_used():
    """A five says more than a four, and how often one likes is not lost in the mean over a task."""
    meta = Hypernetwork(Plain(2), relevant_from=3.0)

    def weight(labels: list[float], meta: Hypernetwork = meta) -> Tensor:
        x = torch.tensor([1.0, 2.0]).expand(1, len(labels), 2)
        return meta.adapt(Examples(x, {}, torch.tensor([labels]), torch.ones(1, len(labels))), {}).weights["weight"]

    assert (weight([5.0, 5.0]) > weight([4.0, 4.0])).all()
    assert (weight([5.0] * 9 + [1.0]) > 0).all()
    assert (weight([5.0] + [1.0] * 9) < 0).all()
    by_class = Hypernetwork(Plain(2), relevant_from=3.0, means="class", shrinkage=1e-6)
    torch.testing.assert_close(
        weight([5.0] * 9 + [1.0], by_class), weight([5.0] + [1.0] * 9, by_class), rtol=1e-4, atol=1e-4
    )


def test_refusals():
    for options, message in (
        ({"kind": "linear"}, "unknown kind 'linear'"),
        ({"means": "median"}, "unknown means 'median': task or class"),
        ({"shrinkage": 0.0}, "shrinkage must be above 0, got 0"),
        ({"kind": "full", "widths": ()}, "full needs widths"),
        ({"kind": "nonlinear_biases", "widths": (4, 0)}, "nonlinear_biases needs widths"),
    ):
        with pytest.raises(ValueError, match=message):
            Hypernetwork(Plain(2), relevant_from=0.5, **options)
    with pytest.raises(ValueError, match="no `represent`"):
        Hypernetwork(nn.Linear(3, 1), relevant_from=0.5)
