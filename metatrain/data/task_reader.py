"""The actor that reads batches for a `TaskStream`. It is given lanes and steps, and keeps nothing else."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Sequence
from typing import Any

from metatrain import faults
from metatrain.data.batch import TaskBatches
from metatrain.data.reader import BatchReader


class TaskReader:
    """The actor around a `BatchReader`. It holds nothing that the plan cannot rebuild."""

    def __init__(self, dataset_url: str, options: dict[str, Any]) -> None:
        self._url, self._options = dataset_url, options
        self._reader: BatchReader | None = None

    def open(self) -> int:
        """Opens the dataset; the process's id. Not in the constructor, whose errors Ray reports as a death."""
        faults.refresh()
        self._reader = BatchReader.from_config(self._url, **self._options, read_ahead=True, verify=False)
        gc.freeze()  # what is loaded stays: without this, collections that look through it take a tenth of the time
        return os.getpid()

    def read(self, epoch: int, step: int, steps: int, lanes: Sequence[int]) -> tuple[TaskBatches, float]:
        """The lanes' part of the batches of consecutive steps, and the seconds that it took."""
        assert self._reader is not None, "open comes first"
        faults.point("reader.read", epoch=epoch, step=step + steps - 1)
        begun = time.monotonic()
        return self._reader.read_steps(epoch, step, steps, lanes), time.monotonic() - begun
