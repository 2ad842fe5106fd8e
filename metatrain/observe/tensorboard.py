"""TensorBoard: the only SummaryWriter. One folder a run, across restarts, without doubled steps."""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch.utils.tensorboard import SummaryWriter
from torch.utils.tensorboard.summary import hparams

from metatrain import storage
from metatrain.observe.copies import Upload, board_url
from metatrain.observe.layout import layout

#: How old the curves on the run's storage may be, at most, while training logs.
SECONDS_BETWEEN_FLUSHES = 10.0
#: A file is put on an object store whole each time, so there another one is begun at this size.
BYTES_A_FILE = 4 << 20
#: Ends the names of those of training, one or more an attempt: FIRST is on an attempt's first.
FIRST, FURTHER = ".attempt", ".attempt-further"
#: Ends the name of the one of the last evaluation.
EVALUATION = ".evaluation"
#: Of the name of an event file; behind it is the second in which it was made.
_SECOND = ".tfevents."


def write_evaluation(run_url: str, values: Mapping[str, float], step: int) -> None:
    """Adds what an evaluation of the checkpoint at `step` came to, in place of what an earlier one did."""
    url = board_url(run_url)
    there = storage.list_folder(url)
    before = [name for name in there if name.endswith(EVALUATION)]
    with tempfile.TemporaryDirectory(prefix="metatrain-tensorboard-") as folder:
        writer = SummaryWriter(folder, filename_suffix=EVALUATION)
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.close()
        [name] = os.listdir(folder)
        with open(os.path.join(folder, name), "rb") as file:
            storage.write_atomic(storage.join(url, _behind(name, there)), file.read())
    for name in before:
        storage.remove(storage.join(url, name))


def _behind(name: str, others: Iterable[str]) -> str:
    """The name of an event file, made to come behind those others.

    TensorBoard reads files by their names, which begin with the second in which they were made. The first event of an
    attempt has it forget what it read of later steps before: of an evaluation too, where a machine whose clock is
    behind wrote one, or both are of one second.
    """
    kind, mark, rest = name.partition(_SECOND)
    seconds = [int(other.partition(_SECOND)[2].partition(".")[0]) for other in others if _SECOND in other]
    second, _, rest = rest.partition(".")
    return f"{kind}{mark}{max([int(second), *(made + 1 for made in seconds)]):010d}.{rest}"


class Board:
    """Writes a run's curves and texts to RUN/tensorboard.

    A board is made once an attempt to train: `restarts` says how many came before.

    Args:
        run_url: The run's folder. Where it is not on a disk, files are written to a local folder and copied from there
            by a thread, so that training never waits for the store.
        step: The step that training starts from: what an earlier, killed attempt wrote beyond it is superseded.
        bytes_a_file: On an object store: see `BYTES_A_FILE`.
    """

    def __init__(self, run_url: str, step: int, bytes_a_file: int = BYTES_A_FILE) -> None:
        self._url = board_url(run_url)
        #: Attempts before this one.
        self.restarts = sum(name.endswith(FIRST) for name in storage.list_folder(self._url))
        local = storage.is_local(self._url)
        self._staged = None if local else tempfile.mkdtemp(prefix="metatrain-tensorboard-")
        self._folder = self._staged or storage.filesystem(self._url)[1]
        # `purge_step` makes TensorBoard forget events at and after it; the last logged one is at `step` itself.
        self._writer, self._current = self._opened(FIRST, purge_step=step + 1)
        self._bytes_a_file = bytes_a_file
        self._upload = Upload(self._staged, self._url) if self._staged else None
        self._flushed = time.monotonic()
        self._end: Any = None

    def scalars(self, values: Mapping[str, float], step: int) -> None:
        """Curves by name (`group/name`) at a step."""
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)
        if time.monotonic() - self._flushed > SECONDS_BETWEEN_FLUSHES:
            self.flush()

    def text(self, name: str, markdown: str) -> None:
        """A text, as Markdown."""
        self._writer.add_text(name, markdown)

    def histogram(self, name: str, values: Any, step: int) -> None:
        """A distribution of values at a step, in 30 bins: as many as TensorBoard shows."""
        self._writer.add_histogram(name, values, step, bins=30)  # pyright: ignore[reportArgumentType]

    def layout(self, of_method: Iterable[str]) -> None:
        """The page of charts that belong together: tab "Custom scalars". See `layout.layout`."""
        self._writer.add_custom_scalars(layout(of_method))

    def hparams(self, settings: Mapping[str, bool | int | float | str], metrics: Sequence[str]) -> None:
        """What tells this run from others, and the curves whose last values judge it: tab "HParams".

        In the run itself: `SummaryWriter.add_hparams` would make another one, in a folder inside this one's.
        """
        experiment, start, self._end = hparams(dict(settings), dict.fromkeys(metrics, 0.0))
        for summary in (experiment, start):
            self._summary(summary)

    def ended(self) -> None:
        """Says in the tab "HParams" that the run came to its end."""
        if self._end is not None:
            self._summary(self._end)

    def file(self, name: str, content: str) -> None:
        """A file beside the events, replaced whole: of the projector."""
        storage.write_atomic(os.path.join(self._folder, name), content)
        if self._upload is not None:
            self._upload.soon()

    def flush(self) -> None:
        """Makes what was written visible; on an object store soon, since a thread puts it there."""
        self._flushed = time.monotonic()
        self._writer.flush()
        if self._upload is None:
            return
        if os.path.getsize(os.path.join(self._folder, self._current)) > self._bytes_a_file:
            self._writer.close()
            self._upload.ended(self._current)
            self._writer, self._current = self._opened(FURTHER)
        self._upload.soon()

    def close(self) -> None:
        """Flushes and closes; waits until everything is on the run's storage."""
        self._writer.close()
        if self._upload is not None and self._staged is not None and self._upload.close():
            shutil.rmtree(self._staged, ignore_errors=True)

    def _summary(self, summary: Any) -> None:
        assert self._writer.file_writer is not None, "the writer is open"
        self._writer.file_writer.add_summary(summary)

    def _opened(self, suffix: str, purge_step: int | None = None) -> tuple[SummaryWriter, str]:
        """A writer, and the name of its file."""
        os.makedirs(self._folder, exist_ok=True)
        before = set(os.listdir(self._folder))
        writer = SummaryWriter(self._folder, purge_step=purge_step, filename_suffix=suffix)
        return writer, max(name for name in os.listdir(self._folder) if name.endswith(suffix) and name not in before)
