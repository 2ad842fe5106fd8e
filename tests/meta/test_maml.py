"""MAML: the inner loop's arithmetic on problems solved by hand, masks, chunks, precision."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from metatrain.meta.engine import FastWeights
from metatrain.meta.episode import Episodes, Examples, Slots
from metatrain.meta.losses import event_loss, mean_over_events
from metatrain.meta.maml import MAML


class Line(nn.Module):
    """score = weight · x: a learner with one number to adapt."""

    def __init__(self, width: int = 1, start: float = 2.0) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.full((width,), start))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight


def examples(x: list[list[float]], y: list[list[float]], mask: list[list[float]] | None = None) -> Examples:
    labels = torch.tensor(y)
    return Examples(torch.tensor(x).unsqueeze(-1), {}, labels, torch.tensor(mask) if mask else torch.ones_like(labels))


def random_episodes(tasks: int, support: int, query: int, width: int, rows: bool = False, seed: int = 0) -> Episodes:
    draw = torch.Generator().manual_seed(seed)
    lengths = torch.randint(0, support + 1, (tasks, 1), generator=draw)

    def side(events: int, mask: Tensor) -> Examples:
        index = torch.randint(0, 3, (tasks, events, 2), generator=draw)
        slots = {"f": Slots(index, torch.ones(tasks, events, 2))} if rows else {}
        x = torch.randn(tasks, events, width, generator=draw)
        return Examples(x, slots, torch.randn(tasks, events, generator=draw), mask)

    masked = (torch.arange(support) < lengths).float()
    own = {"f": torch.randn(tasks, 3, 4, generator=draw, requires_grad=True)} if rows else {}
    return Episodes(side(support, masked), side(query, torch.ones(tasks, query)), own)


def test_one_step_by_hand() -> None:
    # Loss (2·1 - 5)²: gradient -6, so the weight goes to 2.6, and scores 5.2 at x = 2.
    maml = MAML(Line(), steps=1, rate=0.1)
    support, query = examples([[1.0]], [[5.0]]), examples([[2.0]], [[4.0]])
    fast = maml.adapt(support, {})
    assert fast.weights["weight"].tolist() == [[pytest.approx(2.6)]]
    assert maml.predict(fast, query).item() == pytest.approx(5.2)
    found = maml(Episodes(support, query, {}))
    assert found.after.item() == pytest.approx(1.2**2)
    assert found.before.item() == 0.0


@pytest.mark.parametrize(("order", "factor"), [(1, 1.0), (2, 1 - 2 * 0.1)])
def test_orders_by_hand(order: int, factor: float) -> None:
    # w' = w - 0.1 · 2(w - 5), so dw'/dw = 0.8; the outer gradient is 2(2w' - 4) · 2, times it or not.
    maml = MAML(Line(), steps=1, rate=0.1, order=order)
    maml(Episodes(examples([[1.0]], [[5.0]]), examples([[2.0]], [[4.0]]), {})).total.backward()
    assert maml.learner.weight.grad.item() == pytest.approx(2 * 1.2 * 2 * factor)


def test_learned_rates_get_the_gradient_of_finite_differences() -> None:
    maml = MAML(
        nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(-2)), steps=2, rate=0.1, learn_rates=True
    )
    maml.double()
    episodes = random_episodes(4, 5, 3, 3)
    episodes = Episodes(
        *(Examples(s.x.double(), {}, s.labels.double(), s.mask.double()) for s in (episodes.support, episodes.query)),
        {},
    )
    maml(episodes).total.backward()
    assert maml.rates.shape == (2, 4)
    for step, column in ((0, 0), (1, 3), (1, 2)):
        sums = []
        for shift in (1e-6, -1e-6):
            with torch.no_grad():
                maml.rates[step, column] += shift
                sums.append(maml(episodes).total.item())
                maml.rates[step, column] -= shift
        assert maml.rates.grad[step, column].item() == pytest.approx((sums[0] - sums[1]) / 2e-6, rel=1e-5)


def test_padding_changes_nothing() -> None:
    maml = MAML(Line(), steps=3, rate=0.1)
    short = maml(Episodes(examples([[1.0]], [[5.0]]), examples([[2.0]], [[4.0]]), {}))
    junk = maml(
        Episodes(
            examples([[1.0, 9.0]], [[5.0, -3.0]], [[1.0, 0.0]]), examples([[2.0, 7.0]], [[4.0, 70.0]], [[1.0, 0.0]]), {}
        )
    )
    assert junk.after.item() == pytest.approx(short.after.item())
    assert junk.before.item() == short.before.item()


@pytest.mark.parametrize("order", [1, 2])
def test_task_without_support_is_not_adapted(order: int) -> None:
    maml = MAML(Line(), steps=2, rate=0.1, order=order, learn_rates=True)
    found = maml(Episodes(examples([[1.0]], [[5.0]], [[0.0]]), examples([[2.0]], [[3.0]]), {}))
    found.total.backward()
    assert found.after.item() == found.before.item() == 1.0
    assert maml.learner.weight.grad.item() == pytest.approx(2 * 1.0 * 2)
    assert not maml.rates.grad.any()


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("chunk", [1, 2, 5])
def test_chunks_give_the_gradient_of_the_whole(order: int, chunk: int) -> None:
    found = []
    for size in (0, chunk):
        torch.manual_seed(0)
        learner = nn.Sequential(nn.Linear(3 + 4, 6), nn.Tanh(), nn.Linear(6, 1), nn.Flatten(-2))
        maml = MAML(learner, steps=2, rate=0.1, order=order, learn_rates=True, chunk=size, adapt_rows=("f",))
        episodes = random_episodes(7, 5, 3, 3, rows=True)
        episodes.support.x.requires_grad_()
        episodes.query.x.requires_grad_()
        loss = maml(episodes)
        (3.0 * loss.total).backward()
        inputs = [episodes.support.x, episodes.query.x, episodes.rows["f"], *maml.parameters()]
        # First order leaves the support without a gradient, which in chunks is a gradient of zeros.
        gradients = [torch.zeros_like(t) if t.grad is None else t.grad for t in inputs]
        found.append([loss.after, loss.before, *gradients])
    for whole, chunked in zip(*found, strict=True):
        torch.testing.assert_close(chunked, whole, rtol=1e-4, atol=1e-5)


def test_chunks_keep_no_graph() -> None:
    # What bounds memory: after the forward pass not one product of the inner loops is still held.
    def held(chunk: int) -> int:
        maml = MAML(nn.Sequential(nn.Linear(3, 50), nn.Tanh(), nn.Linear(50, 1), nn.Flatten(-2)), steps=3, chunk=chunk)
        episodes = random_episodes(40, 5, 3, 3)
        loss = maml(episodes).total
        nodes, seen = [loss.grad_fn], set()
        while nodes:
            node = nodes.pop()
            if node is not None and node not in seen:
                seen.add(node)
                nodes += [following for following, _ in node.next_functions]
        return len(seen)

    assert held(0) > 100
    assert held(8) == held(4) <= 10


def test_shared_parameters_that_do_not_adapt_still_learn() -> None:
    learner = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(-2))
    maml = MAML(learner, steps=1, adapt=("2.*",))
    fast = maml.adapt(random_episodes(5, 4, 2, 3).support, {})
    assert set(fast.weights) == {"2.weight", "2.bias"}
    maml(random_episodes(5, 4, 2, 3)).total.backward()
    assert learner[0].weight.grad.abs().sum() > 0


def test_patterns_that_match_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match=r"'body\.\*' matches no parameter of the base learner: weight"):
        MAML(Line(), adapt=("body.*",))


def test_gains_whose_gradient_torch_gets_wrong_are_refused() -> None:
    learner = nn.Sequential(nn.Linear(3, 4), nn.LayerNorm(4), nn.Tanh(), nn.Linear(4, 1), nn.Flatten(-2))
    episodes = random_episodes(5, 4, 2, 3)
    with pytest.raises(ValueError, match=r"LayerNorm can't adapt in second order: 1\.weight"):
        MAML(learner)(episodes)
    for allowed in (MAML(learner, order=1), MAML(learner, adapt=("0.*", "1.bias"))):
        allowed(episodes).total.backward()


def test_no_grad_still_adapts() -> None:
    maml = MAML(Line(), steps=1, rate=0.1)
    with torch.no_grad():
        fast = maml.adapt(examples([[1.0]], [[5.0]]), {})
    assert fast.weights["weight"].item() == pytest.approx(2.6)
    assert not fast.weights["weight"].requires_grad


def test_bfloat16_products_float32_losses() -> None:
    torch.manual_seed(0)
    learner = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 1), nn.Flatten(-2))
    losses, gradients = [], []
    for precision in (None, torch.bfloat16):
        maml = MAML(learner, steps=2, rate=0.05, precision=precision)
        learner.zero_grad()
        found = maml(random_episodes(6, 5, 3, 3))
        found.total.backward()
        assert found.total.dtype == torch.float32
        losses.append(found.total.item())
        gradients.append(learner[0].weight.grad.clone())
    assert losses[0] != losses[1]  # it did run in another precision
    assert losses[1] == pytest.approx(losses[0], rel=0.03)
    assert (gradients[1] - gradients[0]).norm() < 0.05 * gradients[0].norm()


def test_click_loss_is_right_at_zero() -> None:
    score = torch.zeros((), dtype=torch.float64, requires_grad=True)
    loss = event_loss("binary_cross_entropy")(score, torch.tensor(1.0, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(loss, score, create_graph=True)
    (curvature,) = torch.autograd.grad(gradient, score)
    assert (loss.item(), gradient.item(), curvature.item()) == pytest.approx((0.693147, -0.5, 0.25), rel=1e-5)


@pytest.mark.parametrize("name", ["squared", "absolute", "huber", "binary_cross_entropy"])
def test_losses_by_their_formulas(name: str) -> None:
    scores, labels = torch.tensor([-3.0, 0.2, 0.9, 4.0]), torch.tensor([0.0, 1.0, 0.0, 1.0])
    error, chance = scores - labels, torch.sigmoid(scores)
    expected = {
        "squared": error**2,
        "absolute": error.abs(),
        "huber": torch.where(error.abs() < 0.5, error**2 / 2, 0.5 * (error.abs() - 0.25)),
        "binary_cross_entropy": -(labels * chance.log() + (1 - labels) * (1 - chance).log()),
    }[name]
    torch.testing.assert_close(event_loss(name, 0.5)(scores, labels), expected)


def test_mean_over_no_event_is_zero() -> None:
    assert mean_over_events(
        torch.tensor([[3.0, 5.0], [7.0, 9.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    ).tolist() == [3, 0]
    with pytest.raises(ValueError, match="unknown loss"):
        event_loss("hinge")


def test_zero_steps_give_the_shared_weights_to_each_task() -> None:
    maml = MAML(Line(), steps=0, learn_rates=True)
    fast = maml.adapt(examples([[1.0], [1.0]], [[5.0], [4.0]]), {})
    assert isinstance(fast, FastWeights)
    assert fast.weights["weight"].tolist() == [[2.0], [2.0]]
    assert maml.rates.shape == (0, 1)
    assert [name for name, _ in maml.named_parameters()] == ["learner.weight"]
