"""The readers of a run that are in its own processes: who checks a run, and who validates."""

from __future__ import annotations

from metatrain.config import Config
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import ItemSet, Split
from metatrain.data.quarantine import read_quarantine
from metatrain.data.reader import BatchReader


def open_reader(dataset: TaskDataset, config: Config, split: Split, *, keys: bool = False) -> BatchReader:
    """A reader of a split's known items in this process: training's episodes for training users, else evaluation's.

    Of training users it leaves out those of shards that the run has quarantined. With `keys` it knows the tasks' keys.
    """
    training = split is Split.TRAIN
    return BatchReader.from_config(
        dataset,
        config.data,
        split,
        ItemSet.EXISTING,
        config.data.episode if training else config.evaluate.episode,
        config.train.seed if training else config.evaluate.seed,
        shuffle=training,
        features=config.model.features,
        quarantined=read_quarantine(config.run_url, dataset).paths if training else (),
        keys=keys,
        timestamps=False,
    )
