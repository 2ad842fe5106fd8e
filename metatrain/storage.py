"""Every path is an fsspec URL: a local folder, or any store that fsspec knows. Retries live here alone.

A file published with `write_atomic` is either wholly there or not there, also after a kill.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import IO, Any, TypeVar, cast

import fsspec
from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from metatrain.errors import StorageError

Result = TypeVar("Result")

# What another try cannot mend.
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
# What `write_atomic` adds to a name.
_TEMPORARY = re.compile(r"\.[0-9a-f]{32}\.tmp$")


def retried(call: Callable[[], Result]) -> Result:
    """Calls `call`, again after a transient `OSError`, up to 5 times over about 10 seconds."""
    policy = Retrying(
        retry=retry_if_exception(lambda e: isinstance(e, OSError) and not isinstance(e, _FINAL)),
        stop=stop_after_attempt(5),
        wait=wait_random_exponential(multiplier=0.2, max=5),
        reraise=True,
    )
    return policy(call)


def absolute(url: str) -> str:
    """The URL in a form that means the same from any working folder (a Ray worker's, for one)."""
    return url if "://" in url else os.path.abspath(os.path.expanduser(url))


def join(url: str, *parts: str) -> str:
    """`url` with path parts behind it, whatever the store."""
    return posixpath.join(url, *parts)


def filesystem(url: str) -> tuple[fsspec.AbstractFileSystem, str]:
    """The file system of a URL, and the path inside it."""
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
        retried(lambda: fs.makedirs(path, exist_ok=True))
    except OSError as error:
        raise StorageError(
            f"The folder cannot be made: {error}", where=url, remedy="Check the path and its rights."
        ) from error


def open_file(url: str, mode: str = "rb", **options: Any) -> IO[Any]:
    """Opens a file; `FileNotFoundError` becomes a `StorageError`."""
    fs, path = filesystem(url)
    try:
        return cast(IO[Any], retried(lambda: fs.open(path, mode, **options)))
    except FileNotFoundError as error:
        raise StorageError("There is no such file.", where=url, remedy="Check the path.") from error


def read_bytes(url: str) -> bytes:
    """A whole file."""
    with open_file(url, "rb") as file:
        return file.read()


def read_text(url: str) -> str:
    """A whole UTF-8 file."""
    return read_bytes(url).decode("utf-8")


def write_atomic(url: str, data: bytes | str | memoryview) -> None:
    """Publishes a file whole: readers see the old one or the new one, never a part.

    On a disk: a temporary file beside it, flushed, then renamed. On an object store a put is atomic already.
    """
    content = data.encode("utf-8") if isinstance(data, str) else data
    if not is_local(url):
        fs, path = filesystem(url)
        retried(lambda: fs.pipe_file(path, bytes(content)))
        return

    def publish() -> None:
        with _published(url, durable=True) as file:
            file.write(content)

    retried(publish)


@contextmanager
def open_atomic(url: str) -> Iterator[IO[bytes]]:
    """A file to write to, published whole when the block ends well, as by `write_atomic`.

    For files that need not outlive a crash of the machine: no time goes into flushing them. Nothing is tried again.
    """
    if is_local(url):
        with _published(url, durable=False) as file:
            yield file
        return
    buffer = io.BytesIO()
    yield buffer
    fs, path = filesystem(url)
    retried(lambda: fs.pipe_file(path, buffer.getvalue()))


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
    if fs.exists(path):
        retried(lambda: fs.rm(path, recursive=True))
