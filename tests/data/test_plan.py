from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metatrain.data.manifest import Shard, Split, read_manifest
from metatrain.data.plan import EpochPlan, lanes_of
from metatrain.errors import ConfigError

SIZES = st.lists(st.integers(0, 9), max_size=40).map(lambda sizes: np.array(sizes, np.int64))
PLANS = st.fixed_dictionaries(
    {
        "seed": st.integers(-(2**40), 2**70),
        "epoch": st.integers(0, 50),
        "lanes": st.integers(1, 7),
        "window": st.integers(1, 5),
        "shuffle": st.booleans(),
    }
)


def make(sizes: np.ndarray, per_lane: int, options: dict) -> EpochPlan:
    return EpochPlan(sizes, tasks_per_step=per_lane * options["lanes"], **options)


def ordinals_by(sizes: np.ndarray, plan_of, lanes: int, parts: int, step: int) -> np.ndarray:
    """The global batch of a step, put together from the parts of as many workers, each with a plan of its own."""
    every = [plan_of().positions(lanes_of(range(lanes), parts, i), step).ordinal for i in range(parts)]
    return np.concatenate(every)


@settings(deadline=None, max_examples=150)
@given(SIZES, st.integers(1, 5), PLANS, st.data())
def test_every_task_once_an_epoch_at_any_world_size_and_restart(sizes, per_lane, options, data):
    plan = make(sizes, per_lane, options)
    seen = []
    step, workers = 0, 1
    while step < plan.steps:  # a restart before any step, into another number of workers
        workers = data.draw(st.integers(1, options["lanes"] + 2), label="workers")
        seen.append(ordinals_by(sizes, lambda: make(sizes, per_lane, options), options["lanes"], workers, step))
        step += 1
    seen.append(plan.positions(range(options["lanes"]), plan.steps).ordinal)
    assert len(seen[-1]) == 0
    found = np.concatenate(seen)
    assert sorted(found.tolist()) == list(range(int(sizes.sum())))


@settings(deadline=None, max_examples=150)
@given(SIZES, st.integers(1, 5), PLANS, st.integers(1, 9), st.integers(1, 4), st.integers(0, 30))
def test_batch_at_a_step_is_the_same_at_every_world_size(sizes, per_lane, options, workers, readers, step):
    lanes = options["lanes"]
    whole = make(sizes, per_lane, options).positions(range(lanes), step)
    parts = []
    for worker in range(workers):
        mine = lanes_of(range(lanes), workers, worker)
        for reader in range(readers):
            plan = make(sizes, per_lane, options)
            parts.append(plan.positions(lanes_of(mine, readers, reader), step))
    for expected, *found in zip(whole, *parts, strict=True):
        assert np.concatenate(found).tolist() == expected.tolist()
    assert len(whole.ordinal) <= per_lane * lanes


@settings(deadline=None)
@given(SIZES, st.integers(1, 5), PLANS)
def test_positions_agree_with_ordinals_and_only_the_last_steps_are_short(sizes, per_lane, options):
    plan = make(sizes, per_lane, options)
    starts = np.cumsum(sizes) - sizes
    for lane in range(options["lanes"]):
        counts = []
        for step in range(plan.steps):
            found = plan.positions([lane], step)
            assert (found.row < sizes[found.row_group]).all()
            assert (starts[found.row_group] + found.row == found.ordinal).all()
            counts.append(len(found.row))
        assert sum(counts) == plan.lane_tasks[lane]
        full = int(plan.lane_tasks[lane]) // per_lane
        assert counts[:full] == [per_lane] * full
        assert not any(counts[full + 1 :])
    # Greedy dealing: no lane is ahead of another by more than one row group.
    assert plan.lane_tasks.max() - plan.lane_tasks.min() <= sizes.max(initial=0)


@settings(deadline=None)
@given(SIZES, st.integers(1, 5), PLANS)
def test_a_window_bounds_what_is_open_and_row_groups_are_read_once(sizes, per_lane, options):
    plan = make(sizes, per_lane, options)
    read: list[int] = []
    for lane in range(options["lanes"]):
        newest = -1
        for step in range(plan.steps):
            for piece in plan.slices(lane, step):
                assert len(piece.row_groups) <= options["window"]
                assert piece.row_groups.tolist() == plan.window_tasks(lane, piece.window).row_groups.tolist()
                assert set(piece.positions.row_group) <= set(piece.row_groups)
                assert piece.window >= newest  # forward only: no window is opened a second time
                if piece.window > newest:
                    newest = piece.window
                    read += piece.row_groups.tolist()
                tasks_before = np.cumsum(sizes[piece.row_groups]) - sizes[piece.row_groups]
                place = np.array([piece.row_groups.tolist().index(g) for g in piece.positions.row_group], np.int64)
                assert (tasks_before[place] + piece.positions.row == piece.rows).all()
    assert len(read) == len(set(read))
    assert set(np.flatnonzero(sizes)) <= set(read)


def test_shuffles_between_epochs_and_seeds_and_within_windows():
    sizes = np.full(64, 10)
    options = {"lanes": 4, "tasks_per_step": 640, "window": 4}

    def order(**which) -> list[int]:
        return EpochPlan(sizes, **options, **which).positions(range(4), 0).ordinal.tolist()

    first = order(seed=1, epoch=0)
    assert sorted(first) == list(range(640))
    assert first == order(seed=1, epoch=0)
    assert first != order(seed=1, epoch=1)
    assert first != order(seed=2, epoch=0)
    # Tasks of one row group are scattered over the 40 of its window, not left together.
    assert np.abs(np.diff(np.array(first) // 10)).astype(bool).sum() / 64 > 5
    unshuffled = EpochPlan(sizes, lanes=1, tasks_per_step=640, window=4, seed=1, epoch=3, shuffle=False)
    assert unshuffled.positions([0], 0).ordinal.tolist() == list(range(640))


def test_every_task_is_equally_likely_to_come_first():
    sizes = np.array([3, 3, 3, 3])
    first = [
        int(EpochPlan(sizes, seed=7, epoch=e, lanes=1, tasks_per_step=1, window=2).positions([0], 0).ordinal[0])
        for e in range(3000)
    ]
    counts = np.bincount(first, minlength=12)
    assert np.abs(counts - 250).max() < 75  # five standard deviations


def test_a_million_row_groups_are_planned_in_seconds_and_any_step_is_found_at_once():
    sizes = np.random.default_rng(0).integers(1, 1025, 1_000_000)
    begun = time.monotonic()
    plan = EpochPlan(sizes, seed=0, epoch=0, lanes=64, tasks_per_step=4096, window=8)
    made = time.monotonic()
    plan.positions(range(64), plan.steps // 2)
    assert made - begun < 20  # about 1.5 alone on a core
    assert time.monotonic() - made < 1


_BILLION = """
import sys, time
from pathlib import Path
import numpy as np
from metatrain.data.manifest import Split, read_manifest
from metatrain.data.plan import EpochPlan
from metatrain.data.shards import row_groups

begun = time.monotonic()
sizes = row_groups(read_manifest(sys.argv[1]).of(Split.TRAIN))
plan = EpochPlan(sizes, seed=0, epoch=3, lanes=64, tasks_per_step=65_536, window=8)
seconds = time.monotonic() - begun
seeks = []
for step in (0, plan.steps // 2, plan.steps - 4):
    taken = []
    for lane in range(64):
        begun = time.perf_counter()
        assert sum(len(piece.rows) for piece in plan.slices(lane, step)) == 1024
        taken.append(time.perf_counter() - begun)
    seeks.append(np.median(taken))
kilobytes = Path("/proc/self/status").read_text().partition("VmHWM:")[2].split()[0]
print(sizes.sum(), seconds, int(kilobytes) / 2**20, *seeks)
"""


def test_a_billion_users_are_planned_in_seconds_and_bounded_memory_from_a_manifest_on_disk(tiny_dataset, tmp_path):
    sizes = tuple(np.random.default_rng(0).integers(1, 2048, 250).tolist())
    shard = Shard(
        path="shards/train/0.parquet", split=Split.TRAIN, row_groups=sizes, events=10**7, bytes=10**8, sha256="0" * 64
    )
    shards = tuple(shard.model_copy(update={"path": f"shards/train/{i:05d}.parquet"}) for i in range(4000))
    whole = {
        "shards": shards,
        "tasks": {Split.TRAIN: sum(sizes) * len(shards)},
        "events": {Split.TRAIN: shard.events * len(shards)},
    }
    read_manifest(tiny_dataset()).model_copy(update=whole).write(str(tmp_path))
    # In a process of its own: the peak of this one's memory is of other tests. VmHWM, as ru_maxrss would begin at the
    # peak of the process that started it.
    command = [sys.executable, "-c", _BILLION, str(tmp_path)]
    found = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[2])
    tasks, seconds, gigabytes, *seeks = map(float, found.stdout.split())
    assert tasks > 1e9
    assert seconds < 10  # about 1.2 alone on a core
    assert gigabytes < 1  # about 0.2
    assert max(seeks) < 0.01  # about 0.0005, wherever the step is
    assert max(seeks) < 5 * min(seeks)


def test_numbers_that_do_not_fit_are_refused():
    with pytest.raises(ConfigError, match="multiple of lanes"):
        EpochPlan(np.array([3]), seed=0, epoch=0, lanes=4, tasks_per_step=6, window=1)
    with pytest.raises(ConfigError, match="at least 1"):
        EpochPlan(np.array([3]), seed=0, epoch=0, lanes=1, tasks_per_step=6, window=0)
