"""What the files of a checkpoint hold: `contents.json`, checked against itself and against the files' sizes.

Each tensor is in chunks, the blocks of rows that the ranks held, or of rows of a block of columns (a number without
dimensions is one row). A chunk is whole, or holds some of its rows only: those touched since the checkpoint that it
builds on. Nothing in a checkpoint is pickled, so loading one runs no code.
"""

from __future__ import annotations

import json
import math
from typing import Annotated

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

from metatrain import storage
from metatrain.checkpoint.blocks import BLOCK, Part
from metatrain.checkpoint.format import checksum
from metatrain.checkpoint.rows import Encoding
from metatrain.errors import CheckpointError, StorageError

CONTENTS = "contents.json"

_DTYPES = {
    str(dtype).removeprefix("torch."): dtype
    for dtype in (
        *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
        *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
    )
}
_Count = Annotated[int, Field(ge=0, lt=1 << 62)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Touched(_Frozen):
    """Which rows a chunk of a differential checkpoint holds, and how."""

    encoding: Encoding
    count: _Count
    #: Rows' numbers in the chunk, ascending: see `index_dtype`.
    index: Part
    #: float32 [count, 2], for int8 alone.
    scales: Part | None = None


class Columns(_Frozen):
    """The columns `start` to `start + count` of a tensor."""

    start: _Count
    count: Annotated[int, Field(ge=1)]


class Chunk(_Frozen):
    """The rows `start` to `start + rows` of a tensor, in a file."""

    start: _Count
    rows: _Count
    #: None: all.
    columns: Columns | None = None
    #: A file beside `contents.json`: no path leads elsewhere.
    file: Annotated[str, Field(pattern=r"^[0-9]+-[0-9a-f]{8}\.bin$")]
    data: Part
    touched: Touched | None = None

    def parts(self) -> list[Part]:
        """All its parts."""
        more = [self.touched.index, self.touched.scales] if self.touched else []
        return [self.data, *(part for part in more if part is not None)]


class StoredTensor(_Frozen):
    """A tensor of a checkpoint."""

    dtype: str
    size: tuple[_Count, ...]
    chunks: tuple[Chunk, ...]

    @property
    def torch_dtype(self) -> torch.dtype:
        """Its dtype."""
        return _DTYPES[self.dtype]

    @property
    def partial(self) -> bool:
        """Whether it holds some rows only, over those of the checkpoint that it builds on."""
        return any(chunk.touched for chunk in self.chunks)

    @property
    def columns(self) -> int:
        """Its columns: 1 where it has one dimension or none."""
        return self.size[1] if len(self.size) > 1 else 1

    @property
    def rows(self) -> int:
        """Its rows: 1 where it has no dimensions."""
        return self.size[0] if self.size else 1

    def row_size(self, chunk: Chunk) -> tuple[int, ...]:
        """The size of a row of one of its chunks."""
        return self.size[1:] if chunk.columns is None else (chunk.columns.count, *self.size[2:])

    def row_bytes(self, chunk: Chunk) -> int:
        """Bytes of a row of one of its chunks."""
        return math.prod(self.row_size(chunk)) * self.torch_dtype.itemsize

    def box(self, chunk: Chunk) -> tuple[torch.Size, torch.Size]:
        """Where a chunk begins, and its size, in all dimensions."""
        if not self.size:
            return torch.Size(()), torch.Size(())
        first = chunk.columns.start if chunk.columns else 0
        offsets = (chunk.start, *([first, *[0] * (len(self.size) - 2)] if len(self.size) > 1 else []))
        return torch.Size(offsets), torch.Size((chunk.rows, *self.row_size(chunk)))


class Contents(_Frozen):
    """Everything in a checkpoint's files, by tensor."""

    block: int
    tensors: dict[str, StoredTensor]

    def files(self) -> dict[str, int]:
        """File → its size in bytes."""
        sizes: dict[str, int] = {}
        for tensor in self.tensors.values():
            for chunk in tensor.chunks:
                end = max(part.at + part.bytes for part in chunk.parts())
                sizes[chunk.file] = max(sizes.get(chunk.file, 0), end)
        return sizes

    def metadata(self) -> Metadata:
        """As torch.distributed.checkpoint plans with it; its storage data are the chunks."""
        found: dict[str, TensorStorageMetadata] = {}
        chunks: dict[MetadataIndex, Chunk] = {}
        for name, tensor in self.tensors.items():
            held = {MetadataIndex(name, tensor.box(chunk)[0]): chunk for chunk in tensor.chunks if chunk.rows}
            boxes = [ChunkStorageMetadata(*tensor.box(chunk)) for chunk in held.values()]
            found[name] = TensorStorageMetadata(TensorProperties(tensor.torch_dtype), torch.Size(tensor.size), boxes)
            chunks |= held
        return Metadata(state_dict_metadata=dict(found), storage_data=chunks)


def dtype_name(dtype: torch.dtype) -> str:
    """How a dtype is written down."""
    return str(dtype).removeprefix("torch.")


def index_dtype(rows: int) -> torch.dtype:
    """Of the row numbers of a chunk with so many rows."""
    return torch.int32 if rows <= 1 << 31 else torch.int64


def read_contents(url: str, expected_checksum: str) -> Contents:
    """The contents of the checkpoint in folder `url`.

    Raises:
        CheckpointError: It is missing, not what was committed, or contradicts itself.
    """
    path = storage.join(url, CONTENTS)
    try:
        data = storage.read_bytes(path)
    except (OSError, StorageError) as error:
        raise _broken(path, str(error)) from error
    if checksum(data) != expected_checksum:
        raise _broken(path, "it does not match the checksum in the marker")
    return parsed_contents(data, path)


def parsed_contents(data: bytes, path: str) -> Contents:
    """The contents in a file's bytes; `path` is for messages.

    Raises:
        CheckpointError: They are no such contents, or contradict themselves.
    """
    try:
        contents = Contents.model_validate(json.loads(data))
    except (ValueError, ValidationError, RecursionError) as error:
        raise _broken(path, str(error)) from error
    if contents.block != BLOCK:
        raise _broken(path, f"blocks are of {contents.block} bytes; this release reads {BLOCK}")
    for name, tensor in contents.tensors.items():
        if problem := _problem(tensor):
            raise _broken(path, f"tensor {name!r}: {problem}")
    return contents


def _problem(tensor: StoredTensor) -> str:
    """What is wrong with it: a gap, an overlap, a part of another size than its rows have."""
    if tensor.dtype not in _DTYPES:
        return f"unknown dtype {tensor.dtype!r}"
    by_columns: dict[tuple[int, int], list[Chunk]] = {}
    for chunk in (c for c in tensor.chunks if c.rows):
        if chunk.columns and (len(tensor.size) < 2 or chunk.touched):
            return "a chunk has columns where there can be none"
        columns = (chunk.columns.start, chunk.columns.count) if chunk.columns else (0, tensor.columns)
        by_columns.setdefault(columns, []).append(chunk)
    if tensor.rows and (problem := _gap(list(by_columns), tensor.columns, "column")):
        return problem
    for chunks in by_columns.values():
        if problem := _gap([(chunk.start, chunk.rows) for chunk in chunks], tensor.rows, "row"):
            return problem
    return next((problem for chunk in tensor.chunks if (problem := _size_problem(chunk, tensor))), "")


def _gap(parts: list[tuple[int, int]], whole: int, what: str) -> str:
    """What keeps parts (start, count) from making up 0 to `whole`."""
    ends = 0
    for start, count in sorted(parts):
        if start != ends:
            return f"{what} {min(start, ends)} is missing, or there twice"
        ends = start + count
    return "" if ends == whole else f"it has {whole} {what}s, its chunks {ends}"


def _size_problem(chunk: Chunk, tensor: StoredTensor) -> str:
    for part in chunk.parts():
        if len(part.checksums) != -(-part.bytes // BLOCK):
            return "a part has another number of checksums than blocks"
    touched = chunk.touched
    if touched is None:
        return (
            "" if chunk.data.bytes == chunk.rows * tensor.row_bytes(chunk) else "a chunk has another size than its rows"
        )
    if not tensor.size or touched.count > chunk.rows:
        return "a chunk holds more rows than it has"
    itemsize = {"exact": tensor.torch_dtype.itemsize, "bfloat16": 2, "int8": 1}[touched.encoding]
    scales = 8 * touched.count if touched.encoding == "int8" else None
    fits = (
        chunk.data.bytes == touched.count * math.prod(tensor.size[1:]) * itemsize,
        touched.index.bytes == touched.count * index_dtype(chunk.rows).itemsize,
        (touched.scales.bytes if touched.scales else None) == scales,
    )
    return "" if all(fits) else "a chunk has another size than its touched rows"


def _broken(path: str, why: str) -> CheckpointError:
    return CheckpointError(f"The checkpoint is broken: its contents cannot be read: {why}", where=path)
