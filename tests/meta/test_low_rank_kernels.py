"""The kernels of the low-rank engine: sizes at which their tiles differ, threads, and machines that have none."""

from __future__ import annotations

import functools
import logging
import os
from pathlib import Path
from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_low_rank import BOTH, LOSSES, PATTERNS, ROWS, assert_same, fused, gradients, make
from torch import Tensor

from metatrain import compiled
from metatrain.meta.low_rank import LowRankEngine


@settings(max_examples=60, deadline=None)
@given(
    hidden=st.lists(st.integers(1, 80), min_size=1, max_size=3).map(tuple),
    activation=st.sampled_from(["relu", "tanh", "gelu", "silu"]),
    skip=st.booleans(),
    order=st.sampled_from([1, 2]),
    steps=st.integers(1, 3),
    pattern=st.sampled_from(PATTERNS),
    loss=st.sampled_from(LOSSES),
    sizes=st.tuples(st.integers(1, 3), st.integers(1, 45), st.integers(1, 25)),
    fixed=st.integers(1, 300) | st.sampled_from([256, 512, 1024]),  # rows that crowd on lines of the first cache
    rows=st.lists(st.sampled_from(tuple(ROWS)), unique=True),
    norm=st.sampled_from(["none", "layer"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    seed=st.integers(0, 1000),
)
def test_any_sizes_give_what_torch_gives(
    hidden, activation, skip, order, steps, pattern, loss, sizes, fixed, rows, norm, dtype, seed
) -> None:
    case = make(hidden, activation, skip, steps, pattern, loss, sizes, seed, dtype, tuple(rows), fixed, norm)
    with torch.no_grad():
        for leaf in case.leaves:
            leaf.mul_(0.2)  # that float32 does not leave the range in which it can be compared
    tolerance = 1e-10 if dtype is torch.float64 else 2e-4
    assert_same(fused(case, loss, order), fused(case, loss, order, kernels=False), tolerance)


def result(threads: int, tasks: int) -> list[Tensor]:
    case = make((16, 8), "tanh", False, 2, sizes=(tasks, 4, 3), dtype=torch.float32)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        after, found = fused(case, "squared", 2)
    finally:
        torch.set_num_threads(before)
    return [after, *found]


@pytest.mark.parametrize("tasks", [11, 300, 1601])
@pytest.mark.parametrize("threads", [1, 2, 3, 16])
def test_threads_change_rounding_alone(threads: int, tasks: int) -> None:
    # Which thread takes which tasks differs from run to run: with more threads than cores they overtake one another.
    one, several = result(1, tasks), result(threads, tasks)
    assert torch.equal(one[0], several[0])  # each task's own; the rest is sums over tasks
    for a, b in zip(one[1:], several[1:], strict=True):
        torch.testing.assert_close(b, a, rtol=1e-4, atol=1e-5 * tasks)
    for _ in range(5):
        for b, c in zip(several, result(threads, tasks), strict=True):
            assert torch.equal(b, c)


def test_what_is_not_finite_shows_in_its_task_alone() -> None:
    case = make((16, 8), "relu", sizes=(5, 4, 3))
    with torch.no_grad():
        case.episodes.query.mask.fill_(1)
        case.episodes.query.x[2, 1] = torch.nan
    after, found = fused(case, "squared", 2)
    assert torch.isfinite(after).tolist() == [True, True, False, True, True]
    assert torch.isnan(found[3]).any()


def test_types_that_differ_go_by_torch() -> None:
    case = make((5, 4), sizes=(3, 4, 3), dtype=torch.float32, rows=("item",))
    case.episodes.rows["item"] = case.episodes.rows["item"].detach().double().requires_grad_()
    engine = LowRankEngine(case.learner, "squared")
    after, _ = fused(case, "squared", 2, engine=engine, served=False)
    assert not engine._translations._held
    assert torch.isfinite(after).all()


def test_a_rate_of_zero_hides_nothing() -> None:
    case = make((5,), pattern="layers.0.weight", steps=1, sizes=(3, 4, 3))
    with torch.no_grad():
        case.rates.zero_()
        case.episodes.support.mask.fill_(1)
        case.episodes.support.labels[1, 0] = torch.nan
    for kernels in (True, False):
        after, _ = fused(case, "squared", 2, kernels=kernels)
        assert torch.isfinite(after).tolist() == [True, False, True]


@BOTH
def test_the_order_of_the_rates_is_the_callers(kernels: bool) -> None:
    case = make((5, 4), sizes=(3, 4, 3))
    engine = LowRankEngine(case.learner, "squared")
    _, expected = fused(case, "squared", 2, engine=engine, kernels=kernels)
    with mock.patch.dict(os.environ, METATRAIN_KERNELS=str(int(kernels))):
        steps = [dict(reversed(step.items())) for step in case.steps]
        result = engine.query_loss(case.parameters, case.adapted, steps, case.episodes, "squared")
    for mine, theirs in zip(gradients(2 * result.total, case), expected, strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.fixture
def unloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """As in a process that has not looked for kernels, and a cache of its own."""
    monkeypatch.setattr(compiled, "loaded", compiled.loaded.__wrapped__)
    monkeypatch.setenv("METATRAIN_CACHE", str(tmp_path))
    return tmp_path


def losses() -> Tensor:
    case = make()
    return (
        LowRankEngine(case.learner, "squared")
        .query_loss(case.parameters, case.adapted, case.steps, case.episodes, "squared")
        .after
    )


def test_a_machine_without_a_compiler_says_so_and_goes_by_torch(
    unloaded: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    expected = losses()
    monkeypatch.setenv("PATH", str(unloaded))
    monkeypatch.delenv("CXX", raising=False)
    torch.testing.assert_close(losses(), expected)
    assert "no C++ compiler is here" in caplog.text


def test_a_compiler_that_fails_says_so_and_goes_by_torch(
    unloaded: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    broken = unloaded / "broken"
    broken.write_text('#!/bin/sh\n[ "$1" = --version ] && exit 0\necho "no such processor" >&2\nexit 1\n')
    broken.chmod(0o755)
    expected = losses()
    monkeypatch.setenv("CXX", str(broken))
    torch.testing.assert_close(losses(), expected)
    assert "could not be built" in caplog.text
    assert "no such processor" in caplog.text


def test_kernels_are_built_once_for_a_machine(unloaded: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    losses()
    losses()
    assert caplog.text.count("low-rank kernels built by") == 1
    assert [path.suffix for path in (unloaded / "kernels").iterdir()] == [".so"]


@pytest.mark.skipif(" avx2 " not in compiled.features(), reason="needs an x86-64 processor with AVX2")
def test_processors_without_avx512_are_served(unloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Their last columns go by narrower vectors, not by masks."""
    case = make((37, 20), "gelu", sizes=(3, 21, 10), fixed=130)
    expected = fused(case, "squared", 2, kernels=False)
    monkeypatch.setattr(compiled, "_for_this_processor", lambda: ["-march=x86-64-v3"])
    # Built once for all of this test's calls.
    monkeypatch.setattr(compiled, "loaded", functools.cache(compiled.loaded))
    assert_same(fused(case, "squared", 2), expected, 1e-10)


def test_a_library_that_was_cut_short_is_built_again(unloaded: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    losses()
    [library] = (unloaded / "kernels").iterdir()
    library.write_bytes(b"")
    losses()
    assert caplog.text.count("low-rank kernels built by") == 2
    assert "by torch" not in caplog.text
    assert library.stat().st_size


def test_a_cache_that_cannot_be_written_serves_this_process(
    unloaded: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    (unloaded / "file").write_text("")
    monkeypatch.setenv("METATRAIN_CACHE", str(unloaded / "file"))
    monkeypatch.setenv("CXX", "env g++")  # with arguments
    losses()
    assert "low-rank kernels built by env g++" in caplog.text
    assert "not kept" in caplog.text


def test_they_can_be_switched_off(unloaded: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METATRAIN_KERNELS", "0")
    losses()
    assert not (unloaded / "kernels").exists()


def test_gradients_are_the_callers() -> None:
    """What one call found must not change with the next."""
    first, second = make(seed=1), make(seed=2)
    engine = LowRankEngine(first.learner, "squared")
    _, found = fused(first, "squared", 2, engine=engine)
    kept = [gradient.clone() for gradient in found]
    fused(second, "squared", 2, engine=engine)
    for gradient, copy in zip(found, kept, strict=True):
        assert torch.equal(gradient, copy)
