"""Derivatives by hand, and the choice between engines."""

from __future__ import annotations

import logging
from itertools import pairwise

import pytest
import torch
from torch import nn

from metatrain.meta.episode import Episodes, Examples, Sizes
from metatrain.meta.losses import event_loss
from metatrain.meta.low_rank_choice import ChoosingEngine
from metatrain.meta.low_rank_cost import Shapes, choose, low_rank_cost, vmap_cost
from metatrain.meta.low_rank_elementwise import ACTIVATIONS, loss_derivatives
from metatrain.meta.low_rank_form import CannotServe, LinearForm, LinearNames, describe
from metatrain.model.learners.mlp import MLP

AT = torch.tensor([-3.0, -1.0, -0.3, 0.0, 0.2, 0.9, 1.0, 4.0], dtype=torch.float64)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations(name: str) -> None:
    activation = ACTIVATIONS[name]
    h = AT.clone().requires_grad_()
    (slope,) = torch.autograd.grad(activation.function(h).sum(), h, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), h, allow_unused=True, materialize_grads=True)
    value, first, second = AT.clone(), torch.empty_like(AT), torch.zeros_like(AT)
    activation.evaluate(value, first, second)
    torch.testing.assert_close(value, activation.function(AT))
    torch.testing.assert_close(first, slope.detach())
    torch.testing.assert_close(second, curvature)
    assert activation.straight == bool((curvature == 0).all())


@pytest.mark.parametrize("given", ["name", "function"])
@pytest.mark.parametrize("name", ["squared", "absolute", "huber", "binary_cross_entropy"])
def test_losses(name: str, given: str) -> None:
    labels = torch.full_like(AT, 0.5)
    s = AT.clone().requires_grad_()
    (slope,) = torch.autograd.grad(event_loss(name, 1.3)(s, labels).sum(), s, create_graph=True)
    curvature = torch.zeros_like(AT)
    if slope.requires_grad:
        (curvature,) = torch.autograd.grad(slope.sum(), s, allow_unused=True, materialize_grads=True)
    derivatives = loss_derivatives(name if given == "name" else event_loss(name, 1.3), 1.3)
    first, second = torch.empty_like(AT), torch.empty_like(AT)
    derivatives.slope(AT, labels, first)
    torch.testing.assert_close(first, slope.detach())
    if not callable(derivatives.curvature):
        second.fill_(derivatives.curvature)
    else:
        derivatives.curvature(AT, labels, second)
    torch.testing.assert_close(second, curvature)


def test_an_unknown_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="cubic"):
        loss_derivatives("cubic")


def shapes(**changes: object) -> Shapes:
    settings = {
        "tasks": 64, "support": 20, "query": 10, "inputs": 256, "hidden": (64, 64), "skip": 0, "steps": 5, "order": 2,
        "differentiable_inputs": False,
    }  # fmt: skip
    return Shapes(**{**settings, **changes})  # type: ignore[arg-type]


def test_wide_inputs_and_few_events_go_by_low_rank() -> None:
    assert choose(shapes()).engine == "low_rank"
    assert choose(shapes(inputs=1024)).engine == "low_rank"


def test_narrow_inputs_and_many_events_go_by_vmap() -> None:
    choice = choose(shapes(inputs=4, hidden=(8,), support=2000, query=1))
    assert choice.engine == "vmap"
    assert "2000 support" in choice.reason


def test_layers_that_do_not_adapt_count() -> None:
    # A head over 64 inputs and 32 hidden units: by vmap the layer below is taken anew in each of the steps.
    head = {"support": 64, "query": 32, "inputs": 96, "hidden": (), "differentiable_inputs": True, "below": (64, 32)}
    assert vmap_cost(shapes(**head)).seconds(64) > 2 * low_rank_cost(shapes(**head)).seconds(64)
    engine, *_, episodes = engine_and_batch()
    sizes = Sizes.of(episodes.support, episodes.query, {})
    found = engine._shapes(("head.weight",), 3, sizes)
    assert (found.inputs, found.hidden, found.skip, found.below) == (4 + 6, (), 0, (6, 5, 4))
    assert engine._shapes(("layers.0.bias",), 3, sizes).below == ()


def test_rows_that_adapt_count() -> None:
    rows = ((30, 32), (4, 16))
    low, full = low_rank_cost, vmap_cost
    for cost in (low, full):
        assert cost(shapes(rows=rows)).seconds(64) > cost(shapes()).seconds(64)
        assert cost(shapes(rows=rows, moves=False)).seconds(64) < cost(shapes(rows=rows)).seconds(64)
    choice = choose(shapes(rows=rows, inputs=64, skip=64))
    assert choice.engine == "low_rank"
    assert "width 112 with 48 of adapted rows" in choice.reason
    engine, *_, episodes = engine_and_batch()
    sizes = Sizes.of(episodes.support, episodes.query, {"item": torch.zeros(3, 7, 2)})
    found = engine._shapes(("head.weight",), 3, sizes)
    assert (found.inputs, found.hidden, found.skip, found.rows, found.moves) == (6, (5, 4), 6, ((7, 2),), False)
    assert engine._shapes(("layers.1.weight",), 3, sizes).moves


def test_normalised_layers_count() -> None:
    for cost in (low_rank_cost, vmap_cost):
        assert cost(shapes(norm=True)).seconds(64) > cost(shapes()).seconds(64)
        assert cost(shapes(norm=True, hidden=())) == cost(shapes(hidden=()))
    assert choose(shapes(norm=True)).engine == "low_rank"


def test_low_rank_gains_with_the_width() -> None:
    gains = [
        vmap_cost(s).seconds(64) / low_rank_cost(s).seconds(64) for s in (shapes(inputs=i) for i in (64, 256, 1024))
    ]
    assert all(narrow < wide for narrow, wide in pairwise(gains))


def engine_and_batch(**options: object) -> tuple[ChoosingEngine, dict, tuple, list, Episodes]:
    learner = MLP(6, (5, 4)).double()
    x = torch.randn(3, 4, 6, dtype=torch.float64)
    examples = Examples(x, {}, torch.randn(3, 4, dtype=torch.float64), torch.ones(3, 4, dtype=torch.float64))
    names = tuple(name for name, _ in learner.named_parameters())
    parameters = {**dict(learner.named_parameters()), **dict(learner.named_buffers())}
    steps = [{name: torch.tensor(0.1, dtype=torch.float64) for name in names} for _ in range(2)]
    engine = ChoosingEngine(learner, "squared", **options)  # type: ignore[arg-type]
    return engine, parameters, names, steps, Episodes(examples, examples, {})


def test_both_engines_give_one_result() -> None:
    found = []
    for name in ("low_rank", "vmap"):
        torch.manual_seed(0)
        engine, parameters, names, steps, episodes = engine_and_batch(engine=name)
        result = engine.query_loss(parameters, names, steps, episodes, "squared")
        fast = engine.adapt(parameters, names, steps, episodes.support, {})
        leaves = [parameters[n] for n in names]
        scores = engine.predict(parameters, fast, episodes.query)
        found.append((result.total, result.after, result.before, *torch.autograd.grad(result.total, leaves), scores))
    for mine, theirs in zip(*found, strict=True):
        torch.testing.assert_close(mine, theirs)


def test_the_choice_is_logged_once_with_its_reason(caplog: pytest.LogCaptureFixture) -> None:
    engine, parameters, names, steps, episodes = engine_and_batch()
    with caplog.at_level(logging.INFO):
        for _ in range(3):
            engine.query_loss(parameters, names, steps, episodes, "squared")
    assert len(caplog.messages) == 1
    assert "low_rank" in caplog.messages[0]
    assert "support" in caplog.messages[0]


def test_adapting_without_training_is_logged_for_debugging_alone(caplog: pytest.LogCaptureFixture) -> None:
    engine, parameters, names, steps, episodes = engine_and_batch()
    with caplog.at_level(logging.DEBUG, logger="metatrain.meta"):  # the command line sets a level on "metatrain"
        engine.adapt(parameters, names, steps, episodes.support, {})
        engine.query_loss(parameters, names, steps, episodes, "squared")
    assert [record.levelname for record in caplog.records] == ["DEBUG", "INFO"]


class Renamed(nn.Module):
    """A learner that keeps its layers under names of its own, and says so."""

    def __init__(self, activation: str = "tanh", says: bool = True) -> None:
        super().__init__()
        self.below, self.above = nn.Linear(6, 5), nn.Linear(5, 1, bias=False)
        hidden, above = LinearNames("below.weight", "below.bias"), LinearNames("above.weight", None)
        if says:
            self.linear_form = lambda: LinearForm((hidden,), above, activation)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.above(torch.tanh(self.below(x))).squeeze(-1)


def test_a_learner_says_itself_what_it_is_made_of() -> None:
    form = describe(MLP(6, (5, 4), activation="gelu", skip=False))
    layers = tuple(LinearNames(f"layers.{n}.weight", f"layers.{n}.bias") for n in range(2))
    assert form == LinearForm(layers, LinearNames("head.weight", "head.bias"), "gelu", False, "offset")
    assert describe(MLP(6, ())).hidden == ()
    assert describe(Renamed()).head.weight == "above.weight"


def test_what_a_learner_does_not_say_is_not_guessed() -> None:
    class Silent(Renamed):
        """The MLP's attributes, and not its word."""

        def __init__(self) -> None:
            super().__init__(says=False)
            self.layers, self.head = nn.ModuleList([self.below]), self.above
            self._activation, self._skip = torch.tanh, False

    with pytest.raises(CannotServe, match="Silent does not say"):
        describe(Silent())
    with pytest.raises(CannotServe, match="'mish' are not known"):
        describe(Renamed("mish"))
    with pytest.raises(CannotServe, match="forward"):
        describe(Renamed("relu"))


def test_what_cannot_be_served_goes_by_vmap_with_the_reason() -> None:
    half, _, names, _, episodes = engine_and_batch(precision=torch.bfloat16)
    choice = half.choice(names, 2, episodes.support, episodes.query, {})
    assert choice.engine == "vmap"
    assert "bfloat16" in choice.reason
    assert not half.fuses(names, 2, episodes)


def test_asking_for_what_cannot_be_served_is_refused() -> None:
    with pytest.raises(CannotServe, match="bfloat16"):
        engine_and_batch(engine="low_rank", precision=torch.bfloat16)
