from __future__ import annotations

import contextlib
import dataclasses
import os
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metatrain.config import DataConfig, EpisodeConfig
from metatrain.data.batch import Ragged, TaskBatch
from metatrain.data.dataset import TaskDataset
from metatrain.data.episodes import split_events
from metatrain.data.gather import LookUp, Runs
from metatrain.data.manifest import ItemSet, Shard, Split, read_manifest
from metatrain.data.plan import EpochPlan, lanes_of
from metatrain.data.prepare_shards import parquet_bytes
from metatrain.data.reader import BatchReader, batch_from_events, concatenate_batches, iterate
from metatrain.data.schema import Kind, Level
from metatrain.data.shards import Shards, row_groups
from metatrain.errors import ConfigError, DatasetError, RequestError

pytestmark = pytest.mark.usefixtures("both_ways")

EPISODE = EpisodeConfig(cut="uniform", support_min=2, support_max=5, query_max=3)
Make = Callable[..., str]


def plain(value: Any) -> Any:
    """A batch as lists and numbers, for comparison; tensors and arrays alike."""
    if isinstance(value, TaskBatch | Ragged):
        return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {name: plain(column) for name, column in value.items()}
    return value.tolist() if hasattr(value, "tolist") else value


def reader(url: str, **options: Any) -> BatchReader:
    settings = {"seed": 3, "lanes_total": 4, "tasks_per_step": 8, "window": 2, **options}
    return BatchReader(url, Split.TRAIN, ItemSet.EXISTING, EPISODE, **settings)


def read_epoch(own: BatchReader) -> list[TaskBatch]:
    return [own.read(0, step, range(4)) for step in range(own.steps(0))]


def by_task(batch: TaskBatch) -> dict[int, dict[str, Any]]:
    """Slow and obvious: what a batch says of each task."""
    found, event = {}, 0
    offsets = {
        n: np.concatenate([[0], np.cumsum(c.lengths)])
        for part in (batch.task_features, batch.item_features, batch.event_features)
        for n, c in part.items()
        if isinstance(c, Ragged)
    }

    def value(features: dict, name: str, row: int) -> Any:
        if isinstance(features[name], Ragged):
            return features[name].values[offsets[name][row] : offsets[name][row + 1]].tolist()
        return features[name][row].tolist()

    for t, task in enumerate(batch.tasks.tolist()):
        events = []
        for _ in range(batch.support_lengths[t] + batch.query_lengths[t]):
            item = int(batch.event_items[event])
            events.append(
                {
                    "item": int(batch.items[item]),
                    "label": float(batch.labels[event]),
                    "timestamp": int(batch.timestamps[event]),
                    **{f"item:{n}": value(batch.item_features, n, item) for n in batch.item_features},
                    **{f"event:{n}": value(batch.event_features, n, event) for n in batch.event_features},
                }
            )
            event += 1
        size = int(batch.support_lengths[t])
        features = {f"task:{n}": value(batch.task_features, n, t) for n in batch.task_features}
        found[task] = {"support": events[:size], "query": events[size:], **features}
    assert event == len(batch.event_items)
    return found


def expected_tasks(url: str, split: Split, items: ItemSet, episode: EpisodeConfig, seed: int, epoch: int) -> dict:
    """Slow and obvious: every task of a split by pyarrow's own lists, one at a time."""
    manifest = read_manifest(url)
    catalogue = pq.read_table(os.path.join(url, "catalogue.parquet")).to_pylist()
    rows = [row for shard in manifest.of(split) for row in pq.read_table(os.path.join(url, shard.path)).to_pylist()]
    found = {}
    for ordinal, row in enumerate(rows):
        wanted = [
            e
            for e, item in enumerate(row["items"])
            if items is ItemSet.ALL or catalogue[item]["new"] is (items is ItemSet.NEW)
        ]
        chosen = split_events(np.array([len(wanted)]), episode, seed, epoch, np.array([ordinal]))
        if chosen.skipped:
            continue
        events = []
        for e in (wanted[i] for i in chosen.events):
            event = {"item": row["items"][e], "label": row["labels"][e], "timestamp": row["timestamps"][e]}
            event |= {k: v for k, v in catalogue[row["items"][e]].items() if k.startswith("item:")}
            event |= {k: v[e] for k, v in row.items() if k.startswith("event:")}
            events.append(event)
        size = int(chosen.support_lengths[0])
        features = {k: v for k, v in row.items() if k.startswith("task:")}
        found[ordinal] = {"key": row["key"], "support": events[:size], "query": events[size:], **features}
    return found


@pytest.mark.parametrize("items", list(ItemSet))
@pytest.mark.parametrize(
    "episode", [EPISODE, EpisodeConfig(), EpisodeConfig(by="random", support_max=4, query_max=2, events_max=15)]
)
def test_equals_a_loop_over_rows(tiny_dataset: Make, items: ItemSet, episode: EpisodeConfig):
    url = tiny_dataset()
    expected = expected_tasks(url, Split.TEST, items, episode, seed=9, epoch=2)
    found, keys, skipped = {}, {}, 0
    for batch, names in iterate(url, Split.TEST, items, episode, seed=9, epoch=2, tasks_per_batch=4, keys=True):
        found |= by_task(batch)
        keys |= dict(zip(batch.tasks.tolist(), names.tolist(), strict=True))
        skipped += batch.skipped
    assert keys == {ordinal: task.pop("key") for ordinal, task in expected.items()}
    assert found == expected
    assert list(found) == sorted(found)
    assert skipped == read_manifest(url).tasks[Split.TEST] - len(expected)
    assert len(expected) > 3


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.data())
def test_every_task_once_over_workers_readers_and_restarts(tiny_dataset: Make, data: st.DataObject):
    """Invariants 1 and 2: each step from a new world of new readers equals the step of one undisturbed reader."""
    url = tiny_dataset()
    epoch = data.draw(st.integers(0, 3), label="epoch")
    whole = reader(url)
    tasks, skipped = [], 0
    for step in range(whole.steps(epoch)):
        expected = whole.read(epoch, step, range(4))
        tasks += expected.tasks.tolist()
        skipped += expected.skipped
        if not data.draw(st.booleans(), label="restart"):
            continue
        workers = data.draw(st.integers(1, 4), label="workers")
        parts = []
        for worker in range(workers):
            mine = lanes_of(range(4), workers, worker)
            readers = data.draw(st.integers(1, len(mine)), label="readers")
            own = [reader(url, read_ahead=data.draw(st.booleans())) for _ in range(readers)]
            parts.append(
                concatenate_batches([r.read(epoch, step, lanes_of(mine, readers, i)) for i, r in enumerate(own)])
            )
            for r in own:
                r.close()
        assert plain(concatenate_batches(parts)) == plain(expected)
    assert len(set(tasks)) == len(tasks)
    assert len(tasks) + skipped == read_manifest(url).tasks[Split.TRAIN]
    assert skipped > 0
    whole.close()


@pytest.mark.parametrize("steps", [2, 5, 100])
def test_several_steps_at_once_are_the_same_batches(tiny_dataset: Make, steps: int):
    one, several = reader(tiny_dataset()), reader(tiny_dataset(), read_ahead=True)
    count = one.steps(1)
    found: list[TaskBatch] = []
    for step in range(0, count, steps):
        batches = several.read_steps(1, step, min(steps, count - step), [1, 2])
        assert len(batches) == min(steps, count - step)
        sent = pickle.loads(pickle.dumps(batches))  # as through the object store
        assert [plain(b) for b in sent] == [plain(b) for b in batches]
        found += batches
    assert [plain(b) for b in found] == [plain(one.read(1, step, [1, 2])) for step in range(count)]
    assert [plain(b) for b in several.read_steps(1, count, 2, [0])] == [plain(one.read(1, count, [0]))] * 2
    several.close()


def test_tensors_of_a_batch_from_the_object_store_share_its_memory(tiny_dataset: Make):
    batches = reader(tiny_dataset()).read_steps(0, 0, 2, range(4))
    buffers: list[pickle.PickleBuffer] = []
    kept = pickle.dumps(batches, protocol=5, buffer_callback=buffers.append)
    # As Ray gives them: out of read-only memory, without a copy.
    for batch, expected in zip(
        pickle.loads(kept, buffers=[b.raw().toreadonly() for b in buffers]), batches, strict=True
    ):
        assert not batch.labels.flags.writeable
        tensors = batch.tensors()
        for name in ("tasks", "support_lengths", "query_lengths", "labels", "timestamps"):
            assert getattr(tensors, name).data_ptr() == getattr(batch, name).ctypes.data
        assert plain(tensors) == plain(expected)
        assert tensors.task_features["zip"].dtype == torch.int64
        labels = tensors.labels
        del tensors, batch  # a tensor keeps the memory that it shows
        assert labels.tolist() == expected.labels.tolist()


def test_reads_every_row_group_once_and_keeps_one_window_a_lane(tiny_dataset: Make, monkeypatch):
    url = tiny_dataset()
    read: list[int] = []
    own = BatchReader.from_config(
        url, DataConfig(lanes=2, tasks_per_step=6, shuffle_row_groups=3), Split.TRAIN, ItemSet.ALL, EPISODE, 3
    )
    shards = own._windows._shards
    original = shards.read
    monkeypatch.setattr(
        shards, "read", lambda groups, names: (read.extend(groups.tolist()), original(groups, names))[1]
    )
    for step in range(own.steps(0)):
        own.read(0, step, [0, 1])
        assert len(own._windows._open) == 2
    assert sorted(read) == list(range(len(row_groups(read_manifest(url).of(Split.TRAIN)))))


def test_reading_ahead_changes_no_batch_and_keeps_two_windows_a_lane(tiny_dataset: Make):
    url = tiny_dataset()
    plainly, ahead = reader(url), reader(url, read_ahead=True)
    for epoch in range(2):
        for step in range(plainly.steps(epoch)):
            assert plain(ahead.read(epoch, step, range(4))) == plain(plainly.read(epoch, step, range(4)))
            assert len(ahead._windows._open) <= 8
    ahead.close()
    plainly.close()


def test_reads_only_the_features_asked_for(tiny_dataset: Make, monkeypatch):
    url = tiny_dataset()
    own = reader(url, features=("zip", "genres"))
    columns: set[str] = set()
    original = own._windows._shards.read
    monkeypatch.setattr(
        own._windows._shards, "read", lambda groups, names: (columns.update(names), original(groups, names))[1]
    )
    batch = own.read(0, 0, range(4))
    assert columns == {"items", "labels", "timestamps", "task:zip"}
    assert (set(batch.task_features), set(batch.item_features), set(batch.event_features)) == (
        {"zip"},
        {"genres"},
        set(),
    )
    with pytest.raises(ConfigError, match="no such feature"):
        reader(url, features=("zap",))


def test_the_times_are_read_where_they_are_asked_for_alone(tiny_dataset: Make, monkeypatch):
    url = tiny_dataset()
    with_times, without = reader(url), reader(url, timestamps=False)
    columns: set[str] = set()
    original = without._windows._shards.read
    monkeypatch.setattr(
        without._windows._shards, "read", lambda groups, names: (columns.update(names), original(groups, names))[1]
    )
    batches = list(without.read_steps(0, 0, with_times.steps(0), range(4)))
    assert "timestamps" not in columns
    for batch, expected in zip(batches, read_epoch(with_times), strict=True):
        assert batch.timestamps is None
        assert plain(batch) == plain(dataclasses.replace(expected, timestamps=None))
        assert plain(batch.tensors()) == plain(batch)
    joined = concatenate_batches([without.read(0, 0, [lane]) for lane in range(4)])
    assert plain(joined) == plain(batches[0])


@given(
    st.integers(1, 300).flatmap(
        lambda rows: st.tuples(st.just(rows), st.lists(st.lists(st.integers(0, rows - 1), max_size=200), max_size=4))
    )
)
def test_items_of_steps_are_looked_up_as_by_unique(drawn: tuple[int, list[list[int]]]):
    catalogue_rows, steps = drawn
    look_up, bounds = LookUp(catalogue_rows), np.cumsum([0, *map(len, steps)])
    rows = np.array([row for step in steps for row in step], np.int32)
    for _ in range(2):  # nothing stays from one call to the next
        items, positions, item_bounds = look_up([rows], Runs(bounds[:-1], np.diff(bounds)), len(steps))
        for i, step in enumerate(steps):
            distinct, inverse = np.unique(np.array(step, np.int64), return_inverse=True)
            assert items[item_bounds[i] : item_bounds[i + 1]].tolist() == distinct.tolist()
            assert positions[bounds[i] : bounds[i + 1]].tolist() == inverse.tolist()
    assert (items.dtype, positions.dtype) == (np.int32, np.int32)


def test_steps_behind_the_epoch_are_empty_batches_of_the_right_types(tiny_dataset: Make):
    own = reader(tiny_dataset())
    full, empty = own.read(0, 0, range(4)), own.read(0, own.steps(0), range(4))
    assert empty.size == 0
    assert len(empty.items) == 0

    def types(value: Any) -> Any:
        if isinstance(value, dict):
            return {n: types(c) for n, c in value.items()}
        if isinstance(value, Ragged):
            return types(value.values), types(value.lengths)
        return (value.dtype, value.shape[1:]) if isinstance(value, np.ndarray) else type(value)

    assert types(vars(empty)) == types(vars(full))
    assert plain(concatenate_batches([empty, full, empty])) == plain(full)
    assert empty.tensors().labels.dtype == torch.float32


def test_numbers_that_do_not_fit_fail_before_a_batch(tiny_dataset: Make):
    with pytest.raises(ConfigError, match="multiple of lanes"):
        reader(tiny_dataset(), tasks_per_step=7)


def broken(url: str, change: Callable[[str], None]) -> str:
    """Changes the second training shard, and gives its path."""
    path = os.path.join(url, read_manifest(url).of(Split.TRAIN)[1].path)
    change(path)
    return path


def cut_short(path: str) -> None:
    with open(path, "r+b") as file:
        file.truncate(os.path.getsize(path) // 2)


def flip(place: float) -> Callable[[str], None]:
    def change(path: str) -> None:
        with open(path, "r+b") as file:
            file.seek(int(os.path.getsize(path) * place))
            byte = file.read(1)
            file.seek(-1, 1)
            file.write(bytes([byte[0] ^ 0xFF]))

    return change


def test_a_truncated_or_missing_shard_fails_at_the_start(tiny_dataset: Make):
    url = tiny_dataset(fresh=True)
    path = broken(url, cut_short)
    with pytest.raises(DatasetError, match="truncated") as caught:
        reader(url)
    assert caught.value.where == path
    assert "bytes; the manifest says" in str(caught.value)
    assert caught.value.remedy
    broken(url, os.remove)
    with pytest.raises(DatasetError, match="missing"):
        reader(url)


def test_a_truncated_shard_names_its_file_also_without_the_check(tiny_dataset: Make):
    url = tiny_dataset(fresh=True)
    path = broken(url, cut_short)
    own = reader(url, verify=False)
    with pytest.raises(DatasetError, match="cannot be read as Parquet") as caught:
        read_epoch(own)
    assert caught.value.where == path


def flip_in(column: str) -> Callable[[str], None]:
    """Changes a byte of a column's values: the last one of its first row group, behind every page's header."""

    def change(path: str) -> None:
        group = pq.ParquetFile(path).metadata.row_group(0)
        chunk = next(c for c in map(group.column, range(group.num_columns)) if c.path_in_schema.startswith(column))
        last = chunk.data_page_offset + chunk.total_compressed_size - 1
        assert not chunk.has_dictionary_page
        flip((last + 0.5) / os.path.getsize(path))(path)

    return change


@pytest.mark.parametrize("column", ["items", "labels", "task:age", "event:tags"])
def test_a_garbled_shard_is_refused_and_named(tiny_dataset: Make, column: str):
    url = tiny_dataset(fresh=True)
    path = broken(url, flip_in(column))
    own = reader(url)
    with pytest.raises(DatasetError, match="cannot be read as Parquet") as caught:
        read_epoch(own)
    assert caught.value.where == path


def test_flipped_bits_in_a_prepared_shard_are_not_read_as_other_values(tmp_path: Path):
    rng = np.random.default_rng(0)
    labels = pa.array(rng.normal(size=2000).astype(np.float32))
    table = pa.table({"labels": pa.ListArray.from_arrays(pa.array(np.arange(0, 2001, 10, dtype=np.int32)), labels)})
    content = parquet_bytes(table, 50)
    shard = Shard(
        path="a.parquet", split=Split.TRAIN, row_groups=(50,) * 4, events=2000, bytes=len(content), sha256="0" * 64
    )
    file = tmp_path / shard.path
    refused = changed = 0
    pages = len(content) - 8 - int.from_bytes(content[-8:-4], "little")  # the footer is behind them
    places = rng.choice(np.arange(4, pages), 200, replace=False)
    for place in places:
        garbled = bytearray(content)
        garbled[place] ^= 1 << rng.integers(8)
        file.write_bytes(garbled)
        try:
            found = Shards(str(tmp_path), [shard]).read(np.arange(4), ["labels"])
            changed += not found.equals(table)
        except DatasetError:
            refused += 1
    # Nearly: a page's header is outside of its checksum. Most of it is of no use to reading, or cannot be wrong unseen.
    assert changed <= 0.01 * len(places)
    assert refused > 0.9 * len(places)


def test_files_are_kept_open_up_to_so_many_row_groups_and_each_is_opened_once_where_they_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shards = []
    for number in range(6):
        table = pa.table({"labels": [[float(10 * number + row)] for row in range(8)]})
        content = parquet_bytes(table, 2)
        (tmp_path / f"{number}.parquet").write_bytes(content)
        groups, digest = (2,) * 4, "0" * 64
        of = Shard(
            path=f"{number}.parquet", split=Split.TRAIN, row_groups=groups, events=8, bytes=len(content), sha256=digest
        )
        shards.append(of)
    opened = []
    monkeypatch.setattr(
        "metatrain.data.shards.open_parquet",
        lambda source, **options: opened.append(source) or pq.ParquetFile(source, **options),
    )
    order = np.random.default_rng(0).permutation(24)
    for most, times in ((24, 6), (8, None), (1, None)):
        monkeypatch.setattr("metatrain.data.shards.OPEN_ROW_GROUPS", most)
        opened.clear()
        own = Shards(str(tmp_path), shards)
        for group in order:
            found = own.read(np.array([group]), ["labels"])["labels"].to_pylist()
            assert found == [[float(10 * (group // 4) + 2 * (group % 4) + row)] for row in range(2)]
            assert 4 * len(own._open) <= max(most, 4)
        assert len(opened) == times if times else len(opened) > 6
        own.close()
        assert not own._open


def rewrite(change: Callable[[pa.Table], pa.Table], size: int = 4) -> Callable[[str], None]:
    return lambda path: pq.write_table(change(pq.read_table(path)), path, row_group_size=size)


def with_column(name: str, change: Callable[[list], list]) -> Callable[[pa.Table], pa.Table]:
    def changed(table: pa.Table) -> pa.Table:
        place = table.column_names.index(name)
        column = pa.array(change(table[name].to_pylist()), table.schema.field(name).type)
        return table.set_column(place, name, column)

    return changed


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (rewrite(lambda t: t, size=3), "row groups are not those of the manifest"),
        (rewrite(lambda t: t.drop_columns(["event:tags"])), "lacks columns"),
        (rewrite(with_column("items", lambda rows: [[999] * len(r) for r in rows])), "catalogue rows below 30"),
        (rewrite(with_column("labels", lambda rows: [r[:-1] for r in rows])), "differ in length"),
        (rewrite(with_column("labels", lambda rows: [[float("nan")] * len(r) for r in rows])), "finite"),
        (rewrite(with_column("labels", lambda rows: [[None] * len(r) for r in rows])), "without nulls"),
        (rewrite(with_column("task:zip", lambda rows: [99] * len(rows))), "ids from 0 to 4"),
        (rewrite(with_column("event:tags", lambda rows: [[[10]] * len(r) for r in rows])), "ids from 0 to 9"),
        (rewrite(with_column("task:age", lambda rows: [None] * len(rows))), "without nulls"),
    ],
)
def test_a_shard_that_is_not_as_the_manifest_says_is_refused(tiny_dataset: Make, change, says: str):
    url = tiny_dataset(fresh=True)
    path = broken(url, change)
    own = reader(url, verify=False)
    with pytest.raises(DatasetError, match=re.escape(says)) as caught:
        read_epoch(own)
    assert path in str(caught.value.where)


def test_concatenation_looks_each_item_up_once(tiny_dataset: Make):
    own = reader(tiny_dataset(), lanes_total=2)
    parts = [own.read(0, 0, [lane]) for lane in range(2)]
    joined = concatenate_batches(parts)
    assert (np.diff(joined.items) > 0).all()
    assert len(joined.items) < sum(len(p.items) for p in parts)
    assert by_task(joined) == by_task(parts[0]) | by_task(parts[1])


def test_batch_from_events_fills_in_what_is_missing(tiny_dataset: Make):
    dataset = TaskDataset.open(tiny_dataset())
    none = np.zeros(0, np.int64)
    supports = [
        (np.array([4, 2]), np.array([5.0, 1.0]), np.array([10, 20])),
        (none, np.zeros(0), none),
    ]
    batch = batch_from_events(dataset, supports, [np.array([2, 7]), np.array([4])], {"zip": np.array([3, 0])})
    assert batch.items.tolist() == [2, 4, 7]
    assert batch.items[batch.event_items].tolist() == [4, 2, 2, 7, 4]
    assert batch.labels.tolist() == [5, 1, 0, 0, 0]
    assert batch.timestamps.tolist() == [10, 20, 20, 20, 0]
    assert (batch.support_lengths.tolist(), batch.query_lengths.tolist()) == ([2, 0], [2, 1])
    assert batch.task_features["zip"].tolist() == [3, 0]
    assert batch.task_features["likes"].lengths.tolist() == [0, 0]
    assert batch.event_features["gaze"].shape == (5, 4)
    sample = next(iter(iterate(dataset, Split.TRAIN, ItemSet.ALL, EPISODE)))
    for level in (Level.TASK, Level.ITEM, Level.EVENT):
        names = {f.name for f in dataset.schema.of(level)}
        assert (
            set(getattr(batch, f"{level.value}_features")) == names == set(getattr(sample, f"{level.value}_features"))
        )
    kinds = {f.kind for f in dataset.schema.of(Level.EVENT)}
    assert kinds == set(Kind)
    with pytest.raises(RequestError, match="not in the catalogue"):
        batch_from_events(dataset, supports, [np.array([-1]), none])


def test_an_epoch_of_an_empty_split_has_no_step(tiny_dataset: Make):
    url = tiny_dataset(validation=0, shards=1)
    assert not any(b.size for b in iterate(url, Split.VALIDATION, ItemSet.ALL, EPISODE))


def test_plan_and_reader_agree_on_the_steps(tiny_dataset: Make):
    url = tiny_dataset()
    plan = EpochPlan(
        row_groups(read_manifest(url).of(Split.TRAIN)), seed=3, epoch=1, lanes=4, tasks_per_step=8, window=2
    )
    with contextlib.closing(reader(url)) as own:
        assert own.steps(1) == plan.steps
