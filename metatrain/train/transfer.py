"""Batches onto the training device: on a GPU the next batch's copy runs beside this batch's work.

The GPU's path (`_StreamCopies`) has not been run: no machine with a GPU was at hand. What is tested is the order in
which copies are begun and handed out, and the CPU's path.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Protocol

import torch
from torch import Tensor

from metatrain.data.batch import TaskBatch


class Copies(Protocol):
    """How batches get to a device. `ahead`: copies in flight while the batch before them is used."""

    ahead: int

    def begin(self, batch: TaskBatch) -> TaskBatch:
        """Begins a batch's copy; its tensors may be used after `end` alone."""
        ...

    def end(self, batch: TaskBatch) -> TaskBatch:
        """Makes work that is asked for from now on wait for the copy."""
        ...


def device_batches(
    batches: Iterable[TaskBatch], device: torch.device, copies: Copies | None = None
) -> Iterator[TaskBatch]:
    """The batches (of arrays) in their order, as tensors on a device.

    Args:
        batches: What a reader gives.
        device: Where the tensors go.
        copies: How. Default: by the device's type.
    """
    if copies is None:
        copies = _StreamCopies(device) if device.type == "cuda" else _PlainCopies(device)
    begun: deque[TaskBatch] = deque()
    for batch in batches:
        begun.append(copies.begin(batch))
        if len(begun) > copies.ahead:
            yield copies.end(begun.popleft())
    while begun:
        yield copies.end(begun.popleft())


class _PlainCopies:
    """On the CPU, or on a device without streams: a batch is made when it is asked for."""

    ahead = 0

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def begin(self, batch: TaskBatch) -> TaskBatch:
        return batch.tensors(self._device)

    def end(self, batch: TaskBatch) -> TaskBatch:
        return batch


class _StreamCopies:
    """On CUDA: through pinned memory, on a stream of their own, one batch ahead."""

    ahead = 1

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._stream = torch.cuda.Stream(device)
        self._done: deque[torch.cuda.Event] = deque()  # of the copies in flight, in their order

    def begin(self, batch: TaskBatch) -> TaskBatch:
        # From pageable memory a copy would block this thread. Pinned blocks come from torch's cache, which hands none
        # out again before the copy from it, on whatever stream, is over.
        pinned = batch.tensors().mapped(Tensor.pin_memory)
        with torch.cuda.stream(self._stream):
            copied = pinned.mapped(lambda tensor: tensor.to(self._device, non_blocking=True))
        done = torch.cuda.Event()
        done.record(self._stream)
        self._done.append(done)
        return copied

    def end(self, batch: TaskBatch) -> TaskBatch:
        current = torch.cuda.current_stream(self._device)
        current.wait_event(self._done.popleft())

        def used_here(tensor: Tensor) -> Tensor:
            # Allocated on the copying stream, where the block would be handed out again as soon as Python lets go
            # of it, with work of this stream on it still to come.
            tensor.record_stream(current)
            return tensor

        return batch.mapped(used_here)
