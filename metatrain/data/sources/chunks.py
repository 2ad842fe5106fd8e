"""Files of tables as pieces of work: large files are cut, small ones read together."""

from __future__ import annotations

from metatrain.data.sources.checks import Check
from metatrain.data.sources.files import RawFile, file_sizes, table_format
from metatrain.data.sources.rawlog import Chunk, Several
from metatrain.data.sources.tables import TablePart, Wanted, delimiter_of, opened_parquet
from metatrain.data.sources.text import Layout, TextPart, parts

#: Footers read when the source is opened, to cut large files into parts; with more files each is a part.
_FEW_FILES = 64
_CHUNK_ROWS = 1 << 20
#: Of more files so many are looked into to know about how many rows all have, so many bytes of each.
_SAMPLE, _SAMPLE_BYTES = 16, 1 << 18


def table_chunks(files: list[RawFile], wanted: dict[str, Wanted], skip_bad: bool) -> tuple[list[Chunk], int]:
    """Files as chunks for parallel reading, and about how many rows they have.

    Large files are cut and small ones are read together, so that a chunk has about `_CHUNK_ROWS` rows.
    """
    found: list[tuple[Chunk, int]] = []  # and about how many rows it has
    sizes = file_sizes(files)
    rates: dict[str, float] = {}
    for file, size in zip(files, sizes, strict=True):
        kind = table_format(file)
        few = len(files) <= _FEW_FILES
        if kind == "parquet" and few:
            spans = _row_group_spans(file)
            found += [(TablePart(file, wanted, skip_bad, row_groups=span), rows) for span, rows in spans]
            continue
        if kind not in rates:
            same = [(f, n) for f, n in zip(files, sizes, strict=True) if table_format(f) == kind]
            rates[kind] = _rows_per_byte(kind, same[:: -(-len(same) // _SAMPLE)])
        if kind == "csv":
            checks: dict[str, Check] = {}
            for w in wanted.values():
                checks.setdefault(w.theirs, w.check)
            layout = Layout(checks, delimiter=delimiter_of(file))
            texts = parts(file, layout, skip_bad) if few else [TextPart(file, layout, skip_bad)]
            rows = int(size * rates[kind] / len(texts))
            found += [(TablePart(file, wanted, skip_bad, text=part), rows) for part in texts]
        else:
            found.append((TablePart(file, wanted, skip_bad), int(size * rates[kind])))
    return _together(found), sum(rows for _, rows in found)


def _together(found: list[tuple[Chunk, int]]) -> list[Chunk]:
    """Neighbours in one chunk as long as they have few rows together."""
    chunks: list[Chunk] = []
    held: list[Chunk] = []
    rows = 0
    for chunk, more in [*found, (None, _CHUNK_ROWS + 1)]:
        if held and rows + more > _CHUNK_ROWS:
            chunks.append(held[0] if len(held) == 1 else Several(tuple(held)))
            held, rows = [], 0
        if chunk is not None:
            held.append(chunk)
            rows += more
    return chunks


def _row_group_spans(file: RawFile) -> list[tuple[tuple[int, int], int]]:
    """A Parquet file cut between row groups: from and to, and the rows."""
    with file.open() as raw:
        metadata = opened_parquet(file, raw).metadata
    spans, start, held = [], 0, 0
    for i in range(metadata.num_row_groups):
        rows = metadata.row_group(i).num_rows
        if held and held + rows > _CHUNK_ROWS:
            spans.append(((start, i), held))
            start, held = i, 0
        held += rows
    return [*spans, ((start, metadata.num_row_groups), held)] if metadata.num_row_groups else []


def _rows_per_byte(kind: str, sample: list[tuple[RawFile, int]]) -> float:
    """About how many rows a byte of such files stands for, by a part of each of the sample."""
    rows = read = 0
    for file, size in sample:
        with file.open() as raw:
            if kind == "parquet":
                rows, read = rows + opened_parquet(file, raw).metadata.num_rows, read + size
                continue
            text = file.unpacked(raw)
            start = text.read(_SAMPLE_BYTES)
            rows += start.count(b"\n")
            # Of packed text, the bytes that were unpacked; up to a buffer more have been read.
            read += min(raw.tell(), size) if file.name.endswith(".gz") else len(start)
    return rows / read if read else 0.0
