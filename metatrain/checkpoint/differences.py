"""How two checkpoints of a run differ: in what they were trained with, and tensor by tensor."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from metatrain.checkpoint.format import Marker
from metatrain.checkpoint.identity import flat
from metatrain.checkpoint.load import open_checkpoint, tensor_of


@dataclass(frozen=True)
class TensorDifference:
    """How a tensor differs between checkpoints a and b."""

    name: str
    size: tuple[int, ...]
    #: max |a − b|
    largest: float
    #: ‖a − b‖ / ‖a‖; infinite where a is zero.
    relative: float
    #: Rows with any difference, and rows; of a tensor without dimensions, its one number counts as a row.
    rows_changed: int
    rows: int


@dataclass(frozen=True)
class Differences:
    """Between two checkpoints, a and b."""

    steps: tuple[int, int]
    #: Field → its values in a and b.
    fields: dict[str, tuple[object, object]]
    #: Those that differ.
    tensors: list[TensorDifference]
    #: How many are equal.
    equal: int
    #: In one of the two alone, or of other sizes.
    unlike: list[str]

    def text(self) -> str:
        """For people."""
        a, b = self.steps
        blocks = []
        if self.fields:
            lines = [f"  {name}: {old!r} → {new!r}" for name, (old, new) in self.fields.items()]
            blocks.append("\n".join([f"configuration, step {a} → step {b}:", *lines]))
        if self.unlike:
            blocks.append("\n".join(["tensors that cannot be compared:", *(f"  {line}" for line in self.unlike)]))
        if self.tensors:
            cells = [("tensor", "shape", "largest |a − b|", "‖a − b‖ / ‖a‖", "rows changed")]
            for d in self.tensors:
                shape = "×".join(map(str, d.size)) or "1"
                changed = f"{d.rows_changed} of {d.rows}"
                cells.append((d.name, shape, f"{d.largest:.3g}", f"{d.relative:.3g}", changed))
            widths = [max(len(row[n]) for row in cells) for n in range(5)]
            rows = [
                "  ".join(c.ljust(w) if n < 1 else c.rjust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True)))
                for row in cells
            ]
            blocks.append("\n".join(rows))
        blocks.append(f"{self.equal} tensors are equal, {len(self.tensors)} differ")
        return "\n\n".join(blocks)


def differences(run_url: str, a: int, b: int) -> Differences:
    """How the checkpoints of steps `a` and `b` differ. Holds a tensor of each at a time.

    Raises:
        CheckpointError: One of them is missing or broken.
    """
    one, other = open_checkpoint(run_url, a), open_checkpoint(run_url, b)
    found, equal, unlike = [], 0, []
    for name in sorted(one.contents.tensors.keys() | other.contents.tensors.keys()):
        entries = [stored.contents.tensors.get(name) for stored in (one, other)]
        if entries[0] is None or entries[1] is None:
            unlike.append(f"{name}: in step {a if entries[0] else b} alone")
        elif (entries[0].size, entries[0].dtype) != (entries[1].size, entries[1].dtype):
            unlike.append(f"{name}: {entries[0].dtype} {entries[0].size}, then {entries[1].dtype} {entries[1].size}")
        elif (difference := _between(name, tensor_of(one, name), tensor_of(other, name))) is None:
            equal += 1
        else:
            found.append(difference)
    return Differences((a, b), _fields(one.marker, other.marker), found, equal, unlike)


def _fields(one: Marker, other: Marker) -> dict[str, tuple[object, object]]:
    a, b = (
        flat({"configuration": m.configuration, "dataset": m.identity.get("dataset"), "workers": m.world_size}, "")
        for m in (one, other)
    )
    names = [name for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)]
    return {name.removeprefix("configuration."): (a.get(name), b.get(name)) for name in names}


def _between(name: str, a: Tensor, b: Tensor) -> TensorDifference | None:
    if torch.equal(a, b):
        return None
    rows = a.shape[0] if a.dim() else 1
    changed = (a != b).reshape(rows, -1).any(1)
    x, y = a.reshape(rows, -1)[changed].double(), b.reshape(rows, -1)[changed].double()
    off, norm = (x - y).norm().item(), torch.linalg.vector_norm(a.flatten(), dtype=torch.float64).item()
    relative = off / norm if norm else math.inf
    return TensorDifference(name, tuple(a.shape), (x - y).abs().max().item(), relative, int(changed.sum()), rows)
