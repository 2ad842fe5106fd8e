"""Partitions of a log against a slow reference; statistics and encoding against plain Python."""

from __future__ import annotations

import itertools
import math
import random
import tempfile
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from metatrain.config import FeatureSource, PrepareConfig, UserSplit
from metatrain.data import prepare_pieces
from metatrain.data.dataset import TaskDataset
from metatrain.data.hashing import fingerprint
from metatrain.data.prepare import prepare
from metatrain.data.prepare_encode import Moments, Statistics, encode, stored_feature, vocabularies
from metatrain.data.prepare_group import Grouped, group
from metatrain.data.prepare_items import ItemIndex, SameFingerprintError, SeenItems, item_fingerprints
from metatrain.data.prepare_pieces import Partitioning
from metatrain.data.prepare_rows import Reading, RowKind
from metatrain.data.prepare_sort import grouped_order
from metatrain.data.randomness import hashed
from metatrain.data.sources.rawlog import TableChunk
from metatrain.errors import SourceError

AGE = FeatureSource(name="age", level="task", kind="numeric")
DEVICE = FeatureSource(name="device", level="event", kind="categorical")
FEATURES = (AGE, DEVICE)
Event = tuple[str, str, int]
events_drawn = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("xyz"), st.integers(0, 3)), max_size=40)


def readings(events: list[Event], users: dict[str, float], cuts: list[int]) -> list[Reading]:
    """A log in pieces that end at `cuts`, and a user table."""
    keys, items, times = zip(*events, strict=True) if events else ((), (), ())
    log = pa.table(
        {
            "key": pa.array(keys, type=pa.string()),
            "item": pa.array(items, type=pa.string()),
            "label": pa.array(range(len(events)), type=pa.float32()),
            "timestamp": pa.array(times, type=pa.int64()),
            "device": pa.array([f"d{i}" for i in range(len(events))], type=pa.string()),
        }
    )
    table = pa.table(
        {"key": list(users), "age": list(users.values())},
        schema=pa.schema([("key", pa.string()), ("age", pa.float64())]),
    )
    ends = [*sorted(min(cut, len(events)) for cut in cuts), len(events)]
    pieces = [log.slice(start, end - start) for start, end in itertools.pairwise([0, *ends])]
    return [Reading(TableChunk(t), RowKind.EVENT, i) for i, t in enumerate(pieces)] + [
        Reading(TableChunk(table), RowKind.TASK, 0)
    ]


def grouped(
    config: PrepareConfig, read: list[Reading], partitions: int = 1
) -> tuple[list[Grouped], list[str], dict[str, int]]:
    """Every partition of a log, the items by row, and the items' first times."""
    with tempfile.TemporaryDirectory() as folder:
        cut = Partitioning(folder, config, FEATURES, partitions)
        pieces = [cut.stage(reading) for reading in read]
        seen = SeenItems()
        for piece in pieces:
            for name in piece.items:
                seen.add(cut.items(name))
        index = ItemIndex(item_fingerprints(seen.keys, 0), np.zeros(len(seen.keys), bool))
        found = [group(cut.gather(number, pieces), index, config, FEATURES) for number in range(partitions)]
    items = seen.keys.to_pylist()
    return found, items, dict(zip(items, seen.first.tolist(), strict=True))


@settings(deadline=None)
@given(
    events=events_drawn,
    cuts=st.lists(st.integers(0, 40), max_size=3),
    run=st.sampled_from([1, 3, 100]),
    partitions=st.integers(1, 3),
    shuffle=st.randoms(use_true_random=False),
    least=st.integers(1, 4),
    most=st.integers(1, 6),
)
def test_a_log_is_grouped_as_the_slow_way_does(events, cuts, run, partitions, shuffle, least, most):
    config = PrepareConfig(min_events=least, max_events=most)
    users = {"a": 30.0, "c": 40.0, "lurker": 50.0}
    read = readings(events, users, cuts)
    shuffle.shuffle(read)  # tasks end in any order
    with pytest.MonkeyPatch.context() as patch:
        # A run of few rows: users are capped in pieces, and again when pieces meet.
        patch.setattr(prepare_pieces, "RUN_ROWS", run)
        parts, items, firsts = grouped(config, read, partitions)

    wanted: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for label, (key, item, time) in enumerate(events):
        wanted[key].append((time, label, item))  # a label is the place in the log: ties stay in its order
    few = {k: len(v) for k, v in wanted.items() if len(v) < least}
    kept = {k: sorted(v)[-most:] for k, v in wanted.items() if len(v) >= least}

    seen: list[str] = []
    for found in parts:
        ends = np.cumsum(found.tasks["events"].to_numpy()).tolist()
        rows = found.events.to_pylist()
        for task, end in zip(found.tasks.to_pylist(), ends, strict=True):
            own = rows[end - task["events"] : end]
            assert [(r["timestamp"], int(r["label"]), items[r["item"]]) for r in own] == kept[task["key"]]
            assert [r["event:device"] for r in own] == [f"d{int(r['label'])}" for r in own]
            assert task["first"] == min(t for t, _, _ in wanted[task["key"]])
            assert task["task:age"] == users.get(task["key"])
            seen.append(task["key"])
    assert sorted(seen) == sorted(kept)
    left_out = {
        f"users with fewer than {least} events": len(few),
        f"events of users with fewer than {least}": sum(few.values()),
        f"oldest events beyond {most} of a user": sum(max(len(v) - most, 0) for k, v in wanted.items() if k in kept),
        "rows of the user table without events": len(set(users) - set(wanted)),
    }
    assert sum((Counter(found.skipped) for found in parts), Counter()) == {r: n for r, n in left_out.items() if n}
    left = sum(few.values()) + left_out[f"oldest events beyond {most} of a user"]
    assert sum(found.events.num_rows for found in parts) + left == len(events)
    assert firsts == {item: min(t for _, i, t in events if i == item) for item in {i for _, i, _ in events}}


def test_the_order_of_tasks_is_not_that_of_the_log():
    config = PrepareConfig(min_events=1)
    orders = set()
    for seed in range(5):
        events = [(k, "x", 0) for k in random.Random(seed).sample("abcdefgh", 8)]
        orders.add(tuple(grouped(config, readings(events, {}, []))[0][0].tasks["key"].to_pylist()))
    assert len(orders) == 1
    assert orders != {tuple("abcdefgh")}


def test_a_task_that_runs_twice_leaves_one_copy_of_its_rows():
    config = PrepareConfig(min_events=1)
    read = readings([("a", "x", 1), ("b", "y", 2), ("a", "z", 0)], {}, [1])
    with tempfile.TemporaryDirectory() as folder:
        cut = Partitioning(folder, config, FEATURES, 2)
        first = [cut.stage(reading) for reading in read]
        before = sorted(p.name for p in Path(folder).rglob("*"))
        again = [cut.stage(reading) for reading in read]
        assert sorted(p.name for p in Path(folder).rglob("*")) == before
        for number in range(2):
            assert cut.gather(number, again) == cut.gather(number, first)


def test_memory_holds_a_few_times_max_events_of_one_user():
    config = PrepareConfig(min_events=1, max_events=50)
    events = [("a", f"i{i % 7}", i) for i in range(4000)] + [(f"u{i}", "x", i) for i in range(20)]
    with pytest.MonkeyPatch.context() as patch, tempfile.TemporaryDirectory() as folder:
        patch.setattr(prepare_pieces, "RUN_ROWS", 200)
        cut = Partitioning(folder, config, FEATURES, 1)
        pieces = [cut.stage(reading) for reading in readings(events, {}, list(range(0, 4000, 100)))]
        assert sum(int(run.rows.sum()) for piece in pieces for run in piece.runs) == 40 * 50 + 20
        held = cut.gather(0, pieces)
    assert held.events.num_rows <= 2 * 200 + 50 + 20
    assert held.left_out["left_out"].to_numpy().sum() + held.events.num_rows == len(events)


def test_two_rows_for_a_user_are_refused():
    config = PrepareConfig(min_events=1)
    read = readings([("a", "x", 1)], {"a": 1.0}, [])
    with pytest.raises(SourceError, match="two rows") as error:
        grouped(config, [*read, Reading(read[-1].chunk, RowKind.TASK, 1)])
    assert error.value.got == "a"


def test_a_split_column_that_the_users_lack_is_refused():
    config = PrepareConfig(user_split=UserSplit(by="given", column="fold"))
    with pytest.raises(SourceError, match="A column is missing: fold"):
        grouped(config, readings([], {"a": 1.0}, []))


# --- orders and fingerprints ---------------------------------------------------------------------------------------


@given(
    st.lists(st.tuples(st.integers(0, 70_000), st.integers(-(2**63), 2**63 - 1)), max_size=30),
    st.integers(0, 2**40),
)
@example([(0, 1), (0, -(2**63))], 0)  # the difference of these times overflows
def test_a_radix_order_is_that_of_lexsort(pairs: list[tuple[int, int]], close: int):
    group_, time = (np.array([p[i] for p in pairs], np.int64) for i in (0, 1))
    for times in (time, np.sort(time), time % (close + 1)):
        np.testing.assert_array_equal(grouped_order(group_, times), np.lexsort((times, group_)))


@settings(deadline=None)
@given(st.lists(st.text(st.characters(codec="utf-8", exclude_categories=("Cs",))), unique=True, max_size=40))
def test_a_fingerprint_is_of_the_text_alone(names: list[str]):
    array = pa.array([*names, "x" * 8, "x" * 9, "a\0", "a"], type=pa.string()).unique()
    whole = fingerprint(array)
    assert len(set(whole.tolist())) == len(array)
    np.testing.assert_array_equal(fingerprint(array.slice(2)), whole[2:])
    np.testing.assert_array_equal(fingerprint(array.cast(pa.large_string())), whole)
    assert not set(fingerprint(array, 1).tolist()) & set(whole.tolist())


def same_fingerprint() -> tuple[str, str]:
    """Two texts of 16 letters with one fingerprint under salt 0: the second half of one undoes the first's change."""
    start = hashed(0, 16)

    def word(text: bytes) -> np.ndarray:
        return np.frombuffer(text, "<u8")

    for i in range(100_000):
        first, other = b"aaaaaaaa", f"{i:08d}".encode()
        change = hashed(start ^ word(first)) ^ hashed(start ^ word(other))
        second = (word(b"items123") ^ change).tobytes()
        if all(33 <= byte < 127 for byte in second):
            return (first + b"items123").decode(), (other + second).decode()
    raise AssertionError


def test_items_that_share_a_fingerprint_are_told_apart(tmp_path: Path):
    a, b = same_fingerprint()
    assert a != b
    assert fingerprint(pa.array([a]))[0] == fingerprint(pa.array([b]))[0]
    with pytest.raises(SameFingerprintError):
        item_fingerprints(pa.array([a, b]), 0)
    with pytest.raises(SameFingerprintError):
        grouped(PrepareConfig(min_events=1), readings([("u", a, 0), ("u", b, 1)], {}, [1]))
    log = tmp_path / "log.csv"
    rows = [f'u{u},"{item}",1,{t}' for u in range(3) for t, item in enumerate((a, b, a))]
    log.write_text("user_id,item_id,label,timestamp\n" + "\n".join(rows) + "\n")
    split = UserSplit(validation=0, test=0)
    config = PrepareConfig(source="events", path=str(log), min_events=1, user_split=split)
    manifest = prepare(config, str(tmp_path / "out"), progress=False)
    assert manifest.items == 2
    keys = TaskDataset.open(str(tmp_path / "out")).catalogue.keys.tolist()
    found = pq.read_table(tmp_path / "out" / manifest.shards[0].path)["items"].to_pylist()
    assert [[keys[i] for i in items] for items in found] == [[a, b, a]] * 3


# --- statistics and encoding ---------------------------------------------------------------------------------------


@given(st.lists(st.lists(st.floats(-1e6, 1e6), max_size=8), max_size=6))
def test_moments_of_pieces_are_those_of_the_whole(pieces: list[list[float]]):
    merged = Moments()
    for piece in pieces:
        merged = merged.with_(Moments.of(np.array(piece)))
    whole = np.array([x for piece in pieces for x in piece])
    assert merged.count == len(whole)
    if len(whole):
        assert merged.mean == pytest.approx(whole.mean(), rel=1e-9, abs=1e-6)
        assert math.sqrt(merged.squares / merged.count) == pytest.approx(whole.std(), rel=1e-6, abs=1e-3)
        assert (merged.least, merged.greatest) == (whole.min(), whole.max())


def stored(feature: FeatureSource, column: pa.Array, others: tuple[FeatureSource, ...] = ()) -> tuple:
    statistics = Statistics()
    statistics.add(feature, column)
    vocabulary = vocabularies((feature, *others), statistics, pa.array([], type=pa.string()))
    found = stored_feature(feature, statistics, vocabulary)
    return found, encode(found, column, vocabulary.get(str(found.table)))


def test_categorical_ids_begin_with_the_commonest_and_unknown_is_0():
    feature, ids = stored(
        FeatureSource(name="f", level="item", kind="categorical", min_count=2),
        pa.array(["b", "a", "b", "a", "b", "c", None]),
    )
    assert ids.to_pylist() == [1, 2, 1, 2, 1, 0, 0]
    assert feature.rows == 3


def test_multi_valued_lists_keep_what_is_known():
    lists = pa.array([["a", "b"], None, [], ["rare", "a"], ["b"]])
    feature, ids = stored(FeatureSource(name="f", level="item", kind="multi", min_count=2), lists)
    assert ids.to_pylist() == [[1, 2], [], [], [1], [2]]
    assert feature.rows == 3


def test_buckets_hash_in_place_of_a_vocabulary():
    feature, ids = stored(
        FeatureSource(name="f", level="task", kind="categorical", buckets=11),
        pa.array([str(i) for i in range(500)] + [None]),
    )
    assert feature.rows == 11
    assert set(ids.to_pylist()[:-1]) == set(range(1, 11))
    assert ids.to_pylist()[-1] == 0


def test_numbers_are_standardised_and_missing_ones_are_0():
    feature, values = stored(FeatureSource(name="f", level="task", kind="numeric"), pa.array([1.0, 3.0, None]))
    assert (feature.mean, feature.deviation) == (2.0, 1.0)
    assert values.to_pylist() == [-1.0, 1.0, 0.0]
    feature, values = stored(FeatureSource(name="f", level="task", kind="numeric"), pa.array([7.0, 7.0]))
    assert values.to_pylist() == [0.0, 0.0]


def test_vectors_have_their_width_or_are_refused():
    source = FeatureSource(name="f", level="item", kind="vector", width=2)
    _, values = stored(source, pa.array([[1.0, 2.0], None]))
    assert values.to_pylist() == [[1.0, 2.0], [0.0, 0.0]]
    for wrong in ([[1.0, 2.0], [1.0]], [[1.0, math.nan]], [[1.0, None]]):
        with pytest.raises(SourceError):
            stored(source, pa.array(wrong, type=pa.list_(pa.float32())))


def test_features_of_one_table_share_its_vocabulary():
    a = FeatureSource(name="a", level="item", kind="categorical", table="t")
    b = FeatureSource(name="b", level="item", kind="multi", table="t")
    statistics = Statistics()
    statistics.add(a, pa.array(["x", "y", "x"]))
    statistics.add(b, pa.array([["z", "x"]]))
    vocabulary = vocabularies((a, b), statistics, pa.array([], type=pa.string()))
    assert vocabulary["t"].to_pylist() == ["x", "y", "z"]
    assert stored_feature(a, statistics, vocabulary).rows == stored_feature(b, statistics, vocabulary).rows == 4
