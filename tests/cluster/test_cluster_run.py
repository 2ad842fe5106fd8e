"""A run on a cluster of several real nodes, from submitting to its end, with all that it reads and writes on S3.

A node dies under it and another comes, it is stopped, refused with other settings, submitted again; and it ends with
the weights and metrics of a run that was left alone, which a rendered RayJob's entrypoint trained.

The log is made up in MovieLens-100K's layout; with METATRAIN_TEST_MOVIELENS=FOLDER it is the one in that folder.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from metatrain import storage
from metatrain.checkpoint import committed_steps, read_marker, read_tensors
from tests.cluster.local_cluster import ROOT, Followed, LocalCluster, s3_server
from tests.cluster.movielens_log import write_movielens_100k
from tests.faults.processes import titled
from tests.train.runs import assert_equal_states

pytestmark = pytest.mark.timeout(2400)

RECIPE = str(ROOT / "configs/movielens-100k.yaml")
DATASET, RUNS = "s3://metatrain/datasets/movielens-100k", "s3://metatrain/runs"
STEPS = 240
#: That anything may take on a machine that does much else; the whole takes three minutes on one that doesn't.
SECONDS = 900.0
#: One worker a node of 2 CPUs: it and its reader take one and a half.
CUT = {
    "data.dataset": DATASET,
    "run.storage": RUNS,
    "data.tasks_per_step": "16",
    "train.workers": "3",
    "train.max_steps": str(STEPS),
    "train.validate_every": "8",
    "train.log_every": "5",
    "train.checkpoint.every_steps": "20",
}


def options(name: str, **others: str) -> list[str]:
    given = {**CUT, "run.name": name, **{key.replace("__", "."): value for key, value in others.items()}}
    return [word for key, value in given.items() for word in (f"--{key}", value)]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """Three nodes that find the S3 server, and the dataset on it."""
    log = os.environ.get("METATRAIN_TEST_MOVIELENS") or str(
        write_movielens_100k(tmp_path_factory.mktemp("log") / "ml-100k", users=240, films=150, events=24)
    )
    with pytest.MonkeyPatch.context() as here, s3_server("metatrain") as variables:
        for name, value in variables.items():
            here.setenv(name, value)
        nodes = LocalCluster(3, variables)
        try:
            prepared = nodes.metatrain("prepare", RECIPE, "--path", log, "--out", DATASET)
            assert prepared.returncode == 0, prepared.stderr
            yield nodes
        finally:
            nodes.down()


def saved(name: str) -> list[int]:
    return committed_steps(f"{RUNS}/{name}")


def final_curves(name: str, folder: Path) -> dict[str, float]:
    """What the run's TensorBoard says that it came to, without what a clock measured."""
    fs, path = storage.filesystem(f"{RUNS}/{name}/tensorboard")
    fs.get(path + "/", str(folder / name) + "/", recursive=True)
    events = EventAccumulator(str(folder / name), size_guidance={"scalars": 0})
    events.Reload()
    tags = [tag for tag in events.Tags()["scalars"] if tag.startswith("final/") and "per_second" not in tag]
    steps = [event.step for event in events.Scalars("learning/loss_after")]
    assert steps == sorted(set(steps)), "no step twice"
    assert steps[-1] == STEPS
    return {tag: events.Scalars(tag)[-1].value for tag in tags}


def run_as_rendered(cluster: LocalCluster, name: str) -> None:
    """Runs what a rendered RayJob says, as KubeRay's submitter does, with no code but what the nodes have installed."""
    rendered = cluster.metatrain("submit", RECIPE, *options(name), "--render", "rayjob", "--image", "metatrain:1")
    assert rendered.returncode == 0, rendered.stderr
    spec = yaml.safe_load(rendered.stdout)["spec"]
    runtime_env = yaml.safe_load(spec["runtimeEnvYAML"])
    ray = str(Path(sys.executable).with_name("ray"))
    submit = [ray, "job", "submit", f"--runtime-env-json={json.dumps(runtime_env)}"]
    submit += [f"--metadata-json={json.dumps(spec['metadata'])}", "--", *spec["entrypoint"].split()]
    done = cluster.run(*submit)
    assert done.returncode == 0, done.stdout + done.stderr


def test_a_run_survives_a_node_and_a_stop_and_ends_as_a_quiet_one(
    cluster: LocalCluster, tmp_path: Path, record_property
):
    run_as_rendered(cluster, "quiet")

    run = Followed(cluster, tmp_path / "log", "submit", RECIPE, *options("disturbed"))
    try:
        run.wait(lambda: saved("disturbed"), "a checkpoint", SECONDS)
        # One worker a node, so the run cannot go on before there is another node.
        assert titled(cluster.process("node2"), "RayTrainWorker")
        cluster.kill("node2")
        killed = time.monotonic()
        assert max(saved("disturbed")) < STEPS - 40, "the node was to die in mid-run"
        assert cluster.add() == "node4"
        run.wait(lambda: "going on from the checkpoint at step" in run.text(), "the restart", SECONDS)
        assert "started again (1), 3 workers" in run.text()
        at_death = max(saved("disturbed"))
        run.wait(lambda: max(saved("disturbed")) > at_death, "a checkpoint after the node's death", SECONDS)
        record_property("seconds from the node's death to the next checkpoint", round(time.monotonic() - killed, 1))
        assert titled(cluster.process("node4"), "RayTrainWorker")
        assert cluster.metatrain("job", "stop", f"{RUNS}/disturbed").returncode == 0
        assert run.end(SECONDS) == 130
    finally:
        run.kill()
    stopped_at = max(saved("disturbed"))
    assert stopped_at < STEPS, "the run was to be stopped before its end"

    changed = cluster.metatrain("submit", RECIPE, *options("disturbed", meta__loss="squared", model__levels="0"))
    assert changed.returncode == 2
    assert "meta.loss: was 'absolute', is 'squared'; model.levels: was 5, is 0" in changed.stderr

    resumed = cluster.metatrain("submit", RECIPE, *options("disturbed"))
    assert resumed.returncode == 0, resumed.stdout + resumed.stderr
    assert f"goes on from step {stopped_at}" in resumed.stdout
    assert f"going on from the checkpoint at step {stopped_at}" in resumed.stdout
    again = cluster.metatrain("submit", RECIPE, *options("disturbed"))
    assert again.returncode == 0
    assert "nothing is submitted" in again.stdout

    one, other = (read_tensors(f"{RUNS}/{name}", STEPS) for name in ("quiet", "disturbed"))
    assert_equal_states(one, other)
    metrics = [read_marker(f"{RUNS}/{name}", STEPS).metrics for name in ("quiet", "disturbed")]
    assert metrics[0] == metrics[1]
    assert set(metrics[0]) == {"validation_loss"}
    ends = final_curves("quiet", tmp_path)
    assert set(ends) == {"final/training_loss", "final/validation_loss", "final/validation_gain"}
    assert final_curves("disturbed", tmp_path) == ends
