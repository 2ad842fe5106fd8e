"""The counted memory of an inner loop beside the measured peak; chunks and recomputed steps that keep to a budget."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from metatrain.meta.episode import Episodes, Examples, Sizes, Slots
from metatrain.meta.low_rank_chunks import Recordings
from metatrain.meta.maml import MAML
from metatrain.meta.memory import FEWEST_TASKS, Loop, plan, task_bytes
from metatrain.model.learners.mlp import MLP


def peak_bytes(run: Callable[[], object]) -> int:
    """The most bytes alive at a time, of tensors that `run` makes: counted at every allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as found:
        run()
    assert found.profiler is not None
    events = [e for e in found.profiler.kineto_results.events() if e.name() == "[memory]"]  # pyright: ignore[reportOptionalMemberAccess]
    live = top = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        live += event.nbytes()
        top = max(top, live)
    return top


def batch(tasks: int, support: int, query: int, width: int, rows: dict[str, tuple[int, int]], dtype=torch.float32):
    draw = torch.Generator().manual_seed(0)

    def side(events: int) -> Examples:
        slots = {
            name: Slots(
                torch.randint(0, count, (tasks, events, 1), generator=draw), torch.ones(tasks, events, 1).to(dtype)
            )
            for name, (count, _) in rows.items()
        }
        x = torch.randn(tasks, events, width, generator=draw).to(dtype).requires_grad_()
        labels = torch.randn(tasks, events, generator=draw).to(dtype)
        return Examples(x, slots, labels, torch.ones_like(labels))

    own = {name: torch.randn(tasks, *shape, generator=draw).to(dtype).requires_grad_() for name, shape in rows.items()}
    return Episodes(side(support), side(query), own)


def maml_of(
    width: int, hidden: tuple[int, ...], rows: dict[str, tuple[int, int]], skip: bool = True, **options
) -> MAML:
    torch.manual_seed(0)
    learner = MLP(width + sum(d for _, d in rows.values()), hidden, "tanh", skip, norm=options.pop("norm", "none"))
    return MAML(learner, **{"rate": 0.01, "learn_rates": True, "adapt_rows": tuple(rows), **options})


def gradients(maml: MAML, episodes: Episodes) -> list[Tensor]:
    leaves = [episodes.support.x, episodes.query.x, *episodes.rows.values(), *maml.parameters()]
    total = maml(episodes).total
    found = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return [total.detach(), *found]


ITEM = {"item": (20, 16)}
#: width, hidden, support, query, steps, order, adapt, skip, learned rates, rows, norm
SHAPES = [
    (64, (64, 64), 64, 10, 3, 2, "*", True, True, {}, "none"),
    (512, (128,), 16, 10, 5, 2, "*", False, True, {}, "none"),
    (64, (32,), 64, 32, 5, 2, "head.*", True, True, {}, "none"),
    (256, (256, 128), 20, 10, 2, 2, "*", True, False, {}, "none"),
    (64, (64, 64), 128, 4, 1, 2, "*", True, True, {}, "none"),
    (64, (64, 64), 20, 10, 20, 2, "*", True, True, {}, "none"),
    (32, (64,), 20, 10, 5, 2, "*", True, True, ITEM, "none"),
    (256, (128,), 64, 32, 5, 1, "*", True, True, {}, "none"),
    (64, (64, 64), 20, 10, 5, 1, "*", False, False, {}, "none"),
    (64, (64, 64), 40, 10, 5, 2, "*", True, True, {}, "layer"),
    (64, (64, 64), 40, 10, 5, 1, "*", True, True, {}, "layer"),
]


def case(shape: tuple, engine: str, tasks: int) -> tuple[MAML, Episodes]:
    width, hidden, support, query, steps, order, adapt, skip, learned, rows, norm = shape
    settings = {"steps": steps, "order": order, "adapt": (adapt,), "learn_rates": learned, "norm": norm}
    return maml_of(width, hidden, rows, skip, engine=engine, **settings), batch(tasks, support, query, width, rows)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_counted_memory_of_vmap_is_near_the_measured_peak(shape: tuple) -> None:
    maml, episodes = case(shape, "vmap", 8)
    gradients(maml, episodes)
    counted = maml.plan(Sizes.of(episodes.support, episodes.query, episodes.rows)).bytes
    assert counted / 1.5 <= peak_bytes(lambda: gradients(maml, episodes)) <= counted * 1.5


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_counted_memory_of_low_rank_is_near_its_buffers(shape: tuple, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METATRAIN_KERNELS", "0")  # they hold a task a thread
    made: list[Recordings] = []
    own = Recordings.__init__
    monkeypatch.setattr(Recordings, "__init__", lambda self: (own(self), made.append(self))[0])
    maml, episodes = case(shape, "low_rank", 16)
    gradients(maml, episodes)
    engine = maml._engine._low_rank
    assert engine is not None
    sizes = Sizes.of(episodes.support, episodes.query, episodes.rows)
    counted = 16 * engine.task_bytes(maml._engine._shapes(maml.adapted, maml.steps, sizes))
    held = sum(
        flat.nbytes
        for recordings in made
        for workspace in recordings._workspaces.values()
        for name, flat in workspace._flat.items()
        if "parameter" not in name  # shared by all tasks
    )
    assert counted / 1.5 <= held <= counted * 1.5


def test_a_budget_is_kept_by_smaller_chunks() -> None:
    budget = 8 << 20
    options = {"steps": 3, "engine": "vmap", "keep": 0}
    episodes = batch(64, 20, 10, 64, {})
    whole, chunked = maml_of(64, (64, 64), {}, **options), maml_of(64, (64, 64), {}, memory=budget, **options)
    taken = chunked.plan(Sizes.of(episodes.support, episodes.query, {}))
    assert 1 < taken.chunk < 64
    assert peak_bytes(lambda: gradients(whole, episodes)) > 2 * budget
    # Beside the chunk there are the gradients of all tasks' inputs.
    assert peak_bytes(lambda: gradients(chunked, episodes)) < 1.5 * budget + 3 * episodes.support.x.nbytes
    for one, other in zip(gradients(whole, episodes), gradients(chunked, episodes), strict=True):
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5 * float(one.abs().max()))
    # What is asked for wins.
    asked = maml_of(64, (64, 64), {}, memory=budget, chunk=64, **options)
    assert asked.plan(Sizes.of(episodes.support, episodes.query, {})).chunk == 64


@pytest.mark.parametrize("rows", [{}, ITEM])
@pytest.mark.parametrize("order", [1, 2])
@pytest.mark.parametrize("keep", [1, 3, 9])
@pytest.mark.parametrize("chunk", [0, 3])
def test_steps_computed_again_give_the_same_gradient(rows: dict, order: int, keep: int, chunk: int) -> None:
    found = []
    for kept in (0, keep):
        maml = maml_of(6, (5, 4), rows, steps=7, order=order, rate=0.1, engine="vmap", keep=kept, chunk=chunk)
        maml.double()
        found.append(gradients(maml, batch(5, 4, 3, 6, rows, torch.float64)))
    for whole, again in zip(*found, strict=True):
        torch.testing.assert_close(again, whole, rtol=1e-10, atol=1e-12)


def test_what_does_not_adapt_gets_its_gradient_through_recomputed_steps() -> None:
    found = []
    for keep in (0, 2):
        maml = maml_of(6, (5, 4), {}, steps=5, rate=0.1, engine="vmap", keep=keep, adapt=("layers.1.*",)).double()
        found.append(gradients(maml, batch(5, 4, 3, 6, {}, torch.float64)))
    for whole, again in zip(*found, strict=True):
        torch.testing.assert_close(again, whole, rtol=1e-10, atol=1e-12)
    assert all(gradient.any() for gradient in found[1])


def test_recomputed_steps_hold_a_part_of_the_memory_of_fifty() -> None:
    episodes = batch(4, 10, 5, 32, {})
    peaks, counted = [], []
    for keep in (0, 7):
        maml = maml_of(32, (64, 64), {}, steps=50, engine="vmap", keep=keep)
        gradients(maml, episodes)
        peaks.append(peak_bytes(lambda maml=maml: gradients(maml, episodes)))
        counted.append(maml.plan(Sizes.of(episodes.support, episodes.query, {})).bytes)
    assert peaks[1] < peaks[0] / 4
    for peak, count in zip(peaks, counted, strict=True):
        assert count / 1.5 <= peak <= count * 1.5


LOOP = Loop(adapted=1_000_000, ins=2000, outs=1000, steps=50, order=2, learned=True)


def test_steps_are_computed_again_only_where_few_tasks_would_fit() -> None:
    a_task = task_bytes(LOOP, 20, 10)
    roomy = plan(LOOP, 64, 20, 10, FEWEST_TASKS * a_task)
    assert (roomy.chunk, roomy.keep) == (FEWEST_TASKS, 0)
    tight = plan(LOOP, 64, 20, 10, FEWEST_TASKS * a_task - 1)
    assert 1 < tight.keep < 50
    assert tight.chunk > FEWEST_TASKS
    assert tight.bytes <= FEWEST_TASKS * a_task
    assert "steps kept at a time" in tight.reason
    assert plan(LOOP, 64, 20, 10, FEWEST_TASKS * a_task - 1, keep=0).keep == 0
    assert plan(LOOP, 64, 20, 10, 1 << 50, keep=5).keep == 5
    assert plan(LOOP, 64, 20, 10, 1 << 50).chunk == 64
    # Not even one task fits: one is taken, and the count says what it needs.
    least = plan(LOOP, 64, 20, 10, 1)
    assert least.chunk == 1
    assert least.bytes > 1


def test_few_tasks_are_no_reason_to_compute_again() -> None:
    a_task = task_bytes(LOOP, 20, 10)
    assert plan(LOOP, 2, 20, 10, 2 * a_task).keep == 0
    assert plan(LOOP, 64, 20, 10, 4 * a_task, chunk=4).keep == 0
