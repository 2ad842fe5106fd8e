"""Delimited text: every row is read or named, however the file is cut."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path

import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metatrain.data.sources import text as text_module
from metatrain.data.sources.checks import Check, seconds
from metatrain.data.sources.files import RawFile, find_files
from metatrain.data.sources.text import Layout, TextPart, parts
from metatrain.errors import SourceError

CHECKS = {"user": Check.KEY, "rating": Check.RATING, "time": Check.TIME}
PLAIN = Layout(CHECKS, ("user", "rating", "time"), "::", quoted=False)
HEADED = Layout(CHECKS)
words = st.text(
    st.characters(codec="utf-8", exclude_characters=':\n\r\x1f"', exclude_categories=("Cs", "Cc")), min_size=1
)
rows = st.tuples(words, st.integers(-5, 5), st.integers(0, 2**31))


def read(chunks: list[TextPart]) -> tuple[list[tuple], int]:
    pieces = [piece for chunk in chunks for piece in chunk.read()]
    found = [tuple(row.values()) for piece in pieces for row in piece.table.to_pylist()]
    return found, sum(piece.bad for piece in pieces)


@settings(deadline=None, max_examples=50)
@given(table=st.lists(rows, min_size=1, max_size=30), part_bytes=st.integers(1, 200), last_newline=st.booleans())
def test_every_row_is_read_once_however_the_file_is_cut(tmp_path_factory, table, part_bytes, last_newline):
    path = tmp_path_factory.mktemp("text") / "ratings.dat"
    content = "\n".join(f"{u}::{r}::{t}" for u, r, t in table) + ("\n" if last_newline else "")
    path.write_bytes(content.encode())
    found, bad = read(parts(RawFile(str(path)), PLAIN, False, part_bytes))
    assert found == [(u, float(r), t) for u, r, t in table]
    assert bad == 0


@settings(deadline=None, max_examples=50)
@given(
    table=st.lists(
        st.one_of(rows, st.sampled_from(["a::b", "a::nan::3", "::1::3", "a::1::soon", "x::y::z::w"])), max_size=25
    )
)
def test_skipped_rows_are_counted_and_the_first_is_named(tmp_path_factory, table):
    path = tmp_path_factory.mktemp("text") / "ratings.dat"
    path.write_text(
        "".join(row + "\n" if isinstance(row, str) else "{}::{}::{}\n".format(*row) for row in table), "utf-8"
    )
    good = [(u, float(r), t) for u, r, t in (row for row in table if not isinstance(row, str))]
    found, bad = read([TextPart(RawFile(str(path)), PLAIN, skip_bad=True)])
    assert (found, bad) == (good, len(table) - len(good))
    if bad:
        first = next(i for i, row in enumerate(table, 1) if isinstance(row, str))
        with pytest.raises(SourceError) as error:
            read([TextPart(RawFile(str(path)), PLAIN)])
        assert f"line {first}" in str(error.value.where).split(",")[0].split(": ")


@pytest.mark.parametrize(
    ("line", "place", "got"),
    [
        ("u,nan,3", "line 4, column rating", "nan"),
        ("u,,3", "line 4, column rating", "nothing"),
        ("u,four,3", "line 4, column rating", "four"),
        (",4,3", "line 4, column user", "nothing"),
        ("u,4,yesterday", "line 4, column time", "yesterday"),
        ("u,4,2020-02-31", "line 4, column time", "2020-02-31"),
        ("u,4", "line 4", "u,4"),
        ('"u,4,3', "line 4", '"u,4,3'),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, line: str, place: str, got: str):
    path = tmp_path / "events.csv"
    path.write_text(f"user,rating,time\nu,1,2\n\n{line}\nu,1,2\n")
    with pytest.raises(SourceError) as error:
        read([TextPart(RawFile(str(path)), HEADED)])
    assert error.value.where == f"{path}: {place}"
    assert error.value.got == got
    assert "--skip-bad-rows" in str(error.value.remedy)


def test_a_line_far_into_the_file_is_named_from_any_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(text_module, "BLOCK_BYTES", 64)
    path = tmp_path / "ratings.dat"
    path.write_text("".join(f"u{i}::{'x' if i == 777 else 3}::5\n" for i in range(1000)))
    chunks = parts(RawFile(str(path)), PLAIN, False, 1000)
    assert len(chunks) > 5
    with pytest.raises(SourceError, match="not a finite number") as error:
        read(chunks)
    assert error.value.where == f"{path}: line 778, column rating"


def test_a_missing_column_is_answered_with_the_nearest(tmp_path: Path):
    path = tmp_path / "events.csv"
    path.write_text("user,ratin,time\nu,1,2\n")
    with pytest.raises(SourceError, match="rating") as error:
        read([TextPart(RawFile(str(path)), HEADED)])
    assert "`ratin`" in str(error.value.remedy)


def test_quotes_byte_order_marks_and_packed_files(tmp_path: Path):
    content = '\ufeffuser,rating,time\n"a,""b""",1,2020-01-01\r\n'.encode()
    (tmp_path / "a.csv").write_bytes(content)
    (tmp_path / "b.csv.gz").write_bytes(gzip.compress(content))
    with zipfile.ZipFile(tmp_path / "c.zip", "w") as archive:
        archive.writestr("inside/c.csv", content)
    for name in ("a.csv", "b.csv.gz", "c.zip"):
        (file,) = find_files(str(tmp_path / name))
        assert read(list(parts(file, HEADED, False))) == ([('a,"b"', 1.0, 1577836800)], 0)


def test_times_of_every_form_agree():
    same = [
        "1577836800",
        "1577836800000",
        "2020-01-01",
        "2020-01-01T00:00:00Z",
        "2020-01-01 01:00:00+01:00",
        "1577836800.0",
    ]
    assert set(seconds(pa.array(same))) == {1577836800.0}
    assert set(seconds(pa.array([1577836800, 1577836800000, 1577836800000000]))) == {1577836800.0}


def test_nothing_at_a_path_is_an_error(tmp_path: Path):
    with pytest.raises(SourceError, match="no such file"):
        find_files(str(tmp_path / "*.csv"))
    (tmp_path / "broken.zip").write_bytes(b"PK no archive")
    with pytest.raises(SourceError, match="broken"):
        find_files(str(tmp_path / "broken.zip"))
