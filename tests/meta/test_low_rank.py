"""The low-rank engine against a float64 loop over single tasks that knows neither vmap nor the low-rank form."""

from __future__ import annotations

import copy
import os
import pickle
import threading
from dataclasses import dataclass
from fnmatch import fnmatchcase
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.func import functional_call

from metatrain.meta.engine import Engine, FastWeights, VmapEngine, rows_key
from metatrain.meta.episode import Episodes, Examples, Slots
from metatrain.meta.losses import event_loss, mean_over_events
from metatrain.meta.low_rank import CannotServe, LowRankEngine
from metatrain.meta.low_rank_products import multiply, multiply_add
from metatrain.model.learners.mlp import MLP

LOSSES = ("squared", "absolute", "huber", "binary_cross_entropy")
PATTERNS = ("*", "head.*", "layers.0.*", "layers.1.*", "*.bias", "*.weight", "head.weight", "layers.0.bias")
#: Adapted features: name → rows of a task, ids of an event at most, width. At level task all events share the slots.
ROWS = {"item": (3, 1, 2), "genres": (4, 3, 3), "task": (2, 2, 1)}

BOTH = pytest.mark.parametrize("kernels", [True, False], ids=["by kernels", "by torch"])


@dataclass
class Case:
    """A learner, its tasks and its rates."""

    learner: nn.Module
    adapted: tuple[str, ...]
    rates: Tensor
    episodes: Episodes

    @property
    def parameters(self) -> dict[str, Tensor]:
        return {**dict(self.learner.named_parameters()), **dict(self.learner.named_buffers())}

    @property
    def steps(self) -> list[dict[str, Tensor]]:
        names = (*self.adapted, *(rows_key(name) for name in self.episodes.rows))
        return [dict(zip(names, row.unbind(), strict=True)) for row in self.rates]

    @property
    def leaves(self) -> list[Tensor]:
        sides = (self.episodes.support.x, self.episodes.query.x)
        return [*sides, self.rates, *self.learner.parameters(), *self.episodes.rows.values()]


def make(
    hidden=(5, 4),
    activation="relu",
    skip=True,
    steps=2,
    pattern="*",
    loss="squared",
    sizes=(5, 4, 3),
    seed=0,
    dtype=torch.float64,
    rows=(),
    fixed=6,
    norm="none",
) -> Case:
    """Random weights and tasks; the first task has no support event, others ragged support and query.

    `rows` names features of `ROWS` that adapt; `fixed` is the width of the inputs that don't.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    learner = MLP(fixed + sum(ROWS[name][2] for name in rows), hidden, activation, skip, 0.3, norm).to(dtype)
    with torch.no_grad():
        for p in learner.parameters():
            p.copy_(normal(*p.shape) * 0.6)
    adapted = tuple(name for name, _ in learner.named_parameters() if fnmatchcase(name, pattern))
    rates = (normal(steps, len(adapted) + len(rows)).abs() * 0.1 + 0.02).requires_grad_()
    tasks, support, query = sizes
    own = {name: normal(tasks, *ROWS[name][::2]).requires_grad_() for name in rows}

    def slots(name: str, events: int) -> Slots:
        count, most, _ = ROWS[name]
        shape = (tasks, 1 if name == "task" else events, most)
        index = torch.randint(0, count, shape, generator=generator)
        mask = (torch.rand(shape, generator=generator) < 0.8).to(dtype)
        return Slots(index.expand(-1, events, -1), mask.expand(-1, events, -1))

    def examples(events: int) -> Examples:
        labels = (normal(tasks, events) > 0).to(dtype) if loss == "binary_cross_entropy" else normal(tasks, events)
        mask = (normal(tasks, events) > -0.5).to(dtype)
        x = normal(tasks, events, fixed).requires_grad_()
        return Examples(x, {name: slots(name, events) for name in rows}, labels, mask)

    s, q = examples(support), examples(query)
    s.mask[:1] = 0
    return Case(learner, adapted, rates, Episodes(s, q, own))


def reference(case: Case, loss: str, order: int) -> tuple[Tensor, list[Tensor]]:
    """Each task's query loss, and the gradient of twice their sum: one task at a time, by autograd alone."""
    of_event = event_loss(loss)
    losses = []
    support, query = case.episodes.support, case.episodes.query
    for t in range(case.episodes.size):
        adapts = {name: case.parameters[name] for name in case.adapted}
        adapts |= {rows_key(name): rows[t] for name, rows in case.episodes.rows.items()}
        for rates in case.steps if adapts else ():
            at = adapts if order == 2 else {n: w.detach().requires_grad_() for n, w in adapts.items()}
            scores = scores_of(case, at, support, t, constant=order == 1)
            inner = mean_over_events(of_event(scores, support.labels[t]), support.mask[t])
            inner = inner + 0 * sum(w.sum() for w in at.values())  # a task may use none of its rows
            found = torch.autograd.grad(
                inner, list(at.values()), create_graph=order == 2, allow_unused=True, materialize_grads=True
            )
            adapts = {n: w - rates[n] * g for (n, w), g in zip(adapts.items(), found, strict=True)}
        losses.append(mean_over_events(of_event(scores_of(case, adapts, query, t), query.labels[t]), query.mask[t]))
    return torch.stack(losses).detach(), gradients(2 * torch.stack(losses).sum(), case)


def scores_of(case: Case, adapts: dict[str, Tensor], examples: Examples, t: int, constant: bool = False) -> Tensor:
    """Scores of one task's events, each event's rows picked and averaged one by one."""
    inputs = []
    for event, x in enumerate(examples.x[t]):
        parts = [x.detach() if constant else x]
        for name in sorted(case.episodes.rows):
            rows, (index, mask) = adapts[rows_key(name)], examples.slots[name]
            used = [rows[i] for i, m in zip(index[t, event], mask[t, event], strict=True) if m]
            parts.append(torch.stack(used).mean(0) if used else torch.zeros_like(rows[0]))
        inputs.append(torch.cat(parts))
    weights = {name: w for name, w in adapts.items() if name in case.adapted}
    frozen = {n: p.detach() for n, p in case.learner.named_parameters()} if constant else {}
    x = torch.stack(inputs) if inputs else examples.x[t]
    return functional_call(case.learner, frozen | weights, (x,))


def gradients(total: Tensor, case: Case) -> list[Tensor]:
    """By every leaf; zeros where it does not matter."""
    return list(torch.autograd.grad(total, case.leaves, allow_unused=True, materialize_grads=True))


def fused(
    case: Case,
    loss: str,
    order: int,
    chunk: int = 0,
    engine: LowRankEngine | None = None,
    kernels: bool = True,
    served: bool = True,
):
    """Losses and gradients by the hand-written reverse, run by the kernels, which must serve, or by torch."""
    engine = engine or LowRankEngine(case.learner, loss, order, chunk=chunk)
    with mock.patch.dict(os.environ, METATRAIN_KERNELS=str(int(kernels))):
        result = engine.query_loss(case.parameters, case.adapted, case.steps, case.episodes, loss)
    if kernels and served:
        assert all(engine._translations._held.values())
        assert engine._translations._held
    return result.after, gradients(2 * result.total, case)


def assert_both_same(case: Case, loss: str, order: int, chunk: int, expected, tolerance=1e-9) -> None:
    """The kernels' result and torch's."""
    assert_same(fused(case, loss, order), expected, tolerance)
    assert_same(fused(case, loss, order, chunk, kernels=False), expected, tolerance)


def plain(case: Case, loss: str, order: int):
    """Losses and gradients through `adapt` and `predict`."""
    engine = LowRankEngine(case.learner, loss, order)
    return adapting(case, engine, loss)


def adapting(case: Case, engine: Engine, loss: str):
    """Losses and gradients through any engine's `adapt` and `predict`."""
    fast = engine.adapt(case.parameters, case.adapted, case.steps, case.episodes.support, case.episodes.rows)
    query = case.episodes.query
    after = mean_over_events(event_loss(loss)(engine.predict(case.parameters, fast, query), query.labels), query.mask)
    return after.detach(), gradients(2 * after.sum(), case)


def assert_same(got, expected, tolerance=1e-9) -> None:
    torch.testing.assert_close(got[0], expected[0], rtol=tolerance, atol=tolerance)
    # Gradients that cancel are compared with the size of the whole, not with their own rounding.
    scale = torch.cat([g.flatten() for g in expected[1]]).norm().clamp(min=1e-3)
    for mine, theirs in zip(got[1], expected[1], strict=True):
        assert (mine - theirs).norm() <= tolerance * scale


@settings(max_examples=120, deadline=None)
@given(
    hidden=st.sampled_from([(), (5,), (5, 4), (5, 4, 3)]),
    activation=st.sampled_from(["relu", "tanh", "gelu", "silu"]),
    skip=st.booleans(),
    order=st.sampled_from([1, 2]),
    steps=st.integers(0, 3),
    pattern=st.sampled_from(PATTERNS),
    loss=st.sampled_from(LOSSES),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)),
    chunk=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_gradients_equal_a_loop_over_tasks(
    hidden, activation, skip, order, steps, pattern, loss, sizes, chunk, seed
) -> None:
    case = make(hidden, activation, skip, steps, pattern, loss, sizes, seed)
    expected = reference(case, loss, order)
    assert_both_same(case, loss, order, chunk, expected)
    assert_same(plain(case, loss, order), expected)


@settings(max_examples=100, deadline=None)
@given(
    rows=st.lists(st.sampled_from(tuple(ROWS)), min_size=1, unique=True),
    hidden=st.sampled_from([(), (5,), (5, 4), (5, 4, 3)]),
    activation=st.sampled_from(["relu", "tanh"]),
    skip=st.booleans(),
    order=st.sampled_from([1, 2]),
    steps=st.integers(0, 5),
    pattern=st.sampled_from((*PATTERNS, "")),
    loss=st.sampled_from(LOSSES),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)),
    fixed=st.sampled_from([0, 6]),
    norm=st.sampled_from(["none", "layer"]),
    chunk=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_rows_that_adapt(
    rows, hidden, activation, skip, order, steps, pattern, loss, sizes, fixed, norm, chunk, seed
) -> None:
    case = make(hidden, activation, skip, steps, pattern, loss, sizes, seed, rows=rows, fixed=fixed, norm=norm)
    expected = reference(case, loss, order)
    assert_both_same(case, loss, order, chunk, expected, 1e-10)
    assert_same(plain(case, loss, order), expected, 1e-10)
    assert_same(adapting(case, VmapEngine(case.learner, event_loss(loss), order), loss), expected, 1e-10)


@settings(max_examples=80, deadline=None)
@given(
    hidden=st.sampled_from([(5,), (5, 4), (5, 4, 3)]),
    activation=st.sampled_from(["relu", "tanh", "gelu", "silu"]),
    skip=st.booleans(),
    order=st.sampled_from([1, 2]),
    steps=st.integers(0, 5),
    pattern=st.sampled_from((*PATTERNS, "norms.*", "norms.0.weight", "norms.*.bias", "layers.*")),
    loss=st.sampled_from(LOSSES),
    sizes=st.tuples(st.integers(1, 5), st.integers(1, 4), st.integers(1, 4)),
    chunk=st.integers(0, 3),
    seed=st.integers(0, 1000),
)
def test_normalised_layers(hidden, activation, skip, order, steps, pattern, loss, sizes, chunk, seed) -> None:
    case = make(hidden, activation, skip, steps, pattern, loss, sizes, seed, norm="layer")
    expected = reference(case, loss, order)
    assert_both_same(case, loss, order, chunk, expected)
    assert_same(plain(case, loss, order), expected)
    assert_same(adapting(case, VmapEngine(case.learner, event_loss(loss), order), loss), expected)


@pytest.mark.parametrize("queries", [1, 40], ids=["last step as factors", "last step folded"])
@pytest.mark.parametrize("steps", [1, 3])
def test_wide_layers_and_many_steps(queries: int, steps: int) -> None:
    case = make((16, 8), "tanh", False, steps, "*", "squared", (4, 5, queries))
    assert_both_same(case, "squared", 2, 3, reference(case, "squared", 2))


def test_second_order_equals_finite_differences() -> None:
    case = make((3,), "tanh", True, 2, "*", "binary_cross_entropy", (2, 3, 2))
    names = [name for name, _ in case.learner.named_parameters()]
    engine = LowRankEngine(case.learner, "binary_cross_entropy")
    buffers = dict(case.learner.named_buffers())

    def total(rates: Tensor, x_s: Tensor, x_q: Tensor, *parameters: Tensor) -> Tensor:
        s, q = case.episodes.support, case.episodes.query
        episodes = Episodes(Examples(x_s, {}, s.labels, s.mask), Examples(x_q, {}, q.labels, q.mask), {})
        steps = [dict(zip(case.adapted, row.unbind(), strict=True)) for row in rates]
        shared = {**dict(zip(names, parameters, strict=True)), **buffers}
        return engine.query_loss(shared, case.adapted, steps, episodes, "binary_cross_entropy").total

    at = [case.rates, case.episodes.support.x, case.episodes.query.x, *case.learner.parameters()]
    assert torch.autograd.gradcheck(total, [t.detach().requires_grad_() for t in at], atol=1e-7, rtol=1e-5)


@BOTH
def test_float32_is_within_its_rounding(kernels: bool) -> None:
    case = make((64, 64), "relu", False, 5, "*", "squared", (8, 20, 10), dtype=torch.float32)
    exact = make((64, 64), "relu", False, 5, "*", "squared", (8, 20, 10))
    with torch.no_grad():
        for mine, theirs in zip(exact.leaves, case.leaves, strict=True):
            mine.copy_(theirs * 0.1 if mine is not exact.rates else theirs)
            theirs.copy_(mine)
    _, expected = reference(exact, "squared", 2)
    _, got = fused(case, "squared", 2, kernels=kernels)
    a, b = (torch.cat([g.double().flatten() for g in found]) for found in (got, expected))
    assert (a - b).norm() / b.norm() < 1e-5


@BOTH
def test_a_replay_sees_new_values_rates_and_shapes(kernels: bool) -> None:
    """What was recorded for one batch must not remember its numbers."""
    first = make(seed=1)
    engine = LowRankEngine(first.learner, "squared", chunk=2)
    for seed, sizes in [(1, (5, 4, 3)), (2, (5, 4, 3)), (3, (4, 7, 3)), (4, (9, 2, 6)), (5, (5, 4, 3))]:
        other = make(sizes=sizes, seed=seed)
        assert_same(fused(other, "squared", 2, engine=engine, kernels=kernels), reference(other, "squared", 2))


@BOTH
def test_inputs_are_never_written_to_nor_kept(kernels: bool) -> None:
    case = make(sizes=(5, 4, 3))
    engine = LowRankEngine(case.learner, "squared", chunk=2)
    for _ in range(3):
        before = [case.episodes.support.x.detach().clone(), case.episodes.query.x.detach().clone()]
        fused(case, "squared", 2, engine=engine, kernels=kernels)
        assert torch.equal(before[0], case.episodes.support.x)
        assert torch.equal(before[1], case.episodes.query.x)
    places = {case.episodes.support.x.untyped_storage().data_ptr(), case.episodes.query.x.untyped_storage().data_ptr()}
    for _, recording in engine._recordings._chunks.values():
        for program in (recording.chunk.forward, recording.chunk.backward):
            assert not places & {t.untyped_storage().data_ptr() for t in program.inputs()}


@BOTH
def test_padding_changes_nothing(kernels: bool) -> None:
    case = make(sizes=(4, 4, 3))
    expected = fused(case, "squared", 2, kernels=kernels)
    with torch.no_grad():
        for examples in (case.episodes.support, case.episodes.query):
            padded = examples.mask == 0
            examples.x[padded] = 1e3
            examples.labels[padded] = -1e3
    got = fused(case, "squared", 2, kernels=kernels)
    torch.testing.assert_close(got[0], expected[0])
    for mine, theirs in zip(got[1][2:], expected[1][2:], strict=True):
        torch.testing.assert_close(mine, theirs)
    assert torch.all(got[1][0][case.episodes.support.mask == 0] == 0)


def test_before_is_the_loss_of_the_shared_parameters() -> None:
    case = make()
    engine = LowRankEngine(case.learner, "squared")
    query = case.episodes.query
    scores = engine.predict(case.parameters, FastWeights({}, {}), query)
    expected = mean_over_events(event_loss("squared")(scores, query.labels), query.mask)
    got = engine.query_loss(case.parameters, case.adapted, case.steps, case.episodes, "squared")
    torch.testing.assert_close(got.before, expected.detach())
    assert not got.before.requires_grad
    assert not got.after.requires_grad


def test_without_gradients_nothing_is_reversed() -> None:
    case = make()
    engine = LowRankEngine(case.learner, "squared")
    with torch.inference_mode():
        quiet = engine.query_loss(case.parameters, case.adapted, case.steps, case.episodes, "squared")
    assert not quiet.total.requires_grad
    # Buffers made in inference mode must serve training afterwards.
    assert_same(fused(case, "squared", 2, engine=engine), reference(case, "squared", 2))
    torch.testing.assert_close(quiet.after, reference(case, "squared", 2)[0])


@BOTH
@pytest.mark.parametrize("sizes", [(0, 4, 3), (3, 0, 2)], ids=["no task", "no support event"])
def test_empty_batches_have_zero_gradients_where_nothing_is(sizes: tuple[int, int, int], kernels: bool) -> None:
    case = make(sizes=sizes)
    after, found = fused(case, "squared", 2, kernels=kernels)
    assert after.shape == (sizes[0],)
    assert torch.all(found[2] == 0)
    if not sizes[0]:
        assert all(torch.all(g == 0) for g in found)


def test_a_loss_without_a_name_goes_by_autograd() -> None:
    case = make(loss="squared")
    engine = LowRankEngine(case.learner, lambda s, y: (s - y) ** 4)
    named = LowRankEngine(case.learner, event_loss("squared"))
    assert_same(fused(case, "squared", 2, engine=named, served=False), reference(case, "squared", 2))
    result = engine.query_loss(case.parameters, case.adapted, case.steps, case.episodes, lambda s, y: (s - y).abs())
    assert torch.isfinite(result.total)


def test_rates_may_be_of_another_type() -> None:
    case = make()
    case.rates = case.rates.detach().float().requires_grad_()
    _, found = fused(case, "squared", 2)
    assert found[2].dtype == torch.float32


def test_a_graph_that_is_retained_goes_backward_twice() -> None:
    case = make()
    total = (
        LowRankEngine(case.learner, "squared")
        .query_loss(case.parameters, case.adapted, case.steps, case.episodes, "squared")
        .total
    )
    first = torch.autograd.grad(total, case.leaves, torch.tensor(3.0, dtype=torch.float64), retain_graph=True)
    second = torch.autograd.grad(total, case.leaves)
    for three, one in zip(first, second, strict=True):
        torch.testing.assert_close(three, 3 * one)


@BOTH
def test_copies_and_pickles_work_without_their_buffers(kernels: bool) -> None:
    case = make()
    engine = LowRankEngine(case.learner, "squared")
    expected = fused(case, "squared", 2, engine=engine, kernels=kernels)
    twin = copy.deepcopy(engine)
    assert_same(fused(case, "squared", 2, engine=twin, kernels=kernels), expected)
    # Closures of losses don't pickle; the recordings within must not be what stops it.
    assert pickle.loads(pickle.dumps(engine._recordings))._chunks == {}
    assert pickle.loads(pickle.dumps(engine._translations))._held == {}


@BOTH
def test_threads_do_not_share_buffers(kernels: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METATRAIN_KERNELS", str(int(kernels)))  # before there are threads
    cases = [make(seed=seed) for seed in range(2)]
    engine = LowRankEngine(cases[0].learner, "squared", chunk=2)
    expected = [fused(case, "squared", 2, kernels=kernels) for case in cases]
    wrong: list[BaseException] = []

    def work(number: int) -> None:
        case = cases[number]
        try:
            for _ in range(20):
                result = engine.query_loss(case.parameters, case.adapted, case.steps, case.episodes, "squared")
                assert_same((result.after, gradients(2 * result.total, case)), expected[number])
        except AssertionError as error:
            wrong.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


class Residual(MLP):
    """Looks like the MLP, computes something else."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x.sum(-1)


@pytest.mark.parametrize(
    ("learner", "reason"),
    [
        (nn.Linear(3, 1), "does not say"),
        (Residual(3), "forward is not that"),
    ],
)
def test_learners_without_the_form_are_refused(learner: nn.Module, reason: str) -> None:
    with pytest.raises(CannotServe, match=reason):
        LowRankEngine(learner, "squared")


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("pattern", ["*", "head.*", ""])
def test_padded_slots_events_and_rows_change_nothing(pattern: str, skip: bool) -> None:
    case = make(rows=("item", "genres"), pattern=pattern, skip=skip)
    expected = fused(case, "squared", 2)

    def padded(examples: Examples) -> Examples:
        generator = torch.Generator().manual_seed(3)
        slots = {}
        for name, (index, mask) in examples.slots.items():
            junk = torch.randint(0, ROWS[name][0] + 2, (*index.shape[:2], 5), generator=generator)
            index = torch.cat([torch.where(mask.bool(), index, junk[..., : index.shape[2]]), junk], -1)
            slots[name] = Slots(index, torch.cat([mask, torch.zeros_like(junk, dtype=mask.dtype)], -1))
        return Examples(examples.x, slots, examples.labels, examples.mask)

    rows = {name: torch.cat([rows, torch.full_like(rows[:, :2], 1e3)], 1) for name, rows in case.episodes.rows.items()}
    own = case.episodes
    case.episodes = Episodes(padded(own.support), padded(own.query), rows)
    result = LowRankEngine(case.learner, "squared").query_loss(
        case.parameters, case.adapted, case.steps, case.episodes, "squared"
    )
    case.episodes = own
    assert_same((result.after, gradients(2 * result.total, case)), expected, 1e-12)


@BOTH
def test_rows_in_float32_are_within_its_rounding(kernels: bool) -> None:
    case, exact = (make((64, 64), "tanh", True, 5, sizes=(8, 20, 10), dtype=dtype, rows=tuple(ROWS))
                   for dtype in (torch.float32, torch.float64))  # fmt: skip
    with torch.no_grad():
        for mine, theirs in zip(exact.leaves, case.leaves, strict=True):
            mine.copy_(theirs * 0.1 if mine is not exact.rates else theirs)
            theirs.copy_(mine)
    (_, expected), (_, got) = reference(exact, "squared", 2), fused(case, "squared", 2, kernels=kernels)
    a, b = (torch.cat([g.double().flatten() for g in found]) for found in (got, expected))
    assert (a - b).norm() / b.norm() < 1e-5


@pytest.mark.parametrize("rows", [(), ("item",), tuple(ROWS)])
def test_products_find_their_matrices_in_one_piece(rows: tuple[str, ...]) -> None:
    """oneDNN is a hundred times slower on a weight with longer rows, and bmm into columns goes task by task."""
    case = make(rows=rows, norm="layer")
    engine = LowRankEngine(case.learner, "squared")
    fused(case, "squared", 2, engine=engine, kernels=False)
    for _, recording in engine._recordings._chunks.values():
        for program in (recording.chunk.forward, recording.chunk.backward):
            for operation, values, options in program._calls:
                if operation in (multiply, multiply_add):
                    b = values[-1]
                    assert b.is_contiguous() or b.t().is_contiguous()
                if "bmm" in operation.__name__:
                    assert options.get("out", getattr(operation, "__self__", None)).is_contiguous()
