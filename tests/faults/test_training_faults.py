"""Kills by a plan, in every phase of a step and of a checkpoint, of workers, readers and the whole run: the weights end
as if nothing had happened, and nothing was trained twice but what came after the last checkpoint.

One run meets all of it: a restart takes longer than this run's training.
"""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from metatrain import faults
from metatrain.checkpoint import Marker, committed_steps, read_marker
from metatrain.config import Config, to_yaml
from metatrain.faults import Fault
from metatrain.observe.status import read_status
from metatrain.train.audit import AuditReport, audit
from tests.data.tiny_dataset import write_tiny_dataset
from tests.faults.processes import alive, kill, titled, wait_for
from tests.train.runs import assert_equal_states, curve, final_state, recipe
from tests.train.without_ray import train_on_ranks

pytestmark = [pytest.mark.ray, pytest.mark.timeout(3000)]  # several restarts, on a machine that may be busy

#: 320 tasks lie in 81 row groups, so one of the four lanes has 21 of them: 21 steps an epoch.
EPOCHS, USERS, STEPS_OF_AN_EPOCH, EVERY = 3, 320, 21, 5
STEPS = EPOCHS * STEPS_OF_AN_EPOCH

#: Of workers, in the order in which they come: each ends an attempt.
KILLS = [
    Fault("train.read", "kill", rank=1, step=8, id="reading"),
    Fault("train.lookup", "kill", rank=0, step=17, id="lookup"),
    # The whole run is killed here: its checkpoint is copied, and on storage but for its marker.
    Fault("checkpoint.commit", "hang", rank=0, step=26, id="whole run"),
    # Not before step 31: so far training goes on beside a checkpoint that hangs, until the next one waits for it.
    Fault("train.backward", "kill", rank=1, step=33, id="backward"),
    Fault("train.update", "kill", rank=0, step=37, id="update"),
    Fault("checkpoint.copied", "kill", rank=1, step=47, id="between copy and commit"),
]
#: Of readers: no attempt ends. The second one kills a reader and the one that takes its place.
READERS = [
    Fault("reader.read", "kill", epoch=0, step=13, id="reader"),
    Fault("reader.read", "kill", epoch=2, step=12, times=2, id="reader and its heir"),
]


@dataclass(frozen=True)
class Disturbed:
    """What a run through all the faults left behind, and the same run without any."""

    config: Config
    undisturbed: Config
    fired: list[dict[str, Any]]
    report: AuditReport
    markers: dict[int, Marker]  # before anything was removed: step → marker


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Disturbed:
    folder = tmp_path_factory.mktemp("faults")
    url, plan = str(folder / "dataset"), str(folder / "plan.json")
    write_tiny_dataset(url, users=USERS, items=60, validation=20)
    rules = {
        "workers": 2,
        "epochs": EPOCHS,
        "audit": True,
        "max_failures": 3,
        "checkpoint": {"every_steps": EVERY, "keep": STEPS},  # all of them: their times are looked at
    }
    undisturbed = recipe(url, str(folder / "runs"), "undisturbed", rules)
    train_on_ranks(undisturbed, 2)
    config = recipe(url, str(folder / "runs"), "disturbed", rules)
    file = folder / "recipe.yaml"
    file.write_text(to_yaml(config))
    faults.write_plan(plan, [*KILLS, *READERS])
    command = [str(Path(sys.executable).with_name("metatrain")), "train", str(file)]
    with (folder / "log").open("w") as log:
        given = {"stdout": log, "stderr": log, "cwd": folder, "env": {**os.environ, faults.VARIABLE: plan}}
        try:
            first = subprocess.Popen(command, **given)
            wait_for(lambda: "whole run" in ids(plan) or first.poll() is not None, 2000, "the place of the last fault")
            # Ray's own agents linger for a minute; what trains must not.
            titles = ("ray::RayTrainWorker", "ray::TaskReader", "raylet")
            family = {pid for title in titles for pid in titled(first.pid, title)}
            assert len(family) >= 5
            kill(first.pid)
            first.wait()
            wait_for(lambda: not alive(family), 60, "the end of the killed run's processes")
            subprocess.run(command, **given, check=True, timeout=2400)
        except BaseException:
            print((folder / "log").read_text())
            raise
    markers = {step: read_marker(config.run_url, step) for step in committed_steps(config.run_url)}
    return Disturbed(config, undisturbed, faults.fired(plan), audit(config.run_url), markers)


def ids(plan: str) -> list[str]:
    return [record["id"] for record in faults.fired(plan)]


def of_workers(run: Disturbed) -> list[dict[str, Any]]:
    """The faults that ended attempts, as they fired."""
    return [record for record in run.fired if record["at"] != "reader.read"]


def test_every_fault_fired_at_its_place(run: Disturbed) -> None:
    for planned, record in zip(KILLS, of_workers(run), strict=True):
        assert (planned.id, planned.step, planned.rank) == (
            record["id"],
            record["place"]["step"],
            record["place"]["rank"],
        )
    readers = [(record["id"], record["place"]["epoch"]) for record in run.fired if record["at"] == "reader.read"]
    assert readers == [("reader", 0), ("reader and its heir", 2), ("reader and its heir", 2)]
    assert not alive({record["pid"] for record in run.fired})


def test_the_weights_and_the_curve_are_those_of_the_undisturbed_run(run: Disturbed) -> None:
    assert max(run.markers) == STEPS
    assert run.markers[STEPS].cursor.total == STEPS
    assert_equal_states(final_state(run.undisturbed), final_state(run.config))
    trained = curve(run.config, "learning/loss_after")
    assert sorted(trained) == list(range(1, STEPS + 1))
    assert trained == curve(run.undisturbed, "learning/loss_after")
    assert curve(run.config, "validation/loss_after") == curve(run.undisturbed, "validation/loss_after")


def test_every_task_was_trained_exactly_once_an_epoch(run: Disturbed) -> None:
    assert run.report.exactly_once, str(run.report)
    assert run.report.steps == STEPS
    assert run.report.whole_epochs == list(range(EPOCHS))
    assert run.report.tasks == audit(run.undisturbed.run_url).tasks


def test_nothing_before_the_last_checkpoint_was_trained_again(run: Disturbed) -> None:
    attempts, ended = run.report.attempts, of_workers(run)
    assert len(attempts) == 1 + len(ended)  # readers that die end none
    assert all(attempt.world_size == 2 for attempt in attempts)
    again = 0
    for (before, after), fault in zip(pairwise(attempts), ended, strict=True):
        # Another rank may yet have committed what it was about to.
        last = max((step for step, marker in run.markers.items() if marker.time < fault["time"]), default=0)
        assert last <= after.begins <= fault["place"]["step"], fault["id"]
        assert after.begins == 0 or after.begins in run.markers
        # A checkpoint is begun when the one before it is whole: no two are ever lost.
        assert after.begins > fault["place"]["step"] - 2 * EVERY
        again += sum(step >= after.begins for step in before.steps)
    assert sum(run.report.redone.values()) == again
    assert read_status(run.config.run_url).restarts == len(ended)
    begun = {fault["id"]: attempt.begins for fault, attempt in zip(ended, attempts[1:], strict=True)}
    assert begun["whole run"] == 21
    assert begun["between copy and commit"] == 42
