"""TensorBoard: the only SummaryWriter. One folder a run, across restarts, without doubled steps."""

from __future__ import annotations

import os
import shutil
import tempfile
import time

from torch.utils.tensorboard import SummaryWriter

from metatrain import storage

#: How old the curves on the run's storage may be, at most, while training logs.
SECONDS_BETWEEN_FLUSHES = 10.0


class Board:
    """Writes a run's curves and texts to RUN/tensorboard.

    Args:
        run_url: The run's folder. Where it is not on a disk, files are written to a local folder and copied at `flush`.
        step: The step that training starts from: what an earlier, killed attempt wrote beyond it is superseded.
    """

    def __init__(self, run_url: str, step: int) -> None:
        self._url = storage.join(run_url, "tensorboard")
        local = storage.is_local(self._url)
        self._staged = None if local else tempfile.mkdtemp(prefix="metatrain-tensorboard-")
        # `purge_step` makes TensorBoard forget events at and after it; the last logged one is at `step` itself.
        self._writer = SummaryWriter(self._staged or storage.filesystem(self._url)[1], purge_step=step + 1)
        self._flushed = time.monotonic()

    def scalars(self, values: dict[str, float], step: int) -> None:
        """Curves by name (`group/name`) at a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if time.monotonic() - self._flushed > SECONDS_BETWEEN_FLUSHES:
            self.flush()

    def text(self, name: str, markdown: str) -> None:
        """A text, as Markdown."""
        self._writer.add_text(name, markdown)

    def histogram(self, name: str, values, step: int) -> None:
        """A distribution of values at a step."""
        self._writer.add_histogram(name, values, step)

    def flush(self) -> None:
        """Makes what was written visible, on the run's storage too."""
        self._flushed = time.monotonic()
        self._writer.flush()
        if self._staged is not None:
            for name in os.listdir(self._staged):
                with open(os.path.join(self._staged, name), "rb") as file:
                    storage.write_atomic(storage.join(self._url, name), file.read())

    def close(self) -> None:
        """Flushes and closes."""
        self.flush()
        self._writer.close()
        if self._staged is not None:
            shutil.rmtree(self._staged, ignore_errors=True)
