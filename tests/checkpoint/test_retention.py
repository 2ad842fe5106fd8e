"""Which checkpoints are kept, and that a kill while others are removed leaves whole ones only."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metatrain import faults, storage
from metatrain.checkpoint import format as layout
from metatrain.checkpoint.retention import prune, remove
from metatrain.errors import CheckpointError
from metatrain.faults import Fault
from tests.checkpoint.made_up import commit


def test_pruning_keeps_the_newest_and_the_best(tmp_path: Path) -> None:
    run = str(tmp_path)
    commit(run, 10, validation_loss=0.1)
    for step in (20, 30, 40, 50):
        commit(run, step, validation_loss=0.2)
    storage.write_atomic(storage.join(layout.checkpoint_url(run, 35), "0-00000000.bin"), b"of a killed attempt")
    assert prune(run, 2) == [20, 30]
    assert layout.committed_steps(run) == [10, 40, 50]
    assert storage.list_folder(layout.checkpoints_url(run)) == ["step-00000010", "step-00000040", "step-00000050"]


def test_pruning_keeps_the_bases_of_what_it_keeps(tmp_path: Path) -> None:
    run = str(tmp_path)
    commit(run, 10)
    commit(run, 20, base=10, validation_loss=0.1)
    commit(run, 30, base=10)
    commit(run, 40)
    commit(run, 50, base=40)
    commit(run, 60, base=40)
    assert prune(run, 1) == [30, 50]
    assert layout.committed_steps(run) == [10, 20, 40, 60]


def test_pruning_keeps_the_young_ones(tmp_path: Path) -> None:
    run = str(tmp_path)
    for step, hours in ((10, 5.0), (20, 3.0), (30, 1.0), (40, 0.0)):
        commit(run, step, age_hours=hours)
    assert prune(run, 1, keep_hours=2.0) == [10, 20]
    assert layout.committed_steps(run) == [30, 40]


def test_pruning_leaves_a_broken_marker_to_be_seen(tmp_path: Path) -> None:
    run = str(tmp_path)
    for step in (10, 20, 30):
        commit(run, step)
    Path(layout.checkpoint_url(run, 10), layout.MARKER).write_text("{}")
    assert prune(run, 1) == [20]
    assert layout.committed_steps(run) == [10, 30]


@given(
    builds=st.lists(st.booleans(), min_size=1, max_size=8),
    losses=st.lists(st.one_of(st.none(), st.floats(0, 1)), min_size=8, max_size=8),
    keep=st.integers(1, 3),
    passed=st.integers(0, 8),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_crash_while_pruning_leaves_checkpoints_that_load(
    tmp_path: Path, builds: list[bool], losses: list[float | None], keep: int, passed: int
) -> None:
    run, plan = str(tmp_path / "run"), str(tmp_path / "plan.json")
    storage.remove(run)
    storage.remove(str(tmp_path / "fired"))
    full = 10
    for n, build in enumerate(builds):
        step = 10 * (n + 1)
        full = full if build and n else step
        metrics = {} if (loss := losses[n]) is None else {"validation_loss": loss}
        commit(run, step, base=full if step != full else None, **metrics)
    newest, best = layout.committed_steps(run)[-1], layout.best_step(run)
    faults.write_plan(plan, [Fault(at="checkpoint.prune", action="error", skip=passed)])
    faults.activate(plan)
    try:
        prune(run, keep)
    except OSError:
        assert faults.fired(plan)
    finally:
        faults.activate(None)
    left = layout.committed_steps(run)
    assert {newest, best} <= set(left)
    for step in left:
        if base := layout.read_marker(run, step).base:
            assert base.step in left
    prune(run, keep)  # the next one clears up
    assert layout.folders(run) == layout.committed_steps(run)
    assert {newest, best} <= set(layout.committed_steps(run))


def test_removing_by_hand_takes_what_is_broken_and_guards_what_builds_on_it(tmp_path: Path) -> None:
    run = str(tmp_path)
    commit(run, 10)
    commit(run, 20)
    commit(run, 30, base=20)
    with pytest.raises(CheckpointError, match="build on this one") as caught:
        remove(run, [20])
    assert "--remove 20 30" in str(caught.value)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        remove(run, [40])
    Path(layout.checkpoint_url(run, 10), layout.MARKER).write_text("{}")
    assert remove(run, [10]) == [10]
    assert remove(run, [30, 20]) == [20, 30]
    assert layout.folders(run) == []
