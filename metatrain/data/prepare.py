"""From a raw log to a task dataset, out of core: memory grows with the number of items, never with that of users.

Three passes over partitions of users: shuffle and stage; count (statistics of training users alone); encode and
write. The manifest comes last, so a preparation that is killed leaves no dataset, and the next one clears its rest.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from pydantic import ValidationError

from metatrain import storage
from metatrain.config import PrepareConfig
from metatrain.data import manifest as manifests
from metatrain.data.manifest import Manifest, Shard, Split
from metatrain.data.prepare_encode import encode, stored_feature, vocabularies
from metatrain.data.prepare_output import origin_of, output_folder, ready_dataset
from metatrain.data.prepare_ray import mapped, partitioned, quiet_ray, shared
from metatrain.data.prepare_rows import Reading, RowKind, group, read_rows
from metatrain.data.prepare_shards import (
    STAGING,
    Counts,
    Encoding,
    ItemIndex,
    Staged,
    count,
    parquet_bytes,
    write_shards,
)
from metatrain.data.prepare_splits import Thresholds, check_splits, new_items, split_file_chunks, time_thresholds
from metatrain.data.schema import ITEM_FEATURE, Feature, Kind, LabelKind, Level, Schema
from metatrain.data.sources import RawLog, raw_type, read_source
from metatrain.errors import ConfigError, SourceError

#: A log of so many events is one partition: shuffling would only start more processes, which takes longer.
_ONE_PARTITION_EVENTS = 2_000_000
#: Events in a partition of a larger log: bounds what one task holds in memory.
_PARTITION_EVENTS = 500_000
_MOST_PARTITIONS = 4096
#: The training split is cut into about this many row groups, so that an epoch's order is random enough.
_ROW_GROUPS = 128

log = logging.getLogger(__name__)


def prepare(
    config: PrepareConfig, out: str, progress: bool = True, overwrite: bool = False, address: str | None = None
) -> Manifest:
    """Prepares a task dataset at `out` and returns its manifest.

    A dataset of the same configuration and of source files that hold the same is left as it is.

    Args:
        config: What to read and how.
        out: URL of the dataset's folder.
        progress: Whether to show bars, on a terminal.
        overwrite: Whether to replace another dataset at `out`. The old one stays until the new one is whole, so
            that there must be room for both.
        address: Of a Ray cluster, where this process has no Ray yet. Default: a local Ray that ends with the call.

    Raises:
        ConfigError: Settings that contradict each other or the source.
        SourceError: A raw log that is missing, broken or empty.
        DatasetError: `out` holds another dataset, or something that is none.
    """
    check_splits(config)
    if single := [f.name for f in config.features if f.buckets == 1]:
        raise ConfigError(
            "A feature has one hash bucket, which is for unknown values.",
            where="prepare.features",
            got=single[0],
            remedy="Give it 2 buckets or more.",
        )
    url = storage.absolute(out)
    raw = read_source(config)
    origin = origin_of(config, raw)
    for note in raw.notes:
        log.info("%s", note)
    if (ready := ready_dataset(url, origin, overwrite)) is not None:
        log.info("The dataset at %s is of this configuration and these files already: nothing to do.", url)
        return ready
    storage.make_folder(url)  # what cannot be written fails before Ray starts
    with quiet_ray(progress, address), output_folder(url) as folder:
        return _prepare(config, folder, raw, origin)


def summary(manifest: Manifest) -> str:
    """What a dataset holds and what was left out, as a small table."""
    lines = [f"{manifest.name}: {manifest.items:,} items, {manifest.new_items:,} of them new"]
    lines += [f"  {s.value:<12}{manifest.tasks[s]:>12,} users{manifest.events[s]:>14,} events" for s in Split]
    s = manifest.schema_
    scale = f"{s.label_min:g} to {s.label_max:g}, mean {s.label_mean:.3f}, deviation {s.label_deviation:.3f}"
    lines.append(f"  labels      {s.label.value}, {scale}")
    lines.append("  features    " + ", ".join(f"{f.name} ({f.level.value}, {f.kind.value})" for f in s.features))
    left_out = [f"  left out    {number:,} {reason}" for reason, number in sorted(manifest.skipped.items())]
    lines += left_out or ["  left out    nothing"]
    lines += [
        f"  {name.replace('_', ' ')}: {value:.6g}" for name, value in manifest.facts.items() if isinstance(value, float)
    ]
    return "\n".join(lines)


def _prepare(config: PrepareConfig, url: str, raw: RawLog, origin: dict[str, Any]) -> Manifest:
    features = raw.features
    skipped = {"bad rows": raw.bad_rows} if raw.bad_rows else {}
    staged = _stage(config, url, raw, skipped)
    catalogue, first = _catalogue(raw, config, staged)
    keys: pa.Array = catalogue["key"].combine_chunks()
    new = new_items(keys, first, catalogue, config.item_split)
    thresholds: Thresholds | None = None
    if config.user_split.by == "time":
        thresholds = time_thresholds(lambda: (s.first_times() for s in staged), config.user_split)

    index = shared(ItemIndex(keys, new))
    counts = Counts(training_events=np.zeros(len(keys), np.int64))
    # Merged in the partitions' order: sums of floating-point numbers depend on it.
    for _, part in sorted(
        mapped(staged, lambda s: (s.number, count(s, index(), config, features, thresholds))), key=lambda p: p[0]
    ):
        counts.merge(part)
    if counts.left_out:
        skipped["users that the given split does not name"] = counts.left_out
    if not counts.training_events.any():
        raise SourceError(
            "No training user has an event on an existing item.",
            where=raw.name,
            got=_tasks_text(counts.tasks),
            remedy="Check prepare.user_split, prepare.item_split and prepare.min_events.",
        )

    schema, vocabulary = _schema(config, raw, catalogue, counts)
    group_tasks = config.row_group_tasks or _row_group_tasks(counts.tasks[Split.TRAIN])
    encoding = shared(Encoding(schema, vocabulary, group_tasks))
    shards: list[Shard] = []
    for written in mapped(staged, lambda s: write_shards(s, index(), config, thresholds, encoding())):
        shards += written
    checksums = {
        table: _write_table(url, f"vocabularies/{table}.parquet", pa.table({"value": values}))
        for table, values in vocabulary.items()
    }
    checksum = _write_table(url, "catalogue.parquet", _encoded_catalogue(catalogue, new, counts, schema, vocabulary))
    storage.remove(storage.join(url, STAGING))
    result = Manifest(
        version=manifests.VERSION,
        name=raw.name,
        schema_=schema,
        shards=tuple(sorted(shards, key=lambda s: s.path)),
        items=len(keys),
        new_items=int(new.sum()),
        tasks=counts.tasks,
        events={split: sum(s.events for s in shards if s.split is split) for split in Split},
        skipped=skipped,
        catalogue_sha256=checksum,
        vocabularies_sha256=checksums,
        prepared_with=origin,
        facts=raw.facts,
    )
    result.write(url)
    return result


def _stage(config: PrepareConfig, url: str, raw: RawLog, skipped: dict[str, int]) -> list[Staged]:
    readings = [Reading(c, RowKind.EVENT, i) for i, c in enumerate(raw.events)]
    readings += [Reading(c, RowKind.TASK, i) for i, c in enumerate(raw.tasks or ())]
    if config.user_split.file:
        readings += [Reading(c, RowKind.GIVEN, i) for i, c in enumerate(split_file_chunks(config.user_split.file))]
    partitions = config.shards or _partitions(raw.events_estimate)
    features = raw.features
    staged: list[Staged] = []
    for part in partitioned(
        len(readings),
        lambda i: read_rows(readings[i], config, features, partitions),
        partitions,
        lambda number, rows: Staged.write(url, number, group(rows, config, features)),
    ):
        staged.append(part)
        for reason, n in part.skipped.items():
            skipped[reason] = skipped.get(reason, 0) + n
    staged.sort(key=lambda s: s.number)
    if not sum(s.tasks for s in staged):
        raise SourceError(
            "The log is empty: no user has enough events.",
            where=config.path or raw.name,
            got=", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "no events",
            remedy="Check `prepare.path`, or lower prepare.min_events.",
        )
    return staged


def _catalogue(raw: RawLog, config: PrepareConfig, staged: list[Staged]) -> tuple[pa.Table, np.ndarray]:
    """All items, raw: those of the item table in its order, then others that the log knows; and their first times."""
    seen = None
    for part in staged:
        found = part.table("items")
        both = found if seen is None else pa.concat_tables([seen, found])
        seen = both.group_by("item").aggregate([("first", "min")]).rename_columns(["item", "first"])
    assert seen is not None
    fields = {"key": pa.string(), "title": pa.string()}
    fields |= {f.name: raw_type(f) for f in raw.features if f.level == "item"}
    tables = [rows.table for chunk in raw.items or () for rows in chunk.read()]
    extra = config.item_split.column
    if extra and extra not in fields and tables and extra in tables[0].column_names:
        fields[extra] = tables[0].schema.field(extra).type
    schema = pa.schema(list(fields.items()))
    known = pa.concat_tables([t.select(schema.names).cast(schema) for t in tables]) if tables else schema.empty_table()
    keys = known["key"].combine_chunks()
    if len(pc.unique(keys)) != len(keys):
        counts = pc.value_counts(keys)
        twice = counts.filter(pc.greater(counts.field("counts"), 1)).field("values")[0].as_py()
        raise SourceError(
            "An item has two rows.", where=config.items or raw.name, got=twice, remedy="Keep one row an item."
        )
    others = seen["item"].filter(pc.invert(pc.is_in(seen["item"], value_set=keys)))
    others = others.take(pc.sort_indices(others)).combine_chunks()
    rest = pa.table([others if f.name == "key" else pa.nulls(len(others), f.type) for f in schema], schema=schema)
    catalogue = pa.concat_tables([known, rest]).combine_chunks()
    row = pc.index_in(catalogue["key"], value_set=seen["item"].combine_chunks())
    never = np.iinfo(np.int64).max
    return catalogue, pc.fill_null(seen["first"].take(row), never).to_numpy()


def _schema(
    config: PrepareConfig, raw: RawLog, catalogue: pa.Table, counts: Counts
) -> tuple[Schema, dict[str, pa.Array]]:
    trained = pa.array(counts.training_events > 0)
    for f in raw.features:
        if f.level == "item":
            counts.statistics.add(f, catalogue[f.name].filter(trained))
    items = catalogue["key"].filter(trained).combine_chunks()
    vocabulary = vocabularies(raw.features, counts.statistics, items)
    own = Feature(
        name=ITEM_FEATURE,
        level=Level.ITEM,
        kind=Kind.CATEGORICAL,
        table=ITEM_FEATURE,
        rows=len(items) + 1,
        width=config.item_width,
    )
    labels = counts.labels
    try:
        schema = Schema(
            features=(own, *(stored_feature(f, counts.statistics, vocabulary) for f in raw.features)),
            label=LabelKind(config.label),
            label_mean=labels.mean,
            label_deviation=labels.deviation,
            label_min=labels.least,
            label_max=labels.greatest,
        )
    except ValidationError as error:
        message = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise ConfigError(
            f"The features contradict each other: {message}.", where="prepare.features", remedy="Mend them."
        ) from error
    return schema, vocabulary


def _encoded_catalogue(
    catalogue: pa.Table, new: np.ndarray, counts: Counts, schema: Schema, vocabulary: dict[str, pa.Array]
) -> pa.Table:
    columns = {"key": catalogue["key"], "title": catalogue["title"], "new": pa.array(new)}
    for f in schema.of(Level.ITEM):
        raw = catalogue["key"] if f.name == ITEM_FEATURE else catalogue[f.name]
        columns[f"item:{f.name}"] = encode(f, raw, vocabulary.get(str(f.table)))
    return pa.table(columns | {"training_events": pa.array(counts.training_events)})


def _write_table(url: str, path: str, table: pa.Table) -> str:
    data = parquet_bytes(table)
    storage.write_atomic(storage.join(url, path), data)
    return hashlib.sha256(data).hexdigest()


def _partitions(events: int) -> int:
    return 1 if events <= _ONE_PARTITION_EVENTS else min(-(-events // _PARTITION_EVENTS), _MOST_PARTITIONS)


def _row_group_tasks(tasks: int) -> int:
    """A power of two from 16 to 1024 that cuts the training split into about `_ROW_GROUPS`."""
    return int(min(max(2 ** int(np.log2(max(tasks / _ROW_GROUPS, 1))), 16), 1024))


def _tasks_text(tasks: dict[Split, int]) -> str:
    return ", ".join(f"{n} {split.value} users" for split, n in tasks.items())


__all__ = ["prepare", "summary"]
