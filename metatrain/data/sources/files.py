"""Raw files wherever they are: a path, a folder, a pattern, any fsspec URL, or a member of a zip archive."""

from __future__ import annotations

import glob
import gzip
import hashlib
import io
import lzma
import os
import posixpath
import struct
import zipfile
import zlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO, cast

from metatrain import storage
from metatrain.errors import SourceError

#: Of the files of one table so many bytes are hashed to know them by: a second or two. A large log isn't read twice.
_HASHED_BYTES = 1 << 30
_BLOCK_BYTES = 1 << 22
#: What stores call that which changes with a file.
_MARKS = ("ETag", "etag", "mtime", "LastModified", "last_modified", "created")


@dataclass(frozen=True)
class RawFile:
    """One raw file: a URL, or a member of the zip archive at that URL. Picklable; opened where it is read."""

    url: str
    member: str | None = None

    @property
    def name(self) -> str:
        """The last part of its path."""
        return posixpath.basename(self.member or self.url)

    @property
    def place(self) -> str:
        """How an error message names it."""
        return f"{self.url}: {self.member}" if self.member else self.url

    def open(self) -> IO[bytes]:
        """Opens it for reading.

        Raises:
            SourceError: A broken archive, also when it is read.
        """
        if self.member is None:
            return storage.open_file(self.url)
        with _packed(self.place):
            member = zipfile.ZipFile(storage.open_file(self.url)).open(self.member)  # noqa: SIM115 (the reader closes it)
        return cast(IO[bytes], _Packed(member, self.place))

    def unpacked(self, raw: IO[bytes]) -> IO[bytes]:
        """The opened file's content: a `.gz` unpacked as it is read.

        Raises:
            SourceError: When it is read, and broken.
        """
        if not self.name.endswith(".gz"):
            return raw
        return cast(IO[bytes], _Packed(cast(IO[bytes], gzip.GzipFile(fileobj=raw)), self.place))

    def read(self) -> bytes:
        """All of it."""
        with self.open() as file:
            return file.read()

    def size(self) -> int:
        """Its size in bytes, unpacked."""
        if self.member is None:
            return storage.size(self.url)
        return _archive(self.url)[self.member].file_size


def find_files(path: str) -> list[RawFile]:
    """The files that a path names: itself, a folder's, a pattern's, or a zip archive's members; by name.

    Raises:
        SourceError: There is nothing there, or a broken archive.
    """
    url = storage.absolute(path)
    fs, inside = storage.filesystem(url)
    prefix = url[: len(url) - len(inside)] if url.endswith(inside) else ""
    if fs.isfile(inside):
        return _members(url) if url.lower().endswith(".zip") else [RawFile(url)]
    if fs.isdir(inside):
        # A folder's files and those of the folders in it: an archive unpacks to ml-1m/ratings.dat.
        found = [str(p) for p in fs.find(inside) if not posixpath.basename(p).startswith((".", "_"))]
    else:
        found = [str(p) for p in fs.glob(inside) if fs.isfile(p)] if glob.has_magic(inside) else []
    if not found:
        raise SourceError(
            "There is no such file, folder or pattern of files.", where=path, remedy="Check `prepare.path`."
        )
    return [RawFile(_with_prefix(prefix, p)) for p in sorted(found)]


def _with_prefix(prefix: str, path: str) -> str:
    return path if "://" in path or (os.path.isabs(path) and not prefix) else prefix + path


def _members(url: str) -> list[RawFile]:
    return [RawFile(url, n) for n in sorted(_archive(url)) if not n.endswith("/") and not n.startswith("__MACOSX")]


def _archive(url: str) -> dict[str, zipfile.ZipInfo]:
    """The members of a zip archive, by name."""
    with storage.open_file(url) as file, _packed(url):
        whole = file if file.seekable() else io.BytesIO(file.read())
        with zipfile.ZipFile(whole) as archive:
            return {member.filename: member for member in archive.infolist()}


@contextmanager
def _packed(place: str) -> Iterator[None]:
    """What unpacking raises over broken bytes becomes a `SourceError`."""
    try:
        yield
    except (zipfile.BadZipFile, gzip.BadGzipFile, zlib.error, lzma.LZMAError, EOFError, struct.error) as error:
        raise SourceError(f"The archive is broken: {error}.", where=place, remedy="Get the file again.") from error
    except (NotImplementedError, RuntimeError, ValueError, OverflowError, OSError) as error:
        raise SourceError(
            f"The archive cannot be read: {error}.", where=place, remedy="Pack it anew, with Deflate and no password."
        ) from error


class _Packed(io.RawIOBase):
    """The content of something packed, whose errors name the file."""

    def __init__(self, inner: IO[bytes], place: str) -> None:
        self._inner, self._place = inner, place

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """As what is packed is."""
        return self._inner.seekable()

    def read(self, size: int | None = -1) -> bytes:
        """As of any file."""
        with _packed(self._place):
            return self._inner.read(-1 if size is None else size)

    def readline(self, size: int | None = -1) -> bytes:
        """As of any file."""
        with _packed(self._place):
            return self._inner.readline(-1 if size is None else size)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """As of any file."""
        with _packed(self._place):
            return self._inner.seek(offset, whence)

    def tell(self) -> int:
        """As of any file."""
        return self._inner.tell()

    def close(self) -> None:
        """Closes it."""
        self._inner.close()
        super().close()


def file_sizes(files: Sequence[RawFile]) -> list[int]:
    """The size of each file in bytes, unpacked from its archive; an archive is opened once."""
    archives: dict[str, dict[str, zipfile.ZipInfo]] = {}
    sizes = []
    for file in files:
        if file.member is None:
            sizes.append(storage.size(file.url))
            continue
        if file.url not in archives:
            archives[file.url] = _archive(file.url)
        sizes.append(archives[file.url][file.member].file_size)
    return sizes


def fingerprints(files: Sequence[RawFile]) -> list[str]:
    """What the files of one table hold, wherever they are and whenever they were copied there: a text each.

    A file on a disk is known by its size and sha256, a member of a zip archive by its size and the archive's CRC-32 of
    it. By size and the store's mark (its etag, or the time of change) are known: a file in a remote store, and a file
    that would bring the bytes to hash above 1 GiB. So a large log that is copied counts as another one.
    """
    archives: dict[str, dict[str, zipfile.ZipInfo]] = {}
    result, left = [], _HASHED_BYTES
    for file in files:
        if file.member is not None:
            if file.url not in archives:
                archives[file.url] = _archive(file.url)
            member = archives[file.url][file.member]
            result.append(f"{member.file_size} bytes, crc32 {member.CRC:08x}")
            continue
        fs, path = storage.filesystem(file.url)
        info = fs.info(path)
        size = int(info.get("size") or 0)
        if storage.is_local(file.url) and size <= left:
            left -= size
            content = f"sha256 {_sha256(file)}"
        else:
            content = next((f"{name} {info[name]}" for name in _MARKS if name in info), "")
        result.append(f"{size} bytes, {content}")
    return result


def _sha256(file: RawFile) -> str:
    digest = hashlib.sha256()
    with file.open() as opened:
        while block := opened.read(_BLOCK_BYTES):
            digest.update(block)
    return digest.hexdigest()


def named(files: list[RawFile], *names: str) -> RawFile | None:
    """The first file that has one of the names, or None."""
    return next((f for n in names for f in files if f.name == n), None)


def table_format(file: RawFile) -> str:
    """Which reader a file takes, by its ending: parquet, json or csv (also of compressed text).

    Raises:
        SourceError: An ending that none takes.
    """
    name = file.name.lower().removesuffix(".gz")
    for endings, kind in (
        ((".parquet", ".pq"), "parquet"),
        ((".jsonl", ".json", ".ndjson"), "json"),
        ((".csv", ".tsv", ".txt"), "csv"),
    ):
        if name.endswith(endings):
            return kind
    raise SourceError(
        "A table must be Parquet, CSV or JSON lines.",
        where=file.place,
        got=posixpath.splitext(name)[1] or "no ending",
        remedy="Name files with .parquet, .csv, .tsv, .jsonl or .json (text may be .gz).",
    )
