"""The storage side of loading, as torch.distributed.checkpoint plans it: rows read straight into the tensors.

Every byte that is used was compared with its checksum.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, ReadItem
from torch.distributed.checkpoint.storage import StorageReader
from torch.futures import Future

from metatrain import storage
from metatrain.checkpoint.blocks import PartReader, view
from metatrain.checkpoint.contents import Chunk, Contents, index_dtype
from metatrain.checkpoint.rows import decoded
from metatrain.errors import CheckpointError

# Bytes of rows that pass through memory of their own at a time, where they cannot be read into their place.
_AT_ONCE = 64 << 20


class Reader(StorageReader):
    """Reads tensors of one checkpoint; of a differential one only the rows that it holds.

    Args:
        url: The checkpoint's folder.
        contents: What its files hold.
        touched: Of some tensors, a bitmap of this rank's rows, in which those that come from here are marked.
    """

    def __init__(self, url: str, contents: Contents, touched: Mapping[str, Tensor] | None = None) -> None:
        self._url, self._contents, self._touched = url, contents, touched or {}

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing: a reader reads one checkpoint."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        """What is there."""
        return self._contents.metadata()

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Takes the chunks that the plan's items are slices of."""
        self._chunks: dict[Any, Chunk] = metadata.storage_data

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        """The plans as they are: each rank reads what it needs."""
        return plans

    @torch.no_grad()
    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        """Fills the plan's tensors, file by file from front to back."""
        by_file: dict[str, list[tuple[Chunk, ReadItem]]] = {}
        for item in plan.items:
            chunk = self._chunks[item.storage_index]
            by_file.setdefault(chunk.file, []).append((chunk, item))
        for name, found in sorted(by_file.items()):
            with PartReader(storage.join(self._url, name)) as file:
                for chunk, item in sorted(found, key=lambda pair: pair[0].data.at):
                    target = planner.resolve_tensor(item).detach()
                    of = _Slice(chunk, self._contents.tensors[item.dest_index.fqn].row_size(chunk), item)
                    if chunk.touched is None:
                        _read_rows(file, of, target)
                        rows = slice(None)
                    else:
                        rows = _read_touched(file, of, target)
                    if (bitmap := self._touched.get(item.dest_index.fqn)) is not None:
                        bitmap.narrow(0, item.dest_offsets[0], item.lengths[0])[rows] = True
        done: Future[None] = Future()
        done.set_result(None)
        return done

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Readers are made for a checkpoint, never found by a name."""
        return False


class _Slice:
    """The part of a chunk that a plan's item wants.

    Args:
        chunk: The chunk.
        row: The size of its rows.
        item: Of the plan.
    """

    def __init__(self, chunk: Chunk, row: tuple[int, ...], item: ReadItem) -> None:
        self.chunk, self.row = chunk, row
        self.start = item.storage_offsets[0] if item.storage_offsets else 0
        self._sides = list(zip(item.storage_offsets[1:], item.lengths[1:], strict=True))
        #: Whether it wants its rows from their first number to their last.
        self.of_whole_rows = tuple(item.lengths[1:]) == row

    def cut(self, rows: Tensor) -> Tensor:
        """Of rows of the chunk, what is wanted."""
        for dim, (start, count) in enumerate(self._sides, 1):
            rows = rows.narrow(dim, start, count)
        return rows


def _read_rows(file: PartReader, of: _Slice, target: Tensor) -> None:
    """Fills `target` with a slice of a chunk."""
    chunk, rows = of.chunk, target.shape[0] if target.dim() else 1
    row_bytes = chunk.data.bytes // chunk.rows
    if target.device.type == "cpu" and target.is_contiguous() and of.of_whole_rows:
        file.read(chunk.data, view(target), of.start * row_bytes)
        return
    for done, count in _pieces(rows, row_bytes):
        data = torch.empty((count, *of.row) if target.dim() else (), dtype=target.dtype)
        file.read(chunk.data, view(data), (of.start + done) * row_bytes)
        (target[done : done + count] if target.dim() else target).copy_(of.cut(data))


def _read_touched(file: PartReader, of: _Slice, target: Tensor) -> Tensor:
    """Puts those of a chunk's touched rows into `target` that belong there; returns their places in it."""
    chunk, touched = of.chunk, of.chunk.touched
    assert touched is not None, "a chunk of some rows"
    index = torch.empty(touched.count, dtype=index_dtype(chunk.rows))
    file.read(touched.index, view(index))
    ordered = bool((index[1:] > index[:-1]).all())
    if index.numel() and not (ordered and int(index[0]) >= 0 and int(index[-1]) < chunk.rows):
        raise CheckpointError(
            "The checkpoint is broken: numbers of touched rows are out of order, or outside their table.",
            where=file.url,
        )
    first, last = (int(torch.searchsorted(index, edge)) for edge in (of.start, of.start + target.shape[0]))
    places = index[first:last].long() - of.start
    per_row = chunk.data.bytes // max(1, touched.count)
    stored = {"exact": target.dtype, "bfloat16": torch.bfloat16, "int8": torch.uint8}[touched.encoding]
    for done, count in _pieces(last - first, per_row):
        data = torch.empty((count, *of.row), dtype=stored)
        file.read(chunk.data, view(data), (first + done) * per_row)
        scales = None
        if touched.scales is not None:
            scales = torch.empty(count, 2)
            file.read(touched.scales, view(scales), (first + done) * 8)
        values = of.cut(decoded(data, scales, target.dtype))
        target.index_copy_(0, places[done : done + count].to(target.device), values.to(target.device))
    return places


def _pieces(rows: int, row_bytes: int) -> list[tuple[int, int]]:
    """Begin and length of bounded pieces of some rows."""
    step = max(1, _AT_ONCE // max(1, row_bytes))
    return [(begin, min(step, rows - begin)) for begin in range(0, rows, step)]
