"""A local file that is written past the page cache, where its file system can.

A checkpoint's bytes are not read again soon. In the cache they would take the place of what is (the shards of the
dataset), and filling its pages costs several times what handing the bytes to the disk does.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os

#: Bytes handed over at a time.
BUFFER = 4 << 20
#: Not every system has it.
_DIRECT = getattr(os, "O_DIRECT", 0)


class DirectFile:
    """A new file, written from its start to its end. Leaving the block without an error puts it on the disk.

    Direct writes take whole sectors from aligned memory, hence the copy into a buffer; the rest, shorter than a buffer,
    goes the usual way.

    Args:
        path: An existing file is replaced.
        buffer: Bytes handed over at a time: a multiple of the page's size.

    Raises:
        OSError: What the file system says, a full disk among it.
    """

    def __init__(self, path: str, buffer: int = BUFFER) -> None:
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC
        try:
            self._file, self._is_direct = os.open(path, flags | _DIRECT, 0o666), bool(_DIRECT)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._file, self._is_direct = os.open(path, flags, 0o666), False
        self._buffer, self._filled = memoryview(mmap.mmap(-1, buffer)), 0  # it begins at a page's start

    def __enter__(self) -> DirectFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        try:
            if kind is None:
                self._usual()
                self._hand_over(self._buffer[: self._filled])
                os.fsync(self._file)
        finally:
            os.close(self._file)

    def write(self, data: memoryview, /) -> int:
        """Appends bytes; some of them may be on the disk only at the end."""
        done = 0
        while done < len(data):
            count = min(len(data) - done, len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + count] = data[done : done + count]
            self._filled, done = self._filled + count, done + count
            if self._filled == len(self._buffer):
                self._hand_over(self._buffer)
                self._filled = 0
        return len(data)

    def _hand_over(self, data: memoryview) -> None:
        done = 0
        while done < len(data):
            try:
                done += os.write(self._file, data[done:])
            except OSError as error:
                # Some file systems take the flag and refuse the write, or take a part that ends within a sector.
                if error.errno != errno.EINVAL or not self._is_direct:
                    raise
                self._usual()

    def _usual(self) -> None:
        if self._is_direct:
            fcntl.fcntl(self._file, fcntl.F_SETFL, fcntl.fcntl(self._file, fcntl.F_GETFL) & ~_DIRECT)
            self._is_direct = False
