"""A kill at every phase of a checkpoint: what loads afterwards is the one before it or the new one, whole."""

from __future__ import annotations

import shutil
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from torch import Tensor

from metatrain import faults
from metatrain.checkpoint import committed_steps, read_tensors
from metatrain.errors import CheckpointError, StorageError
from metatrain.faults import Fault

sys.path.insert(0, str(Path(__file__).parent.parent / "distributed"))

from checkpointed import Small
from ranks import RankError, run_ranks

pytestmark = pytest.mark.timeout(500)

#: Phase → whether the new checkpoint is there after a kill in it.
PHASES = {
    "checkpoint.copy": False,
    "checkpoint.copied": False,
    "checkpoint.write": False,
    "checkpoint.metadata": False,
    "checkpoint.commit": False,
    "checkpoint.committed": True,
    "checkpoint.prune": True,
}
#: Both ranks copy and write; rank 0 alone commits.
KILLS = [
    (phase, rank, full_every)
    for phase in PHASES
    for rank in ((0, 1) if phase in list(PHASES)[:3] else (0,))
    for full_every in (1, 10)
]


@dataclass(frozen=True)
class Killed:
    """A run that was killed in the midst of its checkpoint at step 4."""

    run: str
    plan: str
    full_every: int


def train(rank: int, world_size: int, run: str, plan: str | None, full_every: int) -> dict[int, dict[str, Tensor]]:
    """From the newest checkpoint to step 5, a checkpoint after each step from 2 on: the states by step."""
    faults.activate(plan)
    small = Small(rank, world_size, run, full_every=full_every, keep=1)
    if steps := committed_steps(run):
        small.load(steps[-1])
    states = {}
    while small.total < 5:
        small.train(2 if small.total == 0 else 1)
        states[small.total] = small.whole()
        small.save(wait=False)
    small.saver.wait()
    return states


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> dict[int, dict[str, Tensor]]:
    return run_ranks(train, 2, str(tmp_path_factory.mktemp("run")), None, 1)[0]


def train_all(rank: int, world_size: int, runs: list[Killed]) -> list[dict[int, dict[str, Tensor]]]:
    """As `train`, one after the other."""
    return [train(rank, world_size, killed.run, killed.plan, killed.full_every) for killed in runs]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, int, int], Killed]:
    """By phase, rank and kind, a run as the kill left it."""
    runs = {}
    for phase, rank, full_every in KILLS:
        folder = tmp_path_factory.mktemp("killed")
        run, plan = str(folder / "run"), str(folder / "plan.json")
        faults.write_plan(plan, [Fault(at=phase, rank=rank, step=4, action="kill")])
        with pytest.raises(RankError) as error:
            run_ranks(train, 2, run, plan, full_every)
        assert faults.fired(plan), f"{phase} on rank {rank}: the ranks ended before the kill: {error.value}"
        runs[phase, rank, full_every] = Killed(run, plan, full_every)
    return runs


@pytest.fixture(scope="module")
def gone_on(
    killed: dict[tuple[str, int, int], Killed], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int, int], tuple[str, dict[int, dict[str, Tensor]]]]:
    """Each of them after the same again: its folder, and its states by step."""
    runs = {}
    for key, one in killed.items():
        run = str(tmp_path_factory.mktemp("gone_on") / "run")
        shutil.copytree(one.run, run)
        runs[key] = Killed(run, one.plan, one.full_every)
    states = run_ranks(train_all, 2, list(runs.values()))[0]  # the ranks start once for all of them
    return {key: (one.run, found) for (key, one), found in zip(runs.items(), states, strict=True)}


def assert_equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


@pytest.mark.parametrize(("phase", "rank", "full_every"), KILLS)
def test_a_kill_leaves_the_checkpoint_before_it_or_the_new_one(
    undisturbed: dict[int, dict[str, Tensor]],
    killed: dict[tuple[str, int, int], Killed],
    phase: str,
    rank: int,
    full_every: int,
) -> None:
    one = killed[phase, rank, full_every]
    (fired,) = faults.fired(one.plan)
    assert (fired["at"], fired["place"]["step"], fired["place"]["rank"]) == (phase, 4, rank)
    steps = committed_steps(one.run)
    assert steps[-1] == (4 if PHASES[phase] else 3)
    for step in steps:
        assert_equal(read_tensors(one.run, step), undisturbed[step])


@pytest.mark.parametrize(("phase", "rank", "full_every"), KILLS)
def test_the_same_again_goes_on_clears_up_and_ends_as_if_nothing_had_happened(
    undisturbed: dict[int, dict[str, Tensor]],
    gone_on: dict[tuple[str, int, int], tuple[str, dict[int, dict[str, Tensor]]]],
    phase: str,
    rank: int,
    full_every: int,
) -> None:
    run, states = gone_on[phase, rank, full_every]
    assert min(states) == (5 if PHASES[phase] else 4)
    assert_equal(states[5], undisturbed[5])
    assert_equal(read_tensors(run, 5), undisturbed[5])
    assert committed_steps(run) == ([5] if full_every == 1 else [2, 5])


def fail(rank: int, world_size: int, run: str, plan: str) -> str:
    """Storage fails under a save: what the next one says."""
    faults.activate(plan)
    small = Small(rank, world_size, run, keep=1)
    small.train(1)
    small.save()
    small.train(1)
    small.save(wait=False)
    small.train(1)  # goes on meanwhile
    if rank and "prune" in Path(plan).read_text():
        return "rank 0 alone removes old ones"
    try:
        small.saver.wait()
    except (CheckpointError, StorageError) as error:
        return str(error)
    return "nothing was raised"


def test_a_full_disk_is_told_on_every_rank_and_the_checkpoint_before_it_stays(tmp_path: Path) -> None:
    run, plan = str(tmp_path / "run"), str(tmp_path / "plan.json")
    faults.write_plan(plan, [Fault(at="checkpoint.write", rank=1, step=2, action="error", errno="ENOSPC", times=50)])
    told = run_ranks(fail, 2, run, plan)
    for text in told:
        assert "The disk is full" in text
        assert "bytes are free" in text
        assert "remedy" in text
    assert committed_steps(run) == [1]
    read_tensors(run, 1)


def test_old_checkpoints_that_cannot_be_removed_are_told(tmp_path: Path) -> None:
    run, plan = str(tmp_path / "run"), str(tmp_path / "plan.json")
    faults.write_plan(plan, [Fault(at="checkpoint.prune", step=2, action="error", errno="EROFS")])
    told = run_ranks(fail, 2, run, plan)
    assert "Old checkpoints could not be removed" in told[0]
    assert committed_steps(run) == [2]
