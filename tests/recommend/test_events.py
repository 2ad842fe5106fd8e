"""Events from every kind of input, and every kind of mistake in them."""

from __future__ import annotations

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metatrain.errors import RequestError
from metatrain.recommend.events import read_requests

EVENTS = [
    {"user": "7", "item": "item3", "label": 5, "timestamp": 30, "zip": "z1", "age": 48, "likes": "w1|w5", "hour": 18},
    {"user": "8", "item": "item7", "label": 1, "timestamp": 10, "zip": "none", "age": None, "likes": "", "hour": 6},
    {"user": "7", "item": "item4", "label": 2, "timestamp": 20, "zip": "z1", "age": 48, "likes": "w1|w5", "hour": 12},
]


def same(one, other) -> bool:
    def flat(requests):
        columns = [c for s in requests.supports for c in s]
        features = {**requests.task_features, **requests.event_features}
        columns += [a for f in features.values() for a in ((f.values, f.lengths) if hasattr(f, "values") else (f,))]
        return [requests.users, *[np.asarray(c).tolist() for c in columns]]

    return flat(one) == flat(other)


@pytest.fixture
def read(recommender):
    return lambda events: read_requests(events, recommender.dataset, 6)


def test_supports_are_in_time_order_by_user(read):
    requests = read(EVENTS)
    assert requests.users == ("7", "8")
    items, labels, times = requests.supports[0]
    assert (items.tolist(), labels.tolist(), times.tolist()) == ([4, 3], [2.0, 5.0], [20, 30])
    assert requests.seen[1].tolist() == [7]
    assert read([e for e in EVENTS if e["user"] == "7"]).warnings == ()


def test_features_are_encoded_as_preparation_does(read):
    requests = read(EVENTS)
    features = requests.task_features
    assert features["zip"].tolist() == [2, 0]  # z1 is the second of the vocabulary; another is unknown
    assert features["age"].tolist() == [2.0, 0.0]  # (48 - 30) / 9; missing is the mean
    assert (features["likes"].values.tolist(), features["likes"].lengths.tolist()) == ([2, 6], [2, 0])
    assert requests.event_features["hour"].tolist() == [0.0, 1.0, -1.0]  # events by user and time


def test_values_that_the_model_does_not_know_are_told(read):
    assert read(EVENTS).warnings == ("zip: 1 value is unknown to the model: none (it knows z0, z1, z2, z3).",)
    events = [
        {"user": "7", "item": "item3", "label": 5, "likes": ["w1", "x"], "shade": "pink"},
        {"user": "7", "item": "item4", "label": 5, "likes": ["y"], "shade": "red"},
        {"user": "8", "item": "item4", "label": 5, "likes": ["x", "w2", "z"], "shade": "pink"},
        {"user": "8", "item": "item5", "label": 5, "likes": [], "shade": None},
    ]
    requests = read(events)
    twice = "likes: 1 user has more than one value, and the first is taken:"
    assert requests.warnings == (
        # Of a user's features the first event's count.
        "likes: 3 values are unknown to the model: x, z (it knows w0, w1, w2, w3, w4, …).",
        f"{twice} 7 has 'w1|x', and at the list: event 1, column likes 'y'.",
        "shade: 2 values are unknown to the model: pink (it knows red, green, blue).",
    )
    assert requests.event_features["shade"].tolist() == [0, 1, 0, 0]
    assert read([{"item": "item3", "label": 5, "shade": "", "likes": ""}]).warnings == ()


def test_a_user_with_two_values_of_a_feature_is_told_of(read, tmp_path):
    path = tmp_path / "events.csv"
    path.write_text("user,item,label,zip,age\n8,item1,5,z2,\n7,item2,5,,\n7,item3,5,z1,48\n7,item4,1,z3,48\n")
    requests = read(str(path))
    told = "zip: 1 user has more than one value, and the first is taken: 7 has 'z1', and at"
    assert requests.warnings == (f"{told} {path}: line 5, column zip 'z3'.",)
    # A value that the first of a user's events lacks is taken from a later one.
    assert requests.task_features["zip"].tolist() == [3, 2]
    assert requests.task_features["age"].tolist() == [0.0, 2.0]


def test_lists_of_a_feature_are_compared_whole(read):
    events = [{"user": "7", "item": "item3", "label": 5, "likes": likes} for likes in (["w1", "w5"], ["w1"], None)]
    assert len(read(events).warnings) == 1
    assert read(events[::2]).warnings == ()
    assert read(events[::2]).task_features["likes"].values.tolist() == [2, 6]


def test_every_kind_of_input_reads_the_same(read, tmp_path):
    expected = read(EVENTS)
    names = list(EVENTS[0])
    lines = [",".join(names), *(",".join("" if e[n] is None else str(e[n]) for n in names) for e in EVENTS)]
    (tmp_path / "events.csv").write_text("\n".join(lines) + "\n")
    (tmp_path / "events.jsonl").write_text("\n".join(json.dumps(e) for e in EVENTS))
    table = pa.Table.from_pylist(EVENTS)
    pq.write_table(table, tmp_path / "events.parquet")
    for source in (
        table,
        tmp_path / "events.csv",
        *(str(tmp_path / f"events.{kind}") for kind in ("csv", "jsonl", "parquet")),
    ):
        assert same(read(source), expected), source


def test_numbers_are_keys_too(read):
    as_numbers = [{"user": 7, "item": "item3", "label": 5}, {"user": 8.0, "item": "item4", "label": 5}]
    assert read(as_numbers).users == ("7", "8")


def test_without_user_and_time_the_order_given_counts(read):
    requests = read([{"item": f"item{i}", "label": 3} for i in (9, 2, 5)])
    assert requests.users == ("you",)
    assert requests.supports[0][0].tolist() == [9, 2, 5]


def test_iso_times(read):
    requests = read(
        [
            {"item": "item1", "label": 3, "timestamp": "2020-01-02"},
            {"item": "item2", "label": 3, "timestamp": "2020-01-01"},
        ]
    )
    assert requests.supports[0][0].tolist() == [2, 1]


def test_a_column_that_only_later_events_have_is_not_lost(read):
    requests = read([{"item": "item1", "label": 3}, {"item": "item2", "label": 3, "zip": "z0"}])
    assert requests.task_features["zip"].tolist() == [1]
    assert not requests.warnings


def test_columns_that_mean_nothing_are_told(read):
    requests = read([{"item": "item1", "label": 3, "mood": "good", "genres": "w1"}])
    assert "mood, genres" in requests.warnings[0]


CSV = [
    ("user,label\n1,5\n", "column `item` is missing", "events.csv", "user, label"),
    ("user,item\n1,item1\n", "column `label` is missing", "events.csv", "user, item"),
    ("item,label\n", "no events", "events.csv", None),
    ("item,label\nitem1,5\nitem2,good\n", "not a finite number", "line 3, column label", "good"),
    ("item,label\nitem1,nan\n", "not a finite number", "line 2, column label", "nan"),
    ("item,label\nitem1,\n", "not a finite number", "line 2, column label", "nothing"),
    ("item,label\nitem1,5\nitem1,50\n", "outside of the scale", "line 3, column label", "50.0"),
    ("item,label\n,5\n", "key is empty", "line 2, column item", "nothing"),
    ("item,label,timestamp\nitem1,5,noon\n", "neither a number", "line 2, column timestamp", "noon"),
    ("item,label\nitem1,5,6,7\n", "cannot be parsed", "events.csv", None),
    ("item,label,age\nitem1,5,old\n", "not a finite number", "line 2, column age", "old"),
]


@pytest.mark.parametrize(("content", "what", "where", "got"), CSV)
def test_bad_files_are_refused_with_their_place(read, tmp_path, content, what, where, got):
    path = tmp_path / "events.csv"
    path.write_text(content)
    with pytest.raises(RequestError, match=what) as error:
        read(str(path))
    assert error.value.where.startswith(str(path))
    assert error.value.where.endswith(where)
    assert error.value.got == got
    assert error.value.remedy


def test_a_place_in_a_later_row_of_a_user_is_right(read, tmp_path):
    path = tmp_path / "events.csv"
    path.write_text("user,item,label,timestamp,hour\n1,item1,5,9,3\n2,item2,5,1,4\n1,item3,5,1,late\n")
    with pytest.raises(RequestError) as error:
        read(str(path))
    assert error.value.where == f"{path}: line 4, column hour"


@pytest.mark.parametrize("events", [[], pa.table({})])
def test_no_events(read, events):
    with pytest.raises(RequestError, match="no events"):
        read(events)


@pytest.mark.parametrize(
    ("events", "words"),
    [
        ([{"item": "a", "label": 3}, {"item": 4, "label": 3}], "read as a table"),
        ([3, 4], "read as a table"),
        ("/nowhere/events.csv", "no such file"),
        ("/nowhere/events.xlsx", "kind of file"),
        ([{"item": "item1", "label": 3, "portrait": [1.0, 2.0]}], "portrait"),
    ],
)
def test_what_cannot_be_read(read, events, words):
    with pytest.raises(RequestError, match=words) as error:
        read(events)
    assert error.value.remedy


def test_broken_json_and_parquet(read, tmp_path):
    for kind in ("jsonl", "parquet"):
        path = tmp_path / f"events.{kind}"
        path.write_text('{"item": "item1", "label": 3}\n{"item":\n')
        with pytest.raises(RequestError, match="cannot be parsed"):
            read(str(path))
