"""The Netflix Prize, in both layouts: `combined_data_*.txt`, and the older file a film (`mv_*.txt`).

Both hold blocks: a line `FILM:`, then lines `USER,RATING,DATE`. Titles and years come from `movie_titles.csv`, whose
titles may hold commas. There are no user features.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from metatrain.config import FeatureSource, PrepareConfig
from metatrain.data.sources.checks import Check, parsed, text_of
from metatrain.data.sources.features import chosen_features
from metatrain.data.sources.files import RawFile, find_files, named
from metatrain.data.sources.labels import label_check, labelled
from metatrain.data.sources.rawlog import RawLog, Rows, TableChunk
from metatrain.errors import SourceError

_RATINGS = re.compile(r"^(combined_data_\d+|mv_\d+)\.txt$")
_BLOCK_BYTES = 8 << 20
_EVENT_BYTES = 20
_FILES_PER_CHUNK = 500  # of the layout with a file a film, which are small: one task reads many


@dataclass(frozen=True)
class RatingsChunk:
    """Some ratings files, each read in pieces."""

    files: tuple[RawFile, ...]
    check: Check
    threshold: float | None
    skip_bad: bool

    def read(self) -> Iterator[Rows]:
        """Yields events.

        Raises:
            SourceError: A line that is neither a film nor a rating (without `skip_bad`).
        """
        for file in self.files:
            film: str | None = None
            line = 1
            with file.open() as raw:
                while block := raw.read(_BLOCK_BYTES):
                    text = block if block.endswith(b"\n") else block + raw.readline()
                    rows, film = self._parse(text, film, line, file)
                    line += text.count(b"\n")
                    yield rows

    def _parse(self, block: bytes, film: str | None, first_line: int, file: RawFile) -> tuple[Rows, str | None]:
        lines = pa.array(block.decode("utf-8", errors="replace").split("\n"), type=pa.string())
        lines = pc.utf8_rtrim_whitespace(lines)
        is_film = _bool(pc.match_substring_regex(lines, r"^\d+:$"))
        heads = pc.utf8_rtrim(lines.filter(pa.array(is_film)), ":")
        films = pa.concat_arrays([pa.array([film], type=pa.string()), heads])
        of_line = films.take(pa.array(np.cumsum(is_film)))
        is_row = ~is_film & _bool(pc.not_equal(lines, ""))
        rows, of_row, number = lines.filter(pa.array(is_row)), of_line.filter(pa.array(is_row)), np.flatnonzero(is_row)
        match = pc.extract_regex(rows, r"^(?P<user>[^,]+),(?P<rating>[^,]+),(?P<date>[^,]+)$")
        user, rating, date = (pc.struct_field(match, i) for i in range(3))
        shapeless = _bool(pc.is_null(match)) | _bool(pc.is_null(of_row))
        shapeless |= _bool(pc.match_substring(rows, "\ufffd"))  # stands for bytes that are no text
        wrong_rating, wrong_date = text_of(rating, self.check), text_of(date, Check.TIME)
        bad = shapeless | wrong_rating | wrong_date
        if bad.any() and not self.skip_bad:
            i = int(np.flatnonzero(bad)[0])
            what = "A line is neither `FILM:` nor `USER,RATING,DATE`."
            if not shapeless[i]:
                what = self.check.problem if wrong_rating[i] else Check.TIME.problem
            raise SourceError(
                what,
                where=f"{file.place}: line {first_line + int(number[i])}",
                got=rows[i].as_py()[:200],
                remedy="Mend the line, or count and skip such rows with --skip-bad-rows.",
            )
        keep = pa.array(~bad)
        label = labelled(parsed(rating.filter(keep), self.check), self.threshold)
        table = pa.table(
            {
                "key": user.filter(keep),
                "item": of_row.filter(keep),
                "label": label,
                "timestamp": parsed(date.filter(keep), Check.TIME),
            }
        )
        last = films[len(films) - 1].as_py()
        return Rows(table, int(bad.sum())), last


def read_netflix(config: PrepareConfig) -> RawLog:
    """Opens the Netflix Prize's ratings at `config.path`.

    Raises:
        SourceError: No path, or no ratings files there, or a broken list of titles.
    """
    if config.path is None:
        raise SourceError(
            "The Netflix Prize has no official address to download from.",
            where="prepare.path",
            remedy="Give the folder or zip archive that holds combined_data_*.txt or mv_*.txt.",
        )
    files = find_files(config.path)
    ratings = [f for f in files if _RATINGS.match(f.name)]
    if not ratings:
        raise SourceError(
            "No Netflix Prize ratings are here: neither combined_data_*.txt nor mv_*.txt.",
            where=config.path,
            got=", ".join(sorted({f.name for f in files})[:10]),
            remedy="Check `prepare.path`.",
        )
    combined = [f for f in ratings if f.name.startswith("combined")]
    ratings = combined or ratings
    size = 1 if combined else _FILES_PER_CHUNK
    check = label_check(config)
    titles = named(files, "movie_titles.csv", "movie_titles.txt")
    features = (FeatureSource(name="year", level="item", kind="categorical", width=config.feature_width),)
    return RawLog(
        name="netflix",
        events=[
            RatingsChunk(tuple(ratings[i : i + size]), check, config.click_threshold, config.skip_bad_rows)
            for i in range(0, len(ratings), size)
        ],
        events_estimate=_total_size(ratings) // _EVENT_BYTES,
        items=None if titles is None else [TableChunk(_titles(titles))],
        features=chosen_features(features if titles else (), config),
        facts={"ratings_files": len(ratings)},
        notes=[] if titles else ["no movie_titles.csv: items have neither title nor year"],
        files={"events": ratings, "items": [titles] if titles else []},
    )


def _total_size(files: list[RawFile]) -> int:
    """Near enough: the mean of some, times all."""
    some = files[:: max(len(files) // 16, 1)]
    return int(sum(f.size() for f in some) / len(some) * len(files))


def _titles(file: RawFile) -> pa.Table:
    lines = pa.array(file.read().decode("latin-1").splitlines(), type=pa.string())
    present = _bool(pc.not_equal(pc.utf8_trim_whitespace(lines), ""))
    match = pc.extract_regex(lines, r"^(?P<key>\d+),(?P<year>[^,]*),(?P<title>.*)$")
    broken = present & _bool(pc.is_null(match))
    if broken.any():
        i = int(np.flatnonzero(broken)[0])
        raise SourceError(
            "A line is not `FILM,YEAR,TITLE`.",
            where=f"{file.place}: line {i + 1}",
            got=lines[i].as_py()[:200],
            remedy="Mend the line.",
        )
    match = match.filter(pa.array(present))
    key, year, title = (pc.struct_field(match, i) for i in range(3))
    known = pc.match_substring_regex(year, r"^\d{4}$")
    return pa.table({"key": key, "title": title, "year": pc.if_else(known, year, None)})


def _bool(column: pa.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False).astype(bool)
