"""The Ray that a run trains on, checked before a worker starts: it is there, large enough, and shares the folder."""

from __future__ import annotations

import contextlib
import logging
import math
import os
import uuid
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from metatrain import storage
from metatrain.config import Config
from metatrain.data.dataset import TaskDataset
from metatrain.data.stream import READER_CPUS
from metatrain.errors import ConfigError, MetatrainError
from metatrain.local_ray import local_ray
from metatrain.malloc import MALLOC
from metatrain.model.table_plan import Workers, size
from metatrain.train.footprint import check_fits, footprint

log = logging.getLogger("metatrain")

#: Settings of Ray Train for a machine of its own: a sooner look at the workers. And for all its processes what workers
#: and readers need, who are then among those that Ray has ready.
LOCAL_SETTINGS = {
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5",
    **MALLOC,
}


@contextlib.contextmanager
def ray_session(config: Config, address: str | None) -> Iterator[None]:
    """A Ray to train on: the one already there, the cluster at `address`, or a local one that ends with the block."""
    if ray.is_initialized():
        yield
        return
    # Ray would print a line of its own for every worker; what users need comes through `tell`.
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    with contextlib.ExitStack() as session:
        try:
            if address:
                log.info("connecting to Ray at %s", address)
                ray.init(address=address, **quiet)
                session.callback(ray.shutdown)
            else:
                for name in LOCAL_SETTINGS.keys() - os.environ.keys():
                    os.environ[name] = LOCAL_SETTINGS[name]
                    session.callback(os.environ.pop, name, None)
                cpus = max(os.cpu_count() or 1, cpus_of(config) + 1)
                log.info("starting Ray on this machine (`metatrain doctor` examines it where that takes minutes)")
                session.enter_context(local_ray(num_cpus=cpus, **quiet))
        except MetatrainError:
            raise
        except Exception as error:  # Ray raises of all kinds, a bare Exception where a node does not come up in time
            raise ConfigError(
                f"Ray cannot be {'reached' if address else 'started'}: {error}",
                where="--address" if address else "this machine",
                got=address or "a local Ray",
                remedy="Check the address and that the cluster is up."
                if address
                else "Where the machine is busy or short of memory, try again; `metatrain doctor` examines it.",
            ) from error
        check_resources(config, cluster=bool(address))
        if address:
            check_memory(config, ray.nodes())
        _check_shared_storage(config.run_url)
        yield


def worker_cpus(config: Config) -> float:
    """CPUs that a worker asks for, its readers' among them: so a node takes no worker whose readers have no room."""
    return 1 + config.data.first_readers * READER_CPUS


def cpus_of(config: Config) -> int:
    """CPUs without which a run does not train: of its workers (the least, where there is a range) and their readers."""
    return math.ceil(config.train.least_workers * worker_cpus(config))


def check_resources(config: Config, cluster: bool) -> None:
    """A local Ray never gets what it lacks; a cluster may grow, so there a wait is only announced.

    Raises:
        ConfigError: The local Ray is smaller than the run wants.
    """
    wanted = {"CPU": cpus_of(config), **({"GPU": config.train.least_workers} if config.train.gpus else {})}
    there = ray.cluster_resources()
    for name, count in wanted.items():
        if there.get(name, 0) >= count:
            continue
        if not cluster:
            raise ConfigError(
                f"This machine has fewer {name}s than the run wants.",
                where="train.workers" if name == "CPU" else "train.gpus",
                got=f"{count} wanted, {there.get(name, 0):g} there",
                remedy="Lower `train.workers`, set `train.gpus: false`, or give a cluster by `--address`.",
            )
        log.info("waiting for the cluster: the run wants %d %ss, %g are there", count, name, there.get(name, 0))


def check_memory(config: Config, nodes: Sequence[Mapping[str, Any]]) -> None:
    """Refuses a run whose workers do not fit into the cluster's nodes, where these have CPUs enough for them.

    Ray places by CPUs and GPUs. Where these are still to come, so may be memory.

    Args:
        config: The run.
        nodes: As `ray.nodes()` gives them.

    Raises:
        ConfigError: With the arithmetic.
    """
    count, gpus = config.train.least_workers, config.train.gpus
    manifest = TaskDataset.open(config.data.dataset).manifest
    counted = footprint(config, manifest, Workers(count, 1, device="cuda" if gpus else "cpu"))
    needed = counted.bytes(surely=True)
    room = fits = largest = 0
    for has in [node["Resources"] for node in nodes if node["Alive"] and "memory" in node["Resources"]]:
        memory = int(has["memory"] + has.get("object_store_memory", 0))  # Ray divides a node's into these two
        places = int(has.get("CPU", 0) // worker_cpus(config))
        if gpus:
            places = min(places, int(has.get("GPU", 0)))
        room, fits = room + places, fits + min(places, memory // needed)
        largest = max(largest, memory)
    if room >= count > fits:
        at_most = f"the cluster's nodes, of which the largest has {size(largest)}"
        check_fits(counted, fits * needed, count, at_most)


def _check_shared_storage(run_url: str) -> None:
    """Refuses a folder that is not the same on every node: its checkpoints would exist nowhere whole.

    Raises:
        ConfigError: Names a node that does not see the folder.
    """
    nodes = [node for node in ray.nodes() if node["Alive"]]
    if len(nodes) < 2 or not storage.is_local(run_url):
        return
    probe = storage.join(run_url, f".probe-{uuid.uuid4().hex}")
    storage.write_atomic(probe, "")
    try:
        for node in nodes:
            there = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
            sees = ray.remote(num_cpus=0)(os.path.exists).options(scheduling_strategy=there)
            if not ray.get(sees.remote(probe)):
                raise ConfigError(
                    "The run's folder is not shared by all nodes of the cluster.",
                    where="run.storage",
                    got=f"{run_url}, which node {node['NodeManagerAddress']} does not see",
                    remedy="Name a folder that all nodes mount, or an object store (s3://…).",
                )
    finally:
        storage.remove(probe)
