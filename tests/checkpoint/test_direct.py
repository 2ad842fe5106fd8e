"""A file written past the page cache holds what was written, on file systems that can and on those that cannot."""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metatrain.checkpoint import direct
from metatrain.checkpoint.direct import DirectFile

PAGE = mmap.PAGESIZE


def has_direct_writes(folder: Path) -> bool:
    try:
        os.close(os.open(folder / "probe", os.O_WRONLY | os.O_CREAT | os.O_DIRECT))
    except OSError:
        return False
    return True


@given(sizes=st.lists(st.integers(0, 3 * PAGE) | st.sampled_from([1, PAGE - 1, PAGE, PAGE + 1, 2 * PAGE]), max_size=6))
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_was_written_is_there(tmp_path: Path, sizes: list[int]) -> None:
    contents = [os.urandom(size) for size in sizes]
    path = tmp_path / "x.bin"
    path.write_bytes(b"what was there before, and longer" * PAGE)
    with DirectFile(str(path), buffer=PAGE) as file:
        assert [file.write(memoryview(content)) for content in contents] == sizes
    assert path.read_bytes() == b"".join(contents)


def test_whole_buffers_pass_the_page_cache_by(tmp_path: Path) -> None:
    path = tmp_path / "x.bin"
    if not has_direct_writes(tmp_path):
        pytest.skip("the file system of temporary files has no direct writes")
    with DirectFile(str(path), buffer=PAGE) as file:
        file.write(memoryview(bytes(100 * PAGE)))
        with path.open("rb") as other, mmap.mmap(other.fileno(), 0, prot=mmap.PROT_READ) as seen:
            assert len(seen) == 100 * PAGE, "on the disk before the end"
        flags = Path(f"/proc/self/fdinfo/{file._file}").read_text()
        assert int(flags.split("flags:")[1].split()[0], 8) & os.O_DIRECT


@pytest.mark.parametrize("where", ["open", "write"])
def test_a_file_system_without_direct_writes_takes_the_usual_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    asked: list[Any] = []

    def refuse(is_direct: int, what: Any) -> None:
        if is_direct:
            asked.append(what)
            raise OSError(errno.EINVAL, "Invalid argument")

    real_open, real_write = os.open, os.write

    def opening(path: str, flags: int, mode: int) -> int:
        refuse(flags & os.O_DIRECT, path)
        return real_open(path, flags, mode)

    def writing(file: int, data: memoryview) -> int:
        refuse(fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT, file)
        return real_write(file, data)

    monkeypatch.setattr(direct.os, where, opening if where == "open" else writing)
    content = os.urandom(5 * PAGE + 7)
    with DirectFile(str(tmp_path / "x.bin"), buffer=PAGE) as file:
        file.write(memoryview(content))
    assert (tmp_path / "x.bin").read_bytes() == content
    assert len(asked) == (where == "open" or has_direct_writes(tmp_path))


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(direct.os, "write", full)
    with pytest.raises(OSError, match="No space left"), DirectFile(str(tmp_path / "x.bin"), buffer=PAGE) as file:
        file.write(memoryview(bytes(2 * PAGE)))
    opened = [os.readlink(entry) for entry in Path("/proc/self/fd").iterdir() if entry.exists()]
    assert str(tmp_path / "x.bin") not in opened
