"""Generic logs and the Netflix Prize: one log in every format, and the place of every bad row."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv as pacsv
import pyarrow.parquet as pq
import pytest

from metatrain.config import Columns, FeatureSource, ItemSplit, PrepareConfig, UserSplit
from metatrain.data.sources import chunks, read_source
from metatrain.errors import ConfigError, MetatrainError, SourceError

FEATURES = (
    FeatureSource(name="device", level="event", kind="categorical"),
    FeatureSource(name="length", level="event", kind="numeric"),
    FeatureSource(name="words", level="event", kind="multi"),
    FeatureSource(name="place", level="event", kind="vector", width=2),
)
FIRST = {"device": "tv", "length": 1.5, "words": ["a", "b"], "place": [0.5, 1.0]}
SECOND = {"device": None, "length": None, "words": ["b"], "place": [2.0, 3.0]}
LOG: list[dict[str, Any]] = [
    {"user_id": 3, "item_id": 9, "label": 4.5, "timestamp": 100} | FIRST,
    {"user_id": 4, "item_id": 9, "label": 1.0, "timestamp": 90} | SECOND,
]
WANTED = [
    {"key": "3", "item": "9", "label": 4.5, "timestamp": 100} | FIRST,
    {"key": "4", "item": "9", "label": 1.0, "timestamp": 90} | SECOND,
]


def write(folder: Path, kind: str, log: list[dict[str, Any]] = LOG, name: str = "log") -> Path:
    path = folder / f"{name}.{kind}"
    if kind == "parquet":
        pq.write_table(pa.Table.from_pylist(log), path, row_group_size=1)
    elif kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in log))
    else:
        flat = [{k: "|".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()} for row in log]
        options = pacsv.WriteOptions(delimiter="\t" if kind == "tsv" else ",")
        pacsv.write_csv(pa.Table.from_pylist(flat), path, options)
    return path


def events(path: Any, **settings: Any) -> tuple[list[dict[str, Any]], int]:
    raw = read_source(PrepareConfig(source="events", path=str(path), **settings))
    pieces = [rows for chunk in raw.events for rows in chunk.read()]
    return [row for p in pieces for row in p.table.to_pylist()], sum(p.bad for p in pieces)


@pytest.mark.parametrize("kind", ["parquet", "csv", "tsv", "jsonl"])
def test_every_format_gives_the_same_log(tmp_path: Path, kind: str):
    found, bad = events(write(tmp_path, kind), features=FEATURES)
    assert [{name: row[name] for name in WANTED[0]} for row in found] == WANTED
    assert bad == 0


@pytest.mark.parametrize("kind", ["parquet", "csv"])
def test_thousands_of_files_by_pattern_or_folder(tmp_path: Path, kind: str):
    log = [{k: row[k] for k in ("user_id", "item_id", "label", "timestamp")} for row in LOG]
    for i in range(1100):
        write(tmp_path, kind, [log[0] | {"timestamp": i}], f"part-{i:05d}")
    for path in (tmp_path, tmp_path / "part-*", f"file://{tmp_path}"):
        raw = read_source(PrepareConfig(source="events", path=str(path)))
        assert len(raw.events) == 1  # small files are one piece of work
        assert raw.events_estimate == pytest.approx(1100, rel=0.02 if kind == "parquet" else 1.1)
        times = [t for c in raw.events for rows in c.read() for t in rows.table["timestamp"].to_pylist()]
        assert times == list(range(1100))


@pytest.mark.parametrize("kind", ["parquet", "csv", "csv.gz", "jsonl"])
@pytest.mark.parametrize("files", [3, 70])
def test_chunks_have_like_numbers_of_rows_whatever_the_files(
    tmp_path: Path, kind: str, files: int, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(chunks, "_CHUNK_ROWS", 1000)
    rows = [{"user_id": i, "item_id": 2, "label": 3.0, "timestamp": 1_600_000_000 + i} for i in range(300)]
    for i in range(files):
        path = write(tmp_path, kind.removesuffix(".gz"), rows, f"part-{i:03d}")
        if kind.endswith(".gz"):
            (tmp_path / f"part-{i:03d}.csv.gz").write_bytes(gzip.compress(path.read_bytes()))
            path.unlink()
    raw = read_source(PrepareConfig(source="events", path=str(tmp_path)))
    assert raw.events_estimate == pytest.approx(300 * files, rel=0.02)
    found = [sum(piece.table.num_rows for piece in chunk.read()) for chunk in raw.events]
    assert sum(found) == 300 * files
    assert set(found[:-1]) <= {900}


def test_large_parquet_files_are_cut_between_row_groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(chunks, "_CHUNK_ROWS", 5)
    write(tmp_path, "parquet", [LOG[0] | {"timestamp": i} for i in range(12)])  # of one row each
    raw = read_source(PrepareConfig(source="events", path=str(tmp_path)))
    times = [[t for rows in c.read() for t in rows.table["timestamp"].to_pylist()] for c in raw.events]
    assert times == [list(range(5)), list(range(5, 10)), [10, 11]]
    assert raw.events_estimate == 12


def test_any_store_that_fsspec_knows():
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/logs/a.csv", b"user_id,item_id,label,timestamp\n1,2,3,4\n")
    for path in ("memory://logs/a.csv", "memory://logs/*.csv", "memory://logs"):
        assert events(path)[0] == [{"key": "1", "item": "2", "timestamp": 4, "label": 3.0}]


def test_columns_are_mapped_and_a_log_without_labels_is_of_clicks(tmp_path: Path):
    path = tmp_path / "log.csv"
    path.write_text("who,what,when\nu,i,2020-01-01T00:00:00Z\n")
    columns = Columns(task="who", item="what", label=None, timestamp="when")
    assert events(path, columns=columns, label="click")[0] == [
        {"key": "u", "item": "i", "timestamp": 1577836800, "label": 1.0}
    ]


GOOD = {"user_id": 1, "item_id": 2, "label": 3.0, "timestamp": 4}


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
@pytest.mark.parametrize(
    ("bad", "column"),
    [
        ({"label": None}, "label"),
        ({"label": float("nan")}, "label"),
        ({"label": float("inf")}, "label"),
        ({"user_id": None}, "user_id"),
    ],
)
def test_a_bad_row_is_named_or_counted(tmp_path: Path, kind: str, bad: dict[str, Any], column: str):
    path = write(tmp_path, kind, [GOOD, GOOD | bad, GOOD])
    with pytest.raises(SourceError) as error:
        events(path)
    place = {"parquet": "row 2", "csv": "line 3", "jsonl": "line 2"}[kind]
    assert error.value.where == f"{path}: {place}, column {column}"
    found, skipped = events(path, skip_bad_rows=True)
    assert (len(found), skipped) == (2, 1)


def test_json_lines_that_are_no_objects(tmp_path: Path):
    path = tmp_path / "log.jsonl"
    path.write_text(f'{json.dumps(GOOD)}\n{{"user_id": 1,\n\n{json.dumps(GOOD | {"user_id": "text"})}\n')
    with pytest.raises(SourceError, match="not a JSON object") as error:
        events(path)
    assert error.value.where == f"{path}: line 2"
    found, skipped = events(path, skip_bad_rows=True)
    assert ([row["key"] for row in found], skipped) == (["1", "text"], 1)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl"])
def test_a_missing_column_is_named(tmp_path: Path, kind: str):
    path = write(tmp_path, kind, [{"user_id": 1, "item_id": 2, "labels": 3.0, "timestamp": 4}])
    with pytest.raises(SourceError, match="A column is missing: label") as error:
        events(path)
    assert "`labels`" in str(error.value.remedy)
    with pytest.raises(SourceError, match="A column is missing: device"):
        events(write(tmp_path, kind, [GOOD]), features=FEATURES[:1])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "empty"),
        ("a.parquet", b"PAR1 cut", "Not a whole Parquet file"),
        ("a.xml", b"<log/>", "must be Parquet, CSV or JSON"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: bytes, message: str):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(SourceError, match=message):
        events(tmp_path / name)


def test_settings_that_contradict_the_source(tmp_path: Path):
    path = write(tmp_path, "csv", [GOOD])
    with pytest.raises(ConfigError, match="needs a path"):
        read_source(PrepareConfig(source="events"))
    with pytest.raises(ConfigError, match="needs the table of users"):
        events(path, features=(FeatureSource(name="age", level="task", kind="numeric"),))


def test_tables_of_users_and_items_with_given_splits(tmp_path: Path):
    path = write(tmp_path, "csv", [GOOD])
    users = write(tmp_path, "jsonl", [{"user_id": 1, "fold": "test", "age": 20}], "users")
    items = write(tmp_path, "parquet", [{"item_id": 2, "title": "Two", "added": 2001.0}], "items")
    raw = read_source(
        PrepareConfig(
            source="events",
            path=str(path),
            users=str(users),
            items=str(items),
            features=(FeatureSource(name="age", level="task", kind="numeric"),),
            user_split=UserSplit(by="given", column="fold"),
            item_split=ItemSplit(by="time", column="added", after=2000),
        )
    )
    assert raw.tasks is not None
    assert raw.items is not None
    assert [r for c in raw.tasks for p in c.read() for r in p.table.to_pylist()] == [
        {"key": "1", "fold": "test", "age": 20.0}
    ]
    assert [r for c in raw.items for p in c.read() for r in p.table.to_pylist()] == [
        {"key": "2", "title": "Two", "added": 2001.0}
    ]


# --- the Netflix Prize ---------------------------------------------------------------------------------------------

TITLES = "1,2003,Dinosaurs, and More\n2,NULL,Isle of Mén\n".encode("latin-1")
NETFLIX = [
    {"key": "6", "item": "1", "label": 3.0, "timestamp": 1125964800},
    {"key": "7", "item": "1", "label": 5.0, "timestamp": 1116201600},
    {"key": "6", "item": "2", "label": 1.0, "timestamp": 1116201600},
]


def netflix(folder: Path, layout: str) -> Path:
    films = ["1:\n6,3,2005-09-06\n7,5,2005-05-16\n", "2:\n6,1,2005-05-16\n"]
    (folder / "movie_titles.csv").write_bytes(TITLES)
    if layout == "combined":
        (folder / "combined_data_1.txt").write_text("".join(films))
    else:
        for number, film in enumerate(films, 1):
            (folder / f"mv_{number:07d}.txt").write_text(film)
    return folder


@pytest.mark.parametrize("block", [8 << 20, 1])
@pytest.mark.parametrize("layout", ["combined", "a file a film"])
def test_netflix_in_both_layouts(tmp_path: Path, layout: str, block: int, monkeypatch: pytest.MonkeyPatch):
    import metatrain.data.sources.netflix as source

    monkeypatch.setattr(source, "_BLOCK_BYTES", block)
    raw = read_source(PrepareConfig(source="netflix", path=str(netflix(tmp_path, layout))))
    assert [row for c in raw.events for p in c.read() for row in p.table.to_pylist()] == NETFLIX
    assert raw.items is not None
    assert [row for c in raw.items for p in c.read() for row in p.table.to_pylist()] == [
        {"key": "1", "title": "Dinosaurs, and More", "year": "2003"},
        {"key": "2", "title": "Isle of Mén", "year": None},
    ]


@pytest.mark.parametrize("bad", ["6,3", "6,x,2005-09-06", "6,3,2005-99-06"])
def test_netflix_bad_lines(tmp_path: Path, bad: str):
    path = tmp_path / "combined_data_1.txt"
    path.write_text(f"1:\n6,3,2005-09-06\n{bad}\n7,5,2005-05-16\n")
    with pytest.raises(MetatrainError) as error:
        _ = [list(c.read()) for c in read_source(PrepareConfig(source="netflix", path=str(tmp_path))).events]
    assert (error.value.where, error.value.got) == (f"{path}: line 3", bad)
    raw = read_source(PrepareConfig(source="netflix", path=str(tmp_path), skip_bad_rows=True))
    pieces = [p for c in raw.events for p in c.read()]
    assert (sum(p.table.num_rows for p in pieces), sum(p.bad for p in pieces)) == (2, 1)


def test_netflix_without_ratings(tmp_path: Path):
    (tmp_path / "movie_titles.csv").write_bytes(TITLES)
    with pytest.raises(SourceError, match="No Netflix Prize ratings"):
        read_source(PrepareConfig(source="netflix", path=str(tmp_path)))
    with pytest.raises(SourceError, match="no official address"):
        read_source(PrepareConfig(source="netflix"))
