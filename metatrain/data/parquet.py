"""Parquet from outside, opened without running what it may carry: no type of its own, which code would have to load.

Opening a file makes pyarrow call the loader of every extension type that the file names and this process knows, before
a value is read. Ray Data, which Ray Train imports, registers types whose loaders unpickle what the file holds: a file
could so run any code. Whether a file names such a type is therefore looked up in its footer's bytes.
"""

from __future__ import annotations

import base64
import os
import re
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

_MAGIC_BYTES = 8  # behind the footer: its length, and PAR1
_ARROW_SCHEMA = b"ARROW:schema"
_EXTENSION = b"ARROW:extension:name"
_BASE64 = re.compile(rb"[A-Za-z0-9+/]{40,}")


def open_parquet(source: Any, **options: Any) -> pq.ParquetFile:
    """Opens a Parquet file.

    Args:
        source: A local path, or an open file.
        options: Of `pyarrow.parquet.ParquetFile`.

    Raises:
        pyarrow.ArrowInvalid: Not a whole Parquet file, or one with extension types.
        OSError: It cannot be read.
    """
    if isinstance(source, str):
        with open(source, "rb") as file:
            _refuse_extension_types(file)
    else:
        _refuse_extension_types(source)
    return pq.ParquetFile(source, **options)


def read_parquet(content: bytes) -> pa.Table:
    """A whole file's table.

    Raises:
        pyarrow.ArrowInvalid: Not a whole Parquet file, or one with extension types.
        OSError: Its pages cannot be decoded.
    """
    with open_parquet(pa.BufferReader(content), page_checksum_verification=True) as file:
        return file.read()


def _refuse_extension_types(file: Any) -> None:
    size = file.seek(0, os.SEEK_END)
    size = file.tell() if size is None else size
    file.seek(max(0, size - _MAGIC_BYTES))
    tail = file.read(_MAGIC_BYTES)
    footer = min(int.from_bytes(tail[:4], "little"), max(0, size - _MAGIC_BYTES))
    file.seek(max(0, size - _MAGIC_BYTES - footer))
    content = file.read(footer)
    file.seek(0)
    if _ARROW_SCHEMA not in content:
        return
    for run in _BASE64.findall(content):
        # The bytes before the schema may look like a part of it: all four alignments are tried.
        for start in range(4):
            piece = run[start:]
            if _EXTENSION in base64.b64decode(piece[: len(piece) // 4 * 4]):
                raise pa.ArrowInvalid("it has a column of an extension type, which would have to be loaded as code")
