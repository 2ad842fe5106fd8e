"""Reptile's pseudo-gradient against a loop over tasks one at a time; and that its curves say what others' say."""

from __future__ import annotations

from collections.abc import Iterable

import pytest
import torch
from contract import LAYOUT, assert_close, check_contract, made_up
from inner_steps import LAYOUT_WITH_ROWS, Task, all_gradients, made_up_with_rows

from metatrain.meta.episode import Episodes, Examples, Slots
from metatrain.meta.fomaml import FOMAML
from metatrain.meta.reptile import Reptile, joined
from metatrain.model.learners.factorisation import Factorisation
from metatrain.model.learners.mlp import MLP

RATE = 0.05


def mlp(rows: bool = False) -> MLP:
    torch.manual_seed(1)
    return MLP((LAYOUT_WITH_ROWS if rows else LAYOUT).width, (6, 5), "tanh", offset=3.0).double()


def factorisation() -> Factorisation:
    torch.manual_seed(1)
    learner = Factorisation(LAYOUT.width, layout=LAYOUT, hidden=(7,), activation="tanh", offset=3.5).double()
    torch.nn.init.normal_(learner.taste, std=0.3)
    return learner


def by_hand(meta: Reptile, episodes: Episodes) -> dict[str, torch.Tensor]:
    """(θ - φ)/α of what adapts; of the rest and the inputs the gradient at φ, which is a constant."""
    leaves = dict(meta.named_parameters())
    leaves |= {f"rows:{name}": rows for name, rows in episodes.rows.items()}
    leaves |= {"x of support": episodes.support.x, "x of query": episodes.query.x}
    whole = {name: torch.zeros_like(leaf) for name, leaf in leaves.items() if leaf.requires_grad}
    rate = float(meta.rates[0, 0])
    for number in range(episodes.size):
        task = Task.of(meta, episodes, number)
        weights, rows = task.adapted(meta.adapted, meta.steps, lambda *_: rate, order=1, on=meta.sees)
        weights = {n: w.detach() for n, w in weights.items()}
        rows = {n: r.detach() for n, r in rows.items()}
        seen = task.both if meta.sees == "all" else task.query
        rest = {name: leaves[name] for name in whole}
        found = torch.autograd.grad(
            task.loss(seen, weights, rows, meta.loss), list(rest.values()), allow_unused=True, materialize_grads=True
        )
        for name, gradient in zip(rest, found, strict=True):
            whole[name] += gradient
        for name, weight in weights.items():
            whole[f"learner.{name}"] += (meta.learner.get_parameter(name).detach() - weight) / rate
        for name, own in rows.items():
            whole[f"rows:{name}"][number] += (episodes.rows[name][number].detach() - own) / rate
    return whole


@pytest.mark.parametrize("on", ["all", "support"])
@pytest.mark.parametrize("engine", ["vmap", "low_rank"])
@pytest.mark.parametrize("adapt", [("*",), ("head.*",), ("layers.*",)], ids=["all", "head", "body"])
def test_gradient_is_the_pull_of_a_loop_over_tasks(adapt: Iterable[str], engine: str, on: str):
    meta = Reptile(mlp(True), steps=3, rate=RATE, adapt=adapt, adapt_rows=("zone",), engine=engine, sees=on).double()
    episodes = made_up_with_rows()
    assert_close(all_gradients(meta, episodes, meta(episodes).total), by_hand(meta, episodes))


@pytest.mark.parametrize("loss", ["huber", "binary_cross_entropy"])
@pytest.mark.parametrize("on", ["all", "support"])
def test_gradient_by_chunks_with_other_losses(on: str, loss: str):
    episodes = made_up_with_rows(click=loss == "binary_cross_entropy", tasks=7)
    meta = Reptile(mlp(True), steps=4, rate=RATE, adapt_rows=("zone",), sees=on, loss=loss, chunk=3).double()
    total = 3.0 * meta(episodes).total
    expected = {name: 3.0 * gradient for name, gradient in by_hand(meta, episodes).items()}
    assert_close(all_gradients(meta, episodes, total), expected)


def test_the_value_is_that_of_tasks_adapted_on_their_support_alone():
    episodes = made_up()
    others = FOMAML(mlp(), steps=3, rate=RATE).double()(episodes)
    for on in ("all", "support"):
        found = Reptile(mlp(), steps=3, rate=RATE, sees=on).double()(episodes)
        torch.testing.assert_close(found.after, others.after)
        torch.testing.assert_close(found.before, others.before)
        assert found.total.item() == found.after.sum().item()
    # Without gradients, as validation runs it, too.
    with torch.no_grad():
        torch.testing.assert_close(Reptile(mlp(), steps=3, rate=RATE).double()(episodes).total, others.total.detach())


def test_one_step_on_all_events_is_joint_training():
    episodes = made_up()
    meta = Reptile(mlp(), steps=1, rate=RATE).double()
    losses = [Task.of(meta, episodes, t) for t in range(episodes.size)]
    joint = torch.stack([task.loss(task.both, {}, {}, "squared") for task in losses]).sum()
    assert_close(all_gradients(meta, episodes, meta(episodes).total), all_gradients(meta, episodes, joint))


def test_joined_examples_of_unequal_slots():
    def side(events: int, used: int) -> Examples:
        slots = Slots(torch.full((2, events, used), used), torch.ones(2, events, used))
        return Examples(torch.ones(2, events, 3), {"f": slots}, torch.ones(2, events), torch.ones(2, events))

    both = joined(side(4, 1), side(2, 3))
    assert both.slots["f"].mask.tolist()[0] == [[1, 0, 0]] * 4 + [[1, 1, 1]] * 2
    assert both.slots["f"].index.tolist()[1] == [[1, 0, 0]] * 4 + [[3, 3, 3]] * 2
    assert both.x.shape == (2, 6, 3)


@pytest.mark.parametrize("on", ["all", "support"])
def test_contract(on: str):
    for make in (mlp, factorisation):
        check_contract(lambda make=make: Reptile(make(), steps=2, rate=RATE, sees=on))
        check_contract(lambda make=make: Reptile(make(), rate=0.3, sees=on, loss="binary_cross_entropy"), click=True)


def test_refusals():
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        Reptile(mlp(), steps=0)
    with pytest.raises(ValueError, match="rate must be above 0, got 0"):
        Reptile(mlp(), rate=0.0)
    with pytest.raises(ValueError, match="unknown sees 'query'"):
        Reptile(mlp(), sees="query")
    with pytest.raises(ValueError, match="nothing adapts"):
        Reptile(mlp(), adapt=())
