"""MAMO against a loop over tasks and events written from its formulas; its memory; a family with a known optimum."""

from __future__ import annotations

import pytest
import torch
from contract import LAYOUT, assert_close, check_contract, made_up, meta_gradient, one_task
from test_memory import batch, gradients, peak_bytes
from torch import Tensor, nn
from torch.func import functional_call

from metatrain.meta.engine import FastWeights
from metatrain.meta.episode import Episodes, Examples, Sizes, Slots
from metatrain.meta.layout import Columns, Layout
from metatrain.meta.losses import event_loss
from metatrain.meta.maml import MAML
from metatrain.meta.mamo import MAMO
from metatrain.model.learners.factorisation import Factorisation
from metatrain.model.learners.mlp import MLP


def mamo(loss: str = "squared", learner: str = "mlp", **options) -> MAMO:
    torch.manual_seed(1)
    click = loss == "binary_cross_entropy"
    settings = {"hidden": (6, 5), "activation": "tanh", "offset": 0.0 if click else 3.0}
    base = (
        MLP(LAYOUT.width, **settings)
        if learner == "mlp"
        else Factorisation(LAYOUT.width, layout=LAYOUT, **{**settings, "hidden": (6,)})
    )
    defaults = {"steps": 2, "rate": 0.1, "learn_rates": True, "slots": 3, "tau": 0.5, "sharpness": 2.0}
    meta = MAMO(base, layout=LAYOUT, loss=loss, **{**defaults, **options}).double()
    nn.init.normal_(meta.biases, std=0.1)
    return meta


# --- the formulas, one task and one event at a time ----------------------------------------------------------------


def start_of(meta: MAMO, x: Tensor) -> dict[str, Tensor]:
    """What a task with these inputs of one event starts from."""
    p = x[LAYOUT.of("task")]
    cosines = [p @ q / (p @ p + 1e-6).sqrt() / (q @ q).sqrt() for q in meta.prototypes]
    shares = [torch.exp(meta.log_sharpness.exp() * c) for c in cosines]
    bias = sum(share / sum(shares) * b for share, b in zip(shares, meta.biases, strict=True))
    found = {}
    for name, parameter in meta.learner.named_parameters():
        if name in meta.adapted:
            found[name] = parameter - meta.tau * bias[: parameter.numel()].reshape(parameter.shape)
            bias = bias[parameter.numel() :]
    assert not len(bias)
    return found


def mean_loss(meta: MAMO, weights: dict[str, Tensor], examples: Examples, loss: str) -> Tensor:
    events = int(examples.mask.sum())
    of_event = event_loss(loss)
    losses = [
        of_event(functional_call(meta.learner, weights, (examples.x[0, i],)), examples.labels[0, i])
        for i in range(events)
    ]
    return sum(losses) / max(events, 1)


def task_loss(meta: MAMO, alone: Episodes, order: int, inner: str, adapted: bool = True) -> Tensor:
    weights = start_of(meta, alone.query.x[0, 0])
    for rates in meta.rates if adapted and alone.support.mask.any() else ():
        at = weights if order == 2 else {name: w.detach().requires_grad_() for name, w in weights.items()}
        by_weight = torch.autograd.grad(
            mean_loss(meta, at, alone.support, inner), list(at.values()), create_graph=order == 2
        )
        weights = {
            name: weights[name] - rates[meta.rate_names.index(name)] * g for name, g in zip(at, by_weight, strict=True)
        }
    return mean_loss(meta, weights, alone.query, meta.loss)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(
    ("loss", "inner", "options"),
    [
        ("squared", "squared", {}),
        ("squared", "squared", {"preference": True, "adapt": ("layers.0.*",)}),
        ("huber", "squared", {"learner": "factorisation", "adapt": ("taste", "bias")}),
        ("binary_cross_entropy", "binary_cross_entropy", {"chunk": 2, "keep": 1}),
    ],
    ids=str,
)
def test_meta_gradient_is_that_of_a_loop_over_tasks_and_events(order: int, loss: str, inner: str, options: dict):
    meta, click = mamo(loss, order=order, inner_loss=inner, **options), loss == "binary_cross_entropy"
    episodes = made_up(click=click)
    each = [one_task(episodes, task) for task in range(episodes.size)]
    losses = [task_loss(meta, alone, order, inner) for alone in each]
    found = meta(episodes)
    torch.testing.assert_close(found.after, torch.stack(losses).detach())
    before = [task_loss(meta, alone, order, inner, adapted=False).detach() for alone in each]
    torch.testing.assert_close(found.before, torch.stack(before))
    expected = meta_gradient(meta, torch.stack(losses).sum())
    assert all(gradient.any() for gradient in expected.values())
    assert_close(meta_gradient(meta, found.total), expected)
    # In float32, where training runs.
    single = mamo(loss, order=order, inner_loss=inner, **options).float()
    single.load_state_dict(meta.state_dict())
    assert_close(meta_gradient(single, single(made_up(click=click, dtype=torch.float32)).total), expected)


@pytest.mark.parametrize("options", [{}, {"preference": True, "chunk": 2}, {"order": 1}], ids=str)
def test_contract(options: dict):
    check_contract(lambda: mamo(**options))
    check_contract(lambda: mamo("binary_cross_entropy", **options), click=True)


def test_without_anything_in_the_memory_it_is_maml():
    meta, episodes = mamo(), made_up()
    nn.init.zeros_(meta.biases)
    maml = MAML(meta.learner, steps=2, rate=0.1, learn_rates=True, engine="vmap").double()
    found, expected = meta(episodes), maml(episodes)
    torch.testing.assert_close(found.after, expected.after)
    torch.testing.assert_close(found.before, expected.before)
    ours, theirs = meta_gradient(meta, found.total), meta_gradient(maml, expected.total)
    assert_close({name: ours[name] for name in theirs}, theirs)
    # And the memory is not stuck there.
    assert ours["biases"].any()


def test_a_task_without_support_starts_where_its_features_say():
    meta, episodes = mamo(), made_up()
    nothing = Examples(episodes.support.x, {}, episodes.support.labels, torch.zeros_like(episodes.support.mask))
    scores = meta.predict(meta.adapt(nothing, {}), episodes.query)
    for task in range(episodes.size):
        alone = one_task(episodes, task).query
        expected = functional_call(meta.learner, start_of(meta, alone.x[0, 0]), (alone.x[0],))
        torch.testing.assert_close(scores[task, : alone.x.shape[1]], expected)
    shares = meta.slots_of(episodes.query)
    torch.testing.assert_close(shares.sum(-1), torch.ones(episodes.size).double())
    # Two tasks whose features point the same way have the same start, whatever else they have.
    twins = episodes.query.x[:2].clone()
    twins[1, :, LAYOUT.of("task")] = 3 * twins[0, :, LAYOUT.of("task")]
    of_twins = meta.slots_of(Examples(twins, {}, episodes.query.labels[:2], episodes.query.mask[:2]))
    torch.testing.assert_close(of_twins[0], of_twins[1], rtol=1e-5, atol=1e-6)
    assert (shares[2] - shares[3]).abs().max() > 1e-3


def test_rows_adapt_beside_the_memory():
    """Rows that adapt reach the steps as in MAML; a feature whose rows adapt is no address."""
    layout = Layout((Columns("age", "task", 0, 2), Columns("year", "item", 2, 3), Columns("user", "task", 3, 7)))
    torch.manual_seed(0)
    meta = MAMO(MLP(7, (5,), "tanh"), layout=layout, adapt_rows=("user",), steps=2, rate=0.1, slots=2).double()
    assert meta.columns.tolist() == [0, 1]
    maml = MAML(meta.learner, adapt_rows=("user",), steps=2, rate=0.1, engine="vmap").double()
    draw = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 3, generator=draw, dtype=torch.float64)
    one = torch.ones(3, 4, dtype=torch.float64)
    slots = {"user": Slots(torch.zeros(3, 4, 1, dtype=torch.int64), one.unsqueeze(-1))}
    examples = Examples(x, slots, x[..., 0], one)
    rows = {"user": torch.randn(3, 1, 4, generator=draw, dtype=torch.float64)}
    fast = meta.adapt(examples, rows)
    torch.testing.assert_close(fast.rows, maml.adapt(examples, rows).rows)
    assert (fast.rows["user"] - rows["user"]).abs().max() > 1e-3
    assert isinstance(meta.unadapted(examples, rows), FastWeights)


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize(("steps", "support", "preference"), [(2, 10, False), (3, 60, False), (5, 20, True)])
def test_counted_memory_is_near_the_measured_peak(order: int, steps: int, support: int, preference: bool):
    torch.manual_seed(0)
    layout = Layout((Columns("age", "task", 0, 8), Columns("item", "item", 8, 64)))
    settings = {"steps": steps, "rate": 0.01, "learn_rates": True, "order": order, "preference": preference}
    meta = MAMO(MLP(64, (64, 64), "tanh"), layout=layout, **settings)
    episodes = batch(8, support, 10, 64, {})
    gradients(meta, episodes)
    counted = meta.plan(Sizes.of(episodes.support, episodes.query, episodes.rows)).bytes
    peak = peak_bytes(lambda: gradients(meta, episodes))
    print(order, counted / peak)
    assert counted / 1.5 <= peak <= counted * 1.5


# --- a family of tasks with a known optimum ------------------------------------------------------------------------


class Linear(nn.Module):
    """score = weight · item's columns: what it can't know is the task's group."""

    def __init__(self, columns: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(columns))

    def forward(self, x: Tensor) -> Tensor:
        return x[..., -len(self.weight) :] @ self.weight


def grouped_tasks(tasks: int, seed: int, centres: Tensor, spread: float, noise: float) -> Episodes:
    """Labels are linear in an item's columns by a task's weights, which lie around those of its group; the first
    columns say which group it is, by one of them being 1, and something irrelevant."""
    draw = torch.Generator().manual_seed(seed)
    groups, width = centres.shape
    group = torch.randint(0, groups, (tasks,), generator=draw)
    own = centres[group] + spread**0.5 * torch.randn(tasks, width, generator=draw)
    known = torch.cat([torch.eye(groups)[group], 0.1 * torch.randn(tasks, 1, generator=draw)], 1)

    def side(events: int) -> Examples:
        items = torch.randn(tasks, events, width, generator=draw)
        labels = torch.einsum("tew,tw->te", items, own) + noise**0.5 * torch.randn(tasks, events, generator=draw)
        x = torch.cat([known.unsqueeze(1).expand(-1, events, -1), items], -1)
        return Examples(x, {}, labels, torch.ones_like(labels))

    return Episodes(side(6), side(10), {})


def test_groups_of_tasks_start_at_their_groups_optimum():
    """Before the first event nothing beats the group's weights: an error of noise + spread · width. After it, nothing
    beats the posterior mean; a gradient step of a learned rate comes near it, and a start that all share does not."""
    spread, noise, width = 0.1, 0.5, 3
    draw = torch.Generator().manual_seed(5)
    centres = torch.randn(4, width, generator=draw)
    layout = Layout((Columns("group", "task", 0, 5), Columns("item", "item", 5, 5 + width)))
    torch.manual_seed(0)
    settings = {"steps": 1, "rate": 0.05, "learn_rates": True}
    found = {}
    test = grouped_tasks(10_000, -1, centres, spread, noise)
    for meta in (
        MAMO(Linear(width), layout=layout, slots=6, **settings),
        MAML(Linear(width), engine="vmap", **settings),
    ):
        steps = 200
        optimizer = torch.optim.Adam(meta.parameters(), lr=0.05)
        schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.02, steps)
        for step in range(steps):
            optimizer.zero_grad()
            (meta(grouped_tasks(128, step, centres, spread, noise)).total / 128).backward()
            optimizer.step()
            schedule.step()
        with torch.no_grad():
            losses = meta(test)
        found[type(meta)] = float(losses.before.mean()), float(losses.after.mean())
    # The posterior mean of a task's weights around its group's.
    group = test.support.x[:, 0, :4].argmax(-1)
    a, y = (
        test.support.x[..., 5:],
        test.support.labels - torch.einsum("tew,tw->te", test.support.x[..., 5:], centres[group]),
    )
    system = a.transpose(1, 2) @ a + noise / spread * torch.eye(width)
    w = centres[group] + torch.linalg.solve(system, torch.einsum("tew,te->tw", a, y))
    least = float((torch.einsum("tew,tw->te", test.query.x[..., 5:], w) - test.query.labels).square().mean())
    before, after = found[MAMO]
    assert before == pytest.approx(noise + spread * width, rel=0.02)
    assert least <= after == pytest.approx(least, rel=0.05)
    assert found[MAML][0] > 2 * before
    assert found[MAML][1] > 1.2 * after


def test_refusals():
    with pytest.raises(ValueError, match=r"add a task-level feature to model\.features"):
        MAMO(MLP(3), layout=Layout((Columns("item", "item", 0, 3),)))
    with pytest.raises(ValueError, match=r"leave it out of meta\.adapt_rows"):
        MAMO(MLP(3), layout=Layout((Columns("age", "task", 0, 3),)), adapt_rows=("age",))
    for options, message in (
        ({"slots": 0}, "slots must be above 0, got 0"),
        ({"tau": -1.0}, "tau must be above 0, got -1"),
        ({"sharpness": 0.0}, "sharpness must be above 0, got 0"),
        ({"adapt": ()}, r"meta\.adapt is empty"),
        ({"adapt": ("hed.*",), "preference": True}, r"the pattern 'hed\.\*' matches no parameter"),
    ):
        with pytest.raises(ValueError, match=message):
            mamo(**options)
