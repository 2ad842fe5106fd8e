"""Every path is an fsspec URL: a local folder, or any store that fsspec knows.

A file published with `write_atomic` is either wholly there or not there, also after a kill. What may pass by itself is
tried again as `metatrain.retries` says; a disk that is full is an error of ours. Nothing comes back that is shorter
than the file.
"""

from __future__ import annotations

import contextlib
import errno
import io
import os
import posixpath
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, Any, cast

import fsspec

from metatrain import faults
from metatrain.credentials import REMEDY, holds_credential, redacted
from metatrain.errors import StorageError
from metatrain.retries import SteadyFile, read_whole, retried, whole

# What `write_atomic` adds to a name.
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp$")
# Of a buffer that reads ahead from a store.
_BUFFER_BYTES = 1 << 16


def absolute(url: str) -> str:
    """The URL in a form that means the same from any working folder (a Ray worker's, for one)."""
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))


def join(url: str, *parts: str) -> str:
    """`url` with path parts behind it, whatever the store."""
    return posixpath.join(url, *parts)


def stays_inside(path: str) -> bool:
    """Whether a path, given in a file from outside, names a place below the folder that it is joined to."""
    if "\\" in path or "\0" in path or "://" in path or "::" in path:
        return False
    return all(part not in ("", ".", "..") for part in path.split("/"))


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL, and the path inside it.

    Raises:
        StorageError: None for this URL; or the URL holds a credential.
    """
    if holds_credential(url):
        raise StorageError("A URL has a credential in it.", got=redacted(url), remedy=REMEDY)
    try:
        return fsspec.core.url_to_fs(absolute(url))
    except (ImportError, ValueError) as error:
        raise StorageError(
            f"No file system for this URL: {error}",
            got=url,
            remedy="Install the store's fsspec package, or mend the URL.",
        ) from error


def exists(url: str) -> bool:
    """Whether a file or folder is there."""
    fs, path = filesystem(url)
    return retried(lambda: fs.exists(path))


def size(url: str) -> int:
    """A file's size in bytes."""
    fs, path = filesystem(url)
    return int(cast(int, retried(lambda: fs.size(path))))


def list_folder(url: str) -> list[str]:
    """Names (last path parts) in a folder, sorted; empty where there is no such folder."""
    fs, path = filesystem(url)

    def names() -> list[str]:
        fs.invalidate_cache(path)
        return sorted(posixpath.basename(p.rstrip("/")) for p in fs.ls(path, detail=False))

    try:
        return retried(names)
    except FileNotFoundError:
        return []


def file_sizes(url: str) -> dict[str, int]:
    """Name (last path part) → size in bytes of the files in a folder, by one listing; empty where there is none."""
    fs, path = filesystem(url)

    def sizes() -> dict[str, int]:
        fs.invalidate_cache(path)
        listed = fs.ls(path, detail=True)
        return {
            posixpath.basename(entry["name"]): int(entry["size"]) for entry in listed if entry["type"] != "directory"
        }

    try:
        return retried(sizes)
    except FileNotFoundError:
        return {}


def is_local(url: str) -> bool:
    """Whether the URL is a path on this machine's disks."""
    fs, _ = filesystem(url)
    return "file" in (fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,))


def make_folder(url: str) -> None:
    """Makes a folder and its parents where the store has folders; an `OSError` becomes a `StorageError`."""
    fs, path = filesystem(url)
    try:
        with full_disk_named(url):
            retried(lambda: fs.makedirs(path, exist_ok=True))
    except OSError as error:
        raise StorageError(
            f"The folder cannot be made: {error}", where=url, remedy="Check the path and its rights."
        ) from error


def free_bytes(url: str) -> int | None:
    """Room for more on the disk of a path that need not exist yet; None for a store, which has no bound to know."""
    if not is_local(url):
        return None
    path = filesystem(url)[1]
    while not os.path.exists(path) and os.path.dirname(path) != path:
        path = os.path.dirname(path)
    return shutil.disk_usage(path).free


@contextmanager
def full_disk_named(url: str) -> Iterator[None]:
    """A disk or quota that is full in the block becomes a `StorageError`, which says what is free."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        with contextlib.suppress(OSError):
            free = free_bytes(url)
            raise StorageError(
                "The disk is full." if error.errno == errno.ENOSPC else "The quota of the disk is used up.",
                where=url,
                got=f"{error}; {free or 0:,} bytes are free",
                remedy="Make room, then run the same command again: what was whole before this write still is.",
            ) from error
        raise


def open_file(url: str, mode: str = "rb", **options: Any) -> IO[Any]:
    """Opens a file; `FileNotFoundError` becomes a `StorageError`.

    A store's file that is opened to read bytes survives broken connections: a read is tried again from where it began.
    """
    fs, path = filesystem(url)

    def opened() -> IO[Any]:
        faults.point("storage.open", path=url)
        return cast(IO[Any], fs.open(path, mode, **options))

    try:
        if mode != "rb" or options or is_local(url):
            return retried(opened)
        return io.BufferedReader(SteadyFile(url, opened, size(url)), _BUFFER_BYTES)
    except FileNotFoundError as error:
        raise StorageError("There is no such file.", where=url, remedy="Check the path.") from error


def read_bytes(url: str) -> bytes:
    """A whole file.

    Raises:
        StorageError: No such file, or one that keeps coming shorter than it is.
    """
    fs, path = filesystem(url)

    def read() -> bytes:
        faults.point("storage.open", path=url)
        with fs.open(path, "rb") as file:
            faults.point("storage.read", path=url)
            content = cast(bytes, file.read())
            # The opened file's own size: by its path another one may be there by now.
            return whole(content, int(known) if (known := getattr(file, "size", None)) else size(url), url)

    try:
        return read_whole(url, read)
    except FileNotFoundError as error:
        raise StorageError("There is no such file.", where=url, remedy="Check the path.") from error


def read_text(url: str) -> str:
    """A whole UTF-8 file."""
    return read_bytes(url).decode("utf-8")


def write_atomic(url: str, data: bytes | str | memoryview) -> None:
    """Publishes a file whole: readers see the old one or the new one, never a part.

    On a disk: a temporary file beside it, flushed, then renamed. On an object store a put is atomic already.
    """
    content = data.encode("utf-8") if isinstance(data, str) else data

    def publish() -> None:
        faults.point("storage.write", path=url)
        if is_local(url):
            with _published(url, durable=True) as file:
                file.write(content)
        else:
            fs, path = filesystem(url)
            fs.pipe_file(path, bytes(content))

    with full_disk_named(url):
        retried(publish)


@contextmanager
def open_atomic(url: str) -> Iterator[IO[bytes]]:
    """A file to write to, published whole when the block ends well, as by `write_atomic`.

    For files that need not outlive a crash of the machine: no time goes into flushing them. On a disk nothing is tried
    again.
    """
    if is_local(url):
        with full_disk_named(url):
            faults.point("storage.write", path=url)
            with _published(url, durable=False) as file:
                yield file
        return
    buffer = io.BytesIO()
    yield buffer
    fs, path = filesystem(url)

    def publish() -> None:
        faults.point("storage.write", path=url)
        fs.pipe_file(path, buffer.getvalue())

    retried(publish)


@contextmanager
def _published(url: str, durable: bool) -> Iterator[IO[bytes]]:
    path = filesystem(url)[1]
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{uuid.uuid4().hex}.tmp"
    try:
        with open(temporary, "wb") as file:
            yield file
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        if os.path.exists(temporary):
            os.unlink(temporary)


def published_name(name: str) -> str:
    """The name that a file was to have which a killed `write_atomic` left; any other name as it is."""
    return _TEMPORARY.sub("", name)


def move(url: str, to: str) -> None:
    """Moves a file or a folder to where nothing is: a rename on a disk, a copy on an object store."""
    fs, path = filesystem(url)
    target = filesystem(to)[1]
    if is_local(url):
        os.replace(path, target)
    else:
        # Not tried again: half of a folder may be there by then, and the store would put the whole one into it.
        fs.mv(path, target, recursive=True)


def remove(url: str) -> None:
    """Removes a file or a folder with all in it; nothing happens where there is none."""
    fs, path = filesystem(url)
    if retried(lambda: fs.exists(path)):
        retried(lambda: fs.rm(path, recursive=True))
