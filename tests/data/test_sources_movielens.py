"""MovieLens in each public layout, from made-up files; the download from a made-up address."""

from __future__ import annotations

import hashlib
import io
import logging
import subprocess
import urllib.error
import zipfile
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from metatrain.config import FeatureSource, PrepareConfig
from metatrain.data.sources import download, read_source
from metatrain.data.sources.files import fingerprints
from metatrain.data.sources.movielens import GENRES_100K
from metatrain.errors import ConfigError, SourceError

FLAGS = {"Toys": {"Animation", "Comedy"}, "Nothing": {"unknown"}}


def flags(title: str) -> str:
    return "|".join("1" if g in FLAGS[title] else "0" for g in GENRES_100K)


RELEASES: dict[str, dict[str, bytes]] = {
    "100k": {
        "u.data": b"1\t7\t4\t881250949\n2\t8\t1\t881250950\n",
        "u.item": (
            f"7|Toys (1995)|01-Jan-1995||http://x|{flags('Toys')}\n8|Nöthing|||http://y|{flags('Nothing')}\n"
        ).encode("latin-1"),
        "u.user": b"1|24|M|technician|85711\n2|53|F|other|94043\n",
    },
    "recbole": {
        "ml-100k.inter": (
            b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n1\t7\t4\t881250949\n2\t8\t1\t881250950\n"
        ),
        "ml-100k.item": (
            "item_id:token\tmovie_title:token_seq\trelease_year:token\tclass:token_seq\n"
            "7\tToys\t1995\tAnimation Comedy\n8\tNöthing\t\tunknown\n"
        ).encode(),
        "ml-100k.user": (
            b"user_id:token\tage:token\tgender:token\toccupation:token\tzip_code:token\n"
            b"1\t24\tM\ttechnician\t85711\n2\t53\tF\tother\t94043\n"
        ),
    },
    "1m": {
        "ratings.dat": b"1::7::4::881250949\n2::8::1::881250950\n",
        "movies.dat": "7::Toys (1995)::Animation|Comedy\n8::Nöthing::unknown\n".encode("latin-1"),
        "users.dat": b"1::M::18::12::85711\n2::F::50::0::94043\n",
    },
    "csv": {
        "ratings.csv": b"userId,movieId,rating,timestamp\n1,7,4.0,881250949\n2,8,1.0,881250950\n",
        "movies.csv": "movieId,title,genres\n7,Toys (1995),Animation|Comedy\n8,Nöthing,unknown\n".encode(),
    },
}


def write(folder: Path, release: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in RELEASES[release].items():
        (folder / name).write_bytes(content)
    return folder


def tables(config: PrepareConfig) -> dict[str, list[dict[str, Any]]]:
    raw = read_source(config)
    parts = {"events": raw.events, "tasks": raw.tasks or [], "items": raw.items or []}
    return {
        name: [row for c in chunks for rows in c.read() for row in rows.table.to_pylist()]
        for name, chunks in parts.items()
    }


@pytest.mark.parametrize("packed", ["folder", "zip"])
@pytest.mark.parametrize("release", list(RELEASES))
def test_every_table_of_a_release_is_known_by_what_it_holds(tmp_path: Path, release: str, packed: str):
    def known(folder: str, changed: str | None = None) -> dict[str, list[str]]:
        path = write(tmp_path / folder, release)
        if changed is not None:
            (path / changed).write_bytes(RELEASES[release][changed].replace(b"7", b"9"))
        if packed == "zip":
            with zipfile.ZipFile(tmp_path / f"{folder}.zip", "w") as archive:
                for file in sorted(path.iterdir()):
                    archive.write(file, f"ml/{file.name}")
            path = tmp_path / f"{folder}.zip"
        raw = read_source(PrepareConfig(source="movielens", path=str(path)))
        return {role: fingerprints(files) for role, files in raw.files.items()}

    first = known("a")
    assert len(first) == len(RELEASES[release])
    assert all(len(files) == 1 for files in first.values())
    assert known("b") == first
    for name in RELEASES[release]:
        other = known(f"c-{name}", name)
        assert sum(other[role] != first[role] for role in first) == 1


@pytest.mark.parametrize("packed", ["folder", "zip", "file"])
@pytest.mark.parametrize("release", list(RELEASES))
def test_every_layout_gives_the_same_log(tmp_path: Path, release: str, packed: str):
    folder = write(tmp_path / "ml", release)
    path = folder
    if packed == "zip":
        path = tmp_path / "ml.zip"
        with zipfile.ZipFile(path, "w") as archive:
            for name, content in RELEASES[release].items():
                archive.writestr(f"ml/{name}", content)
    if packed == "file":
        path = folder / next(iter(RELEASES[release]))
    found = tables(PrepareConfig(source="movielens", path=str(path)))
    assert found["events"] == [
        {"key": "1", "item": "7", "label": 4.0, "timestamp": 881250949},
        {"key": "2", "item": "8", "label": 1.0, "timestamp": 881250950},
    ]
    assert found["items"] == [
        {"key": "7", "title": "Toys (1995)", "genres": ["Animation", "Comedy"], "year": "1995"},
        {"key": "8", "title": "Nöthing", "genres": ["unknown"], "year": None},
    ]
    if release == "csv":
        assert found["tasks"] == []
    else:
        first, second = found["tasks"]
        assert (first["gender"], first["age"], second["gender"], second["age"]) == ("M", "18-24", "F", "50-55")
        assert first["occupation"] == ("programmer" if release == "1m" else "technician")
        assert "zip" not in first


def test_10m_has_half_stars_and_no_users_and_utf8_titles(tmp_path: Path):
    folder = write(tmp_path, "1m")
    (folder / "users.dat").unlink()
    (folder / "ratings.dat").write_bytes(b"1::7::3.5::881250949\n")
    (folder / "movies.dat").write_bytes("7::Nöthing (2001)::(no genres listed)\n".encode())
    found = tables(PrepareConfig(source="movielens", path=str(folder)))
    assert found["events"][0]["label"] == 3.5
    assert found["tasks"] == []
    assert found["items"] == [{"key": "7", "title": "Nöthing (2001)", "genres": None, "year": "2001"}]


def test_extras_join_certificate_directors_and_actors(tmp_path: Path):
    folder = write(tmp_path / "ml", "1m")
    extras = tmp_path / "movies_extrainfos.dat"
    extras.write_text(
        "8::Nothing::1999::N/A::1 Jan 1999::Drama::Ann A, Bob B::W::Cy C, Cy C, N/A N::A plot::with it::u\n"
    )
    found = tables(PrepareConfig(source="movielens-1m", path=str(folder), extras=str(extras)))["items"]
    assert found[0] == {
        "key": "7", "title": "Toys (1995)", "genres": ["Animation", "Comedy"], "year": "1995",
        "certificate": None, "directors": None, "actors": None,
    }  # fmt: skip
    assert (found[1]["year"], found[1]["certificate"]) == ("1999", None)
    assert (found[1]["directors"], found[1]["actors"]) == (["Ann A", "Bob B"], ["Cy C", "N/A N"])


def test_clicks_of_ratings(tmp_path: Path):
    folder = write(tmp_path, "1m")
    config = PrepareConfig(source="movielens", path=str(folder), label="click", click_threshold=4)
    assert [e["label"] for e in tables(config)["events"]] == [1.0, 0.0]
    with pytest.raises(SourceError, match="0 or 1") as error:
        tables(PrepareConfig(source="movielens", path=str(folder), label="click"))
    assert str(error.value.where).endswith("ratings.dat: line 1, column rating")


def test_features_are_chosen_by_name(tmp_path: Path):
    folder = str(write(tmp_path, "1m"))
    year = FeatureSource(name="year", level="item", kind="categorical", width=4)
    assert read_source(PrepareConfig(source="movielens", path=folder, features=(year,))).features == (year,)
    typo = FeatureSource(name="occupatoin", level="task", kind="categorical")
    with pytest.raises(ConfigError, match="no such feature") as error:
        read_source(PrepareConfig(source="movielens", path=folder, features=(typo,)))
    assert "Did you mean `occupation`" in str(error.value.remedy)


@pytest.mark.parametrize("missing", ["movies.csv", "ratings.csv"])
def test_a_release_that_is_not_whole_is_refused(tmp_path: Path, missing: str):
    (write(tmp_path, "csv") / missing).unlink()
    with pytest.raises(SourceError, match=r"movies\.csv is missing|No MovieLens release"):
        read_source(PrepareConfig(source="movielens", path=str(tmp_path)))


def test_an_unknown_source_is_answered_with_the_nearest():
    with pytest.raises(SourceError) as error:
        read_source(PrepareConfig(source="movielens-100"))
    assert "Did you mean `movielens-100k`?" in str(error.value.remedy)
    with pytest.raises(SourceError, match="which release"):
        read_source(PrepareConfig(source="movielens"))


# --- download ------------------------------------------------------------------------------------------------------


def archive_bytes() -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in RELEASES["1m"].items():
            archive.writestr(f"ml-1m/{name}", content)
    return buffer.getvalue()


class Reply(io.BytesIO):
    def __init__(self, content: bytes, length: int | None = None) -> None:
        super().__init__(content)
        self.headers = {"Content-Length": str(len(content) if length is None else length)}


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("METATRAIN_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def serve(monkeypatch: pytest.MonkeyPatch, md5: bytes | None, content: bytes, length: int | None = None) -> list[str]:
    asked: list[str] = []

    def urlopen(url: str, timeout: float) -> Reply:
        asked.append(url)
        if url.endswith(".md5") and md5 is None:
            raise urllib.error.HTTPError(url, 404, "none", {}, io.BytesIO())  # type: ignore[arg-type]
        return Reply(md5 or b"") if url.endswith(".md5") else Reply(content, length)

    monkeypatch.setattr(download.urllib.request, "urlopen", urlopen)
    return asked


def test_a_download_is_checked_and_cached(cache: Path, monkeypatch: pytest.MonkeyPatch):
    content = archive_bytes()
    asked = serve(monkeypatch, b"MD5 (ml-1m.zip) = " + hashlib.md5(content).hexdigest().encode(), content)
    raw = read_source(PrepareConfig(source="movielens-1m"))
    assert asked == [f"{download.ADDRESS}/ml-1m.zip.md5", f"{download.ADDRESS}/ml-1m.zip"]
    assert "md5 agrees" in raw.notes[0]
    assert sum(rows.table.num_rows for c in raw.events for rows in c.read()) == 2
    read_source(PrepareConfig(source="movielens-1m"))
    assert len(asked) == 2
    assert (cache / "movielens" / "ml-1m.zip").read_bytes() == content


@pytest.mark.parametrize(
    ("md5", "length", "message"), [(b"0" * 32, None, "md5 differs"), (None, 10**6, "connection ended")]
)
def test_a_broken_download_is_refused_and_not_cached(
    cache: Path, monkeypatch: pytest.MonkeyPatch, md5, length, message
):
    serve(monkeypatch, md5, archive_bytes(), length)
    with pytest.raises(SourceError, match=message):
        read_source(PrepareConfig(source="movielens-1m"))
    assert list((cache / "movielens").iterdir()) == []


def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def urlopen(url: str, timeout: float) -> None:
        assert timeout <= 5
        raise urllib.error.URLError("no route")

    monkeypatch.setattr(download.urllib.request, "urlopen", urlopen)


def test_100k_falls_back_to_the_recbole_wheel_and_says_so(cache: Path, monkeypatch: pytest.MonkeyPatch, caplog):
    unreachable(monkeypatch)
    commands = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess:
        commands.append(command)
        wheel = Path(command[command.index("--dest") + 1]) / "recbole-1.2.1-py3-none-any.whl"
        with zipfile.ZipFile(wheel, "w") as archive:
            for name, content in RELEASES["recbole"].items():
                archive.writestr(f"recbole/dataset_example/ml-100k/{name}", content)
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(download.subprocess, "run", run)
    with caplog.at_level(logging.WARNING):
        raw = read_source(PrepareConfig(source="movielens-100k"))
    assert "falling back to the copy inside the recbole==1.2.1 wheel" in caplog.text
    assert "recbole" in raw.notes[0]
    assert sum(rows.table.num_rows for c in raw.events for rows in c.read()) == 2
    assert "recbole" in read_source(PrepareConfig(source="movielens-100k")).notes[0]
    assert len(commands) == 1
    assert {"download", "--no-deps", "recbole==1.2.1"} <= set(commands[0])


def test_without_address_and_wheel_the_remedy_is_a_path(cache: Path, monkeypatch: pytest.MonkeyPatch):
    unreachable(monkeypatch)
    failed = subprocess.CompletedProcess([], 1, "", "no index")
    monkeypatch.setattr(download.subprocess, "run", lambda *_, **__: failed)
    for source in ("movielens-100k", "movielens-25m"):
        with pytest.raises(SourceError) as error:
            read_source(PrepareConfig(source=source))
        assert "prepare.path" in str(error.value.remedy)


def test_the_real_1m_archive_is_read_whole():
    path = Path(__file__).parents[2].parent / "shared" / "data" / "ml-1m.zip"
    if not path.exists():
        pytest.skip("MovieLens-1M may not be redistributed; its archive isn't on this machine")
    raw = read_source(PrepareConfig(source="movielens-1m", path=str(path)))
    found = pa.concat_tables([rows.table for c in raw.events for rows in c.read()])
    assert (found.num_rows, len(found["key"].unique()), len(found["item"].unique())) == (1_000_209, 6_040, 3_706)
