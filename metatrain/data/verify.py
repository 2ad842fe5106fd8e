"""A dataset checked wholly against its manifest: every file, every row. What `metatrain verify` does.

Each shard alone: its size, its checksum, that all its row groups decode, that lists of one task are equally long, that
ids are inside their tables and the catalogue, that events are in time order and as many as the manifest says. Then
together: that no task's key is there twice, in one split or in two.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from tqdm import tqdm

from metatrain import storage
from metatrain.data import manifest as manifests
from metatrain.data.dataset import CATALOGUE, TaskDataset
from metatrain.data.decoded import ColumnError, Decoder
from metatrain.data.hashing import hash_text
from metatrain.data.manifest import Shard, Split
from metatrain.data.schema import Level
from metatrain.data.shards import Shards, check_content, shard_error, wrong_sizes
from metatrain.errors import DatasetError, ShardError

#: Of keys that are there twice, so many are named.
_SHOWN = 5


@dataclass(frozen=True)
class FileCheck:
    """One file of a dataset: its path inside it, and what is wrong with it, where something is."""

    path: str
    error: DatasetError | None = None


@dataclass(frozen=True)
class Verification:
    """What was found in a dataset."""

    dataset: TaskDataset
    files: tuple[FileCheck, ...]
    #: What no single file is to blame for.
    errors: tuple[DatasetError, ...]
    #: Files that the manifest does not list: never read.
    strangers: tuple[str, ...]
    bytes: int
    seconds: float

    @property
    def whole(self) -> bool:
        """Whether nothing is wrong."""
        return not self.errors and all(file.error is None for file in self.files)

    @property
    def bad_shards(self) -> tuple[str, ...]:
        """Paths of the shards that are bad."""
        return tuple(file.path for file in self.files if isinstance(file.error, ShardError))

    def table(self) -> str:
        """For people: a line a split and other file, then every bad file with what is wrong with it."""
        manifest = self.dataset.manifest
        known = {shard.path: shard for shard in manifest.shards}
        rows: list[tuple[str, ...]] = [("part", "files", "bad", "tasks", "events", "bytes")]
        for split in Split:
            own = [file for file in self.files if file.path in known and known[file.path].split is split]
            shards = manifest.of(split)
            totals = (sum(s.tasks for s in shards), sum(s.events for s in shards), sum(s.bytes for s in shards))
            bad = sum(file.error is not None for file in own)
            rows.append((split.value, f"{len(own):,}", f"{bad:,}", *(f"{total:,}" for total in totals)))
        for name, own in (
            ("catalogue", [file for file in self.files if file.path == CATALOGUE]),
            ("vocabularies", [file for file in self.files if file.path not in known and file.path != CATALOGUE]),
        ):
            rows.append((name, f"{len(own):,}", f"{sum(file.error is not None for file in own):,}", "", "", ""))
        widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
        lines = [f"{manifest.name}: {self.dataset.url}", ""]
        lines += [
            "  ".join(
                f"{t:<{w}}" if not i else f"{t:>{w}}" for i, (t, w) in enumerate(zip(row, widths, strict=True))
            ).rstrip()
            for row in rows
        ]
        for error in [*(file.error for file in self.files if file.error), *self.errors]:
            lines += ["", f"BAD  {error.where}", f"     {error.what}", *([f"     {error.got}"] if error.got else [])]
        if self.strangers:
            shown = ", ".join(self.strangers[:_SHOWN]) + (", …" if len(self.strangers) > _SHOWN else "")
            lines += ["", f"{len(self.strangers)} files that the manifest does not list, which nothing reads: {shown}"]
        bad = sum(file.error is not None for file in self.files) + len(self.errors)
        verdict = f"{bad} to mend" if bad else "whole"
        lines += ["", f"{verdict}: {len(self.files):,} files, {self.bytes:,} bytes in {self.seconds:.1f} s"]
        return "\n".join(lines)


def verify(url: str, progress: bool = True) -> Verification:
    """Checks a dataset wholly. Memory: a row group, the catalogue, and 12 bytes a task for the search of double keys.

    Args:
        url: The dataset.
        progress: Whether to show a bar, on a terminal.

    Raises:
        DatasetError: The manifest cannot be used: nothing can be checked against it.
    """
    begun = time.monotonic()
    dataset = TaskDataset.open(url)
    shards = sorted(dataset.manifest.shards, key=lambda shard: shard.path)
    files, errors = [], []

    def tried(path: str, check: Callable[[], object]) -> None:
        try:
            check()
            files.append(FileCheck(path))
        except DatasetError as error:
            files.append(FileCheck(path, error))

    tried(CATALOGUE, lambda: _check_catalogue(dataset))
    for table in sorted({str(f.table) for f in dataset.schema.features if f.embedded and not f.buckets}):
        tried(f"vocabularies/{table}.parquet", lambda table=table: dataset.vocabulary(table))
    # Without the catalogue, how far ids may reach is what the manifest says.
    decoder = _decoder(dataset)
    sizes = {error.path: error for error in wrong_sizes(dataset.url, shards)}
    keys: list[np.ndarray] = []
    shown = progress and sys.stderr.isatty()
    total = sum(shard.bytes for shard in shards)
    with tqdm(total=total, unit="B", unit_scale=True, desc="verify", disable=not shown, dynamic_ncols=True) as bar:
        for shard in shards:
            hashes = np.zeros(0, np.uint64)
            try:
                if shard.path in sizes:
                    raise sizes[shard.path]
                hashes = check_shard(dataset, shard, decoder, bar.update)
                files.append(FileCheck(shard.path))
            except ShardError as error:
                files.append(FileCheck(shard.path, error))
            keys.append(hashes)
    errors += _double_keys(dataset, shards, keys)
    return Verification(
        dataset,
        tuple(files),
        tuple(errors),
        tuple(_strangers(dataset)),
        total,
        time.monotonic() - begun,
    )


def check_shard(
    dataset: TaskDataset,
    shard: Shard,
    decoder: Decoder | None = None,
    told: Callable[[int], object] = lambda _: None,
) -> np.ndarray:
    """Checks one shard: its size, its checksum, and every row. Returns hashes of its tasks' keys: uint64 [tasks].

    Raises:
        ShardError: What is wrong with it.
    """
    for error in wrong_sizes(dataset.url, [shard]) if decoder is None else ():
        raise error
    check_content(dataset.url, shard, told)
    decoder = decoder or _decoder(dataset)
    hashes, events = [np.zeros(0, np.uint64)], 0
    for table in _row_groups(dataset, shard, decoder):
        try:
            decoded = decoder(table)
            assert decoded.timestamps is not None, "this decoder reads them"
            steps, first = np.diff(decoded.timestamps), decoded.offsets[1:-1]
            steps[first[(first > 0) & (first < len(decoded.timestamps))] - 1] = 0  # from one task to the next
            if (steps < 0).any():
                task = int(np.searchsorted(decoded.offsets, np.flatnonzero(steps < 0)[0], side="right")) - 1
                raise ColumnError(
                    "timestamps", f"events of the task {table['key'][task].as_py()!r} are not in time order"
                )
        except ColumnError as error:
            what = f"A shard's column is not what the manifest says: {error.reason}."
            raise shard_error(dataset.url, shard, what, column=error.column) from error
        hashes.append(hash_text(table["key"], "verify"))
        events += len(decoded.items)
    if events != shard.events:
        raise shard_error(
            dataset.url,
            shard,
            "A shard has another number of events than the manifest says.",
            got=f"{events} events; the manifest says {shard.events}",
        )
    return np.concatenate(hashes)


def _decoder(dataset: TaskDataset) -> Decoder:
    features = {level: dataset.schema.of(level) for level in Level}
    return Decoder(features, dataset.manifest.items, None, keys=True)


def _row_groups(dataset: TaskDataset, shard: Shard, decoder: Decoder) -> Iterator[pa.Table]:
    titles = {"title": pa.string()} if dataset.manifest.task == "item" else {}
    shards = Shards(dataset.url, [shard], decoder.types | titles)
    try:
        for group in range(len(shard.row_groups)):
            yield shards.read(np.array([group]), [*decoder.names, *titles])
    finally:
        shards.close()


def _check_catalogue(dataset: TaskDataset) -> None:
    catalogue, path = dataset.catalogue, storage.join(dataset.url, CATALOGUE)
    wrong = ""
    if (new := int(catalogue.new.sum())) != dataset.manifest.new_items:
        wrong = f"{new} new items; the manifest says {dataset.manifest.new_items}"
    elif len(catalogue) and catalogue.training_events[catalogue.new].any():
        wrong = "a new item has training events"
    elif (catalogue.training_events < 0).any():
        wrong = "a number of training events is negative"
    elif twice := _repeated(pa.array(catalogue.keys, pa.string())):
        wrong = f"keys that are there twice: {', '.join(twice)}"
    if wrong:
        raise DatasetError(
            "A file of the dataset is not what the manifest says.",
            where=path,
            got=wrong,
            remedy="Prepare the dataset again.",
        )


def _repeated(keys: pa.Array) -> list[str]:
    counts = pc.value_counts(keys)
    return counts.filter(pc.greater(counts.field("counts"), 1)).field("values").to_pylist()[:_SHOWN]


def _double_keys(dataset: TaskDataset, shards: list[Shard], hashes: list[np.ndarray]) -> Iterator[DatasetError]:
    """Keys of several tasks: of one split, or, worse, of two."""
    every = np.concatenate([np.zeros(0, np.uint64), *hashes])
    shard_of = np.repeat(np.arange(len(shards), dtype=np.int32), [len(own) for own in hashes])
    order = np.argsort(every, kind="stable")
    equal = np.flatnonzero(every[order][1:] == every[order][:-1])
    suspects = np.unique(every[order][equal])
    if not len(suspects):
        return
    # Two keys may have one hash: the keys themselves decide.
    found: dict[str, list[Shard]] = {}
    where = np.isin(every, suspects)
    for number in np.unique(shard_of[where]).tolist():
        reader = Shards(dataset.url, [shards[number]])
        keys = reader.read(np.arange(len(shards[number].row_groups)), ["key"])["key"]
        reader.close()
        for key in keys.filter(pa.array(np.isin(hashes[number], suspects))).to_pylist():
            found.setdefault(key, []).append(shards[number])
    double = {key: places for key, places in found.items() if len(places) > 1}
    for key, places in list(double.items())[:_SHOWN]:
        splits = sorted({shard.split.value for shard in places})
        what = f"A {dataset.manifest.task} is in several splits: {', '.join(splits)}."
        yield DatasetError(
            what if len(splits) > 1 else f"A {dataset.manifest.task} is there {len(places)} times.",
            where=", ".join(storage.join(dataset.url, path) for path in sorted({shard.path for shard in places})),
            got=f"the key {key!r}" + (f", and {len(double) - _SHOWN} more" if len(double) > _SHOWN else ""),
            remedy="Prepare the dataset again.",
        )


def _strangers(dataset: TaskDataset) -> Iterator[str]:
    known = {shard.path for shard in dataset.manifest.shards} | {CATALOGUE, manifests.FILE}
    known |= {f"vocabularies/{table}.parquet" for table in dataset.manifest.vocabularies_sha256}
    folders = sorted({path.rpartition("/")[0] for path in known} | {f"shards/{split.value}" for split in Split})
    for folder in folders:
        for name in storage.file_sizes(storage.join(dataset.url, folder) if folder else dataset.url):
            path = f"{folder}/{name}" if folder else name
            if path not in known:
                yield path
