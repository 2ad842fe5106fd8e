"""One partition against a slow reference; statistics and encoding against plain Python."""

from __future__ import annotations

import math
from collections import defaultdict

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metatrain.config import FeatureSource, PrepareConfig, UserSplit
from metatrain.data.prepare_encode import Moments, Statistics, encode, stored_feature, vocabularies
from metatrain.data.prepare_rows import Reading, RowKind, group, read_rows, shuffle_schema, tally
from metatrain.data.sources.rawlog import TableChunk
from metatrain.errors import SourceError

AGE = FeatureSource(name="age", level="task", kind="numeric")
DEVICE = FeatureSource(name="device", level="event", kind="categorical")
FEATURES = (AGE, DEVICE)
events_drawn = st.lists(st.tuples(st.sampled_from("abcd"), st.sampled_from("xyz"), st.integers(0, 3)), max_size=40)


def partition(
    events: list[tuple[str, str, int]], users: dict[str, float], config: PrepareConfig, shuffle: int = 0
) -> pa.Table:
    """The rows of one partition, in an order that a shuffle might leave."""
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
    readings = [Reading(TableChunk(log), RowKind.EVENT, 0), Reading(TableChunk(table), RowKind.TASK, 0)]
    rows = pa.concat_tables([t for r in readings for t in read_rows(r, config, FEATURES, 1)])
    order = np.random.default_rng(shuffle).permutation(rows.num_rows)
    return rows.take(pa.array(order))


@settings(deadline=None)
@given(events=events_drawn, shuffle=st.integers(0, 5), least=st.integers(1, 4), most=st.integers(1, 6))
def test_a_partition_is_grouped_as_the_slow_way_does(events, shuffle, least, most):
    most = max(least, most)
    config = PrepareConfig(min_events=least, max_events=most)
    users = {"a": 30.0, "c": 40.0, "lurker": 50.0}
    found = group(partition(events, users, config, shuffle), config, FEATURES)

    wanted: dict[str, list[tuple[int, int, str]]] = defaultdict(list)
    for label, (key, item, time) in enumerate(events):
        wanted[key].append((time, label, item))  # a label is the place in the log: ties stay in its order
    few = {k: len(v) for k, v in wanted.items() if len(v) < least}
    kept = {k: sorted(v)[-most:] for k, v in wanted.items() if len(v) >= least}

    ends = np.cumsum(found.tasks["events"].to_numpy()).tolist()
    rows = found.events.to_pylist()
    for task, end in zip(found.tasks.to_pylist(), ends, strict=True):
        own = rows[end - task["events"] : end]
        assert [(r["timestamp"], int(r["label"]), r["item"]) for r in own] == kept[task["key"]]
        assert [r["event:device"] for r in own] == [f"d{int(r['label'])}" for r in own]
        assert task["first"] == min(t for t, _, _ in wanted[task["key"]])
        assert task["task:age"] == users.get(task["key"])
    assert set(found.tasks["key"].to_pylist()) == set(kept)
    left_out = {
        f"users with fewer than {least} events": len(few),
        f"events of users with fewer than {least}": sum(few.values()),
        f"oldest events beyond {most} of a user": sum(max(len(v) - most, 0) for k, v in wanted.items() if k in kept),
        "rows of the user table without events": len(set(users) - set(wanted)),
    }
    assert found.skipped == {reason: n for reason, n in left_out.items() if n}
    assert found.events.num_rows + sum(few.values()) + left_out[f"oldest events beyond {most} of a user"] == len(events)
    firsts = {item: min(t for _, i, t in events if i == item) for item in {i for _, i, _ in events}}
    assert {r["item"]: r["first"] for r in found.items.to_pylist()} == firsts


def test_the_order_of_tasks_is_not_that_of_the_shuffle():
    config = PrepareConfig(min_events=1)
    events = [(k, "x", 0) for k in "abcdefgh"]
    orders = {
        tuple(group(partition(events, {}, config, s), config, FEATURES).tasks["key"].to_pylist()) for s in range(5)
    }
    assert len(orders) == 1
    assert orders != {tuple("abcdefgh")}


def test_counts_of_skipped_rows_travel_with_the_rows():
    config = PrepareConfig(min_events=1)
    schema = shuffle_schema(FEATURES)
    rows = pa.concat_tables(
        [partition([("a", "x", 1)], {}, config), tally("bad rows", 3, schema), tally("bad rows", 4, schema)]
    )
    assert group(rows, config, FEATURES).skipped == {"bad rows": 7}


def test_two_rows_for_a_user_are_refused():
    config = PrepareConfig(min_events=1)
    table = partition([("a", "x", 1)], {"a": 1.0}, config)
    with pytest.raises(SourceError, match="two rows") as error:
        group(pa.concat_tables([table, table]), config, FEATURES)
    assert error.value.got == "a"


def test_a_split_column_that_the_users_lack_is_refused():
    config = PrepareConfig(user_split=UserSplit(by="given", column="fold"))
    with pytest.raises(SourceError, match="A column is missing: fold"):
        partition([], {"a": 1.0}, config)


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
