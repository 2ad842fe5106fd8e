"""Nodes that come, go with notice and die: another number of workers, the same curve and weights."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from ray.cluster_utils import Cluster

from metatrain.checkpoint import committed_steps, read_marker
from metatrain.config import to_yaml
from tests.data.tiny_dataset import write_tiny_dataset
from tests.faults.processes import wait_for
from tests.train.runs import recipe

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[2]
STEPS = 600


@pytest.fixture
def cluster() -> Iterator[Cluster]:
    """A head without room for workers; nodes are added by the test, each with room for one."""
    small = {"object_store_memory": 80 * 1024**2, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, connect=False, head_node_args={"num_cpus": 0, **small})
    yield cluster
    cluster.shutdown()


def add_node(cluster: Cluster):
    return cluster.add_node(num_cpus=2, object_store_memory=80 * 1024**2)


def test_two_workers_one_and_two_again_give_the_curve_and_weights_of_one(
    cluster: Cluster, tmp_path: Path, ray_session: None
) -> None:
    write_tiny_dataset(str(tmp_path / "dataset"), users=640, items=60, validation=20)
    rules = {"epochs": 60, "max_steps": STEPS, "max_failures": 1, "resize_seconds": 2, "validate_every": 10}
    rules["workers"] = {"min": 1, "max": 2}
    # No checkpoint by steps: those that are there were asked for.
    rules["checkpoint"] = {"every_steps": 0, "keep": 50}
    config = recipe(str(tmp_path / "dataset"), str(tmp_path / "runs"), "elastic", rules)
    file, quick = tmp_path / "recipe.yaml", tmp_path / "quick"
    file.write_text(to_yaml(config))
    first, _ = add_node(cluster), add_node(cluster)
    log = (tmp_path / "log").open("w")
    command = [
        sys.executable,
        str(Path(__file__).with_name("elastic_run.py")),
        str(file),
        cluster.address,
        "0.3",
        str(quick),
    ]
    run = subprocess.Popen(command, stdout=log, stderr=log, cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)})

    def sizes() -> list[int]:
        assert run.poll() is None, (tmp_path / "log").read_text()
        return [read_marker(config.run_url, step).world_size for step in committed_steps(config.run_url)]

    def said(text: str, times: int = 1) -> bool:
        assert run.poll() is None, (tmp_path / "log").read_text()
        return (tmp_path / "log").read_text().count(text) >= times

    try:
        wait_for(lambda: sizes() == [2], 300, "xx")
    finally:
        run.kill()
        print((tmp_path / "log").read_text())
