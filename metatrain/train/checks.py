"""What is known to be wrong with a run before a process of Ray's is started for it, and whether it is at its end.

Nothing here imports torch or Ray before it must: both take seconds, and most mistakes are told without them.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Sequence

from metatrain import storage
from metatrain.checkpoint.format import Cursor, committed_steps, read_marker
from metatrain.checkpoint.identity import check_identity, identity
from metatrain.config import Config
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import Split
from metatrain.data.quarantine import read_quarantine
from metatrain.errors import ConfigError
from metatrain.model.choices import check_choices
from metatrain.model.construct import absolute_name
from metatrain.train.early_stopping import Patience
from metatrain.train.readers import open_reader

#: Variable of a submitted job that holds its recipe (see `metatrain.submit`).
RECIPE_VARIABLE = "METATRAIN_RECIPE"
#: Under this name a checkpoint tells which shards it was trained without.
QUARANTINED = "quarantined"


def located(config: Config) -> Config:
    """The same configuration with absolute paths: a Ray worker has another working folder."""
    # A submitted job's processes each work in their node's copy of its folder, which is elsewhere on each.
    file_name = str if RECIPE_VARIABLE in os.environ else absolute_name
    return config.model_copy(
        update={
            "run": config.run.model_copy(update={"storage": storage.absolute(config.run.storage)}),
            "data": config.data.model_copy(update={"dataset": storage.absolute(config.data.dataset)}),
            "model": config.model.model_copy(update={"learner": file_name(config.model.learner)}),
            "meta": config.meta.model_copy(update={"algorithm": file_name(config.meta.algorithm)}),
        }
    )


def check(config: Config) -> None:
    """All that can be known to be wrong before a worker starts.

    Raises:
        MetatrainError: A dataset, shard, feature, parameter pattern or checkpoint that cannot be used.
    """
    dataset = TaskDataset.open(config.data.dataset)
    check_choices(dataset.schema, config)
    check_episodes(config, dataset)
    steps = committed_steps(config.run_url)
    if steps:
        marker = read_marker(config.run_url, steps[-1])
        check_identity(marker.identity, identity(config, dataset.fingerprint), config.run_url)
        read_quarantine(config.run_url, dataset).check_grown(marker.loop.get(QUARANTINED, ()), config.run_url)
    # What needs no torch has been refused.
    from metatrain.model.pair import build_pair

    build_pair(dataset.schema, config)
    if steps:
        from metatrain.checkpoint.load import open_checkpoint

        open_checkpoint(config.run_url, steps[-1])


def check_episodes(config: Config, dataset: TaskDataset) -> None:
    """Refuses a split of which no task has an episode, and shards that are not there or shorter than they were.

    Raises:
        MetatrainError: The configuration's bounds, or a shard.
    """
    splits = {Split.TRAIN: "data.episode"}
    if config.train.validate_every and dataset.manifest.tasks.get(Split.VALIDATION):
        splits[Split.VALIDATION] = "evaluate.episode"
    for split, where in splits.items():
        # Opening checks that every shard is there, and as long as the manifest says.
        with contextlib.closing(open_reader(dataset, config, split)) as reader:
            lanes = range(config.data.lanes)
            if not any(reader.read(0, step, lanes).size for step in range(reader.steps(0))):
                raise ConfigError(
                    f"No {split.value} {dataset.manifest.task} has enough events for an episode.",
                    where=where,
                    got=f"{dataset.manifest.tasks.get(split, 0)} {dataset.manifest.task}s in {dataset.url}",
                    remedy="Lower `support_min`, `query_min` or `events_min`, or prepare other data.",
                )


def finished(config: Config) -> bool:
    """Whether the run's last checkpoint is its end: then no worker need start."""
    if not (steps := committed_steps(config.run_url)):
        return False
    marker = read_marker(config.run_url, steps[-1])
    with contextlib.closing(open_reader(TaskDataset.open(config.data.dataset), config, Split.TRAIN)) as reader:
        last = last_step(config, [reader.steps(epoch) for epoch in range(config.train.epochs)])
    return is_over(config, marker.cursor, last, Patience(config.train.early_stopping, marker.loop))


def last_step(config: Config, steps_of: Sequence[int]) -> int:
    """Steps of a whole run, whose epochs have `steps_of` steps."""
    whole = sum(steps_of)
    return min(whole, config.train.max_steps or whole)


def is_over(config: Config, cursor: Cursor, last: int, patience: Patience) -> bool:
    """Whether a run that stands at `cursor` is at its end."""
    return cursor.epoch >= config.train.epochs or cursor.total >= last or patience.exhausted
