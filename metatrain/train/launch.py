"""Launching a run on Ray Train: an embedded local Ray by default, a cluster by its address.

A run that cannot work fails here, in its first seconds, before any worker is started.
"""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Iterator
from typing import Any, cast

import pyarrow.fs
import ray
import ray.train
import ray.train.torch
from ray.train.v2.api.config import LoggingConfig
from ray.train.v2.api.exceptions import TrainingFailedError

from metatrain import storage
from metatrain.checkpoint import committed_steps, read_marker
from metatrain.checkpoint.identity import check_identity, identity
from metatrain.config import Config, to_yaml, validated
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import Split
from metatrain.errors import ConfigError, MetatrainError, TrainingError
from metatrain.model.metamodel import build_model
from metatrain.observe.progress import TrainingProgress
from metatrain.train.step import open_reader
from metatrain.train.worker import Seat, train

log = logging.getLogger("metatrain")

READER_CPUS = 0.5


def launch(config: Config, address: str | None = None) -> None:
    """Trains a run to its end; the same call again goes on where it stopped.

    Args:
        config: The resolved configuration.
        address: Of a Ray cluster (`auto`, `host:port`, `ray://…`). Default: a local Ray that ends with the call.

    Raises:
        MetatrainError: The run cannot work, or failed more often than `train.max_failures` allows.
    """
    config = located(config)
    check(config)
    storage.write_atomic(storage.join(config.run_url, "config.yaml"), to_yaml(config))
    with ray_session(config, address):
        _fit(config)


def located(config: Config) -> Config:
    """The same configuration with absolute paths: a Ray worker has another working folder."""
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"storage": storage.absolute(config.run.storage)}),
            "data": config.data.model_copy(update={"dataset": storage.absolute(config.data.dataset)}),
        }
    )


def check(config: Config) -> None:
    """All that can be known to be wrong before a worker starts.

    Raises:
        MetatrainError: A dataset, shard, feature, parameter pattern or checkpoint that cannot be used.
    """
    dataset = TaskDataset.open(config.data.dataset)
    build_model(dataset.schema, config, "cpu", tables_device="meta")
    for split in (Split.TRAIN, Split.VALIDATION):
        open_reader(dataset, config, split).close()  # every shard is there, and as long as the manifest says
    if not dataset.manifest.tasks.get(Split.TRAIN):
        raise ConfigError("The dataset has no training user.", where=dataset.url, remedy="Lower `prepare.min_events`.")
    if steps := committed_steps(config.run_url):
        marker = read_marker(config.run_url, steps[-1])
        check_identity(marker.identity, identity(config, dataset.fingerprint), config.run_url)


@contextlib.contextmanager
def ray_session(config: Config, address: str | None) -> Iterator[None]:
    """A Ray to train on: the one already there, the cluster at `address`, or a local one that ends with the block."""
    if ray.is_initialized():
        yield
        return
    # Ray would print a line of its own for every worker; what users need comes through `tell`.
    quiet: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address:
        ray.init(address=address, **quiet)
    else:
        workers = config.train.workers
        wanted = workers + int(workers * config.data.readers_per_worker * READER_CPUS + 1)
        ray.init(num_cpus=max(os.cpu_count() or 1, wanted), include_dashboard=False, **quiet)
    try:
        yield
    finally:
        ray.shutdown()


@ray.remote(num_cpus=0)
class Teller:
    """Carries the workers' messages to the command that launched them."""

    def __init__(self) -> None:
        self._messages: list[dict[str, Any]] = []
        self._fatal: MetatrainError | None = None

    def tell(self, message: dict[str, Any]) -> None:
        """Takes a message."""
        self._messages.append(message)

    def drain(self) -> list[dict[str, Any]]:
        """The messages since the last call."""
        messages, self._messages = self._messages, []
        return messages

    def end_with(self, error: MetatrainError) -> None:
        """Takes an error that another try cannot mend."""
        self._fatal = self._fatal or error

    def fatal(self) -> MetatrainError | None:
        """The error that ends the run."""
        return self._fatal


def _fatal(teller: Any) -> MetatrainError | None:
    return cast("MetatrainError | None", ray.get(teller.fatal.remote()))


def _worker_loop(settings: dict[str, Any]) -> None:
    """What Ray Train runs on every worker."""
    import torch

    teller = settings["teller"]
    if _fatal(teller):
        return  # Ray Train starts failed workers again; an error in the input would only come again.
    logging.basicConfig(level=logging.WARNING)
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

    tell({"start": world_size})
    try:
        train(config, Seat(rank, world_size, device, tell))
    except MetatrainError as error:
        ray.get(teller.end_with.remote(error))
        raise


def _fit(config: Config) -> None:
    teller = Teller.remote()  # pyright: ignore[reportAttributeAccessIssue]
    fs, path = storage.filesystem(config.run_url)
    storage.make_folder(config.run_url)
    trainer = ray.train.torch.TorchTrainer(
        _worker_loop,
        train_loop_config={"config": config.model_dump(mode="json"), "where": config.run_url, "teller": teller},
        torch_config=ray.train.torch.TorchConfig(backend="cpu:gloo,cuda:nccl" if config.train.gpus else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=config.train.workers,
            use_gpu=config.train.gpus,
            resources_per_worker={"CPU": 1, **({"GPU": 1} if config.train.gpus else {})},
        ),
        run_config=ray.train.RunConfig(
            name="ray",
            storage_path=path,
            storage_filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(fs)),
            failure_config=ray.train.FailureConfig(max_failures=config.train.max_failures),
            logging_config=LoggingConfig(log_level="ERROR"),
        ),
    )
    try:
        with _shown(teller):
            trainer.fit()
    except TrainingFailedError as error:
        if fatal := _fatal(teller):
            raise fatal from None
        raise TrainingError(
            f"Training failed more often than `train.max_failures` allows ({config.train.max_failures}).",
            where=config.run_url,
            got=str(error)[-2000:],
            remedy="Mend the cause; the same command goes on from the last checkpoint.",
        ) from error
    if fatal := _fatal(teller):
        raise fatal


@contextlib.contextmanager
def _shown(teller: Any) -> Iterator[None]:
    """Shows the workers' messages while the block runs."""
    progress, over = TrainingProgress(), threading.Event()

    def drain() -> None:
        for message in ray.get(teller.drain.remote()):
            progress.take(message)

    def poll() -> None:
        while not over.wait(0.5):
            drain()

    thread = threading.Thread(target=poll, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        drain()
        progress.close()
