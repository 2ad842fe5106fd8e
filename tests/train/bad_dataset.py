"""A dataset with one task whose labels overflow float32 when they are squared: finite, and so taken by readers."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from metatrain.data.manifest import Manifest, Split, read_manifest
from metatrain.data.prepare_shards import parquet_bytes
from tests.data.tiny_dataset import write_tiny_dataset


def write_bad_dataset(url: str, key: str, **options: int) -> Manifest:
    """A tiny dataset in which the labels of one training task are 3e38."""
    write_tiny_dataset(url, **options)
    manifest = read_manifest(url)
    shards = []
    for shard in manifest.shards:
        path = Path(url) / shard.path
        table = pq.read_table(io.BytesIO(path.read_bytes()))
        if shard.split is Split.TRAIN and key in table["key"].to_pylist():
            labels = table["labels"].combine_chunks()
            task = table["key"].to_pylist().index(key)
            values = labels.values.to_numpy().copy()
            values[labels.offsets[task].as_py() : labels.offsets[task + 1].as_py()] = 3e38
            changed = pa.ListArray.from_arrays(labels.offsets, pa.array(values.astype(np.float32)))
            table = table.set_column(table.column_names.index("labels"), "labels", changed)
            content = parquet_bytes(table, max(shard.row_groups))
            path.write_bytes(content)
            shard = shard.model_copy(update={"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()})
        shards.append(shard)
    manifest = manifest.model_copy(update={"shards": tuple(shards)})
    manifest.write(url)
    return manifest
