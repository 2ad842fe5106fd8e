"""Saving a run while it trains: training waits for a local copy, the rest is done beside it.

All ranks save together. After a kill at any point the checkpoint is whole or doesn't count.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, cast

import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import CheckpointException, DefaultSavePlanner

from metatrain import __version__, faults
from metatrain.checkpoint.format import MODEL, Base, Cursor, Marker, checkpoint_url, checkpoints_url
from metatrain.checkpoint.retention import prune
from metatrain.checkpoint.rows import Encoding
from metatrain.checkpoint.staging import Buffers
from metatrain.checkpoint.writer import Writer
from metatrain.config import CheckpointConfig
from metatrain.errors import CheckpointError, MetatrainError

#: How long ranks wait for the slowest one's bytes.
_GROUP_TIMEOUT = timedelta(hours=2)
# Between looks at how far a save has come that is waited for.
_PROGRESS_SECONDS = 5.0


@dataclass(frozen=True)
class Saved:
    """A save that has begun."""

    step: int
    full: bool
    #: Seconds that training waited for the save before it, and for this one's copy.
    waited: float
    copied: float


class Saver:
    """Saves a run's checkpoints, one at a time. Made by all ranks together, within a process group.

    Args:
        run_url: The run.
        config: When a checkpoint is full, and which are kept.
        state: The run's tensors by name, sharded by rows or the same on all ranks: memory for copies is taken now.
        touched: Of tables and their optimizer's state, which rows of this rank's part have changed since the last
            full checkpoint: bool, one a row. A full checkpoint clears them. Without: all checkpoints are full.
        resumed: The checkpoint that the run goes on from.
        progress: Called now and then while training waits for a save whose bytes go on being written.
    """

    def __init__(
        self,
        run_url: str,
        config: CheckpointConfig,
        state: Mapping[str, Tensor],
        touched: Mapping[str, Tensor] | None = None,
        resumed: Marker | None = None,
        progress: Callable[[], object] = lambda: None,
    ) -> None:
        self._run_url, self._config, self._progress = run_url, config, progress
        self._touched = dict(touched or {})
        self._encodings: dict[str, Encoding] = {name: config.rows for name in self._touched if name.startswith(MODEL)}
        self._rank = dist.get_rank()
        # Its own group: the collectives of a save run beside those of training, in another order on every rank.
        self._group = cast(dist.ProcessGroup, dist.new_group(backend="gloo", timeout=_GROUP_TIMEOUT))
        self._buffers = Buffers(state)
        self._base: Base | None = None
        if resumed is not None:
            self._base = resumed.base or Base(step=resumed.cursor.total, contents=resumed.contents, number=0)
        self._thread: threading.Thread | None = None
        self._writer: Writer | None = None
        self._error: BaseException | None = None
        #: The step of the checkpoint that was committed last; None before the first.
        self.committed: int | None = None

    def save(
        self,
        state: Mapping[str, Tensor],
        *,
        cursor: Cursor,
        identity: dict[str, Any],
        loop: dict[str, Any],
        configuration: dict[str, Any],
        metrics: dict[str, float],
    ) -> Saved:
        """Copies the state and begins to write it. All ranks call it at the same step.

        Raises:
            CheckpointError, StorageError: The save before this one failed.
        """
        start = time.monotonic()
        self.wait()
        begun = time.monotonic()
        place = {"step": cursor.total, "rank": self._rank, "path": checkpoint_url(self._run_url, cursor.total)}
        faults.point("checkpoint.copy", **place)
        number = self._base.number + 1 if self._base else 0
        full = not self._touched or self._base is None or number >= self._config.full_every
        staged = self._buffers.stage(state, {} if full else self._touched, self._encodings)
        if full:
            for bitmap in self._touched.values():
                bitmap.zero_()
        base = None if full or self._base is None else self._base.model_copy(update={"number": number})
        copied = time.monotonic()
        faults.point("checkpoint.copied", **place)
        marker = {
            "release": __version__,
            "cursor": cursor,
            "identity": identity,
            "loop": loop,
            "configuration": configuration,
            "metrics": metrics,
            "world_size": dist.get_world_size(),
            "base": base,
        }
        writer = Writer(self._run_url, staged, marker, self._rank)
        # Not waited for when the process ends: after an error, a peer may never answer.
        self._thread = threading.Thread(
            target=self._write, args=(dict(state), writer, base), name="checkpoint", daemon=True
        )
        self._writer = writer
        self._thread.start()
        return Saved(cursor.total, full, waited=begun - start, copied=copied - begun)

    def check(self) -> None:
        """Raises what went wrong with the save that was begun last, if it is known by now. No time at all.

        Raises:
            CheckpointError, StorageError: It could not be written.
        """
        if (error := self._error) is not None:
            raise _as_ours(error)

    def wait(self) -> None:
        """Waits until the save that was begun last is committed.

        Raises:
            CheckpointError, StorageError: It could not be written.
        """
        if self._thread is not None and self._writer is not None:
            written = -1
            while self._thread.is_alive():
                self._thread.join(_PROGRESS_SECONDS)
                if self._writer.written > written:
                    written = self._writer.written
                    self._progress()
            self._thread = None
        self.check()

    def close(self, seconds: float = 60.0) -> None:
        """Gives a save that was begun some time to end; what becomes of it is no longer told."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _write(self, state: dict[str, Tensor], writer: Writer, base: Base | None) -> None:
        try:
            planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
            dcp.save(state, storage_writer=writer, planner=planner, process_group=self._group)
            contents = writer.committed.contents if writer.committed else ""  # rank 0 alone writes it down
            self._base = base or Base(step=writer.step, contents=contents, number=0)
            self.committed = writer.step
            if self._rank == 0:
                self._prune()
        except BaseException as error:
            self._error = error

    def _prune(self) -> None:
        try:
            prune(self._run_url, self._config.keep, self._config.keep_hours)
        except OSError as error:  # going on would fill the disk
            raise CheckpointError(
                f"Old checkpoints could not be removed: {error}",
                where=checkpoints_url(self._run_url),
                remedy="Mend the storage; the same command goes on from the last checkpoint.",
            ) from error


def _as_ours(error: BaseException) -> BaseException:
    """The error to raise: ours where storing failed. Where a peer is gone it stays: another try may mend that."""
    if isinstance(error, CheckpointException):
        causes = [cause for cause, _ in error.failures.values()]
        error = next((cause for cause in causes if isinstance(cause, MetatrainError)), causes[0])
    if not isinstance(error, OSError):
        return error
    return CheckpointError(
        f"A checkpoint could not be written: {type(error).__name__}: {error}",
        where=error.filename,
        remedy="Mend the storage; the same command goes on from the last checkpoint.",
    )
