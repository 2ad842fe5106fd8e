"""MovieLens in all its public layouts, told apart by the files that are there, not by the release's name.

- 100K: `u.data` (tab), `u.item` and `u.user` (`|`, latin-1); also as the recbole wheel holds it (`ml-100k.inter` …)
- 1M, 10M: `ratings.dat`, `movies.dat`, `users.dat` (`::`; 1M latin-1, 10M utf-8 and without users)
- 20M, 25M, 32M, latest: `ratings.csv`, `movies.csv`

Item features: genres, year, and with `extras` also certificate, directors, actors. User features, where the release
has users: gender, age (in the 1M release's seven ranges), occupation.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from metatrain.config import FeatureSource, PrepareConfig
from metatrain.data.sources.checks import Check
from metatrain.data.sources.download import movielens_archive
from metatrain.data.sources.features import chosen_features
from metatrain.data.sources.files import RawFile, find_files, named
from metatrain.data.sources.labels import label_check, labelled
from metatrain.data.sources.rawlog import Chunk, RawLog, Rows, TableChunk
from metatrain.data.sources.text import Layout, TextPart, parts, read_whole
from metatrain.errors import SourceError

GENRES_100K = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama", "Fantasy",
    "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
_AGE_RANGES = ("under 18", "18-24", "25-34", "35-44", "45-49", "50-55", "56+")
_AGE_STARTS = np.array([18, 25, 35, 45, 50, 56])
_OCCUPATIONS_1M = (
    "other", "academic/educator", "artist", "clerical/admin", "college/grad student", "customer service",
    "doctor/health care", "executive/managerial", "farmer", "homemaker", "K-12 student", "lawyer", "programmer",
    "retired", "sales/marketing", "scientist", "self-employed", "technician/engineer", "tradesman/craftsman",
    "unemployed", "writer",
)  # fmt: skip
#: Directors and actors of one film teach nothing about another.
_LEAST_PEOPLE = 2
_EVENT_BYTES = 24


@dataclass(frozen=True)
class RatingsChunk:
    """A part of a ratings file."""

    part: TextPart
    names: tuple[str, str, str, str]  # its columns of user, item, rating, time
    threshold: float | None

    def read(self):
        """Yields events."""
        user, item, rating, time = self.names
        for rows in self.part.read():
            t = rows.table
            columns = {
                "key": t[user],
                "item": t[item],
                "label": labelled(t[rating], self.threshold),
                "timestamp": t[time],
            }
            yield Rows(pa.table(columns), rows.bad)


@dataclass(frozen=True)
class _Release:
    """The files of one layout, and how each is laid out."""

    ratings: tuple[RawFile, Layout, tuple[str, str, str, str]]
    items: Rows  # key, title, genres (list), year
    users: Rows | None  # key, gender, age, occupation
    files: dict[str, list[RawFile]]  # of the tables of items and users


def read_movielens(config: PrepareConfig) -> RawLog:
    """Opens a MovieLens release, downloading it where no `path` is given.

    Raises:
        SourceError: No release is named or found, a file is missing, or a table of users or items is broken.
    """
    source = config.source or "movielens"
    notes: list[str] = []
    path = config.path
    if path is None:
        release = source.replace("movielens", "ml")
        if release == "ml":
            raise SourceError(
                "`movielens` alone doesn't say which release to download.",
                where="prepare.source",
                remedy="Use movielens-100k, -1m, -10m, -20m, -25m, -32m or -latest-small, or give `prepare.path`.",
            )
        path, notes = movielens_archive(release)
    files = find_files(path)
    release = _release(files, config, path)
    file, layout, names = release.ratings
    events: list[Chunk] = [
        RatingsChunk(part, names, config.click_threshold) for part in parts(file, layout, config.skip_bad_rows)
    ]
    width = config.feature_width
    features = [
        FeatureSource(name="genres", level="item", kind="multi", width=width),
        FeatureSource(name="year", level="item", kind="categorical", width=width),
    ]
    items = release.items.table
    used = {"events": [file]} | release.files
    if config.extras:
        items, extras = _with_extras(items, config.extras)
        used["extras"] = [extras]
        features += [
            FeatureSource(name="certificate", level="item", kind="categorical", width=width),
            FeatureSource(name="directors", level="item", kind="multi", width=width, min_count=_LEAST_PEOPLE),
            FeatureSource(name="actors", level="item", kind="multi", width=width, min_count=_LEAST_PEOPLE),
        ]
    tasks = None
    if release.users is not None:
        tasks = [TableChunk(release.users.table)]
        features += [
            FeatureSource(name=n, level="task", kind="categorical", width=width)
            for n in ("gender", "age", "occupation")
        ]
    bad = release.items.bad + (release.users.bad if release.users else 0)
    return RawLog(
        name=source,
        events=events,
        events_estimate=file.size() // _EVENT_BYTES,
        tasks=tasks,
        items=[TableChunk(items)],
        features=chosen_features(features, config),
        facts={"ratings": file.place},
        notes=notes,
        files=used,
        bad_rows=bad,
    )


def _release(files: list[RawFile], config: PrepareConfig, path: str) -> _Release:
    for name, layout in (
        ("u.data", _release_100k),
        ("ml-100k.inter", _release_recbole),
        ("ratings.dat", _release_dat),
        ("ratings.csv", _release_csv),
    ):
        if (ratings := named(files, name)) is not None:
            return layout(ratings, files, config)
    found = ", ".join(sorted({f.name for f in files})[:10])
    raise SourceError(
        "No MovieLens release is here: none of u.data, ratings.dat, ratings.csv.",
        where=path,
        got=found,
        remedy="Give `prepare.path` as the release's folder or zip archive.",
    )


def _needed(files: list[RawFile], name: str, beside: RawFile) -> RawFile:
    file = named(files, name) or _beside(beside, name)
    if file is None:
        raise SourceError(
            f"The release is not whole: {name} is missing.",
            where=beside.place,
            remedy=f"Put {name} beside {beside.name}.",
        )
    return file


def _beside(file: RawFile, name: str) -> RawFile | None:
    """A file in the folder of another, for a `path` that names the ratings file itself."""
    if file.member is not None:
        return None
    from metatrain import storage

    near = replace(file, url=storage.join(file.url.rpartition("/")[0] or ".", name))
    return near if storage.exists(near.url) else None


def _checks(names: tuple[str, str, str, str], config: PrepareConfig) -> dict[str, Check]:
    return dict(zip(names, (Check.KEY, Check.KEY, label_check(config), Check.TIME), strict=True))


def _release_100k(ratings: RawFile, files: list[RawFile], config: PrepareConfig) -> _Release:
    names = ("user", "item", "rating", "time")
    layout = Layout(_checks(names, config), names, "\t", quoted=False)
    columns = ("key", "title", "date", "video_date", "url", *GENRES_100K)
    checks = {"key": Check.KEY, "title": Check.TEXT, "date": Check.TEXT} | dict.fromkeys(GENRES_100K, Check.TEXT)
    films, people = _needed(files, "u.item", ratings), _needed(files, "u.user", ratings)
    raw = read_whole(films, Layout(checks, columns, "|", False, "latin-1"), config.skip_bad_rows)
    for genre in GENRES_100K:
        known = pc.fill_null(pc.is_in(raw.table[genre], value_set=pa.array(["0", "1"])), False)
        if not pc.all(known).as_py() and raw.table.num_rows:
            row = pc.index(known, False).as_py()
            raise SourceError(
                "A genre's flag is neither 0 nor 1.",
                where=f"{films.place}: item {raw.table['key'][row]}, {genre}",
                got=raw.table[genre][row].as_py() or "nothing",
                remedy="Mend the line.",
            )
    flags = np.stack([pc.equal(raw.table[g], "1").to_numpy() for g in GENRES_100K], axis=1)
    offsets = np.concatenate([[0], flags.sum(axis=1).cumsum()]).astype(np.int32)
    words = pa.array(GENRES_100K).take(pa.array(np.nonzero(flags)[1]))
    year = _matched(raw.table["date"], r"(?P<year>\d{4})$")
    items = pa.table(
        {
            "key": raw.table["key"],
            "title": raw.table["title"],
            "genres": pa.ListArray.from_arrays(pa.array(offsets), words),
            "year": pc.coalesce(year, _year(raw.table["title"])),
        }
    )
    columns = ("key", "age", "gender", "occupation", "zip")
    checks = {"key": Check.KEY, "age": Check.NUMBER, "gender": Check.TEXT, "occupation": Check.TEXT}
    users = read_whole(people, Layout(checks, columns, "|", False, "latin-1"), config.skip_bad_rows)
    tables = {"items": [films], "users": [people]}
    return _Release((ratings, layout, names), Rows(items, raw.bad), _with_age_ranges(users), tables)


def _release_recbole(ratings: RawFile, files: list[RawFile], config: PrepareConfig) -> _Release:
    names = ("user_id:token", "item_id:token", "rating:float", "timestamp:float")
    layout = Layout(_checks(names, config), None, "\t", quoted=False)
    columns = {
        "item_id:token": "key",
        "movie_title:token_seq": "title",
        "release_year:token": "year",
        "class:token_seq": "genres",
    }
    films, people = _needed(files, "ml-100k.item", ratings), _needed(files, "ml-100k.user", ratings)
    raw = _renamed(films, columns, {"key": Check.KEY}, config)
    t = raw.table
    year = _text(t["year"])
    # The wheel's copy lost the year that the official titles end in, and writes genres with blanks between.
    known = pc.match_substring_regex(pc.fill_null(year, ""), r"^\d{4}$")
    title = pc.if_else(known, pc.binary_join_element_wise(_text(t["title"]), year, " ("), t["title"])
    title = pc.if_else(known, pc.binary_join_element_wise(_text(title), ")", ""), title)
    items = pa.table(
        {
            "key": t["key"],
            "title": title,
            "genres": pc.split_pattern_regex(pc.fill_null(t["genres"], "unknown"), r"\s+"),
            "year": pc.if_else(known, year, None),
        }
    )
    columns = {"user_id:token": "key", "age:token": "age", "gender:token": "gender", "occupation:token": "occupation"}
    users = _renamed(people, columns, {"key": Check.KEY, "age": Check.NUMBER}, config)
    tables = {"items": [films], "users": [people]}
    return _Release((ratings, layout, names), Rows(items, raw.bad), _with_age_ranges(users), tables)


def _release_dat(ratings: RawFile, files: list[RawFile], config: PrepareConfig) -> _Release:
    names = ("user", "item", "rating", "time")
    layout = Layout(_checks(names, config), names, "::", quoted=False)
    movies = _needed(files, "movies.dat", ratings)
    checks = {"key": Check.KEY, "title": Check.TEXT, "genres": Check.TEXT}
    raw = read_whole(
        movies, Layout(checks, ("key", "title", "genres"), "::", False, _encoding(movies)), config.skip_bad_rows
    )
    users, tables = None, {"items": [movies]}
    if (file := named(files, "users.dat") or _beside(ratings, "users.dat")) is not None:
        tables["users"] = [file]
        checks = {"key": Check.KEY, "gender": Check.TEXT, "age": Check.NUMBER, "occupation": Check.TEXT}
        columns = ("key", "gender", "age", "occupation", "zip")
        users = _with_age_ranges(
            read_whole(file, Layout(checks, columns, "::", False, "latin-1"), config.skip_bad_rows)
        )
        code = pc.index_in(_text(users.table["occupation"]), pa.array([str(i) for i in range(len(_OCCUPATIONS_1M))]))
        word = pc.coalesce(pa.array(_OCCUPATIONS_1M).take(code), _text(users.table["occupation"]))
        users = Rows(users.table.set_column(3, "occupation", word), users.bad)
    return _Release((ratings, layout, names), Rows(_titled(raw.table), raw.bad), users, tables)


def _release_csv(ratings: RawFile, files: list[RawFile], config: PrepareConfig) -> _Release:
    names = ("userId", "movieId", "rating", "timestamp")
    columns = {"movieId": "key", "title": "title", "genres": "genres"}
    movies = _needed(files, "movies.csv", ratings)
    raw = _renamed(movies, columns, {"key": Check.KEY}, config, ",", True)
    table = (ratings, Layout(_checks(names, config)), names)
    return _Release(table, Rows(_titled(raw.table), raw.bad), None, {"items": [movies]})


def _renamed(
    file: RawFile,
    columns: dict[str, str],
    checks: dict[str, Check],
    config: PrepareConfig,
    delimiter: str = "\t",
    quoted: bool = False,
) -> Rows:
    """A small table with a header, its columns under our names."""
    layout = Layout({theirs: checks.get(ours, Check.TEXT) for theirs, ours in columns.items()}, None, delimiter, quoted)
    rows = read_whole(file, layout, config.skip_bad_rows)
    return Rows(rows.table.rename_columns(list(columns.values())), rows.bad)


def _titled(table: pa.Table) -> pa.Table:
    """Items of the 1M and CSV layouts: genres between `|`, the year at the title's end."""
    genres = pc.if_else(pc.equal(_text(table["genres"]), "(no genres listed)"), None, _text(table["genres"]))
    return pa.table(
        {
            "key": table["key"],
            "title": table["title"],
            "genres": pc.split_pattern(genres, "|"),
            "year": _year(table["title"]),
        }
    )


def _with_age_ranges(users: Rows) -> Rows:
    table = users.table
    age = table["age"].to_numpy()
    known = np.isfinite(age)
    place = np.searchsorted(_AGE_STARTS, np.where(known, age, 0), side="right")
    ranges = pa.array(_AGE_RANGES).take(pa.array(place, mask=~known))
    columns = {"key": table["key"], "gender": table["gender"], "age": ranges, "occupation": table["occupation"]}
    return Rows(pa.table(columns), users.bad)


def _year(title: pa.ChunkedArray) -> pa.Array:
    return _matched(title, r"\((?P<year>\d{4})\)\s*$")


def _matched(column: pa.ChunkedArray, pattern: str) -> pa.Array:
    """What the one group of a pattern matches; null where it doesn't."""
    return pc.struct_field(pc.extract_regex(_text(column), pattern), 0)


def _text(column: pa.Array | pa.ChunkedArray) -> pa.Array:
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    return array.cast(pa.string())


def _encoding(file: RawFile) -> Literal["utf-8", "latin-1"]:
    """1M's titles are latin-1, 10M's are utf-8; the files don't say."""
    try:
        file.read().decode("utf-8")
    except UnicodeDecodeError:
        return "latin-1"
    return "utf-8"


def _with_extras(items: pa.Table, path: str) -> tuple[pa.Table, RawFile]:
    """Joins `movies_extrainfos.dat`: its year where it knows it, certificate, directors, actors."""
    file = named(find_files(path), "movies_extrainfos.dat")
    if file is None:
        raise SourceError("No movies_extrainfos.dat is here.", where=path, remedy="Check `prepare.extras`.")
    keys, years, certificates, directors, actors = [], [], [], [], []
    # A few thousand lines, once; the plot may hold the delimiter, but what is read here stands before it.
    try:
        text = file.read().decode("utf-8")
    except UnicodeDecodeError as error:
        raise SourceError(f"The file is not UTF-8: {error}.", where=file.place, remedy="Get the file again.") from error
    for number, line in enumerate(text.splitlines(), 1):
        parts_ = line.split("::")
        if len(parts_) < 9:
            raise SourceError(
                f"A line cannot be parsed: {len(parts_)} fields where 11 are expected.",
                where=f"{file.place}: line {number}", got=line[:200], remedy="Mend the line.",
            )  # fmt: skip
        keys.append(parts_[0])
        years.append(_known(parts_[2]))
        certificates.append(_known(parts_[3]))
        directors.append(_people(parts_[6]))
        actors.append(_people(parts_[8]))
    row = pc.index_in(_text(items["key"]), pa.array(keys, type=pa.string()))
    year = pc.coalesce(pa.array(years, type=pa.string()).take(row), _text(items["year"]))
    items = items.set_column(items.schema.get_field_index("year"), "year", year)
    for name, column in (
        ("certificate", pa.array(certificates, type=pa.string())),
        ("directors", pa.array(directors, type=pa.list_(pa.string()))),
        ("actors", pa.array(actors, type=pa.list_(pa.string()))),
    ):
        items = items.append_column(name, column.take(row))
    return items, file


def _known(text: str) -> str | None:
    return None if text.strip() in ("", "N/A") else text.strip()


def _people(text: str) -> list[str]:
    return [] if _known(text) is None else list(dict.fromkeys(p.strip() for p in text.split(",") if p.strip()))
