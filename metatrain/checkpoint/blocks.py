"""Bytes of tensors in files: written in order, read from anywhere, every block under a checksum.

A *part* is a run of bytes of a file, in blocks of `BLOCK` bytes (the last one may be shorter) with a checksum each
(XXH3, 64 bits). A slice of a part is read by the blocks that it touches, so that whatever is read was checked.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Annotated, Any, cast

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from metatrain import faults, storage
from metatrain.checkpoint.direct import DirectFile
from metatrain.checkpoint.format import checksum
from metatrain.errors import CheckpointError
from metatrain.retries import ShortReadError, retried

#: Bytes under one checksum: also what is asked of an object store at a time.
BLOCK = 8 << 20
#: Blocks that are fetched from an object store at a time.
_FETCHED = 8


class Part(BaseModel):
    """Where some bytes of a tensor are in a file."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    at: Annotated[int, Field(ge=0)]
    bytes: Annotated[int, Field(ge=0)]
    #: Of each block, hexadecimal.
    checksums: tuple[str, ...]


def view(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor in CPU memory: the very ones."""
    assert tensor.device.type == "cpu", "bytes are of CPU memory"
    assert tensor.is_contiguous(), "a view of other tensors would be a copy"
    return memoryview(cast(Any, tensor.detach().reshape(-1).view(torch.uint8).numpy()))


class PartWriter:
    """Appends parts to a file."""

    def __init__(self, file: IO[bytes] | DirectFile) -> None:
        self._file, self.at = file, 0

    def put(self, data: memoryview) -> Part:
        """Writes bytes; returns where they are."""
        at, checksums = self.at, []
        for start in range(0, len(data), BLOCK):
            block = data[start : start + BLOCK]
            checksums.append(checksum(block))
            self._file.write(block)
            self.at += len(block)
        return Part(at=at, bytes=len(data), checksums=tuple(checksums))


@contextmanager
def writing(url: str) -> Iterator[PartWriter]:
    """A new file for parts; when the block ends well its bytes are on the disk, or with the object store."""
    faults.point("storage.write", path=url)
    if not storage.is_local(url):
        # Sent in bounded pieces while it is written.
        with storage.open_file(url, "wb", block_size=4 * BLOCK) as file:
            yield PartWriter(file)
        return
    with DirectFile(storage.filesystem(url)[1]) as file:
        yield PartWriter(file)


def sync_folder(url: str) -> None:
    """Puts a local folder's entries on the disk: until then a crash of the machine may forget new names."""
    if storage.is_local(url):
        descriptor = os.open(storage.filesystem(url)[1], os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


class PartReader:
    """Reads slices of parts of one file.

    Raises:
        CheckpointError: The file is missing, too short, or not what was written.
    """

    def __init__(self, url: str) -> None:
        self.url = url
        self._file: int | None = None
        self._scratch: memoryview | None = None
        self._fs, self._path = storage.filesystem(url)
        if storage.is_local(url):
            try:
                self._file = retried(lambda: os.open(self._path, os.O_RDONLY))
            except OSError as error:
                raise self._unreadable(str(error)) from error

    def __enter__(self) -> PartReader:
        return self

    def __exit__(self, *_: object) -> None:
        if self._file is not None:
            os.close(self._file)
            self._file = None

    def read(self, part: Part, into: memoryview, start: int = 0) -> None:
        """Fills `into` with the part's bytes from `start` on."""
        end = start + len(into)
        assert 0 <= start <= end <= part.bytes, "a slice of the part"
        blocks = range(start // BLOCK, -(-end // BLOCK)) if into else range(0)
        step = 1 if self._file is not None else _FETCHED
        for first in range(blocks.start, blocks.stop, step):
            group = range(first, min(first + step, blocks.stop))
            spans = [(i * BLOCK, min((i + 1) * BLOCK, part.bytes)) for i in group]
            whole = start <= spans[0][0] and spans[-1][1] <= end
            low, high = spans[0][0], spans[-1][1]
            target = into[low - start : high - start] if whole else self._scratched(high - low)
            self._fill(target, part.at + low, [b - a for a, b in spans])
            for i, (a, b) in zip(group, spans, strict=True):
                if checksum(target[a - low : b - low]) != part.checksums[i]:
                    raise CheckpointError(
                        "The checkpoint is broken: bytes do not match their checksum.",
                        where=f"{self.url}: bytes {part.at + a} to {part.at + b}",
                    )
            if not whole:
                a, b = max(low, start), min(high, end)
                into[a - start : b - start] = target[a - low : b - low]

    def check(self, part: Part) -> None:
        """Reads a part's bytes only to compare them with their checksums."""
        step = _FETCHED * BLOCK
        buffer = memoryview(bytearray(min(part.bytes, step)))
        for start in range(0, part.bytes, step):
            self.read(part, buffer[: min(step, part.bytes - start)], start)

    def _scratched(self, size: int) -> memoryview:
        if self._scratch is None or len(self._scratch) < size:
            self._scratch = memoryview(bytearray(size))
        return self._scratch[:size]

    def _fill(self, target: memoryview, at: int, sizes: list[int]) -> None:
        fill = self._from_disk if self._file is not None else self._from_store
        try:
            retried(lambda: fill(target, at, sizes))
        except CheckpointError:
            raise
        except Exception as error:  # stores' clients raise anything
            raise self._unreadable(f"{type(error).__name__}: {error}") from error

    def _from_disk(self, target: memoryview, at: int, _: list[int]) -> None:
        assert self._file is not None, "opened"
        faults.point("storage.read", path=self.url)
        done = 0
        while done < len(target):
            if not (got := os.preadv(self._file, [target[done:]], at + done)):
                raise self._unreadable(f"it ends after {at + done} bytes")
            done += got

    def _from_store(self, target: memoryview, at: int, sizes: list[int]) -> None:
        faults.point("storage.read", path=self.url)
        starts = [at + sum(sizes[:i]) for i in range(len(sizes))]
        ends = [start + size for start, size in zip(starts, sizes, strict=True)]
        found: list[Any] = self._fs.cat_ranges([self._path] * len(sizes), starts, ends, on_error="raise")
        done = 0
        for data, size in zip(found, sizes, strict=True):
            if len(data) != size:
                raise ShortReadError(f"{len(data)} bytes came in place of {size}")
            target[done : done + size] = data
            done += size

    def _unreadable(self, why: str) -> CheckpointError:
        return CheckpointError(f"The checkpoint is broken: a file of it cannot be read: {why}", where=self.url)
