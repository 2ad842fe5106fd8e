"""The manifest: what makes a folder of shards a task dataset. Written last; without it there is no dataset.

Layout of a dataset at URL::

    manifest.json
    catalogue.parquet            one row an item; the row's number is the item's id in the shards
    vocabularies/TABLE.parquet   column `value` (string), row r has the id r + 1
    shards/train/*.parquet       one row a task, in row groups of at most `row_group_tasks` tasks
    shards/validation/*.parquet
    shards/test/*.parquet

Columns of a shard: `key` (string), `items` (list<int32>: catalogue rows), `labels` (list<float>),
`timestamps` (list<int64>: seconds), `task:NAME` a task feature, `event:NAME` an event feature. The three lists and
the event columns of one row have the same length; events are in time order, ties in the log's order. Where tasks are
items, a shard also has `title` (string or null), and the catalogue's rows are users.
Columns of the catalogue: `key` (string), `title` (string or null), `new` (bool: an item held out of training),
`item:NAME` a feature, `training_events` (int64: events of training users on it, 0 for a new item).
A feature's column is int32 (categorical), list<int32> (multi), float32 (numeric, standardised), or
fixed_size_list<float, width> (vector); an event feature's is a list of that.
"""

from __future__ import annotations

import hashlib
import json
import posixpath
from collections import Counter
from enum import StrEnum
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from metatrain import storage
from metatrain.data.schema import Schema
from metatrain.documents import parse_json
from metatrain.errors import DatasetError

VERSION = 1
FILE = "manifest.json"


class Split(StrEnum):
    """Which tasks: each task's key (a user's; an item's) is in exactly one split."""

    TRAIN = "train"
    VALIDATION = "validation"
    TEST = "test"


class ItemSet(StrEnum):
    """Which items' events of a task count: those known in training, those held out as new, or all."""

    EXISTING = "existing"
    NEW = "new"
    ALL = "all"


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


Count = Annotated[int, Field(ge=0, lt=2**63)]
Checksum = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Shard(_Frozen):
    """One Parquet file: path inside the dataset, tasks in each of its row groups, and what to check it by."""

    path: str
    split: Split
    row_groups: tuple[Annotated[int, Field(ge=0, lt=2**31)], ...]
    events: Count
    bytes: Count
    sha256: Checksum

    @model_validator(mode="after")
    def _inside(self) -> Shard:
        if not storage.stays_inside(self.path):
            raise ValueError(f"the shard's path {self.path!r} leaves the dataset's folder")
        return self

    @property
    def tasks(self) -> int:
        """Rows in the file."""
        return sum(self.row_groups)


class Manifest(_Frozen):
    """All of a dataset but its rows."""

    version: int
    name: str
    schema_: Schema
    shards: tuple[Shard, ...]
    items: Annotated[int, Field(ge=0, lt=2**31)]  # rows of the catalogue: 32-bit numbers in the shards
    new_items: Count
    tasks: dict[Split, Count]
    events: dict[Split, Count]
    #: What preparation left out by choice, by reason; shown to the user.
    skipped: dict[str, int]
    catalogue_sha256: Checksum
    #: Of each table's vocabulary file, by the table's name.
    vocabularies_sha256: dict[str, Checksum]
    #: The resolved `prepare` configuration, and where the data came from.
    prepared_with: dict[str, Any]
    #: Free facts for people, such as a synthetic log's Bayes-optimal error.
    facts: dict[str, Any] = {}
    #: What a task is. Datasets from before there was a choice have users.
    task: Literal["user", "item"] = "user"

    @model_validator(mode="after")
    def _consistent(self) -> Manifest:
        paths = Counter(posixpath.normpath(shard.path) for shard in self.shards)
        if twice := [path for path, count in paths.items() if count > 1]:
            raise ValueError(f"the shard {twice[0]!r} is listed twice")
        if self.new_items > self.items:
            raise ValueError(f"{self.new_items} of {self.items} items are new")
        for split in Split:
            shards = [shard for shard in self.shards if shard.split is split]
            for what, counted, told in (
                ("tasks", sum(s.tasks for s in shards), self.tasks.get(split, 0)),
                ("events", sum(s.events for s in shards), self.events.get(split, 0)),
            ):
                if counted != told:
                    raise ValueError(f"the {split.value} shards have {counted} {what}, the split {told}")
        return self

    @property
    def catalogued(self) -> str:
        """What a row of the catalogue is: "item", or "user" where items are the tasks."""
        return "item" if self.task == "user" else "user"

    def of(self, split: Split) -> tuple[Shard, ...]:
        """The shards of one split, in the plan's order (by path)."""
        return tuple(sorted((s for s in self.shards if s.split is split), key=lambda s: s.path))

    @property
    def fingerprint(self) -> str:
        """The identity of the content: sha256 of the schema and of every file's checksum.

        Where the raw files were, when they were read and by which release does not count: the same input prepared
        again, or elsewhere, has the same fingerprint (with the same pyarrow, which decides how values are packed).
        """
        content = self.model_dump(mode="json", include={"schema_", "catalogue_sha256", "vocabularies_sha256"})
        content["shards"] = [shard.model_dump(mode="json") for shard in sorted(self.shards, key=lambda s: s.path)]
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def write(self, url: str) -> None:
        """Publishes the manifest, which makes the dataset exist."""
        storage.write_atomic(storage.join(url, FILE), self.model_dump_json(indent=1))


def read_manifest(url: str) -> Manifest:
    """Reads and checks a dataset's manifest.

    Raises:
        DatasetError: No manifest, not one of ours, or of another version.
    """
    path = storage.join(url, FILE)
    if not storage.exists(path):
        raise DatasetError(
            "There is no task dataset here: no manifest.",
            where=path,
            remedy="Make one with `metatrain prepare SOURCE --out URL`, or mend `data.dataset`.",
        )
    try:
        raw = parse_json(storage.read_bytes(path))
    except ValueError as error:
        raise DatasetError(
            f"The manifest cannot be read as JSON: {error}", where=path, remedy="Prepare the dataset again."
        ) from error
    version = raw.get("version") if isinstance(raw, dict) else None
    if version != VERSION:
        raise DatasetError(
            f"The manifest is of another schema version; this release reads version {VERSION}.",
            where=path,
            got=version,
            remedy="Prepare the dataset again with this release, or use the release that wrote it.",
        )
    try:
        return Manifest.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        raise DatasetError(
            f"The manifest cannot be used: {first['msg']}",
            where=f"{path}: {'.'.join(str(p) for p in first['loc'])}",
            got=str(first.get("input"))[:200],
            remedy="Prepare the dataset again.",
        ) from error
