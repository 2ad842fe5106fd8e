"""Retries: what may pass is tried again, what may not is not; a file never comes back shorter than it is."""

from __future__ import annotations

import errno
import http.client
import json
import os
from collections import deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import aiohttp
import fsspec
import pyarrow.parquet as pq
import pytest
from fsspec.exceptions import FSTimeoutError
from fsspec.implementations.memory import MemoryFileSystem

from metatrain import faults, storage
from metatrain.config import EpisodeConfig
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import ItemSet, Split
from metatrain.data.reader import BatchReader
from metatrain.errors import ConfigError, MetatrainError, StorageError
from metatrain.retries import Policy, ShortReadError, transient
from tests.data.tiny_dataset import plain, write_tiny_dataset


class ThrottledError(Exception):
    """As botocore's ClientError looks, where it comes out untranslated."""

    def __init__(self, code: str, status: int) -> None:
        super().__init__(code)
        self.response = {"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}


class StatusError(Exception):
    """As gcsfs and google.api_core have it."""

    def __init__(self, code: int | str) -> None:
        super().__init__(f"status {code}")
        self.code = code


class FlakyFileSystem(MemoryFileSystem):
    """A store in memory whose calls fail as planned: each takes the next of `plan`, and None is success.

    A number in the plan is a read that ends after so many bytes.
    """

    protocol = "flaky"
    cachable = False
    plan: ClassVar[deque[Any]] = deque()
    calls: ClassVar[list[str]] = []

    def _next(self, call: str) -> int | None:
        self.calls.append(call)
        planned = self.plan.popleft() if self.plan else None
        if isinstance(planned, BaseException):
            raise planned
        return planned

    def _open(self, path: str, mode: str = "rb", **options: Any) -> Any:
        self._next("open")
        return _FlakyFile(self, super()._open(path, mode=mode, **options))

    def pipe_file(self, path: str, value: bytes, **options: Any) -> None:
        self._next("pipe")
        super().pipe_file(path, value, **options)

    def info(self, path: str, **options: Any) -> Any:
        self._next("info")
        return super().info(path, **options)


class _FlakyFile:
    def __init__(self, store: FlakyFileSystem, file: Any) -> None:
        self._store, self._file = store, file
        self.size = file.size

    def read(self, length: int = -1) -> bytes:
        ends = self._store._next("read")
        data = self._file.read(length)
        return data if ends is None else data[:ends]

    def seek(self, *to: int) -> int:
        return self._file.seek(*to)

    def close(self) -> None:
        self.closed = True

    def __enter__(self) -> _FlakyFile:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[FlakyFileSystem]]:
    monkeypatch.setattr("tenacity.nap.time.sleep", lambda _: None)
    fsspec.register_implementation("flaky", FlakyFileSystem, clobber=True)
    FlakyFileSystem.plan.clear()
    FlakyFileSystem.store.clear()
    yield FlakyFileSystem
    FlakyFileSystem.plan.clear()
    FlakyFileSystem.store.clear()


PASSING = [
    OSError("no number"),
    OSError(errno.EBUSY, "Please reduce your request rate"),  # what s3fs makes of SlowDown and 503
    OSError(errno.EREMOTEIO, "internal error"),
    ConnectionResetError(errno.ECONNRESET, "reset by peer"),
    TimeoutError("timed out"),
    FSTimeoutError(),
    ShortReadError("3 of 9 bytes"),
    aiohttp.ServerDisconnectedError(),
    aiohttp.ClientPayloadError("not enough data"),
    http.client.IncompleteRead(b"abc"),
    ThrottledError("SlowDown", 503),
    ThrottledError("ThrottlingException", 400),
    StatusError(429),
    StatusError("503"),
]
LASTING = [
    FileNotFoundError(errno.ENOENT, "none"),
    PermissionError(errno.EACCES, "no"),
    OSError(errno.ENOSPC, "full"),
    OSError(errno.EROFS, "read only"),
    ThrottledError("NoSuchBucket", 404),
    StatusError(403),
    StatusError("mutex"),
    ValueError("not a number"),
    StorageError("ours"),
    KeyboardInterrupt(),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_throttling_time_outs_and_broken_connections_pass(error: BaseException, flaky: type[FlakyFileSystem]) -> None:
    assert transient(error)
    storage.write_atomic("flaky://store/file", "content")
    flaky.plan.extend([error, None, error, error])
    assert storage.read_text("flaky://store/file") == "content"
    flaky.plan.extend([error, error])
    storage.write_atomic("flaky://store/file", "other")
    assert storage.read_text("flaky://store/file") == "other"


@pytest.mark.parametrize("error", LASTING, ids=repr)
def test_what_no_other_try_can_mend_is_not_tried_again(error: BaseException, flaky: type[FlakyFileSystem]) -> None:
    assert not transient(error)
    storage.write_atomic("flaky://store/file", "content")
    flaky.plan.append(error)
    flaky.calls.clear()
    with pytest.raises((type(error), StorageError)):
        storage.read_bytes("flaky://store/file")
    assert flaky.calls == ["open"]


def test_libraries_of_stores_are_known_by_name() -> None:
    botocore = pytest.importorskip("botocore.exceptions")
    for name in ("ReadTimeoutError", "ConnectTimeoutError", "EndpointConnectionError", "ConnectionClosedError"):
        assert transient(getattr(botocore, name)(endpoint_url="http://store")), name
    s3fs = pytest.importorskip("s3fs.errors")
    for code, passes in {"SlowDown": True, "503": True, "RequestTimeout": True, "NoSuchKey": False}.items():
        error = botocore.ClientError({"Error": {"Code": code}, "ResponseMetadata": {}}, "GetObject")
        assert transient(s3fs.translate_boto_error(error)) is passes, code


def test_a_store_that_stays_away_is_given_up_after_the_policy(
    flaky: type[FlakyFileSystem], monkeypatch: pytest.MonkeyPatch
) -> None:
    storage.write_atomic("flaky://store/file", "content")
    for attempts in (None, 3):
        if attempts:
            monkeypatch.setenv("METATRAIN_STORAGE_ATTEMPTS", str(attempts))
        flaky.plan.extend([OSError(errno.EBUSY, "slow down")] * 50)
        flaky.calls.clear()
        with pytest.raises(OSError, match="slow down"):
            storage.read_bytes("flaky://store/file")
        assert flaky.calls == ["open"] * (attempts or Policy().attempts)
        flaky.plan.clear()
    monkeypatch.setenv("METATRAIN_STORAGE_ATTEMPTS", "often")
    with pytest.raises(ConfigError, match="whole number"):
        storage.read_bytes("flaky://store/file")


def test_a_short_read_is_tried_again_and_then_refused(flaky: type[FlakyFileSystem]) -> None:
    storage.write_atomic("flaky://store/file", b"0123456789")
    flaky.plan.extend([None, 4, None, 9])
    assert storage.read_bytes("flaky://store/file") == b"0123456789"
    flaky.plan.extend([None, 4] * 50)
    with pytest.raises(StorageError, match="shorter than its store says") as caught:
        storage.read_bytes("flaky://store/file")
    assert "4 of 10 bytes" in str(caught.value)


def test_an_open_file_survives_broken_connections_at_any_place(flaky: type[FlakyFileSystem]) -> None:
    content = os.urandom(300_000)
    storage.write_atomic("flaky://store/file", content)
    with storage.open_file("flaky://store/file") as file:
        flaky.plan.extend([ConnectionResetError(), None, 1000, ThrottledError("SlowDown", 503), None, None])
        assert file.read(100) == content[:100]
        flaky.plan.extend([10, None, OSError("gone")])
        assert file.seek(-5000, os.SEEK_END) == 295_000
        assert file.read() == content[295_000:]
        file.seek(17)
        flaky.plan.extend([FSTimeoutError(), OSError("again")])
        assert file.read(200_000) == content[17:200_017]
        assert file.read(200_000) == content[200_017:]
        assert file.read(1) == b""
        file.seek(0)
        flaky.plan.extend([None, 3] * 50)
        with pytest.raises(StorageError, match="shorter"):
            file.read(100_000)


def test_a_dataset_on_a_flaky_store_gives_the_batches_of_its_copy_on_a_disk(
    tmp_path: Path, flaky: type[FlakyFileSystem]
) -> None:
    write_tiny_dataset(str(tmp_path))
    for path in tmp_path.rglob("*"):
        if path.is_file():
            storage.write_atomic(f"flaky://data/{path.relative_to(tmp_path)}", path.read_bytes())
    shard = TaskDataset.open(str(tmp_path)).manifest.shards[0].path
    flaky.plan.extend([None, OSError("gone"), None, 100, TimeoutError()])
    assert pq.ParquetFile(storage.open_file(f"flaky://data/{shard}")).read().num_rows > 0

    def batches(url: str) -> list[Any]:
        options = {"lanes_total": 2, "tasks_per_step": 8, "window": 2}
        reader = BatchReader(url, Split.TRAIN, ItemSet.EXISTING, EpisodeConfig(), seed=1, **options)
        found = []
        for step in range(reader.steps(0)):
            if url.startswith("flaky") and not flaky.plan:
                flaky.plan.extend(
                    [None, OSError("gone"), ShortReadError("early"), None, 5, ThrottledError("SlowDown", 503)]
                )
            found.append(plain(reader.read(0, step, range(2))))
        reader.close()
        return found

    assert batches("flaky://data") == batches(str(tmp_path))


def test_a_full_disk_is_named_with_what_is_free_and_the_old_file_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = str(tmp_path / "file")
    storage.write_atomic(path, "old")
    plan = str(tmp_path / "plan" / "faults.json")
    for number, words in (("ENOSPC", "disk is full"), ("EDQUOT", "quota")):
        fault = faults.Fault(at="storage.write", action="error", errno=number, path="file", times=3)
        faults.write_plan(plan, [fault])
        faults.activate(plan)
        try:
            with pytest.raises(StorageError, match=words) as caught:
                storage.write_atomic(path, "new")
            with pytest.raises(StorageError, match=words), storage.open_atomic(path) as file:
                file.write(b"new")
            with pytest.raises(OSError, match=r"on purpose"), storage.full_disk_named(path):
                raise OSError(errno.EIO, "on purpose")
        finally:
            faults.activate(None)
        assert "bytes are free" in str(caught.value)
        assert isinstance(caught.value, MetatrainError)
        assert caught.value.remedy
        assert len(faults.fired(plan)) == 2, "a full disk is not tried again"
    assert storage.read_text(path) == "old"
    assert sorted(os.listdir(tmp_path)) == ["file", "plan"]
    json.loads(Path(plan).read_text())


def test_free_room_is_known_of_disks_alone(tmp_path: Path) -> None:
    free = storage.free_bytes(str(tmp_path / "not" / "yet" / "there"))
    assert free is not None
    assert free > 0
    assert storage.free_bytes("memory://anywhere") is None
