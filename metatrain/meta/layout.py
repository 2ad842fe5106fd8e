"""Which columns of a base learner's input are whose: the task's (the user's), the item's, the event's.

age       genres            year   item
├─ task ─┤├───────── item ────────┤         columns 0 to F + ΣD; adapted features come last, in name order
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor

Owner = Literal["task", "item", "event"]
#: The feature that is an item's own id.
ITEM = "item"


class Columns(NamedTuple):
    """A feature's columns in the input."""

    feature: str
    owner: Owner
    start: int
    stop: int


@dataclass(frozen=True)
class Layout:
    """All features' columns, in their order; they follow one another without gaps."""

    features: tuple[Columns, ...]

    @property
    def width(self) -> int:
        """Width of the input."""
        return self.features[-1].stop if self.features else 0

    def where(self, wanted: Callable[[Columns], bool]) -> Tensor:
        """The columns of the features that are wanted: int64 [n], ascending."""
        ranges = [torch.arange(c.start, c.stop) for c in self.features if wanted(c)]
        return torch.cat(ranges) if ranges else torch.zeros(0, dtype=torch.int64)

    def of(self, *owners: Owner) -> Tensor:
        """The columns of these owners: int64 [n], ascending."""
        return self.where(lambda c: c.owner in owners)
