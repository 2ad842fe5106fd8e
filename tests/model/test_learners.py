"""Base learners against their formulas, written out for one event at a time in float64; what all of them promise."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from metatrain.meta.layout import Columns, Layout
from metatrain.meta.maml import MAML
from metatrain.model.learners.content import ContentBased
from metatrain.model.learners.cross import DeepCross
from metatrain.model.learners.deepfm import DeepFM
from metatrain.model.learners.factorisation import Factorisation
from metatrain.model.learners.hybrid import Hybrid
from metatrain.model.learners.mlp import MLP
from tests.meta.contract import LAYOUT, check_contract

#: The id's columns last, as where its rows adapt; no features of tasks.
ADAPTED = Layout((Columns("genres", "item", 0, 4), Columns("hour", "event", 4, 5), Columns("item", "item", 5, 13)))
NO_CONTENT = Layout((Columns("age", "task", 0, 4), Columns("item", "item", 4, 12)))
NO_ID = Layout((Columns("age", "task", 0, 4), Columns("year", "item", 4, 5)))
NO_ITEM = Layout((Columns("age", "task", 0, 4),))
ONE = Layout((Columns("item", "item", 0, 8),))
OFFSET = 3.53

Weights = dict[str, Tensor]


def columns(x: Tensor, layout: Layout, wanted: Callable[[Columns], bool]) -> Tensor:
    """One event's numbers [F] of the features that are wanted."""
    return torch.cat([x[c.start : c.stop] for c in layout.features if wanted(c)] or [x[:0]])


def task(x: Tensor, layout: Layout) -> Tensor:
    return columns(x, layout, lambda c: c.owner == "task")


def content(x: Tensor, layout: Layout) -> Tensor:
    return columns(x, layout, lambda c: c.owner == "event" or (c.owner == "item" and c.feature != "item"))


def item_id(x: Tensor, layout: Layout) -> Tensor:
    return columns(x, layout, lambda c: c.feature == "item")


def mlp(p: Weights, name: str, x: Tensor) -> Tensor:
    n = 0
    while f"{name}{n}.weight" in p:
        x = torch.tanh(p[f"{name}{n}.weight"] @ x + p[f"{name}{n}.bias"])
        n += 1
    return x


def tower(p: Weights, name: str, x: Tensor) -> Tensor:
    v = p[f"{name}.linear.weight"] @ x
    if f"{name}.out.weight" in p:
        v = v + p[f"{name}.out.weight"] @ mlp(p, f"{name}.hidden.layers.", x) + p[f"{name}.out.bias"]
    return v


def taste(p: Weights, name: str, v: Tensor, t: Tensor) -> Tensor:
    score = p[f"{name}.popularity.weight"][0] @ v + p[f"{name}.vector"] @ v + p[f"{name}.bias"][0]
    if f"{name}.tower.linear.weight" in p:
        own = tower(p, f"{name}.tower", t)
        score = score + own[:-1] @ v + own[-1]
    return score


def by_factorisation(p: Weights, x: Tensor, layout: Layout) -> Tensor:
    c, t = content(x, layout), task(x, layout)
    v = item_id(x, layout) if len(item_id(x, layout)) else torch.zeros(len(p["taste"]), dtype=x.dtype)
    if "content.weight" in p:
        v = v + p["content.weight"] @ c
    if "layers.0.weight" in p:
        last = max(n for n in range(9) if f"layers.{n}.weight" in p)
        h = mlp({k: w for k, w in p.items() if not k.startswith(f"layers.{last}.")}, "layers.", c)
        v = v + p[f"layers.{last}.weight"] @ h + p[f"layers.{last}.bias"]
    score = OFFSET + p["popularity.weight"][0] @ v + p["taste"] @ v + p["bias"][0]
    if "user.weight" in p:
        own = p["user.weight"] @ t
        score = score + own[:-1] @ v + own[-1]
    return score


def by_content(p: Weights, x: Tensor, layout: Layout) -> Tensor:
    return OFFSET + taste(p, "user", tower(p, "item", content(x, layout)), task(x, layout))


def by_hybrid(p: Weights, x: Tensor, layout: Layout) -> Tensor:
    e, t = item_id(x, layout), task(x, layout)
    logit = p["alpha_logit"][0] + (p["gate.weight"][0] @ e if "gate.weight" in p else 0.0)
    alpha = 1 / (1 + torch.exp(-logit)) if any(float(n) for n in e) else 0.0
    of_content = by_content({k.removeprefix("content."): w for k, w in p.items()}, x, layout) - OFFSET
    return OFFSET + alpha * taste(p, "collaborative", e, t) + (1 - alpha) * of_content


def by_deepfm(p: Weights, x: Tensor, layout: Layout) -> Tensor:
    fields = []
    for n, c in enumerate(layout.features):
        f = x[c.start : c.stop]
        fields.append(p[f"fields.{n}.weight"] @ f if f"fields.{n}.weight" in p else f)
    score = OFFSET + p["linear.weight"][0] @ x + p["linear.bias"][0]
    score = score + sum(one @ other for one, other in itertools.combinations(fields, 2))
    if "head.weight" in p:
        score = score + p["head.weight"][0] @ mlp(p, "deep.layers.", torch.cat(fields)) + p["head.bias"][0]
    return score


def by_cross(p: Weights, x: Tensor, layout: Layout, stacked: bool = False) -> Tensor:
    crossed, n = x, 0
    while any(name.startswith(f"crosses.{n}.") for name in p):
        if f"crosses.{n}.0.weight" in p:
            matrix, bias = p[f"crosses.{n}.1.weight"] @ p[f"crosses.{n}.0.weight"], p[f"crosses.{n}.1.bias"]
        else:
            matrix, bias = p[f"crosses.{n}.weight"], p[f"crosses.{n}.bias"]
        crossed = torch.stack([x[i] * (matrix[i] @ crossed + bias[i]) + crossed[i] for i in range(len(x))])
        n += 1
    deep = "deep.layers.0.weight" in p
    if stacked:
        h = mlp(p, "deep.layers.", crossed)
    else:
        h = torch.cat([crossed, mlp(p, "deep.layers.", x)]) if deep else crossed
    return OFFSET + p["head.weight"][0] @ h + p["head.bias"][0]


def by_mlp(p: Weights, x: Tensor, layout: Layout) -> Tensor:
    return OFFSET + p["head.weight"][0] @ torch.cat([mlp(p, "layers.", x), x]) + p["head.bias"][0]


def learner_of(kind: type[nn.Module], layout: Layout = LAYOUT, **options: object) -> nn.Module:
    """In float64, with every parameter away from its start, so that none is without effect."""
    given = {"hidden": (7, 5), "activation": "tanh", "offset": OFFSET, **options}
    if kind not in (MLP, DeepCross):
        given["layout"] = layout
    learner = kind(layout.width, **given).double()
    generator = torch.Generator().manual_seed(1)
    for parameter in learner.parameters():
        parameter.data.normal_(0, 0.4, generator=generator)
    # As exact as the formulas': the constructor rounds it to float32.
    learner.offset = torch.tensor(OFFSET, dtype=torch.float64)
    return learner


CASES = {
    "factorisation": (by_factorisation, lambda: (learner_of(Factorisation), LAYOUT)),
    "factorisation, linear": (by_factorisation, lambda: (learner_of(Factorisation, ADAPTED, hidden=()), ADAPTED)),
    "factorisation, no id": (by_factorisation, lambda: (learner_of(Factorisation, NO_ID, width=6), NO_ID)),
    "factorisation, id alone": (by_factorisation, lambda: (learner_of(Factorisation, NO_CONTENT), NO_CONTENT)),
    "content": (by_content, lambda: (learner_of(ContentBased, width=6), LAYOUT)),
    "content, linear": (by_content, lambda: (learner_of(ContentBased, hidden=()), LAYOUT)),
    "content, no tasks": (by_content, lambda: (learner_of(ContentBased, ADAPTED, hidden=(3,)), ADAPTED)),
    "hybrid": (by_hybrid, lambda: (learner_of(Hybrid, width=6), LAYOUT)),
    "hybrid, no gate": (by_hybrid, lambda: (learner_of(Hybrid, ADAPTED, gate=False, hidden=()), ADAPTED)),
    "deepfm": (by_deepfm, lambda: (learner_of(DeepFM, width=4), LAYOUT)),
    "deepfm, no deep part": (by_deepfm, lambda: (learner_of(DeepFM, ADAPTED, width=8, hidden=()), ADAPTED)),
    "cross, parallel": (by_cross, lambda: (learner_of(DeepCross, crosses=3), LAYOUT)),
    "cross, alone": (by_cross, lambda: (learner_of(DeepCross, hidden=()), LAYOUT)),
    "cross, stacked, low rank": (
        lambda *of: by_cross(*of, stacked=True),
        lambda: (learner_of(DeepCross, structure="stacked", rank=3), LAYOUT),
    ),
    "mlp": (by_mlp, lambda: (learner_of(MLP), LAYOUT)),
}


def events_of(layout: Layout, *shape: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, layout.width, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("case", CASES)
def test_scores_and_gradients_are_the_formulas_of_one_event_at_a_time(case: str):
    formula, make = CASES[case]
    learner, layout = make()
    x = events_of(layout, 3, 4)
    parameters = dict(learner.named_parameters())
    expected = torch.stack([torch.stack([formula(parameters, event, layout) for event in of_task]) for of_task in x])
    found = learner(x)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    by_score = events_of(layout, 3, 4, seed=1)[..., 0]
    by_hand = torch.autograd.grad((expected * by_score).sum(), list(parameters.values()))
    by_autograd = torch.autograd.grad((found * by_score).sum(), list(parameters.values()))
    for name, one, other in zip(parameters, by_autograd, by_hand, strict=True):
        assert other.abs().max() > 0, f"{name} is without effect"
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_what_a_base_learner_promises(case: str):
    learner, layout = CASES[case][1]()
    x = events_of(layout, 3, 4)
    untouched = x.clone()
    # The score is read off the representation, on any leading axes.
    h = learner.represent(x)
    assert h.shape == (3, 4, learner.represented)
    torch.testing.assert_close(learner.score(h, x), learner(x))
    torch.testing.assert_close(learner(x[0, 0]), learner(x)[0, 0])
    assert torch.equal(x, untouched)
    # Every task with weights of its own, and second derivatives, under torch.func.
    shared = dict(learner.named_parameters())
    generator = torch.Generator().manual_seed(3)
    own = {
        name: p.detach() + 0.1 * torch.randn(3, *p.shape, generator=generator, dtype=torch.float64)
        for name, p in shared.items()
    }

    def stepped(weights: Weights, x: Tensor) -> Tensor:
        loss = grad(lambda w: functional_call(learner, w, (x,)).square().mean())
        moved = {name: w - 0.01 * g for (name, w), g in zip(weights.items(), loss(weights).values(), strict=True)}
        return functional_call(learner, moved, (x,)).sum()

    together = vmap(grad(stepped))(own, x)
    for number in range(3):
        leaves = {name: w[number].clone().requires_grad_() for name, w in own.items()}
        loss = functional_call(learner, leaves, (x[number],)).square().mean()
        found = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
        moved = {name: w - 0.01 * g for (name, w), g in zip(leaves.items(), found, strict=True)}
        alone = torch.autograd.grad(functional_call(learner, moved, (x[number],)).sum(), list(leaves.values()))
        for name, gradient in zip(leaves, alone, strict=True):
            torch.testing.assert_close(together[name][number], gradient, rtol=1e-8, atol=1e-8, msg=name)


@pytest.mark.parametrize("case", CASES)
def test_the_offset_is_not_rounded_in_bfloat16(case: str):
    learner, layout = CASES[case][1]()
    learner.float()
    for parameter in learner.parameters():
        nn.init.zeros_(parameter)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scores = learner(torch.zeros(2, layout.width))
    assert scores.dtype == torch.float32
    torch.testing.assert_close(scores, torch.full((2,), OFFSET))


def test_content_never_sees_the_id():
    learner, x = learner_of(ContentBased), events_of(LAYOUT, 5)
    other = x.clone()
    other[:, 6:14] = 9.0
    assert torch.equal(learner(x), learner(other))
    assert learner.represent(x).shape == (5, 32)


def test_a_hybrid_without_an_id_is_content_and_the_ends_of_alpha_are_its_parts():
    learner, x = learner_of(Hybrid), events_of(LAYOUT, 5)
    of_content = learner.content(x) + OFFSET
    unknown = x.clone()
    unknown[:, 6:14] = 0.0
    assert torch.equal(learner.alpha(unknown), torch.zeros(5, 1, dtype=torch.float64))
    torch.testing.assert_close(learner(unknown), of_content)
    assert (learner(x) - of_content).abs().min() > 1e-3
    learner.alpha_logit.data.fill_(-60.0)
    torch.testing.assert_close(learner(x), of_content)
    learner.alpha_logit.data.fill_(60.0)
    scores = learner(x)
    x[:, 14:] = 5.0  # content
    torch.testing.assert_close(learner(x), scores)


def test_a_hybrids_gate_learns_to_close_on_the_row_of_unknown_items():
    """Items are known by their id but for those whose id is the common row: only content tells these apart."""
    generator = torch.Generator().manual_seed(0)
    layout = Layout((Columns("item", "item", 0, 8), Columns("year", "item", 8, 10)))

    def last_loss(gate: bool) -> float:
        torch.manual_seed(0)
        learner = Hybrid(layout.width, layout=layout, hidden=(), width=4, gate=gate)
        common = nn.Parameter(torch.randn(8, generator=torch.Generator().manual_seed(1)))
        optimizer = torch.optim.Adam([*learner.parameters(), common], lr=0.1)
        losses = []
        for _ in range(100):
            e, year = torch.randn(256, 8, generator=generator), torch.randn(256, 2, generator=generator)
            known = torch.rand(256, generator=generator) < 0.5
            label = torch.where(known, e.sum(-1), year.sum(-1))
            x = torch.cat([torch.where(known[:, None], e, common), year], -1)
            optimizer.zero_grad()
            loss = (learner(x) - label).square().mean()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
        return sum(losses[-10:]) / 10

    assert last_loss(gate=True) < 0.1 < 0.4 < last_loss(gate=False)


def test_a_user_adapts_its_alpha_alone():
    check_contract(lambda: MAML(learner_of(Hybrid, hidden=()), adapt=["alpha_logit"], rate=0.5))


def test_factorisation_starts_without_a_taste_and_hybrid_at_its_alpha():
    torch.manual_seed(0)
    x = events_of(LAYOUT, 6).float()
    learner = Factorisation(LAYOUT.width, layout=LAYOUT)
    assert not learner.taste.any()
    assert not learner.bias.any()
    torch.testing.assert_close(Hybrid(LAYOUT.width, layout=LAYOUT, alpha=0.3).alpha(x), torch.full((6, 1), 0.3))


def test_pairs_lose_nothing_where_fields_come_in_bfloat16():
    """Fields nearly equal: the square of their sum less the sum of their squares would cancel most of its digits."""
    layout = Layout((Columns("a", "task", 0, 2), Columns("b", "item", 2, 4), Columns("c", "item", 4, 6)))
    learner = DeepFM(6, layout=layout, hidden=(), width=3)
    x = torch.tensor([[1.0, 2.0, 1.01, 2.01, 0.99, 2.02]])
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        fields = [f(x[:, c : c + 2]).float() for f, c in zip(learner.fields, (0, 2, 4), strict=True)]
        pairs = learner.represent(x)[:, 6:]
    assert pairs.dtype == torch.float32
    torch.testing.assert_close(pairs, sum(one * other for one, other in itertools.combinations(fields, 2)))


@pytest.mark.parametrize(
    ("kind", "options", "message"),
    [
        (
            Factorisation,
            {"layout": Layout((Columns("age", "task", 0, 4),))},
            "needs the item's id or features of items",
        ),
        (ContentBased, {"layout": NO_CONTENT}, "content-based scores need features of items beside their id"),
        (ContentBased, {"layout": LAYOUT, "width": 0}, "width must be at least 1, got 0"),
        (Hybrid, {"layout": NO_ID}, "a hybrid needs the item's id beside its content"),
        (Hybrid, {"layout": NO_CONTENT}, "need features of items beside their id"),
        (Hybrid, {"layout": LAYOUT, "alpha": 1.0}, "alpha must be between 0 and 1, both excluded, got 1.0"),
        (DeepFM, {"layout": ONE}, "there is but 1"),
        (DeepFM, {"layout": LAYOUT, "width": 0}, "width must be at least 1, got 0"),
        (DeepCross, {"crosses": 0}, "crosses must be at least 1, got 0"),
        (DeepCross, {"structure": "side"}, "unknown structure 'side': parallel, stacked"),
        (DeepCross, {"rank": 21}, "rank must be from 0 (full matrices) to below the input's width, 21, got 21"),
        (MLP, {"activation": "step"}, "unknown activation 'step'"),
        (DeepCross, {"activation": "step"}, "unknown activation 'step'"),
    ],
)
def test_refusals(kind: type[nn.Module], options: dict, message: str):
    width = options["layout"].width if "layout" in options else LAYOUT.width
    with pytest.raises(ValueError, match=re.escape(message)):
        kind(width, **options)


def test_scores_start_near_the_offset():
    """So that training starts from the labels' mean, whatever the learner."""
    for kind in (Factorisation, ContentBased, Hybrid, DeepFM, DeepCross, MLP):
        torch.manual_seed(0)
        options = {} if kind in (MLP, DeepCross) else {"layout": LAYOUT}
        scores = kind(LAYOUT.width, offset=OFFSET, **options)(0.05 * events_of(LAYOUT, 50).float())
        assert (scores - OFFSET).abs().max() < 0.3, kind.__name__
        assert math.isfinite(float(scores.detach().std()))
        assert float(scores.detach().std()) > 0
