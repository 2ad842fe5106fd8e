"""What the files of a checkpoint hold: `contents.json`, checked against itself and against the files' sizes.

Each tensor is in chunks, the blocks of rows that the ranks held (a number without dimensions is one row). A chunk is
whole, or holds some of its rows only: those touched since the checkpoint that it builds on. Nothing in a checkpoint is
pickled, so loading one runs no code.
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
from metatrain.checkpoint.blocks import BLOCK, Part, checksum
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


class Chunk(_Frozen):
    """The rows `start` to `start + rows` of a tensor, in a file."""

    start: _Count
    rows: _Count
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
    def rows(self) -> int:
        """Its rows: 1 where it has no dimensions."""
        return self.size[0] if self.size else 1

    @property
    def row_bytes(self) -> int:
        """Bytes of a row."""
        return math.prod(self.size[1:]) * self.torch_dtype.itemsize


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
            row, held = tensor.size[1:], [c for c in tensor.chunks if c.rows]
            starts = [torch.Size((c.start, *[0] * len(row)) if tensor.size else ()) for c in held]
            sizes = [torch.Size((c.rows, *row) if tensor.size else ()) for c in held]
            boxes = [ChunkStorageMetadata(*box) for box in zip(starts, sizes, strict=True)]
            found[name] = TensorStorageMetadata(TensorProperties(tensor.torch_dtype), torch.Size(tensor.size), boxes)
            chunks |= {MetadataIndex(name, start): c for start, c in zip(starts, held, strict=True)}
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
    ends = 0
    for chunk in sorted((c for c in tensor.chunks if c.rows), key=lambda c: c.start):
        if chunk.start != ends:
            return f"row {min(chunk.start, ends)} is missing, or there twice"
        ends = chunk.start + chunk.rows
    if ends != tensor.rows:
        return f"it has {tensor.rows} rows, its chunks {ends}"
    return next((problem for chunk in tensor.chunks if (problem := _size_problem(chunk, tensor))), "")


def _size_problem(chunk: Chunk, tensor: StoredTensor) -> str:
    for part in chunk.parts():
        if len(part.checksums) != -(-part.bytes // BLOCK):
            return "a part has another number of checksums than blocks"
    touched = chunk.touched
    if touched is None:
        return "" if chunk.data.bytes == chunk.rows * tensor.row_bytes else "a chunk has another size than its rows"
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
