"""`kill -9` in mid-run, of a worker, of a reader, of the whole run: the weights end as if nothing had happened."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from metatrain.checkpoint import committed_steps, read_marker
from metatrain.config import Config, to_yaml
from metatrain.train.launch import launch
from tests.data.tiny_dataset import write_tiny_dataset
from tests.faults.processes import alive, kill, titled, wait_for
from tests.train.runs import assert_equal_states, curve, final_state, recipe

pytestmark = pytest.mark.timeout(400)

STEPS = 240


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, ray_session: None) -> Config:
    folder = tmp_path_factory.mktemp("faults")
    write_tiny_dataset(str(folder / "dataset"), users=640, items=60, validation=20)
    config = recipe(
        str(folder / "dataset"),
        str(folder / "runs"),
        "undisturbed",
        {"workers": 2, "epochs": 6, "max_steps": STEPS, "max_failures": 2},
    )
    launch(config)
    assert committed_steps(config.run_url)[-1] == STEPS
    return config


def named(config: Config, name: str) -> Config:
    return config.model_copy(update={"run": config.run.model_copy(update={"name": name})})


def train_while_killing(config: Config, victims: Callable[[], list[int]]) -> None:
    """Trains in this thread; another kills one victim when the run has a checkpoint and is far from its end."""
    killed: list[int] = []

    def murder() -> None:
        wait_for(lambda: committed_steps(config.run_url), 200, "a first checkpoint")
        pid = wait_for(victims, 10, "a victim")[-1]
        kill(pid)
        killed.append(committed_steps(config.run_url)[-1])

    thread = threading.Thread(target=murder)
    thread.start()
    launch(config)
    thread.join()
    assert killed, "nothing was killed"
    assert killed[0] < STEPS, "the run was over before the kill"


def test_a_killed_worker_is_started_again_and_the_weights_are_the_same(undisturbed: Config) -> None:
    config = named(undisturbed, "worker")
    train_while_killing(config, lambda: titled(os.getpid(), "ray::RayTrainWorker"))
    assert_equal_states(final_state(undisturbed), final_state(config))
    assert curve(config, "learning/loss_after") == curve(undisturbed, "learning/loss_after")


def test_a_killed_reader_is_replaced_and_the_weights_are_the_same(undisturbed: Config) -> None:
    config = named(undisturbed, "reader")
    train_while_killing(config, lambda: titled(os.getpid(), "ray::TaskReader"))
    assert_equal_states(final_state(undisturbed), final_state(config))


def test_a_killed_run_goes_on_by_the_same_command_and_the_weights_are_the_same(
    undisturbed: Config, tmp_path: Path
) -> None:
    config = named(undisturbed, "whole")
    file = tmp_path / "recipe.yaml"
    file.write_text(to_yaml(config))
    command = [str(Path(sys.executable).with_name("metatrain")), "train", str(file)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "cwd": tmp_path}
    first = subprocess.Popen(command, **quiet)
    wait_for(lambda: committed_steps(config.run_url), 200, "a first checkpoint")
    # Ray's own agents linger for a minute; what trains must not.
    family = {pid for title in ("ray::RayTrainWorker", "ray::TaskReader", "raylet") for pid in titled(first.pid, title)}
    assert len(family) >= 5
    kill(first.pid)
    first.wait()
    stopped_at = committed_steps(config.run_url)[-1]
    assert stopped_at < STEPS, "the run was over before the kill"
    wait_for(lambda: not alive(family), 60, "the end of the killed run's processes")
    subprocess.run(command, **quiet, check=True, timeout=200)
    assert read_marker(config.run_url, STEPS).cursor.total == STEPS
    assert_equal_states(final_state(undisturbed), final_state(config))
    assert sorted(curve(config, "learning/loss_after")) == list(range(1, STEPS + 1))
