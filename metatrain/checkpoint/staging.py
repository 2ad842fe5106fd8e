"""The local copy of a run's tensors: all that training waits for. Buffers are made once and used again.

A full checkpoint copies every tensor; a differential one copies, of the tables, the rows that were touched since the
last full one: or all, where these are nearly all. The GPU's path (pinned memory, gathering on the device) has not been
run: no machine with a GPU was at hand.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from metatrain.checkpoint.contents import index_dtype
from metatrain.checkpoint.rows import Encoding


@dataclass(frozen=True)
class Staged:
    """This rank's part of a tensor in CPU memory, or some rows of it."""

    data: Tensor
    #: Which rows of the part `data` holds, ascending; None: all.
    index: Tensor | None = None
    encoding: Encoding = "exact"


class Buffers:
    """CPU memory for copies of a state's tensors, this rank's parts: as much as these take themselves."""

    def __init__(self, state: Mapping[str, Tensor]) -> None:
        self._buffers: dict[str, Tensor] = {}
        for name, tensor in state.items():
            part = local(tensor)
            # Written to now: pages that are first touched by the first copy would make that one several times slower.
            self._buffers[name] = torch.zeros(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)

    @torch.no_grad()
    def stage(
        self, state: Mapping[str, Tensor], touched: Mapping[str, Tensor], encodings: Mapping[str, Encoding]
    ) -> dict[str, Staged]:
        """Copies the tensors of `state`.

        Args:
            state: The tensors that the buffers were made for.
            touched: Of some of them, the rows to copy: bool, one for each row of this rank's part.
            encodings: How rows are to be stored, where not exactly.
        """
        staged: dict[str, Staged] = {}
        indices: dict[int, tuple[Tensor, Tensor]] = {}  # a table and its optimizer's state share their bitmap
        for name, tensor in state.items():
            part, buffer = local(tensor), self._buffers[name]
            if (bitmap := touched.get(name)) is None:
                buffer.copy_(part, non_blocking=True)
                staged[name] = Staged(buffer)
                continue
            if id(bitmap) not in indices:
                rows = bitmap.nonzero().squeeze(1)
                indices[id(bitmap)] = rows, rows.to("cpu", index_dtype(bitmap.numel()))
            rows, index = indices[id(bitmap)]
            encoding = encodings.get(name, "exact")
            if encoding == "exact" and rows.numel() * part[:1].nbytes + index.nbytes > part.nbytes:
                # With their numbers these rows would take more room than all rows.
                buffer.copy_(part, non_blocking=True)
                staged[name] = Staged(buffer)
                continue
            data = buffer[: rows.numel()]
            if part.is_cuda:
                data.copy_(part.index_select(0, rows), non_blocking=True)
            else:
                torch.index_select(part, 0, rows, out=data)
            staged[name] = Staged(data, index, encoding)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return staged


def local(tensor: Tensor) -> Tensor:
    """This rank's part of a tensor: the very memory."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()
