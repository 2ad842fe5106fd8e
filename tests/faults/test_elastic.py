"""Nodes that come, go with notice and die: another number of workers, the same curve and weights."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ray.cluster_utils import Cluster
from torch.distributed.tensor import DTensor

from metatrain.checkpoint import committed_steps, read_marker
from metatrain.config import Config, to_yaml
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import Split
from metatrain.malloc import MALLOC
from metatrain.model.build import build_model
from metatrain.model.sharding import distribute
from metatrain.train.audit import audit
from metatrain.train.not_finite import coordinates
from metatrain.train.outer import DenseOptimizer
from metatrain.train.readers import open_reader
from metatrain.train.step import OuterLoop
from metatrain.train.worker import run_state
from tests.data.tiny_dataset import write_tiny_dataset
from tests.faults.processes import wait_for
from tests.train.runs import assert_equal_states, curve, final_state, recipe

pytestmark = [pytest.mark.ray, pytest.mark.timeout(1200)]

ROOT = Path(__file__).parents[2]
STEPS = 240


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without room for workers; nodes are added by the test, each with room for one."""
    small = {"object_store_memory": 80 * 1024**2, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, connect=False, head_node_args={"num_cpus": 0, **small})
    yield cluster
    cluster.shutdown()


def add_node(cluster: Cluster):
    return cluster.add_node(num_cpus=2, object_store_memory=80 * 1024**2)


def drain(cluster: Cluster, node, seconds: int) -> None:
    """As a cloud gives notice that it takes a machine away."""
    ray = str(Path(sys.executable).with_name("ray"))
    options = {"node-id": node.node_id, "reason": "DRAIN_NODE_REASON_PREEMPTION", "reason-message": "spot"}
    options |= {"address": cluster.address, "deadline-remaining-seconds": str(seconds)}
    command = [ray, "drain-node", *(f"--{name}={value}" for name, value in options.items())]
    subprocess.run(command, check=True, capture_output=True, timeout=60)


class Run:
    """A run in a process of its own, which steps slowly until it is told to hurry."""

    def __init__(self, config: Config, folder: Path, address: str) -> None:
        self.config, self._log, self._quick = config, folder / "log", folder / "quick"
        file = folder / "recipe.yaml"
        file.write_text(to_yaml(config))
        script = str(Path(__file__).with_name("elastic_run.py"))
        with self._log.open("w") as log:
            self._process = subprocess.Popen(
                [sys.executable, script, str(file), address, "1.2", str(self._quick)],
                stdout=log,
                stderr=log,
                cwd=folder,
                env={**{k: v for k, v in os.environ.items() if k not in MALLOC}, "PYTHONPATH": str(ROOT)},
            )

    def log(self) -> str:
        return self._log.read_text()

    def sizes(self) -> list[int]:
        """Workers that wrote the checkpoints, in their order."""
        steps = committed_steps(self.config.run_url)
        return [read_marker(self.config.run_url, step).world_size for step in steps]

    def wait(self, condition: Callable[[], bool], what: str) -> None:
        """Until it holds; fails where the run ends before."""

        def holds() -> bool:
            assert self._process.poll() is None, f"the run ended before {what}:\n{self.log()}"
            return condition()

        try:
            wait_for(holds, 400, what)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.log()}") from error

    def wait_for_workers(self, count: int, starts: int) -> None:
        """Until the group of the `starts`-th restart trains."""
        self.wait(lambda: f"started again ({starts}), {count} workers" in self.log(), f"restart {starts}")
        told = self.log().count(f"/{STEPS}  ")
        self.wait(lambda: self.log().count(f"/{STEPS}  ") > told, "a step")

    def finish(self) -> None:
        """Hurries, to the end."""
        self._quick.touch()
        assert self._process.wait(400) == 0, self.log()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def recipe_of(tmp_path: Path, workers: Any, max_failures: int) -> Config:
    """A recipe whose checkpoints are those alone that were asked for, and the last one."""
    write_tiny_dataset(str(tmp_path / "dataset"), users=640, items=60, validation=20)
    rules: dict[str, Any] = {"epochs": 60, "max_steps": STEPS, "max_failures": max_failures, "audit": True}
    rules |= {"workers": workers, "resize_seconds": 2, "validate_every": 0}
    rules["checkpoint"] = {"every_steps": 0, "keep": 50}
    return recipe(str(tmp_path / "dataset"), str(tmp_path / "runs"), "elastic", rules)


def assert_as_undisturbed(config: Config) -> None:
    """The run's curve and last checkpoint are those of the same batches, one after the other in this process."""
    losses, state = trained_here(config)
    got = curve(config, "learning/loss_after")
    assert sorted(got) == list(range(1, STEPS + 1))
    # Another number of workers rounds otherwise, which grows over the steps: most, as a share, in losses near 0.
    assert all(got[step + 1] == pytest.approx(loss, rel=1e-5, abs=1e-5) for step, loss in enumerate(losses))
    assert_equal_states(state, final_state(config), tolerance=1e-4)


def trained_here(config: Config) -> tuple[list[float], dict[str, torch.Tensor]]:
    dataset = TaskDataset.open(config.data.dataset)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        distributed = distribute(build_model(dataset.schema, config, tables_device="meta"), config.train.optimizer)
        optimizer = DenseOptimizer(distributed.dense_parameters(), config.train.optimizer)
        loop = OuterLoop(distributed, optimizer, config, STEPS, 1)
        reader, losses = open_reader(dataset, config, Split.TRAIN), []
        steps_of = [reader.steps(epoch) for epoch in range(config.train.epochs)]
        for total in range(STEPS):
            batch = reader.read(*coordinates(total, steps_of), range(config.data.lanes)).tensors()
            output = loop.step(batch, total).output
            losses.append(float(output.after) / output.tasks)
        state = run_state(distributed, optimizer)
        return losses, {n: (v.to_local() if isinstance(v, DTensor) else v).detach().clone() for n, v in state.items()}
    finally:
        dist.destroy_process_group()


def test_nodes_that_come_go_with_notice_and_die(cluster: Cluster, tmp_path: Path) -> None:
    config = recipe_of(tmp_path, {"min": 1, "max": 2}, max_failures=1)
    add_node(cluster)
    run = Run(config, tmp_path, cluster.address)
    try:
        run.wait(lambda: f"/{STEPS}  " in run.log(), "a step of one worker")
        second = add_node(cluster)
        run.wait(lambda: run.sizes() == [1], "the checkpoint before the group grows")
        run.wait_for_workers(2, starts=1)

        drain(cluster, second, 60)  # longer than the group takes to leave on a machine that does much else
        run.wait(lambda: run.sizes() == [1, 2], "the checkpoint within the notice")
        run.wait_for_workers(1, starts=2)
        cluster.remove_node(second, allow_graceful=False)

        third = add_node(cluster)
        run.wait(lambda: run.sizes() == [1, 2, 1], "the checkpoint before the group grows again")
        run.wait_for_workers(2, starts=3)
        cluster.remove_node(third, allow_graceful=False)
        run.wait_for_workers(1, starts=4)
        run.finish()
    finally:
        run.kill()
    assert run.log().count("the worker group is about to change") == 3
    assert run.sizes() == [1, 2, 1, 1]
    report = audit(config.run_url)
    assert report.exactly_once, str(report)
    assert [attempt.world_size for attempt in report.attempts] == [1, 2, 1, 2, 1]
    # With notice nothing is lost; of a node that dies, what came after the last checkpoint is trained again.
    ends = [attempt.steps[-1] + 1 for attempt in report.attempts]
    begins = [attempt.begins for attempt in report.attempts]
    assert begins[1:4] == ends[:3]
    assert begins[4] == begins[3]
    assert set(report.redone) == set(range(begins[4], ends[3]))
    assert_as_undisturbed(config)


def test_a_group_of_fixed_size_saves_until_its_node_goes_and_starts_on_another(
    cluster: Cluster, tmp_path: Path
) -> None:
    config = recipe_of(tmp_path, 1, max_failures=0)
    first = add_node(cluster)
    run = Run(config, tmp_path, cluster.address)
    try:
        run.wait(lambda: f"/{STEPS}  " in run.log(), "a step")
        drain(cluster, first, 40)
        run.wait(lambda: len(run.sizes()) == 1, "the checkpoint at the notice")
        add_node(cluster)
        run.wait(lambda: len(run.sizes()) == 2, "the one before the end")
        run.wait_for_workers(1, starts=1)
        run.finish()
    finally:
        run.kill()
    at_notice, before_the_end, _ = committed_steps(config.run_url)
    report = audit(config.run_url)
    assert report.exactly_once, str(report)
    assert [attempt.begins for attempt in report.attempts] == [0, before_the_end]
    assert at_notice < before_the_end
    assert_as_undisturbed(config)
