"""Mutated raw logs: every line becomes a row, is counted as bad by choice, or is refused by its place."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from metatrain.config import FeatureSource, PrepareConfig, UserSplit
from metatrain.data.prepare import prepare
from metatrain.data.sources import read_source
from metatrain.data.verify import verify
from tests.data.test_sources_movielens import RELEASES
from tests.fuzz.mutations import altered, columns, fuzzed, mutated, read_or_refused

FEATURES = (
    FeatureSource(name="device", level="event", kind="categorical"),
    FeatureSource(name="length", level="event", kind="numeric"),
    FeatureSource(name="words", level="event", kind="multi"),
    FeatureSource(name="place", level="event", kind="vector", width=2),
)
LOG: list[dict[str, Any]] = [
    {
        "user_id": f"u{i % 3}",
        "item_id": f"i{i % 4}",
        "label": float(1 + i % 5),
        "timestamp": 1_000_000 + i,
        "device": "tv" if i % 2 else None,
        "length": 0.5 * i,
        "words": "a|b",
        "place": "0.5|1.0",
    }
    for i in range(12)
]
TABLE = pa.Table.from_pylist(LOG)


def as_file(kind: str) -> bytes:
    sink = pa.BufferOutputStream()
    if kind == "parquet":
        pq.write_table(TABLE, sink, row_group_size=5)
    elif kind == "csv":
        pacsv.write_csv(TABLE, sink)
    else:
        return "".join(json.dumps(row) + "\n" for row in LOG).encode()
    return sink.getvalue().to_pybytes()


def events_config(path: Path, **settings: Any) -> PrepareConfig:
    return PrepareConfig(source="events", path=str(path), features=FEATURES, min_events=1, **settings)


def read_log(config: PrepareConfig) -> tuple[int, int]:
    """Rows of events that are read, and those that are skipped by choice."""
    raw = read_source(config)
    rows = bad = 0
    for chunks in (raw.tasks or [], raw.items or []):
        for chunk in chunks:
            for piece in chunk.read():
                assert piece.table["key"].null_count == 0
    for chunk in raw.events:
        for piece in chunk.read():
            rows, bad = rows + piece.table.num_rows, bad + piece.bad
            for name in ("key", "item", "label", "timestamp"):
                assert piece.table[name].null_count == 0
            assert all(abs(label) < float("inf") for label in piece.table["label"].to_pylist())
    return rows, bad


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@fuzzed(50)
@given(data=st.data())
def test_mutated_logs(tmp_path_factory: Any, kind: str, skip: bool, data: st.DataObject):
    path = Path(tmp_path_factory.getbasetemp()) / f"log.{kind}"
    content = data.draw(mutated(as_file(kind)))
    path.write_bytes(content)
    found = read_or_refused(lambda: read_log(events_config(path, skip_bad_rows=skip)))
    if found is not None and kind != "parquet":
        lines = [line for line in content.split(b"\n") if line.strip(b"\r")]
        blank = sum(1 for line in lines if not line.strip()) if kind == "jsonl" else 0
        if kind == "jsonl" or all(line.count(b'"') % 2 == 0 for line in lines):  # else a value may hold a line's end
            assert sum(found) == len(lines) - blank - (kind == "csv"), "lines were lost in silence"


@pytest.mark.parametrize("packed", ["csv.gz", "jsonl.gz", "zip"])
@fuzzed(40)
@given(data=st.data())
def test_mutated_packed_logs(tmp_path_factory: Any, packed: str, data: st.DataObject):
    path = Path(tmp_path_factory.getbasetemp()) / f"packed.{packed}"
    if packed == "zip":
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as archive:
            archive.writestr("log.csv", as_file("csv"))
        content = buffer.getvalue()
    else:
        content = gzip.compress(as_file(packed.partition(".")[0]))
    content = data.draw(mutated(content))
    path.write_bytes(content)
    found = read_or_refused(lambda: read_log(events_config(path)))
    assert found is None or not content or sum(found) == len(LOG)


@fuzzed(120)
@given(data=st.data(), skip=st.booleans())
def test_logs_with_other_columns(tmp_path_factory: Any, data: st.DataObject, skip: bool):
    name = data.draw(st.sampled_from(TABLE.column_names))
    table = TABLE.set_column(TABLE.column_names.index(name), name, data.draw(columns(len(TABLE))))
    path = Path(tmp_path_factory.getbasetemp()) / "columns.parquet"
    try:
        pq.write_table(table, path)
    except (pa.ArrowException, NotImplementedError):
        return
    found = read_or_refused(lambda: read_log(events_config(path, skip_bad_rows=skip)))
    assert found is None or sum(found) == len(TABLE)


@fuzzed(60)
@given(data=st.data(), skip=st.booleans())
def test_altered_lines_of_json(tmp_path_factory: Any, data: st.DataObject, skip: bool):
    changed = data.draw(altered(LOG))
    lines = changed if isinstance(changed, list) else [changed]
    path = Path(tmp_path_factory.getbasetemp()) / "altered.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = read_or_refused(lambda: read_log(events_config(path, skip_bad_rows=skip)))
    assert found is None or sum(found) == len(lines)


@pytest.mark.parametrize("release", list(RELEASES))
@fuzzed(40)
@given(data=st.data())
def test_mutated_movielens(tmp_path_factory: Any, release: str, data: st.DataObject):
    folder = Path(tmp_path_factory.getbasetemp()) / "movielens"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    victim = data.draw(st.sampled_from(sorted(RELEASES[release])))
    for name, content in RELEASES[release].items():
        (folder / name).write_bytes(data.draw(mutated(content)) if name == victim else content)
    skip = data.draw(st.booleans())
    read_or_refused(lambda: read_log(PrepareConfig(source="movielens", path=str(folder), skip_bad_rows=skip)))


NETFLIX = {
    "combined_data_1.txt": b"1:\n10,3,2005-09-06\n11,5,2005-05-13\n2:\n10,1,2004-01-01\n",
    "movie_titles.csv": b"1,2003,Dinosaur Planet\n2,NULL,A, B and C\n",
}


@fuzzed(60)
@given(data=st.data(), skip=st.booleans())
def test_mutated_netflix(tmp_path_factory: Any, data: st.DataObject, skip: bool):
    folder = Path(tmp_path_factory.getbasetemp()) / "netflix"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    victim = data.draw(st.sampled_from(sorted(NETFLIX)))
    for name, content in NETFLIX.items():
        (folder / name).write_bytes(data.draw(mutated(content)) if name == victim else content)
    read_or_refused(lambda: read_log(PrepareConfig(source="netflix", path=str(folder), skip_bad_rows=skip)))


@pytest.mark.parametrize("kind", ["csv", "jsonl", "parquet"])
@fuzzed(15)
@given(data=st.data())
def test_what_is_prepared_of_a_mutated_log_is_whole(tmp_path_factory: Any, kind: str, data: st.DataObject):
    base = Path(tmp_path_factory.getbasetemp())
    path, out = base / f"whole.{kind}", base / "prepared"
    shutil.rmtree(out, ignore_errors=True)
    if kind == "parquet" and data.draw(st.booleans()):
        name = data.draw(st.sampled_from(TABLE.column_names))
        kept = TABLE.schema.field(name).type
        table = TABLE.set_column(TABLE.column_names.index(name), name, data.draw(columns(len(TABLE), kept)))
        pq.write_table(table, path)
    else:
        path.write_bytes(data.draw(mutated(as_file(kind))))
    split = UserSplit(validation=0.0, test=0.0)
    config = events_config(path, skip_bad_rows=data.draw(st.booleans()), user_split=split)
    if read_or_refused(lambda: prepare(config, str(out), progress=False)) is not None:
        found = verify(str(out), progress=False)
        assert found.whole, found.table()
