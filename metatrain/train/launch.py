"""Launching a run on Ray Train: an embedded local Ray by default, a cluster by its address.

A run that cannot work fails here, in its first seconds, before any worker is started.
"""

from __future__ import annotations

import contextlib
import logging
import math
import os
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, cast

import pyarrow.fs
import ray
import ray.train
import ray.train.torch
from ray.train.v2.api.config import LoggingConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from metatrain import storage
from metatrain.checkpoint import committed_steps
from metatrain.config import Config, to_yaml, validated
from metatrain.data.manifest import Split
from metatrain.data.quarantine import BadShards
from metatrain.errors import MetatrainError, TrainingError
from metatrain.malloc import with_malloc
from metatrain.train.checks import check, finished, located
from metatrain.train.elastic import Trainer
from metatrain.train.footprint import check_machine
from metatrain.train.session import ray_session, worker_cpus
from metatrain.train.supervise import BEAT_SECONDS, Overseer, fatal, group_name, heart, kill_hanging, make_teller
from metatrain.train.watch import Watch, watching
from metatrain.train.worker import Seat, train

log = logging.getLogger("metatrain")

#: Seconds that the workers' room is waited for before their number is thought of again, and attempts in all: half an
#: hour. A node that has just died still counts for some seconds, so a number that may change is thought of more often.
START_SECONDS, START_ATTEMPTS = 60, 30
START_SECONDS_OF_A_RANGE, START_ATTEMPTS_OF_A_RANGE = 20, 90
#: Bound of a collective where hanging workers are not looked for: torch's own.
COLLECTIVE_SECONDS = 1800


def launch(config: Config, address: str | None = None, work: Callable[[Config, Seat], None] = train) -> None:
    """Trains a run to its end; the same call again goes on where it stopped.

    Args:
        config: The resolved configuration.
        address: Of a Ray cluster (`auto`, `host:port`, `ray://…`). Default: a local Ray that ends with the call.
        work: What every worker does: benchmarks do more than to train.

    Raises:
        MetatrainError: The run cannot work, or failed more often than `train.max_failures` allows.
    """
    config = located(config)
    checked = {Split.TRAIN, *([Split.VALIDATION] if config.train.validate_every else [])}
    shards = BadShards(config.run_url, config.data, lambda: max(committed_steps(config.run_url), default=0))
    shards.check(checked)
    shards.spared(lambda: check(config))
    if not address:
        check_machine(config)
    if finished(config):
        log.info("this run is trained to its end: %s", config.run_url)
        return
    storage.write_atomic(storage.join(config.run_url, "config.yaml"), to_yaml(config))
    # A Ray that does not start is how a run ended, too.
    with watching(config) as watch, ray_session(config, address):
        shards.spared(lambda: _fit(config, work, watch))
    if lost := shards.quarantine().told():
        log.warning("%s", lost)


class _Told(logging.Handler):
    """Passes log lines on by `tell`."""

    def __init__(self, tell: Callable[[dict[str, Any]], None]) -> None:
        super().__init__()
        self._tell = tell

    def emit(self, record: logging.LogRecord) -> None:
        self._tell({"say": self.format(record)})


def _worker_loop(settings: dict[str, Any]) -> None:
    """What Ray Train runs on every worker."""
    import torch

    teller, entered = settings["teller"], time.time()
    wait = cast(float, ray.get(teller.begin.remote(group_name())))
    if fatal(teller):
        return  # Ray Train starts failed workers again; an error in the input would only come again.
    config = validated(settings["config"], where=settings["where"])
    if config.train.threads_per_worker:
        torch.set_num_threads(config.train.threads_per_worker)
    context = ray.train.get_context()
    rank, world_size = context.get_world_rank(), context.get_world_size()
    device = ray.train.torch.get_device() if config.train.gpus else torch.device("cpu")
    assert isinstance(device, torch.device), "one device a worker"

    def tell(message: dict[str, Any]) -> None:
        if rank == 0:
            teller.tell.remote(message)

    # What rooms below log (a reader died, the inner loop's engine) is for whoever launched the run.
    logging.getLogger("metatrain").setLevel(logging.INFO)
    logging.getLogger("metatrain").addHandler(_Told(tell))
    tell({"start": world_size, "at": entered, "wait": wait})
    time.sleep(wait)
    seat = Seat(rank, world_size, device, tell)
    try:
        with heart(teller, rank, seat.pulse, seat.asked):
            settings["work"](config, seat)
    except MetatrainError as error:
        ray.get(teller.end_with.remote(error))
        raise


def scaling(config: Config) -> ray.train.ScalingConfig:
    """How many workers, what each takes, and how they lie on the nodes."""
    rules = config.train
    return ray.train.ScalingConfig(
        num_workers=rules.workers,
        use_gpu=rules.gpus,
        resources_per_worker={"CPU": worker_cpus(config), **({"GPU": 1} if rules.gpus else {})},
        placement_strategy=rules.placement.upper(),
        elastic_resize_monitor_interval_s=rules.resize_seconds,
    )


def _fit(config: Config, work: Callable[[Config, Seat], None], watch: Watch) -> None:
    rules, ranged = config.train, isinstance(config.train.workers, tuple)
    seconds, attempts = (
        (START_SECONDS_OF_A_RANGE, START_ATTEMPTS_OF_A_RANGE) if ranged else (START_SECONDS, START_ATTEMPTS)
    )
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = str(seconds)  # Ray Train has no other way to say it
    teller = make_teller(rules.backoff_seconds)
    fs, path = storage.filesystem(config.run_url)
    storage.make_folder(config.run_url)
    trainer = Trainer(
        _worker_loop,
        teller=teller,
        train_loop_config={
            "config": config.model_dump(mode="json"),
            "where": config.run_url,
            "teller": teller,
            "work": work,
        },
        torch_config=ray.train.torch.TorchConfig(
            backend="cpu:gloo,cuda:nccl" if rules.gpus else "gloo",
            # Longer than a worker may hang: who waits for it should not fail first, and be taken for the cause.
            timeout_s=math.ceil(2 * rules.hang_seconds + 300) if rules.hang_seconds else COLLECTIVE_SECONDS,
        ),
        scaling_config=scaling(config),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=path,
            storage_filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)),
            failure_config=ray.train.FailureConfig(
                max_failures=rules.max_failures,
                # Of starting the workers: time for a cluster to grow, but not for ever.
                controller_failure_limit=attempts,
            ),
            worker_runtime_env=with_malloc(),
            logging_config=LoggingConfig(log_level="ERROR"),
            # Ray Train takes callbacks of its controller too, though the type names only one kind.
            callbacks=cast(Any, [Overseer(teller)]),
        ),
    )
    hung: list[str] = []
    try:
        with _shown(teller, watch, rules.hang_seconds, hung):
            trainer.fit()
    except TrainingFailedError as error:
        if known := fatal(teller):
            raise known from None
        raise TrainingError(
            f"Training failed more often than `train.max_failures` allows ({rules.max_failures}).",
            where=config.run_url,
            got="\n".join([*(f"hung: {worker}" for worker in hung), str(error)[-2000:]]),
            remedy="Mend the cause; the same command goes on from the last checkpoint.",
        ) from error
    if known := fatal(teller):
        raise known


@contextlib.contextmanager
def _shown(teller: Any, watch: Watch, hang_seconds: float, hung: list[str]) -> Iterator[None]:
    """Shows the workers' messages while the block runs, and kills those that hang, which come to be in `hung`."""
    over = threading.Event()

    def drain() -> None:
        for message in ray.get(teller.drain.remote()):
            watch.take(message)
        watch.tick()

    def kill() -> None:
        for worker in kill_hanging(teller, hang_seconds):
            hung.append(worker)
            told = f"a worker hangs and is killed: {worker}"
            watch.take({"say": told, "fault": told})

    def poll() -> None:
        looked = time.monotonic()
        while not over.wait(0.5):
            drain()
            if hang_seconds and time.monotonic() - looked >= BEAT_SECONDS:  # no worker is heard of sooner
                looked = time.monotonic()
                kill()

    thread = threading.Thread(target=poll, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        drain()
