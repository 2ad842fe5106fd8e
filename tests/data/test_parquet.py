"""Parquet that carries code: a column of a type whose loader unpickles is refused before anything is loaded."""

from __future__ import annotations

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from metatrain import storage
from metatrain.config import EpisodeConfig
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import ItemSet, Split
from metatrain.data.parquet import open_parquet, read_parquet
from metatrain.data.reader import iterate
from metatrain.data.sources.files import RawFile
from metatrain.data.sources.tables import opened_parquet
from metatrain.errors import DatasetError, RequestError, SourceError
from metatrain.recommend.event_tables import read_table
from tests.data.damage import replace_shard, shard_of

OURS = "tests.unpickles"


class Unpickles(pa.ExtensionType):
    """As Ray Data's tensor types do: what the file holds of the type is unpickled when the file is opened."""

    def __init__(self, payload: bytes = b"") -> None:
        self.payload = payload
        super().__init__(pa.int32(), OURS)

    def __arrow_ext_serialize__(self) -> bytes:
        return self.payload

    @classmethod
    def __arrow_ext_deserialize__(cls, storage_type: pa.DataType, serialized: bytes) -> Unpickles:
        pickle.loads(serialized)
        return cls(serialized)


class Payload:
    """Makes a folder when it is unpickled."""

    def __init__(self, trace: str) -> None:
        self.trace = trace

    def __reduce__(self):
        return os.mkdir, (self.trace,)


@pytest.fixture
def trace(tmp_path: Path):
    """Where the payload leaves its trace, while the type is registered in this process."""
    pa.register_extension_type(Unpickles())
    yield tmp_path / "trace"
    pa.unregister_extension_type(OURS)


def malicious(trace: Path, table: pa.Table | None = None) -> bytes:
    """A table with a further column (or none but it) whose type carries the pickle."""
    kind = Unpickles(pickle.dumps(Payload(str(trace))))
    rows = table.num_rows if table is not None else 3
    column = pa.ExtensionArray.from_storage(kind, pa.array(range(rows), pa.int32()))
    table = pa.table({"item": column}) if table is None else table.append_column("evil", column)
    sink = pa.BufferOutputStream()
    pq.write_table(table, sink)
    return sink.getvalue().to_pybytes()


def test_plain_pyarrow_would_run_it(trace: Path):
    pq.ParquetFile(pa.BufferReader(malicious(trace)))
    assert trace.exists()


def test_it_is_refused_unopened(trace: Path, tmp_path: Path):
    content = malicious(trace)
    file = tmp_path / "evil.parquet"
    file.write_bytes(content)
    with pytest.raises(pa.ArrowInvalid, match="extension type"):
        read_parquet(content)
    with pytest.raises(pa.ArrowInvalid, match="extension type"):
        open_parquet(str(file))
    with storage.open_file(str(file)) as opened, pytest.raises(pa.ArrowInvalid, match="extension type"):
        open_parquet(opened)
    assert not trace.exists()


def test_in_a_shard_or_a_catalogue_it_does_nothing(trace: Path, tiny_dataset: Callable[..., str]):
    url = tiny_dataset(fresh=True)
    shard, path = shard_of(url)
    catalogue = Path(url) / "catalogue.parquet"
    whole = catalogue.read_bytes()
    replace_shard(url, shard, malicious(trace, pq.read_table(path)))
    with pytest.raises(DatasetError, match="extension type"):
        list(iterate(url, Split.TRAIN, ItemSet.ALL, EpisodeConfig()))
    dataset = TaskDataset.open(url)
    content = malicious(trace, read_parquet(whole))
    catalogue.write_bytes(content)
    checksum = hashlib.sha256(content).hexdigest()
    lying = TaskDataset(url, dataset.manifest.model_copy(update={"catalogue_sha256": checksum}))
    with pytest.raises(DatasetError, match="extension type"):
        _ = lying.catalogue
    assert not trace.exists()


def test_in_events_or_a_raw_log_it_does_nothing(trace: Path, tmp_path: Path):
    file = tmp_path / "events.parquet"
    file.write_bytes(malicious(trace))
    with pytest.raises(RequestError, match="extension type"):
        read_table(str(file))
    raw = RawFile(str(file))
    with raw.open() as opened, pytest.raises(SourceError, match="extension type"):
        opened_parquet(raw, opened)
    assert not trace.exists()


@pytest.mark.parametrize("content", [b"", b"PAR1", b"PAR1PAR1", b"\xff" * 12, b"PAR1\xff\xff\xff\x7fPAR1"])
def test_what_is_no_parquet_is_refused(content: bytes):
    with pytest.raises(pa.ArrowInvalid):
        read_parquet(content)
