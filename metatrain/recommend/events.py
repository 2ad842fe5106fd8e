"""The events of people who ask for recommendations: from a file, a table or a list to supports in catalogue rows.

Columns: `item` (the catalogue's key; MovieLens' id, for one) and `label`; optionally `user` (without it all events are
one user's), `timestamp` (seconds, milliseconds or ISO 8601; without it events are in time order as they stand), and
any task or event feature of the dataset by its name. The label may be left out where labels are clicks: each is 1.
Where the dataset's tasks are items, events are of people who liked or disliked a new item: `user` is the catalogue's
key, `item` (optional; without it all events are one item's) tells the new items apart, and `title` may name them.
What is bad is refused with its place. What is left out by choice (unknown items, events beyond the most recent that
the model takes, columns that mean nothing here, values of features that training never saw) is counted in `warnings`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from metatrain.data.assemble import Support, batch_from_events
from metatrain.data.batch import Column, TaskBatch
from metatrain.data.columns import stored, take
from metatrain.data.dataset import TaskDataset
from metatrain.data.schema import Feature, LabelKind, Level, Schema
from metatrain.data.sources.checks import Check, bad_values, parsed, text_of
from metatrain.errors import RequestError
from metatrain.recommend.encoding import as_text, encoded
from metatrain.recommend.event_tables import Events, Places, read_table

LABEL, TIMESTAMP, TITLE = "label", "timestamp", "title"
#: What the one task of events without its column is called.
UNNAMED = {"user": "you", "item": "new item"}


@dataclass(frozen=True)
class Requests:
    """U users' (tasks') supports, events in time order, ready for a batch."""

    users: tuple[str, ...]
    supports: tuple[Support, ...]
    #: Catalogue rows of all events given, also those too old for the support: what a user has seen.
    seen: tuple[np.ndarray, ...]
    task_features: dict[str, Column]  # U rows
    event_features: dict[str, Column]  # rows of all supports behind one another
    #: Items that the catalogue doesn't hold, and how many events named each.
    unknown_items: dict[str, int]
    warnings: tuple[str, ...]
    #: Titles of tasks that have one, by key: of items alone.
    titles: dict[str, str] = field(default_factory=dict)

    def batch(self, dataset: TaskDataset, tasks: np.ndarray, kept: Sequence[np.ndarray] | None = None) -> TaskBatch:
        """A batch of supports without queries.

        Args:
            dataset: Whose catalogue the rows are of.
            tasks: Positions in `users`; a user may come several times.
            kept: For each of `tasks`, the positions in its support to adapt to. Default: all.
        """
        kept = kept or [np.arange(len(self.supports[t][0])) for t in tasks]
        supports: list[Support] = [
            (items[k], labels[k], times[k])
            for (items, labels, times), k in zip((self.supports[t] for t in tasks), kept, strict=True)
        ]
        lengths = np.array([len(s[0]) for s in self.supports], np.int64)
        starts = np.cumsum(lengths) - lengths
        events = np.concatenate([np.zeros(0, np.int64), *(starts[t] + k for t, k in zip(tasks, kept, strict=True))])
        return batch_from_events(
            dataset,
            supports,
            [np.zeros(0, np.int64)] * len(tasks),
            {name: take(stored(column), tasks) for name, column in self.task_features.items()},
            {name: take(stored(column), events) for name, column in self.event_features.items()},
        )


def read_requests(events: Events, dataset: TaskDataset, support_max: int) -> Requests:
    """Reads and checks events.

    Raises:
        RequestError: An unreadable file, a missing column, no event at all, or a value that cannot be used: names the
            file, the place, the value and the remedy.
    """
    table, places = read_table(events)
    _check_columns(table, places, dataset)
    task, entry = dataset.manifest.task, dataset.manifest.catalogued  # "user" and "item", or the other way round
    items = _checked(_text(table, entry, places), Check.KEY, entry, places)
    users = (
        _checked(_text(table, task, places), Check.KEY, task, places)
        if task in table.column_names
        else pa.array([UNNAMED[task]] * len(table))
    )
    labels = _labels(table, dataset.schema, places)
    # Without times the order given is the order of time: positions stand in for them.
    times = np.arange(len(table), dtype=np.int64)
    if TIMESTAMP in table.column_names:
        times = np.asarray(parsed(_checked(table[TIMESTAMP], Check.TIME, TIMESTAMP, places), Check.TIME))
    warnings = _ignored(table, dataset)

    names, codes = _in_order_of_appearance(users)
    rows = np.asarray(dataset.catalogue.rows_of(items.to_pylist()), dtype=np.int64)
    keys, counts = np.unique(np.asarray(items.to_pylist(), dtype=object)[rows < 0], return_counts=True)
    unknown = {str(k): int(c) for k, c in zip(keys, counts, strict=True)}
    if unknown:
        shown = ", ".join(list(unknown)[:5]) + (", …" if len(unknown) > 5 else "")
        warnings.append(
            f"{sum(unknown.values())} of {len(table)} events left out: {entry}s not in the catalogue ({shown})."
        )
    order = np.lexsort((np.arange(len(rows)), times, codes))
    order = order[rows[order] >= 0]
    lengths = np.bincount(codes[order], minlength=len(names))
    ends = np.cumsum(lengths)
    recent = np.arange(len(order)) >= (ends - support_max)[codes[order]]
    if not recent.all():
        warnings.append(f"{(~recent).sum()} events left out: the model takes each {task}'s {support_max} most recent.")
    kept = order[recent]
    if without := [name for name, n in zip(names, lengths, strict=True) if not n]:
        shown = ", ".join(without[:5]) + (", …" if len(without) > 5 else "")
        warnings.append(f"{len(without)} {task}s have no event on a known {entry}, and are not adapted to: {shown}.")
    cuts = np.cumsum(np.bincount(codes[kept], minlength=len(names)))[:-1]
    supports = zip(np.split(rows[kept], cuts), np.split(labels[kept], cuts), np.split(times[kept], cuts), strict=True)
    task_features, unknown_of_users = _task_features(table, dataset, codes, names, places)
    event_features, unknown_of_events = _features(
        table.take(pa.array(kept)), dataset.schema.of(Level.EVENT), dataset, places.at(kept)
    )
    return Requests(
        users=tuple(names),
        supports=tuple(supports),
        seen=tuple(np.unique(part) for part in np.split(rows[order], ends[:-1])),
        task_features=task_features,
        event_features=event_features,
        unknown_items=unknown,
        warnings=(*warnings, *unknown_of_users, *unknown_of_events),
        titles=_titles(table, names, codes, places) if task == "item" else {},
    )


def check_columns(events: Events, dataset: TaskDataset) -> None:
    """Refuses events that are not there, cannot be parsed or lack a column: what is known before a model is loaded.

    Raises:
        RequestError: As `read_requests`.
    """
    _check_columns(*read_table(events), dataset)


# --- checking --------------------------------------------------------------------------------------------------------


def _check_columns(table: pa.Table, places: Places, dataset: TaskDataset) -> None:
    if twice := [name for name, count in Counter(table.column_names).items() if count > 1]:
        raise RequestError("A column is there twice.", where=places.file, got=twice[0], remedy="Name each column once.")
    entry = dataset.manifest.catalogued
    if not table.num_rows:
        remedy = f"Give at least one event: {entry} and label."
        raise RequestError("There are no events.", where=places.file, remedy=remedy)
    if entry not in table.column_names:
        raise _missing(entry, table, places, dataset)
    if LABEL not in table.column_names and dataset.schema.label is LabelKind.RATING:
        raise _missing(LABEL, table, places, dataset)


def _labels(table: pa.Table, schema: Schema, places: Places) -> np.ndarray:
    if LABEL not in table.column_names:
        return np.ones(len(table), np.float32)
    click = schema.label is LabelKind.CLICK
    column = _checked(table[LABEL], Check.CLICK if click else Check.RATING, LABEL, places)
    labels = np.asarray(parsed(column, Check.RATING)).astype(np.float32)
    low, high = schema.label_min, schema.label_max
    # A scale of whole or half steps is known exactly; of other labels training has seen but a sample of the range.
    room = 0.0 if (2 * low).is_integer() and (2 * high).is_integer() else schema.label_deviation
    outside = np.flatnonzero((labels < low - room) | (labels > high + room))
    if len(outside) and not click:
        raise RequestError(
            "A label is outside of the scale that the model was trained on.",
            where=places(outside[0], LABEL),
            got=float(labels[outside[0]]),
            remedy=f"Give labels from {low:g} to {high:g}.",
        )
    return labels


def _checked(column: Any, check: Check, name: str, places: Places) -> Any:
    """The column in the check's type, or an error that names the first bad row."""
    column = _whole(column)
    numeric = pa.types.is_integer(column.type) or pa.types.is_floating(column.type) or pa.types.is_boolean(column.type)
    if check.arrow_type == pa.float64() and numeric:
        column = pc.cast(column, pa.float64(), safe=False)
    if check.arrow_type == pa.float64() and not numeric:
        column = _as_text(column, name, places)
        bad = text_of(column, check)
    else:
        bad = bad_values(column, check)
    if bad.any():
        row = int(np.flatnonzero(bad)[0])
        value = column[row].as_py()
        remedies = {
            Check.KEY: "Give each event a key.",
            Check.TIME: "Give seconds, milliseconds or ISO 8601.",
            Check.CLICK: "Give 0 or 1.",
        }
        raise RequestError(
            {Check.CLICK: "A click's label must be 0 or 1."}.get(check, check.problem),
            where=places(row, name),
            got="nothing" if value is None else str(value),
            remedy=remedies.get(check, "Give a number."),
        )
    return column


def _whole(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    if isinstance(column, pa.ChunkedArray):
        return pa.concat_arrays(column.chunks) if column.num_chunks else pa.array([], column.type)
    return column


def _text(table: pa.Table, name: str, places: Places) -> pa.Array:
    return _as_text(_whole(table[name]), name, places)


def _as_text(column: pa.Array, name: str, places: Places) -> pa.Array:
    try:
        return as_text(column)
    except pa.ArrowException as error:
        raise RequestError(
            f"A column cannot be read: {str(error).splitlines()[0]}",
            where=f"{places.file}: column {name}",
            got=str(column.type),
            remedy="Give texts or numbers.",
        ) from error


def _missing(name: str, table: pa.Table, places: Places, dataset: TaskDataset) -> RequestError:
    task, entry = dataset.manifest.task, dataset.manifest.catalogued
    return RequestError(
        f"The column `{name}` is missing.",
        where=places.file,
        got=", ".join(table.column_names) or "no column",
        remedy=f"Name the columns {task} (optional), {entry}, label, timestamp (optional).",
    )


def _ignored(table: pa.Table, dataset: TaskDataset) -> list[str]:
    task = dataset.manifest.task
    known = {"user", "item", LABEL, TIMESTAMP, *([TITLE] if task == "item" else [])}
    known |= {f.name for f in dataset.schema.features if f.level is not Level.ITEM}
    extra = [name for name in table.column_names if name not in known]
    return [f"columns left out, the dataset has no such {task} or event feature: {', '.join(extra)}."] if extra else []


def _titles(table: pa.Table, names: list[str], codes: np.ndarray, places: Places) -> dict[str, str]:
    """The titles that the events give to their tasks: those of the first event of each."""
    if TITLE not in table.column_names:
        return {}
    titles = _text(table, TITLE, places).take(pa.array(_first(codes, len(names)))).to_pylist()
    return {name: title for name, title in zip(names, titles, strict=True) if title}


def _in_order_of_appearance(users: pa.Array) -> tuple[list[str], np.ndarray]:
    coded = users.dictionary_encode()
    return coded.dictionary.to_pylist(), coded.indices.to_numpy().astype(np.int64)


def _task_features(
    table: pa.Table, dataset: TaskDataset, codes: np.ndarray, names: Sequence[str], places: Places
) -> tuple[dict[str, Column], list[str]]:
    """As `_features`, a row a task: of what its events say, the first; another value is told, and left out."""
    found: dict[str, Column] = {}
    warnings: list[str] = []
    for feature in dataset.schema.of(Level.TASK):
        if feature.name not in table.column_names:
            continue
        values, texts = _identities(_whole(table[feature.name]))
        given = np.flatnonzero(values >= 0)
        first = _first(codes, len(names))
        first[codes[given[::-1]]] = given[::-1]  # the last one written is the first one given
        columns, unknown = _features(table.take(pa.array(first)), [feature], dataset, places.at(first))
        found |= columns
        warnings += unknown
        if len(other := given[values[given] != values[first][codes[given]]]):
            row, task = int(other[0]), int(codes[other[0]])
            told, taken = (texts[int(at)].as_py() for at in (row, first[task]))
            several, word = len(np.unique(codes[other])), dataset.manifest.task
            have = f"{several} {word}s have" if several > 1 else f"1 {word} has"
            warnings.append(
                f"{feature.name}: {have} more than one value, and the first is taken: {names[task]} has {taken!r}, "
                f"and at {places(row, feature.name)} {told!r}."
            )
    return found, warnings


def _identities(column: pa.Array) -> tuple[np.ndarray, pa.Array]:
    """A number for each distinct value [n], -1 where there is none; and the values as text."""
    try:
        listed = pa.types.is_list(column.type)
        texts = pc.binary_join(column.cast(pa.list_(pa.string())), "|") if listed else column.cast(pa.string())
    except pa.ArrowException:
        return np.zeros(len(column), np.int64), column  # of no use as a feature: refused when it is encoded
    coded = pc.if_else(pc.equal(texts, ""), None, texts).dictionary_encode()
    return coded.indices.fill_null(-1).to_numpy(zero_copy_only=False).astype(np.int64), texts


def _features(
    table: pa.Table, features: Sequence[Feature], dataset: TaskDataset, places: Places
) -> tuple[dict[str, Column], list[str]]:
    """The features that the table has, encoded, and warnings of values that the model doesn't know."""
    given = [f for f in features if f.name in table.column_names]
    found = {f.name: encoded(_whole(table[f.name]), f, dataset, lambda row, f=f: places(row, f.name)) for f in given}
    return {name: one.column for name, one in found.items()}, [w for one in found.values() for w in one.warnings]


def _first(codes: np.ndarray, tasks: int) -> np.ndarray:
    """The first row of each task: int64 [tasks]."""
    first = np.full(tasks, len(codes), np.int64)
    np.minimum.at(first, codes, np.arange(len(codes)))
    return first
