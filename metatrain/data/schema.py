"""What a task dataset holds: its features, their levels and kinds, and the kind of its labels.

An encoded categorical id is 0 for "unknown" (missing, or not in the vocabulary), then 1, 2, … in the
vocabulary's order; with hash buckets it is 1 + hash mod (buckets - 1).
"""

from __future__ import annotations

from enum import StrEnum
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, model_validator

from metatrain import storage

#: The feature that stands for the item itself: its own embedding row, known for items of training events alone.
ITEM_FEATURE = "item"


class Level(StrEnum):
    """What a feature describes."""

    TASK = "task"
    ITEM = "item"
    EVENT = "event"


class Kind(StrEnum):
    """How a feature is stored and embedded."""

    CATEGORICAL = "categorical"  # one id
    MULTI = "multi"  # any number of ids, pooled by their mean
    NUMERIC = "numeric"  # one number, standardised with the training users' mean and deviation; missing is 0
    VECTOR = "vector"  # a dense vector of fixed length


class LabelKind(StrEnum):
    """What a label is: a rating on a scale, or a click (0 or 1)."""

    RATING = "rating"
    CLICK = "click"


#: Ids are 32-bit numbers in the shards.
Rows = Annotated[int, Field(gt=0, lt=2**31)]
Width = Annotated[int, Field(gt=0, le=2**20)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class Feature(_Frozen):
    """One feature as stored.

    `rows` is the number of ids, the unknown id 0 included, for categorical and multi-valued kinds (of the whole
    shared table, where several features share one). `table` names the embedding table; features with the same
    `table` share it, its vocabulary and `rows`. `width` is the embedding width, or a vector's length.
    """

    name: str
    level: Level
    kind: Kind
    table: str | None = None
    rows: Rows | None = None
    width: Width | None = None
    buckets: Annotated[int, Field(ge=2, lt=2**31)] | None = None
    mean: float = 0.0
    deviation: Annotated[float, Field(ge=0)] = 1.0

    @property
    def embedded(self) -> bool:
        """Whether its values are ids that look up embedding rows."""
        return self.kind in (Kind.CATEGORICAL, Kind.MULTI)

    @model_validator(mode="after")
    def _whole(self) -> Feature:
        if self.embedded and (not self.table or not self.rows or not self.width):
            raise ValueError(f"feature {self.name!r} is {self.kind.value}: it needs table, rows and width")
        if self.kind is Kind.VECTOR and not self.width:
            raise ValueError(f"feature {self.name!r} is a vector: it needs a width")
        if self.table is not None and not storage.stays_inside(self.table):
            raise ValueError(f"the table {self.table!r} cannot be a file's name")  # of its vocabulary
        return self


class Schema(_Frozen):
    """The features of a task dataset and the scale of its labels, statistics from training users alone."""

    features: tuple[Feature, ...]
    label: LabelKind
    label_mean: float
    label_deviation: Annotated[float, Field(ge=0)]
    label_min: float
    label_max: float

    @model_validator(mode="after")
    def _consistent(self) -> Schema:
        names = [f.name for f in self.features]
        if len(set(names)) != len(names):
            raise ValueError(f"two features have the same name: {sorted(names)}")
        tables: dict[str, tuple[int | None, int | None]] = {}
        for f in self.features:
            if f.embedded and tables.setdefault(str(f.table), (f.rows, f.width)) != (f.rows, f.width):
                raise ValueError(f"features of table {f.table!r} differ in rows or width")
        return self

    def of(self, level: Level) -> tuple[Feature, ...]:
        """The features of one level, in their order."""
        return tuple(f for f in self.features if f.level is level)
