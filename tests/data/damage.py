"""Damage to a dataset's files, and the checksums of the manifest made to fit a changed file again."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from metatrain.data.manifest import Shard, Split, read_manifest
from metatrain.data.prepare_shards import parquet_bytes


def shard_of(url: str, split: Split = Split.TRAIN, number: int = 1) -> tuple[Shard, Path]:
    """A shard of the split, and its file."""
    shard = read_manifest(url).of(split)[number]
    return shard, Path(url) / shard.path


def flip_byte(path: Path, place: float = 0.5) -> None:
    """Changes a byte at this share of the file."""
    content = bytearray(path.read_bytes())
    content[int(len(content) * place)] ^= 0xFF
    path.write_bytes(content)


def edit_manifest(url: str, change: Callable[[dict[str, Any]], None]) -> None:
    """Changes the manifest's JSON."""
    path = Path(url) / "manifest.json"
    raw = json.loads(path.read_text())
    change(raw)
    path.write_text(json.dumps(raw))


def replace_shard(url: str, shard: Shard, content: bytes) -> None:
    """Puts other content in a shard's place, with the size and checksum in the manifest to fit."""
    (Path(url) / shard.path).write_bytes(content)

    def change(raw: dict[str, Any]) -> None:
        entry = next(entry for entry in raw["shards"] if entry["path"] == shard.path)
        entry |= {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}

    edit_manifest(url, change)


def rewrite_shard(url: str, shard: Shard, change: Callable[[pa.Table], pa.Table]) -> None:
    """Changes a shard's table as a buggy writer would: its checksum fits."""
    table = change(pq.read_table(os.path.join(url, shard.path)))
    replace_shard(url, shard, parquet_bytes(table, shard.row_groups[0]).to_pybytes())


def with_values(name: str, change: Callable[[list], list], kind: pa.DataType | None = None) -> Callable:
    """A change of one column's values, and of its type where `kind` is given."""

    def changed(table: pa.Table) -> pa.Table:
        column = pa.array(change(table[name].to_pylist()), kind or table.schema.field(name).type)
        return table.set_column(table.column_names.index(name), name, column)

    return changed
