"""Implicit MAML against closed forms, and against differentiation through very many steps; one task at a time."""

from __future__ import annotations

import pytest
import torch
from contract import LAYOUT, assert_close, check_contract, made_up, meta_gradient
from inner_steps import LAYOUT_WITH_ROWS, Task, all_gradients, made_up_with_rows
from torch import Tensor, nn

from metatrain.meta.episode import Episodes, Examples
from metatrain.meta.imaml import IMAML, conjugate_gradients
from metatrain.model.learners.factorisation import Factorisation
from metatrain.model.learners.mlp import MLP

HEAD = ("head.weight", "head.bias")


def mlp(rows: bool = False) -> MLP:
    torch.manual_seed(1)
    width = (LAYOUT_WITH_ROWS if rows else LAYOUT).width
    # Without skip: the problems' curvature stays below 14, and few steps solve them.
    return MLP(width, (5,), "tanh", False, offset=3.0).double()


def factorisation() -> Factorisation:
    torch.manual_seed(1)
    learner = Factorisation(LAYOUT.width, layout=LAYOUT, hidden=(7,), activation="tanh", offset=3.5).double()
    torch.nn.init.normal_(learner.taste, std=0.1)
    return learner


def leaves(episodes: Episodes) -> Episodes:
    """With inputs that want a gradient."""
    for side in (episodes.support, episodes.query):
        side.x.requires_grad_()
    return episodes


def solved_head(meta: IMAML, x: Tensor, y: Tensor, query: Tensor) -> Tensor:
    """A task's query scores with the head that minimises mean squared support loss + λ/2 |head - start|²."""
    learner = meta.learner
    start = torch.cat([learner.head.weight[0], learner.head.bias])

    def regressors(of: Tensor) -> Tensor:
        return torch.cat([learner.represent(of), torch.ones(len(of), 1).double()], 1)

    head = start
    if len(y):
        a, ties = regressors(x), meta.strength * torch.eye(len(start)).double()
        normal = 2 / len(y) * a.T @ a + ties
        head = torch.linalg.solve(normal, 2 / len(y) * a.T @ (y - learner.offset) + meta.strength * start)
    return regressors(query) @ head + learner.offset


@pytest.mark.parametrize("chunk", [0, 2])
@pytest.mark.parametrize("loss", ["squared", "huber"])
def test_gradient_is_that_through_the_closed_form(loss: str, chunk: int):
    """Linear head, squared inner loss: φ has a closed form, and autograd goes through it."""
    meta = IMAML(
        mlp(), adapt=("head.*",), steps=90, rate=0.1, strength=2.0, cg_steps=9, loss=loss, inner_loss="squared",
        chunk=chunk,
    ).double()  # fmt: skip
    episodes = leaves(made_up(support=9))
    losses = []
    for number in range(episodes.size):
        task = Task.of(meta, episodes, number)
        scores = solved_head(meta, task.support[0], task.support[2], task.query[0])
        losses.append(meta.event_loss(scores, task.query[2]).mean())
    expected = all_gradients(meta, episodes, torch.stack(losses).sum())
    found = meta(episodes)
    torch.testing.assert_close(found.after, torch.stack(losses).detach())
    gradients = all_gradients(meta, episodes, found.total)
    assert_close(gradients, expected)
    # What the support says of the inputs is a part that the direct path alone doesn't have.
    assert gradients["x of support"].abs().max() > 1e-3
    curves = meta.curves()
    assert curves["meta/imaml inner residual"] < 1e-6
    assert curves["meta/imaml CG residual"] < 1e-6


@pytest.mark.parametrize("loss", ["squared", "binary_cross_entropy"])
@pytest.mark.parametrize("adapt", [("*",), ("layers.*",)], ids=["all", "body"])
def test_gradient_is_that_through_very_many_steps(adapt: tuple[str, ...], loss: str):
    """Of a learner that isn't linear, with adapted rows: what unrolling the regularised problem converges to."""
    settings = {"adapt": adapt, "adapt_rows": ("zone",), "rate": 0.1, "strength": 6.0, "loss": loss}
    meta = IMAML(mlp(True), steps=90, cg_steps=60, **settings).double()
    episodes = made_up_with_rows(click=loss == "binary_cross_entropy", tasks=3, support=4, scale=0.3)
    losses = []
    for number in range(episodes.size):
        task = Task.of(meta, episodes, number)
        found = task.adapted(meta.adapted, 80, lambda step, name: 0.1, strength=6.0)
        losses.append(task.query_loss(*found))
    expected = all_gradients(meta, episodes, torch.stack(losses).sum())
    found = meta(episodes)
    torch.testing.assert_close(found.after, torch.stack(losses).detach())
    assert_close(all_gradients(meta, episodes, found.total), expected)


def graph(total: Tensor) -> int:
    """Numbers that the graph behind a loss holds on to."""
    nodes, seen, held = [total.grad_fn], set(), 0
    while nodes:
        node = nodes.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        saved = getattr(node, "saved_tensors", ())
        saved += tuple(getattr(node, n) for n in dir(node) if n.startswith("_saved_") and n != "_saved_tensors")
        held += sum(t.numel() for t in saved if isinstance(t, Tensor))
        nodes += [before for before, _ in node.next_functions]
    return held


def test_memory_does_not_grow_with_the_steps():
    held = [graph(IMAML(mlp(), steps=steps, rate=0.01).double()(made_up()).total) for steps in (1, 30)]
    assert held[0] == held[1] > 0


def test_conjugate_gradients_solve_many_systems_and_end_at_negative_curvature():
    draw = torch.Generator().manual_seed(0)
    half = torch.randn(3, 6, 6, generator=draw).double()
    systems = half @ half.transpose(1, 2) + 0.1 * torch.eye(6)
    b = torch.randn(3, 6, generator=draw).double()
    b[1] = 0.0  # solved before it begins
    found, left = conjugate_gradients(lambda v: torch.einsum("tij,tj->ti", systems, v), b, 40)
    torch.testing.assert_close(found, torch.linalg.solve(systems, b.unsqueeze(-1)).squeeze(-1))
    assert (left < 1e-10).all()
    # One system is bent the wrong way throughout, one in a direction that isn't the first.
    systems[0] = -systems[0]
    systems[2] = torch.diag(torch.tensor([3.0, 2.0, 1.0, -0.5, 1.0, 1.0]))
    found, _ = conjugate_gradients(lambda v: torch.einsum("tij,tj->ti", systems, v), torch.ones(3, 6).double(), 40)
    assert (found[0] == 1).all()
    assert torch.isfinite(found).all()
    assert found[2].norm() < 10


def test_a_strong_tie_is_no_adaptation_and_a_weak_one_forgets_the_start():
    """(I + H/λ)⁻¹ vanishes with λ where the support decides everything."""
    shares, gradients = [], []
    for strength, rate in ((1e4, 1e-4), (1e-3, 0.15)):
        learner = nn.Sequential(nn.Linear(2, 1, bias=False), nn.Flatten(-2)).double()
        meta = IMAML(learner, steps=150, rate=rate, strength=strength, cg_steps=2)
        draw = torch.Generator().manual_seed(0)
        x = torch.randn(4, 12, 2, generator=draw).double()
        y, ones = x.sum(-1), torch.ones(4, 12).double()
        of = Examples(x, {}, y, ones)
        found = meta(Episodes(of, of, {}))
        gradient = meta_gradient(meta, found.total)["learner.0.weight"]
        shares.append(float(found.after.sum() / found.before.sum()))
        gradients.append(float(gradient.norm()))
    assert shares[0] > 0.99
    assert shares[1] < 1e-5
    assert gradients[1] < 1e-4 * gradients[0]


def test_contract():
    for make in (mlp, factorisation):
        check_contract(lambda make=make: IMAML(make(), steps=4, rate=0.01, strength=0.5))
        check_contract(lambda make=make: IMAML(make(), steps=4, rate=0.3, loss="binary_cross_entropy"), click=True)


def test_refusals():
    for name in ("steps", "cg_steps"):
        with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
            IMAML(mlp(), **{name: 0})
    with pytest.raises(ValueError, match="strength must be above 0, got 0"):
        IMAML(mlp(), strength=0.0)
    with pytest.raises(ValueError, match=r"must be below 2, got 0.5 × 4"):
        IMAML(mlp(), strength=4.0, rate=0.5)
    with pytest.raises(ValueError, match="no curvature"):
        IMAML(mlp(), loss="absolute")
    IMAML(mlp(), loss="absolute", inner_loss="huber")
    with pytest.raises(ValueError, match="nothing adapts"):
        IMAML(mlp(), adapt=())
    fused = nn.Sequential(nn.Linear(2, 3), nn.LayerNorm(3), nn.Linear(3, 1), nn.Flatten(-2))
    with pytest.raises(ValueError, match=r"1\.weight"):
        IMAML(fused)
    IMAML(fused, adapt=("2.*",))
