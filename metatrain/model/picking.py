"""Ids and rows on CPUs, by kernels of our own (`kernels.cpp`): distinct ids, and rows picked for every place.

Promises: what torch gives, bit for bit whatever the number of threads, gradients to any order included. Where there are
no kernels torch does it.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import Function

from metatrain import compiled

#: Rows of a table, to each of the ids, up to which going through a bit a row takes less time than sorting ids.
_ROWS_AN_ID = 64


def distinct(ids: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """`torch.unique(ids, return_inverse=True)` of ids into a table of so many rows: int64 [n] → [K] ascending, [n].

    Ids that are outside of the table are not looked for: they are among the distinct ones.
    """
    library = kernels()
    if library is None or ids.device.type != "cpu" or ids.dtype is not torch.int64 or rows > _ROWS_AN_ID * len(ids):
        return torch.unique(ids, return_inverse=True)
    ids, keys, positions = ids.contiguous(), torch.empty_like(ids), torch.empty_like(ids)
    count = library.metatrain_distinct(ids.data_ptr(), len(ids), rows, keys.data_ptr(), positions.data_ptr())
    if count < 0:
        return torch.unique(ids, return_inverse=True)
    return keys[:count], positions


def picked(values: Tensor, index: Tensor) -> Tensor:
    """values[index], [n, F] and [P] (or any shape) → [P, F]; zeros where there is nothing to pick from."""
    if not values.shape[0]:
        return values.new_zeros(*index.shape, values.shape[1])
    return values.index_select(0, index.flatten()).view(*index.shape, values.shape[1])


def side_by_side(
    tables: Sequence[Tensor], indices: Sequence[Tensor], present: Tensor, sizes: Sequence[int]
) -> list[Tensor]:
    """tables[i][indices[i]] for all i, side by side: [nᵢ, Fᵢ] and integers [P] → [P, Σ Fᵢ] in pieces of these sizes.

    One pass over the places there and one back, where `index_select`, `cat`, a product with the mask and `split` take
    four each. Places that are not `present` (bool [P]) have zeros, whatever their indices, and so has what a table
    without rows would give.

    Raises:
        IndexError: A place that is present has an index outside of its table.
    """
    served = all(table.dtype is torch.float32 for table in tables) and present.dtype is torch.bool
    if served and all(t.device.type == "cpu" for t in (present, *indices, *tables)) and kernels() is not None:
        given = [index.to(torch.int64).contiguous() for index in indices]
        return list(_Pick.apply(tuple(sizes), present.contiguous(), len(tables), *given, *tables))
    mask = present.unsqueeze(-1)
    parts = [picked(table, torch.where(present, index, 0)) for table, index in zip(tables, indices, strict=True)]
    return list(torch.cat(parts, dim=-1).masked_fill(~mask, 0).split(list(sizes)))


class _TABLE(ctypes.Structure):
    """`Table` of the kernels."""

    _fields_ = (
        ("rows", ctypes.c_void_p),
        ("index", ctypes.c_void_p),
        ("count", ctypes.c_int64),
        ("width", ctypes.c_int64),
    )


class _Pick(Function):
    """(sizes, present, number of tables, indices…, tables…) → pieces of the places' rows."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, sizes: tuple[int, ...], present: Tensor, count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        indices, tables = tensors[:count], tensors[count:]
        ctx.save_for_backward(present, *indices)
        ctx.sizes, ctx.shapes = sizes, [table.shape for table in tables]
        width = sum(table.shape[1] for table in tables)
        pieces = tuple(tables[0].new_empty(size, width) for size in sizes)
        _call("metatrain_pick", present, indices, tables, pieces)
        return pieces

    @staticmethod
    def backward(ctx: Any, *d_pieces: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        present, *indices = ctx.saved_tensors
        wanted = ctx.needs_input_grad[-len(indices) :]
        # For the others: tables without rows, to which nothing is added.
        shapes = [shape if w else torch.Size((0, shape[1])) for shape, w in zip(ctx.shapes, wanted, strict=True)]
        found = _Add.apply(ctx.sizes, present, shapes, len(indices), *indices, *d_pieces)
        return None, None, None, *[None] * len(indices), *(f if w else None for f, w in zip(found, wanted, strict=True))


class _Add(Function):
    """(sizes, present, tables' shapes, their number, indices…, pieces…) → tables whose rows the pieces are added to.

    `_Pick` reversed.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, sizes: tuple[int, ...], present: Tensor, shapes: list[torch.Size], count: int, *tensors: Tensor
    ) -> tuple[Tensor, ...]:
        indices, pieces = tensors[:count], tensors[count:]
        ctx.save_for_backward(present, *indices)
        ctx.sizes = sizes
        tables = tuple(present.new_zeros(shape, dtype=torch.float32) for shape in shapes)
        _call("metatrain_add", present, indices, tables, pieces)
        return tables

    @staticmethod
    def backward(ctx: Any, *d_tables: Tensor) -> tuple[Tensor | None, ...]:  # type: ignore[override]
        present, *indices = ctx.saved_tensors
        d_pieces = _Pick.apply(ctx.sizes, present, len(indices), *indices, *d_tables)
        return None, None, None, None, *[None] * len(indices), *d_pieces


def _call(
    name: str, present: Tensor, indices: Sequence[Tensor], tables: Sequence[Tensor], pieces: Sequence[Tensor]
) -> None:
    """A kernel, piece by piece. Indices and what is written to are contiguous; of the rest copies are made."""
    kernel = getattr(kernels(), name)
    tables = [table.contiguous() for table in tables]
    for index in indices:
        if index.shape != present.shape:
            raise ValueError(f"indices of shape {tuple(index.shape)} for places of shape {tuple(present.shape)}")
    start, threads = 0, torch.get_num_threads()
    for piece in pieces:
        values, stop = piece.contiguous(), start + len(piece)
        given = (_TABLE * len(tables))(
            *(
                _TABLE(table.data_ptr(), index.data_ptr() + start * index.element_size(), *table.shape)
                for table, index in zip(tables, indices, strict=True)
            )
        )
        wrong = kernel(given, len(tables), present.data_ptr() + start, stop - start, values.data_ptr(), threads)
        if wrong:
            rows, index = len(tables[wrong - 1]), indices[wrong - 1][start:stop][present[start:stop]]
            raise IndexError(
                f"places of table {wrong - 1} have indices {index.min()} to {index.max()}, and it has {rows} rows"
            )
        start = stop
    if start != len(present):
        raise ValueError(f"pieces of {start} places in all, of {len(present)}")


def kernels() -> ctypes.CDLL | None:
    """The library, built where it is not yet; None: there is none, and torch serves."""
    return compiled.loaded(_SOURCE) if compiled.wanted() else None


def _bind(library: ctypes.CDLL) -> None:
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.metatrain_distinct.argtypes, library.metatrain_distinct.restype = (
        [pointer, number, number, pointer, pointer],
        number,
    )
    for name in ("pick", "add"):
        function = getattr(library, f"metatrain_{name}")
        function.argtypes = [ctypes.POINTER(_TABLE), number, pointer, number, pointer, number]
        function.restype = number


_SOURCE = compiled.Source(
    Path(__file__).with_name("kernels.cpp"),
    "model's kernels",
    _bind,
    "ids are sorted and the learners' inputs put together by torch, at a fraction of the speed",
    ("-O3", "-pthread"),
)
