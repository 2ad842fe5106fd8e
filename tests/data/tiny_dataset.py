"""A small random task dataset, written straight to Parquet: every kind of feature at every level."""

from __future__ import annotations

import dataclasses
import hashlib
import os
from typing import Any

import numpy as np
import pyarrow as pa

from metatrain.data.batch import Ragged, TaskBatch
from metatrain.data.manifest import VERSION, Manifest, Shard, Split
from metatrain.data.prepare_shards import parquet_bytes
from metatrain.data.schema import ITEM_FEATURE, Feature, Kind, LabelKind, Level, Schema

#: Tables with their vocabularies; id 0 is "unknown". `word` is shared by features of all three levels.
TABLES = {"colour": ["red", "green", "blue"], "word": [f"w{i}" for i in range(9)], "zip": [f"z{i}" for i in range(4)]}
FIRST_TIME = 1_000_000_000


def tiny_features(items: int) -> tuple[Feature, ...]:
    """Categorical, multi, numeric and vector, of tasks, items and events; and the item's own id."""

    def embedded(name: str, level: Level, kind: Kind, table: str) -> Feature:
        rows = items + 1 if table == ITEM_FEATURE else len(TABLES[table]) + 1
        width = {"colour": 4, "word": 8, "zip": 4, ITEM_FEATURE: 8}[table]
        return Feature(name=name, level=level, kind=kind, table=table, rows=rows, width=width)

    return (
        embedded(ITEM_FEATURE, Level.ITEM, Kind.CATEGORICAL, ITEM_FEATURE),
        embedded("zip", Level.TASK, Kind.CATEGORICAL, "zip"),
        embedded("likes", Level.TASK, Kind.MULTI, "word"),
        Feature(name="age", level=Level.TASK, kind=Kind.NUMERIC, mean=30.0, deviation=9.0),
        Feature(name="portrait", level=Level.TASK, kind=Kind.VECTOR, width=3),
        embedded("colour", Level.ITEM, Kind.CATEGORICAL, "colour"),
        embedded("genres", Level.ITEM, Kind.MULTI, "word"),
        Feature(name="price", level=Level.ITEM, kind=Kind.NUMERIC, mean=5.0, deviation=2.0),
        Feature(name="picture", level=Level.ITEM, kind=Kind.VECTOR, width=2),
        embedded("shade", Level.EVENT, Kind.CATEGORICAL, "colour"),
        embedded("tags", Level.EVENT, Kind.MULTI, "word"),
        Feature(name="hour", level=Level.EVENT, kind=Kind.NUMERIC, mean=12.0, deviation=6.0),
        Feature(name="gaze", level=Level.EVENT, kind=Kind.VECTOR, width=4),
    )


def write_tiny_dataset(
    url: str,
    users: int = 60,
    items: int = 30,
    *,
    validation: int = 10,
    test: int = 15,
    new_items: int = 6,
    min_events: int = 1,
    max_events: int = 20,
    row_group_tasks: int = 4,
    shards: int = 3,
    label: LabelKind = LabelKind.RATING,
    seed: int = 0,
) -> Manifest:
    """Writes a dataset of `users` training users (and others) at a local path, and its manifest.

    Ratings are 1 to 5, with a trace of the user and of the item so that there is something to learn; events of one
    user have times that rise strictly, and a task feature `age` whose value is the number of the user, standardised.
    Events of training users on new items are in the shards, as preparation leaves them.
    """
    rng = np.random.default_rng(seed)
    features = tiny_features(items)
    new = np.zeros(items, bool)
    new[rng.choice(items, new_items, replace=False)] = True
    quality = rng.normal(size=items)
    training_events = np.zeros(items, np.int64)
    written: list[Shard] = []
    counted = {Split.TRAIN: users, Split.VALIDATION: validation, Split.TEST: test}
    first_user = 0
    for split, count in counted.items():
        folder = os.path.join(url, "shards", split.value)
        os.makedirs(folder, exist_ok=True)
        for i, part in enumerate(np.array_split(np.arange(first_user, first_user + count), min(shards, max(count, 1)))):
            lengths = rng.integers(min_events, max_events + 1, len(part))
            events = [rng.choice(items, n, replace=n > items) for n in lengths]
            flat = np.concatenate([np.zeros(0, np.int64), *events]).astype(np.int32)
            score = (
                3 + quality[flat] + np.repeat(rng.normal(size=len(part)), lengths) + 0.3 * rng.normal(size=len(flat))
            )
            labels = np.clip(np.round(score), 1, 5) if label is LabelKind.RATING else (score > 3) * 1.0
            offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
            times = FIRST_TIME + np.cumsum(rng.integers(1, 100, len(flat)))

            def listed(values: pa.Array, offsets: np.ndarray = offsets) -> pa.Array:
                return pa.ListArray.from_arrays(pa.array(offsets), values)

            columns = {
                "key": pa.array([f"user{u}" for u in part], pa.string()),
                "items": listed(pa.array(flat)),
                "labels": listed(pa.array(labels.astype(np.float32))),
                "timestamps": listed(pa.array(times.astype(np.int64))),
            }
            for feature in features:
                if feature.level is Level.TASK:
                    columns[f"task:{feature.name}"] = _random(rng, feature, len(part))
                elif feature.level is Level.EVENT:
                    columns[f"event:{feature.name}"] = listed(_random(rng, feature, len(flat)))
            columns["task:age"] = pa.array(((part - 30.0) / 9.0).astype(np.float32))
            if split is Split.TRAIN:
                training_events += np.bincount(flat, minlength=items)
            written.append(_write(url, f"shards/{split.value}/part-{i:05d}.parquet", columns, split, row_group_tasks))
        first_user += count
    training_events[new] = 0
    catalogue = {
        "key": pa.array([f"item{i}" for i in range(items)]),
        "title": pa.array([f"The item {i}" if i % 7 else None for i in range(items)], pa.string()),
        "new": pa.array(new),
        "training_events": pa.array(training_events),
    }
    for feature in features:
        if feature.level is Level.ITEM:
            catalogue[f"item:{feature.name}"] = _random(rng, feature, items)
    own = np.where(training_events > 0, np.arange(1, items + 1), 0)
    catalogue[f"item:{ITEM_FEATURE}"] = pa.array(own.astype(np.int32))
    catalogue_sha256 = _write_file(url, "catalogue.parquet", parquet_bytes(pa.table(catalogue)))
    vocabularies = {**TABLES, ITEM_FEATURE: [f"item{i}" for i in range(items)]}
    vocabularies_sha256 = {
        table: _write_file(url, f"vocabularies/{table}.parquet", parquet_bytes(pa.table({"value": values})))
        for table, values in vocabularies.items()
    }
    rating = label is LabelKind.RATING
    manifest = Manifest(
        version=VERSION,
        name="tiny",
        schema_=Schema(
            features=features,
            label=label,
            label_mean=3.0 if rating else 0.5,
            label_deviation=1.2 if rating else 0.5,
            label_min=1.0 if rating else 0.0,
            label_max=5.0 if rating else 1.0,
        ),
        shards=tuple(written),
        items=items,
        new_items=new_items,
        tasks=counted,
        events={s: sum(shard.events for shard in written if shard.split is s) for s in Split},
        skipped={},
        catalogue_sha256=catalogue_sha256,
        vocabularies_sha256=vocabularies_sha256,
        prepared_with={"source": "tiny", "seed": seed},
    )
    manifest.write(url)
    return manifest


def _write(url: str, path: str, columns: dict[str, pa.Array], split: Split, row_group_tasks: int) -> Shard:
    table = pa.table(columns)
    content = parquet_bytes(table, row_group_tasks)
    rows = table.num_rows
    return Shard(
        path=path,
        split=split,
        row_groups=tuple(min(row_group_tasks, rows - start) for start in range(0, rows, row_group_tasks)),
        events=len(table["items"].combine_chunks().flatten()),
        bytes=len(content),
        sha256=_write_file(url, path, content),
    )


def _random(rng: np.random.Generator, feature: Feature, rows: int) -> pa.Array:
    if feature.kind is Kind.NUMERIC:
        return pa.array(rng.normal(size=rows).astype(np.float32))
    if feature.kind is Kind.VECTOR:
        width = feature.width or 0
        return pa.FixedSizeListArray.from_arrays(pa.array(rng.normal(size=rows * width).astype(np.float32)), width)
    lengths = np.ones(rows, np.int64) if feature.kind is Kind.CATEGORICAL else rng.integers(0, 4, rows)
    ids = pa.array(rng.integers(0, feature.rows or 0, int(lengths.sum())).astype(np.int32))
    if feature.kind is Kind.CATEGORICAL:
        return ids
    return pa.ListArray.from_arrays(pa.array(np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)), ids)


def _write_file(url: str, path: str, content: bytes) -> str:
    """Writes a file of the dataset; its checksum."""
    file = os.path.join(url, path)
    os.makedirs(os.path.dirname(file), exist_ok=True)
    with open(file, "wb") as opened:
        opened.write(content)
    return hashlib.sha256(content).hexdigest()


def plain(value: Any) -> Any:
    """A batch as lists and mappings, which compare by value."""
    if isinstance(value, TaskBatch | Ragged):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: plain(column) for name, column in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value
