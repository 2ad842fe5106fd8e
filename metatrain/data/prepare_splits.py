"""Which split a user is in, and which items are new: functions of keys, times and what is given. No Ray.

A user's split is decided from its own row alone (with two times that are fixed beforehand, when time decides), so a
partition needs nothing of the others.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from metatrain import storage
from metatrain.config import ItemSplit, PrepareConfig, UserSplit
from metatrain.data.hashing import hash_text, unit
from metatrain.data.manifest import ItemSet, Split
from metatrain.data.sources.checks import Check
from metatrain.data.sources.files import RawFile
from metatrain.data.sources.rawlog import Chunk, Rows
from metatrain.data.sources.text import Layout, parts
from metatrain.errors import ConfigError, SourceError

#: Codes of splits in arrays; LEFT_OUT is a user that a given split doesn't name.
SPLITS = (Split.TRAIN, Split.VALIDATION, Split.TEST)
LEFT_OUT = -1
_BINS = 1 << 20


@dataclass(frozen=True)
class Thresholds:
    """Users whose first event is later than `test` are for test, then later than `validation` for validation."""

    validation: int
    test: int


@dataclass(frozen=True)
class SplitFileChunk:
    """A part of a split file, as `key` and `split`."""

    part: Chunk

    def read(self) -> Iterator[Rows]:
        """Yields its rows."""
        yield from self.part.read()


def check_splits(config: PrepareConfig) -> None:
    """Refuses a split whose settings contradict each other, before anything is read.

    Raises:
        ConfigError: `given` without exactly one of column and file; a setting that the split would ignore; shares of 1
            and more.
    """
    users, items = config.user_split, config.item_split
    for name, split in (("user_split", users), ("item_split", items)):
        if split.by == "given" and (split.column is None) == (split.file is None):
            raise ConfigError(
                "A given split needs a column or a file, and not both.",
                where=f"prepare.{name}",
                remedy=f"Set one of prepare.{name}.column and prepare.{name}.file.",
            )
    for setting, value, by, kinds in (
        ("user_split.column", users.column, users.by, ("given",)),
        ("user_split.file", users.file, users.by, ("given",)),
        ("item_split.column", items.column, items.by, ("given", "time")),
        ("item_split.after", items.after, items.by, ("time",)),
        ("item_split.file", items.file, items.by, ("given",)),
    ):
        if value is not None and by not in kinds:
            section, _, field = setting.partition(".")
            raise ConfigError(
                f"The setting `{field}` has no part in a split by `{by}`.",
                where=f"prepare.{setting}",
                got=value,
                remedy=f"Set prepare.{section}.by to {' or '.join(kinds)}, or leave `{field}` out.",
            )
    if users.validation + users.test >= 1:
        raise ConfigError(
            f"Validation and test leave no {config.task} for training.",
            where="prepare.user_split",
            got=users.validation + users.test,
            remedy="Make their shares smaller.",
        )
    if items.by == "time" and (items.column is None) != (items.after is None):
        raise ConfigError(
            "A time split by a column needs both `column` and `after`.",
            where="prepare.item_split",
            remedy="Set both, or neither to split by the time of an item's first event.",
        )


def split_files(config: PrepareConfig) -> dict[str, list[RawFile]]:
    """The files that tell the splits, by the setting that names them."""
    named = {"user_split": config.user_split.file, "item_split": config.item_split.file}
    return {name: [RawFile(storage.absolute(file))] for name, file in named.items() if file is not None}


def split_file_chunks(path: str) -> list[Chunk]:
    """A split file, `key,split`, in parts."""
    layout = Layout({"key": Check.KEY, "split": Check.KEY})
    return [SplitFileChunk(part) for part in parts(RawFile(storage.absolute(path)), layout, skip_bad=False)]


def user_splits(tasks: pa.Table, split: UserSplit, thresholds: Thresholds | None) -> np.ndarray:
    """The split of each user: code in `SPLITS`, or `LEFT_OUT`; int8 [n].

    Raises:
        SourceError: A given split that is none of train, validation, test.
    """
    if split.by == "hash":
        u = unit(hash_text(tasks["key"], split.salt))
        return np.select([u < split.test, u < split.test + split.validation], [2, 1], 0).astype(np.int8)
    if split.by == "time":
        assert thresholds is not None
        first = tasks["first"].to_numpy()
        return np.select([first > thresholds.test, first > thresholds.validation], [2, 1], 0).astype(np.int8)
    where = split.file or f"column {split.column} of the user table"
    return _codes(tasks["split"], [s.value for s in SPLITS], tasks["key"], where)


def _codes(column: pa.ChunkedArray, names: list[str], keys: pa.ChunkedArray, where: str) -> np.ndarray:
    code = pc.fill_null(pc.index_in(column, value_set=pa.array(names)), LEFT_OUT).to_numpy().astype(np.int8)
    wrong = (code == LEFT_OUT) & pc.is_valid(column).to_numpy()
    if wrong.any():
        i = int(np.flatnonzero(wrong)[0])
        raise SourceError(
            f"A split must be one of {', '.join(names)}.",
            where=f"{where}: key {keys[i].as_py()}",
            got=column[i].as_py(),
            remedy="Mend the value.",
        )
    return code


def time_thresholds(firsts: Callable[[], Iterable[np.ndarray]], split: UserSplit) -> Thresholds:
    """The times that leave the wished shares of users above them, exact to the second.

    Args:
        firsts: Gives all users' first times, int64, piece by piece; called a few times, so that memory stays bounded.
    """
    low, high, total = 2**62, -(2**62), 0
    for piece in firsts():
        if len(piece):
            low, high, total = min(low, int(piece.min())), max(high, int(piece.max())), total + len(piece)
    if not total:
        return Thresholds(0, 0)

    def above(share: float) -> int:
        """The least time with at most `share` of the users later than it."""
        bottom, top, later = low, high, 0  # the time is in [bottom, top]; `later` users are after top
        while bottom < top:
            step = -(-(top - bottom + 1) // _BINS)
            counts = np.zeros(-(-(top - bottom + 1) // step), dtype=np.int64)
            for piece in firsts():
                inside = piece[(piece >= bottom) & (piece <= top)]
                counts += np.bincount((inside - bottom) // step, minlength=len(counts))
            tail = later + np.cumsum(counts[::-1])[::-1]  # users at or after the start of each bin
            # The first bin whose users, with all later ones, would be too many to be above the time.
            i = int(np.flatnonzero(np.append(tail[1:], later) <= share * total)[0])
            later = int(tail[i + 1]) if i + 1 < len(tail) else later
            bottom, top = bottom + i * step, min(bottom + (i + 1) * step - 1, top)
        return bottom

    return Thresholds(above(split.validation + split.test), above(split.test))


def new_items(
    keys: pa.Array, first: np.ndarray, items: pa.Table, split: ItemSplit, catalogued: str = "item"
) -> np.ndarray:
    """Which items are new: bool [n].

    Args:
        keys: Item keys, in the catalogue's order.
        first: Time of each item's first event, int64; the greatest integer where it has none.
        items: Their raw rows, in the same order.
        split: The rule.
        catalogued: What they are, in messages: "item" or "user".

    Raises:
        ConfigError: The column that the split names isn't there.
        SourceError: A given split that is neither existing nor new.
    """
    if split.by == "none":
        return np.zeros(len(keys), dtype=bool)
    if split.by == "hash":
        return unit(hash_text(keys, split.salt)) < split.new
    if split.by == "time" and split.column is None:
        return _latest(first, split.new)
    if split.by == "given" and split.file is not None:
        given = _given_items(split.file)
        column = pa.chunked_array([pa.array([given.get(k) for k in keys.to_pylist()], type=pa.string())])
        return _codes(column, [ItemSet.EXISTING.value, ItemSet.NEW.value], pa.chunked_array([keys]), split.file) == 1
    if split.column is None or split.column not in items.column_names:
        raise ConfigError(
            f"The {catalogued}s have no such column.",
            where="prepare.item_split.column",
            got=split.column,
            remedy=f"Columns: {', '.join(items.column_names)}.",
        )
    column = items[split.column]
    if split.by == "given":
        codes = _codes(
            column.cast(pa.string()),
            [ItemSet.EXISTING.value, ItemSet.NEW.value],
            pa.chunked_array([keys]),
            f"column {split.column}",
        )
        return codes == 1
    return pc.fill_null(pc.greater(_numbers(column, split.column), split.after), False).to_numpy(zero_copy_only=False)


def _latest(first: np.ndarray, share: float) -> np.ndarray:
    """The items whose first event is latest, at most a share of those that have events."""
    seen = first < np.iinfo(np.int64).max
    times = np.sort(first[seen])
    if not len(times):
        return np.zeros(len(first), dtype=bool)
    threshold = times[max(len(times) - 1 - int(share * len(times)), 0)]
    return seen & (first > threshold)


def _numbers(column: pa.ChunkedArray, name: str) -> pa.Array:
    try:
        return column.combine_chunks().cast(pa.float64())
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise SourceError(
            f"The column that splits the items by time isn't numbers: {error}.",
            where=f"column {name} of the items",
            remedy="Name a column of numbers in `prepare.item_split.column`.",
        ) from error


def _given_items(path: str) -> dict[str, str]:
    rows = csv.DictReader(io.StringIO(storage.read_text(path)))
    if not {"key", "split"} <= set(rows.fieldnames or ()):
        raise SourceError(
            "A split file has the header `key,split`.",
            where=path,
            got=",".join(rows.fieldnames or ()),
            remedy="Mend its first line.",
        )
    return {row["key"]: row["split"] for row in rows}
