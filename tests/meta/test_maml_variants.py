"""FOMAML, ANIL, BOIL and Meta-SGD against a loop over tasks one at a time; what each adapts, and what it refuses."""

from __future__ import annotations

import logging

import pytest
import torch
from contract import LAYOUT, assert_close, check_contract, made_up
from inner_steps import LAYOUT_WITH_ROWS, Task, all_gradients, made_up_with_rows

from metatrain.meta.anil import ANIL
from metatrain.meta.boil import BOIL
from metatrain.meta.fomaml import FOMAML
from metatrain.meta.maml import MAML
from metatrain.meta.meta_sgd import MetaSGD
from metatrain.model.learners.factorisation import Factorisation
from metatrain.model.learners.mlp import MLP

HEAD = ("head.weight", "head.bias")


def mlp(rows: bool = False) -> MLP:
    torch.manual_seed(1)
    return MLP((LAYOUT_WITH_ROWS if rows else LAYOUT).width, (6, 5), "tanh", offset=3.0).double()


def factorisation(rows: bool = False) -> Factorisation:
    torch.manual_seed(1)
    layout = LAYOUT_WITH_ROWS if rows else LAYOUT
    learner = Factorisation(layout.width, layout=layout, hidden=(7,), activation="tanh", offset=3.5).double()
    torch.nn.init.normal_(learner.taste, std=0.3)
    return learner


def same(meta: MAML):
    """One rate throughout, as the method holds it: made in float32."""
    return lambda step, name: meta.rates[0, 0]


def compared(meta: MAML, rows: bool, order: int, names: tuple[str, ...], rate, loss: str = "squared") -> None:
    """Losses and every gradient of `meta` are those of a loop over tasks."""
    click = loss == "binary_cross_entropy"
    episodes = made_up_with_rows(click=click) if rows else made_up(click=click)
    losses = []
    for number in range(episodes.size):
        task = Task.of(meta, episodes, number)
        losses.append(task.query_loss(*task.adapted(names, meta.steps, rate, order=order)))
    expected = all_gradients(meta, episodes, torch.stack(losses).sum())
    found = meta(episodes)
    torch.testing.assert_close(found.after, torch.stack(losses).detach())
    assert_close(all_gradients(meta, episodes, found.total), expected)


LEARNERS = pytest.mark.parametrize("learner", [mlp, factorisation], ids=["mlp", "factorisation"])
ENGINES = pytest.mark.parametrize("engine", ["vmap", "low_rank"])


@pytest.mark.parametrize("loss", ["squared", "binary_cross_entropy"])
@ENGINES
def test_fomaml_takes_inner_gradients_as_constants(engine: str, loss: str):
    meta = FOMAML(mlp(True), steps=3, rate=0.1, learn_rates=True, adapt_rows=("zone",), engine=engine, loss=loss)
    columns = {name: i for i, name in enumerate(meta.double().rate_names)}
    names = tuple(name for name, _ in meta.learner.named_parameters())
    compared(meta, True, 1, names, lambda step, name: meta.rates[step, columns[name]], loss)


@pytest.mark.parametrize("order", [1, 2])
@ENGINES
def test_anil_adapts_the_head_alone(engine: str, order: int):
    meta = ANIL(mlp(), steps=3, rate=0.05, order=order, engine=engine).double()
    assert meta.adapted == HEAD
    assert set(meta.adapt(made_up().support, {}).weights) == set(HEAD)
    compared(meta, False, order, HEAD, same(meta))


@pytest.mark.parametrize("order", [1, 2])
@ENGINES
def test_boil_adapts_all_but_the_head(engine: str, order: int):
    meta = BOIL(mlp(True), steps=3, rate=0.05, order=order, adapt_rows=("zone",), engine=engine).double()
    assert meta.adapted == tuple(n for n, _ in meta.learner.named_parameters() if n not in HEAD)
    compared(meta, True, order, meta.adapted, same(meta))


def test_a_factorisations_head_is_what_a_user_is_known_by():
    for kind, names in ((ANIL, ("taste", "bias")), (BOIL, None)):
        meta = kind(factorisation(), steps=2, rate=0.01).double()
        if names is None:
            names = tuple(n for n, _ in meta.learner.named_parameters() if n not in ("taste", "bias"))
        assert meta.adapted == names
        compared(meta, False, 2, names, same(meta))


@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("settings", [{}, {"chunk": 2}, {"keep": 1}], ids=["whole", "chunks", "recomputed"])
@LEARNERS
def test_meta_sgd_has_a_rate_a_weight(learner, settings: dict[str, int], order: int):
    made = {"steps": 3, "rate": 0.05, "order": order, "adapt_rows": ("zone",), "layout": LAYOUT_WITH_ROWS}
    meta = MetaSGD(learner(True), **made, **settings).double()
    draw = torch.Generator().manual_seed(3)
    with torch.no_grad():  # some of them negative
        meta.rates.copy_(0.02 + 0.05 * torch.randn(meta.rates.shape, generator=draw).double())
    rates, at = {}, 0
    for name in meta.adapted:
        of = meta.learner.get_parameter(name)
        rates[name], at = meta.rates[at : at + of.numel()].view(of.shape), at + of.numel()
    rates["rows:zone"] = meta.rates[at:]
    assert rates["rows:zone"].shape == (4,)
    compared(meta, True, order, meta.adapted, lambda step, name: rates[name])


def test_meta_sgd_starts_as_maml():
    settings = {"steps": 2, "rate": 0.07, "adapt": ("head.*", "layers.1.*")}
    sgd, maml = MetaSGD(mlp(), **settings).double(), MAML(mlp(), **settings).double()
    torch.testing.assert_close(sgd(made_up()).after, maml(made_up()).after)
    curves = sgd.curves()
    assert curves["rates/inner head.weight"] == pytest.approx(0.07)
    assert curves["rates/share below 0"] == 0.0


def test_rates_a_weight_are_taken_by_vmap_with_the_reason_told(caplog: pytest.LogCaptureFixture):
    with caplog.at_level(logging.INFO):
        MetaSGD(mlp()).double()(made_up())
    assert "every weight has a rate of its own" in caplog.text
    with pytest.raises(ValueError, match="every weight has a rate of its own"):
        MetaSGD(mlp(), engine="low_rank")
    MAML(mlp(), engine="low_rank")


@pytest.mark.parametrize("kind", [FOMAML, ANIL, BOIL, MetaSGD])
@LEARNERS
def test_contract(kind: type[MAML], learner):
    check_contract(lambda: kind(learner(), steps=2, rate=0.05))
    check_contract(lambda: kind(learner(), steps=2, rate=0.3, loss="binary_cross_entropy"), click=True)


def test_refusals():
    nameless = torch.nn.Sequential(torch.nn.Linear(3, 1), torch.nn.Flatten(-2))
    for kind in (ANIL, BOIL):
        with pytest.raises(ValueError, match="head_parameters"):
            kind(nameless)
    with pytest.raises(ValueError, match="nothing but its head"):
        BOIL(MLP(3, ()))
    for kind, lacks in ((ANIL, "adapt"), (ANIL, "adapt_rows"), (BOIL, "adapt"), (FOMAML, "order")):
        with pytest.raises(TypeError, match=lacks):
            kind(mlp(), **{lacks: ("*",)})
    with pytest.raises(ValueError, match="steps must be at least 1, got 0"):
        MetaSGD(mlp(), steps=0)
    with pytest.raises(ValueError, match="how wide those of zone"):
        MetaSGD(mlp(True), adapt_rows=("zone",), layout=LAYOUT)
    with pytest.raises(ValueError, match="nothing adapts"):
        MetaSGD(mlp(), adapt=())
