"""From a raw log to a task dataset, out of core: memory grows with the catalogue (the items; the users where
`prepare.task` is item), never with the number of tasks.

Three passes: read the log piece by piece and stage its rows by partition of users; group each partition and count
(statistics of training users alone); encode and write. The manifest comes last, so a preparation that is killed leaves
no dataset, and the next one clears its rest.
"""

from __future__ import annotations

import hashlib
import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from pydantic import ValidationError

from metatrain import storage
from metatrain.config import PrepareConfig
from metatrain.data import manifest as manifests
from metatrain.data.manifest import Manifest, Shard, Split
from metatrain.data.prepare_encode import encode, stored_feature, vocabularies
from metatrain.data.prepare_group import group
from metatrain.data.prepare_items import ItemIndex, SameFingerprintError, SeenItems, item_fingerprints, raw_catalogue
from metatrain.data.prepare_output import origin_of, output_folder, ready_dataset
from metatrain.data.prepare_pieces import STAGING, Partitioning, Piece
from metatrain.data.prepare_ray import Workers, workers
from metatrain.data.prepare_rows import Reading, RowKind
from metatrain.data.prepare_shards import Counts, Encoding, Staged, Totals, count, parquet_bytes, write_shards
from metatrain.data.prepare_splits import Thresholds, check_splits, new_items, split_file_chunks, time_thresholds
from metatrain.data.schema import ITEM_FEATURE, Feature, Kind, LabelKind, Level, Schema
from metatrain.data.sources import RawLog, read_source
from metatrain.errors import ConfigError, SourceError

#: A log of so many events is prepared here before Ray has started.
_FEW_EVENTS = 8_000_000
#: A log of so many events is one partition, so that it has one file a split.
_ONE_PARTITION_EVENTS = 2_000_000
#: Events in a partition of a larger log: bounds what one task holds in memory.
_PARTITION_EVENTS = 1_000_000
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
    few = raw.events_estimate <= _FEW_EVENTS
    with workers(progress, address, small=few) as pool, output_folder(url) as folder:
        return _prepare(pool, config, folder, raw, origin)


def summary(manifest: Manifest) -> str:
    """What a dataset holds and what was left out, as a small table."""
    task = manifest.task
    lines = [f"{manifest.name}: {manifest.items:,} {manifest.catalogued}s, {manifest.new_items:,} of them new"]
    lines += [f"  {s.value:<12}{manifest.tasks[s]:>12,} {task}s{manifest.events[s]:>14,} events" for s in Split]
    s = manifest.schema_
    scale = f"{s.label_min:g} to {s.label_max:g}, mean {s.label_mean:.3f}, deviation {s.label_deviation:.3f}"
    lines.append(f"  labels      {s.label.value}, {scale}")
    lines.append("  features    " + ", ".join(f"{f.name} ({f.level.value}, {f.kind.value})" for f in s.features))
    for table, of in manifest.facts.get("hashed", {}).items():
        share = f"{of['values']:,} values in {of['buckets']:,} buckets, {of['sharing']:.0%} of them share one"
        lines.append(f"  hashed      {table}: about {share}")
    left_out = [f"  left out    {number:,} {reason}" for reason, number in sorted(manifest.skipped.items())]
    lines += left_out or ["  left out    nothing"]
    lines += [
        f"  {name.replace('_', ' ')}: {value:.6g}" for name, value in manifest.facts.items() if isinstance(value, float)
    ]
    return "\n".join(lines)


def _prepare(pool: Workers, config: PrepareConfig, url: str, raw: RawLog, origin: dict[str, Any]) -> Manifest:
    skipped: dict[str, int] = {}
    log_ = _stage(pool, config, url, raw)
    _count(skipped, "bad rows", raw.bad_rows + log_.bad + sum(piece.bad for piece in log_.pieces))
    catalogue, keys = log_.catalogue, log_.catalogue["key"].combine_chunks()
    new = new_items(keys, log_.first, catalogue, config.item_split, config.catalogued)
    staged, totals, thresholds = _group(pool, log_, ItemIndex(log_.fingerprints, new), skipped)
    _count(skipped, f"{config.task}s that the given split does not name", totals.left_out)
    if not totals.training_events.any():
        raise SourceError(
            f"No training {config.task} has an event on an existing {config.catalogued}.",
            where=raw.name,
            got=", ".join(f"{n} {split.value} {config.task}s" for split, n in totals.tasks.items()),
            remedy="Check prepare.user_split, prepare.item_split and prepare.min_events.",
        )

    schema, vocabulary, hashed = _schema(config, raw, catalogue, totals)
    group_tasks = config.row_group_tasks or _row_group_tasks(totals.tasks[Split.TRAIN])
    encoding = pool.share(Encoding(schema, vocabulary, group_tasks))
    shards: list[Shard] = []
    for written in pool.map("writing", staged, lambda s: write_shards(s, config, thresholds, encoding())):
        shards += written
    checksums = {
        table: _write_table(url, f"vocabularies/{table}.parquet", pa.table({"value": values}))
        for table, values in vocabulary.items()
    }
    checksum = _write_table(url, "catalogue.parquet", _encoded_catalogue(catalogue, new, totals, schema, vocabulary))
    storage.remove(storage.join(url, STAGING))
    result = Manifest(
        version=manifests.VERSION,
        name=raw.name,
        schema_=schema,
        shards=tuple(sorted(shards, key=lambda s: s.path)),
        items=len(keys),
        new_items=int(new.sum()),
        tasks=totals.tasks,
        events={split: sum(s.events for s in shards if s.split is split) for split in Split},
        skipped=skipped,
        catalogue_sha256=checksum,
        vocabularies_sha256=checksums,
        prepared_with=origin,
        facts=raw.facts | ({"hashed": hashed} if hashed else {}),
        task=config.task,
    )
    result.write(url)
    return result


@dataclass(frozen=True)
class _Log:
    """A log that is staged by partition, and its items."""

    cut: Partitioning
    pieces: list[Piece]
    catalogue: pa.Table
    first: np.ndarray  # by catalogue row: int64
    fingerprints: pa.Array
    bad: int  # rows of the items' table that were skipped


def _stage(pool: Workers, config: PrepareConfig, url: str, raw: RawLog) -> _Log:
    readings = [Reading(c, RowKind.EVENT, i) for i, c in enumerate(raw.events)]
    readings += [Reading(c, RowKind.TASK, i) for i, c in enumerate(raw.tasks or ())]
    if config.user_split.file:
        readings += [Reading(c, RowKind.GIVEN, i) for i, c in enumerate(split_file_chunks(config.user_split.file))]
    salt = 0
    while True:
        cut = Partitioning(url, config, raw.features, config.shards or _partitions(raw.events_estimate), salt)
        pieces, seen = [], SeenItems()
        try:
            for piece in pool.map("reading", readings, cut.stage):
                pieces.append(piece)
                for name in piece.items:
                    seen.add(cut.items(name))
            catalogue, first, bad = raw_catalogue(raw, config, seen)
            marks = item_fingerprints(catalogue["key"].combine_chunks(), salt)
        except SameFingerprintError:
            salt += 1  # about once in a hundred million logs of a million items
            storage.remove(storage.join(url, STAGING))
            continue
        return _Log(cut, pieces, catalogue, first, marks, bad)


def _group(
    pool: Workers, log_: _Log, index: ItemIndex, skipped: dict[str, int]
) -> tuple[list[Staged], Totals, Thresholds | None]:
    """Groups and counts every partition. What is left out goes into `skipped`."""
    cut, pieces, shared_index = log_.cut, pool.share(log_.pieces), pool.share(index)
    config, features = cut.config, cut.features
    by_time = config.user_split.by == "time"

    def grouped(number: int) -> tuple[Staged, Counts | None]:
        found = group(cut.gather(number, pieces()), shared_index(), config, features)
        staged = Staged.write(cut.url, number, found)
        # By time, a user's split is known when all users' first times are.
        return staged, None if by_time else count(found.tasks, found.events, shared_index().new, config, features, None)

    totals, staged, thresholds = Totals(len(index.new)), [], None
    for part, counts in pool.map("grouping", range(cut.partitions), grouped):
        staged.append(part)
        for reason, n in part.skipped.items():
            _count(skipped, reason, n)
        if counts is not None:
            totals.add(part.number, counts)
    staged.sort(key=lambda s: s.number)
    if not sum(s.tasks for s in staged):
        raise SourceError(
            f"The log is empty: no {config.task} has enough events.",
            where=config.path or config.source,
            got=", ".join(f"{n} {reason}" for reason, n in skipped.items()) or "no events",
            remedy="Check `prepare.path`, or lower prepare.min_events.",
        )
    if by_time:
        thresholds = time_thresholds(lambda: (s.first_times() for s in staged), config.user_split)

        def counted(s: Staged) -> tuple[int, Counts]:
            tasks, events = s.table("tasks"), s.table("events")
            return s.number, count(tasks, events, shared_index().new, config, features, thresholds)

        for number, counts in pool.map("counting", staged, counted):
            totals.add(number, counts)
    return staged, totals, thresholds


def _schema(
    config: PrepareConfig, raw: RawLog, catalogue: pa.Table, totals: Totals
) -> tuple[Schema, dict[str, pa.Array], dict[str, dict[str, float]]]:
    """The schema, the tables' vocabularies, and what values of hashed tables collide."""
    trained = pa.array(totals.training_events > 0)
    statistics, labels = totals.statistics()
    for f in raw.features:
        if f.level == "item":
            statistics.add(f, catalogue[f.name].filter(trained))
    items = catalogue["key"].filter(trained).combine_chunks()
    vocabulary = vocabularies(raw.features, statistics, items)
    own = Feature(
        name=ITEM_FEATURE,
        level=Level.ITEM,
        kind=Kind.CATEGORICAL,
        table=ITEM_FEATURE,
        rows=len(items) + 1,
        width=config.item_width,
    )
    try:
        schema = Schema(
            features=(own, *(stored_feature(f, statistics, vocabulary) for f in raw.features)),
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
    return schema, vocabulary, statistics.collisions(schema.features)


def _encoded_catalogue(
    catalogue: pa.Table, new: np.ndarray, totals: Totals, schema: Schema, vocabulary: dict[str, pa.Array]
) -> pa.Table:
    columns = {"key": catalogue["key"], "title": catalogue["title"], "new": pa.array(new)}
    for f in schema.of(Level.ITEM):
        raw = catalogue["key"] if f.name == ITEM_FEATURE else catalogue[f.name]
        columns[f"item:{f.name}"] = encode(f, raw, vocabulary.get(str(f.table)))
    return pa.table(columns | {"training_events": pa.array(totals.training_events)})


def _write_table(url: str, path: str, table: pa.Table) -> str:
    data = parquet_bytes(table)
    storage.write_atomic(storage.join(url, path), memoryview(data))
    return hashlib.sha256(data).hexdigest()


def _partitions(events: int) -> int:
    return 1 if events <= _ONE_PARTITION_EVENTS else min(-(-events // _PARTITION_EVENTS), _MOST_PARTITIONS)


def _count(skipped: dict[str, int], reason: str, number: int) -> None:
    if number:
        skipped[reason] = skipped.get(reason, 0) + number


def _row_group_tasks(tasks: int) -> int:
    """A power of two from 16 to 512 that cuts the training split into about `_ROW_GROUPS`."""
    return int(min(max(2 ** int(np.log2(max(tasks / _ROW_GROUPS, 1))), 16), 512))


__all__ = ["prepare", "summary"]
