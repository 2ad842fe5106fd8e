"""Parts of files: any slice is what was written, and a changed byte is found wherever it is."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metatrain.checkpoint import blocks
from metatrain.checkpoint.blocks import Part, PartReader, writing
from metatrain.errors import CheckpointError


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "BLOCK", 8)
    monkeypatch.setenv("METATRAIN_STORAGE_ATTEMPTS", "1")  # a store's short read may pass, a disk's does not


def written(url: str, contents: list[bytes]) -> list[Part]:
    with writing(url) as file:
        return [file.put(memoryview(content)) for content in contents]


@pytest.mark.parametrize("scheme", ["", "memory://"])
@given(contents=st.lists(st.binary(max_size=200), min_size=1, max_size=4), data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_slice_of_any_part_comes_back(
    tmp_path: Path, scheme: str, contents: list[bytes], data: st.DataObject
) -> None:
    url = f"{scheme}{tmp_path}/x.bin"
    parts = written(url, contents)
    n = data.draw(st.integers(0, len(contents) - 1))
    start = data.draw(st.integers(0, len(contents[n])))
    into = bytearray(data.draw(st.integers(0, len(contents[n]) - start)))
    with PartReader(url) as file:
        file.read(parts[n], memoryview(into), start)
        for part in parts:
            file.check(part)
    assert into == contents[n][start : start + len(into)]


@given(content=st.binary(min_size=1, max_size=100), data=st.data())
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_changed_byte_is_found_and_no_other_slice_is_refused(
    tmp_path: Path, content: bytes, data: st.DataObject
) -> None:
    path = tmp_path / "x.bin"
    (part,) = written(str(path), [content])
    at = data.draw(st.integers(0, len(content) - 1))
    changed = bytearray(content)
    changed[at] ^= 1 << data.draw(st.integers(0, 7))
    path.write_bytes(changed)
    start = data.draw(st.integers(0, len(content) - 1))
    into = bytearray(data.draw(st.integers(1, len(content) - start)))
    same_block = start // 8 <= at // 8 <= (start + len(into) - 1) // 8
    with PartReader(str(path)) as file:
        if same_block:
            with pytest.raises(CheckpointError, match="do not match their checksum") as caught:
                file.read(part, memoryview(into), start)
            assert str(path) in str(caught.value)
        else:
            file.read(part, memoryview(into), start)
            assert into == content[start : start + len(into)]
        with pytest.raises(CheckpointError):
            file.check(part)


@pytest.mark.parametrize("scheme", ["", "memory://"])
def test_missing_and_short_files_are_named(tmp_path: Path, scheme: str) -> None:
    url = f"{scheme}{tmp_path}/x.bin"
    (part,) = written(url, [b"x" * 20])
    with writing(url) as file:
        file.put(memoryview(b"x" * 17))
    with PartReader(url) as file, pytest.raises(CheckpointError, match="cannot be read") as caught:
        file.check(part)
    assert "x.bin" in str(caught.value)
    with pytest.raises(CheckpointError, match="cannot be read"), PartReader(f"{scheme}{tmp_path}/none.bin") as file:
        file.check(part)
