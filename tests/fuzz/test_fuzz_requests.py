"""Mutated support files of `metatrain recommend`: every event is used, or counted as left out, or refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metatrain.data.dataset import TaskDataset
from metatrain.data.schema import LabelKind
from metatrain.errors import RequestError
from metatrain.recommend.event_tables import read_table
from metatrain.recommend.events import read_requests
from tests.data.tiny_dataset import write_tiny_dataset
from tests.fuzz.mutations import altered, columns, fuzzed, mutated, read_or_refused

_NAMES = ("user", "item", "label", "timestamp", "zip", "age", "likes", "hour")
_VALUES = [
    ("7", "item3", 5.0, 30, "z1", 48.0, "w1|w5", 18.0),
    ("8", "item7", 1.0, 10, "none", None, "", 6.0),
    ("7", "nothing", 2.0, 20, "z1", 48.0, "w1", 12.0),
    ("7", "item4", 3.0, 40, "z1", 48.0, "w1", 0.0),
]
EVENTS: list[dict[str, Any]] = [dict(zip(_NAMES, values, strict=True)) for values in _VALUES]
TABLE = pa.Table.from_pylist(EVENTS)
SUPPORT = 6


def as_file(kind: str) -> bytes:
    sink = pa.BufferOutputStream()
    if kind == "parquet":
        pq.write_table(TABLE, sink)
    elif kind == "csv":
        pacsv.write_csv(TABLE, sink)
    else:
        return "".join(json.dumps(event) + "\n" for event in EVENTS).encode()
    return sink.getvalue().to_pybytes()


@pytest.fixture(scope="module", params=[LabelKind.RATING, LabelKind.CLICK])
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> TaskDataset:
    url = str(tmp_path_factory.mktemp("tiny"))
    write_tiny_dataset(url, users=10, items=10, validation=2, test=2, new_items=2, shards=1, label=request.param)
    return TaskDataset.open(url)


def check(events: Any, dataset: TaskDataset) -> None:
    found = read_or_refused(lambda: read_requests(events, dataset, SUPPORT), RequestError)
    if found is None:
        return
    rows = read_table(events)[0].num_rows
    used = [len(items) for items, _, _ in found.supports]
    older = sum(int(w.split(" ")[0]) for w in found.warnings if "most recent" in w)
    assert sum(used) + sum(found.unknown_items.values()) + older == rows, "events were lost in silence"
    assert max(used, default=0) <= SUPPORT
    for items, labels, times in found.supports:
        assert ((items >= 0) & (items < len(dataset.catalogue))).all()
        assert np.isfinite(labels).all()
        assert (np.diff(times) >= 0).all()
    found.batch(dataset, np.arange(len(found.users))).tensors()


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@fuzzed(60)
@given(data=st.data())
def test_mutated_files(dataset: TaskDataset, tmp_path_factory: Any, kind: str, data: st.DataObject):
    path = Path(tmp_path_factory.getbasetemp()) / f"events.{kind}"
    path.write_bytes(data.draw(mutated(as_file(kind))))
    check(str(path), dataset)


@fuzzed(60)
@given(data=st.data())
def test_altered_lines_of_json(dataset: TaskDataset, tmp_path_factory: Any, data: st.DataObject):
    changed = data.draw(altered(EVENTS))
    path = Path(tmp_path_factory.getbasetemp()) / "altered.jsonl"
    lines = changed if isinstance(changed, list) else [changed]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    check(str(path), dataset)


@fuzzed(150)
@given(data=st.data(), packed=st.booleans())
def test_tables_with_other_columns(dataset: TaskDataset, tmp_path_factory: Any, data: st.DataObject, packed: bool):
    name = data.draw(st.sampled_from(TABLE.column_names))
    change = data.draw(st.sampled_from(["set", "set", "set", "set", "drop", "twice"]))
    place = TABLE.column_names.index(name)
    if change == "set":
        table = TABLE.set_column(place, name, data.draw(columns(len(TABLE))))
    else:
        table = TABLE.drop_columns([name]) if change == "drop" else TABLE.append_column(name, TABLE[name])
    if packed:
        path = Path(tmp_path_factory.getbasetemp()) / "table.parquet"
        try:
            pq.write_table(table, path)
        except (pa.ArrowException, NotImplementedError):
            return
        check(str(path), dataset)
    else:
        check(table, dataset)


@fuzzed(60)
@given(data=st.data())
def test_altered_lists_of_events(dataset: TaskDataset, data: st.DataObject):
    changed = data.draw(altered(EVENTS))
    if isinstance(changed, list):
        check(changed, dataset)
