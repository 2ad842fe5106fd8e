"""What a checkpoint's contents may say: changed ones are read or refused, and nothing in a checkpoint is run."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from metatrain import storage
from metatrain.checkpoint import committed_steps, read_tensors
from metatrain.checkpoint.contents import CONTENTS, parsed_contents
from metatrain.checkpoint.format import MARKER, checkpoint_url, checksum, read_marker
from metatrain.checkpoint.listing import listed
from metatrain.errors import CheckpointError
from tests.checkpoint.made_up import save


def state() -> dict[str, Tensor]:
    return {
        "model.table": torch.arange(40.0).reshape(10, 4),
        "model.flags": torch.tensor([True, False]),
        "model.none": torch.zeros(0, 3),
        "optimizer.step": torch.tensor(2.0),
    }


def differential(run: str) -> None:
    """A full checkpoint of step 1, and one of step 2 over it."""
    tensors = state()
    save(run, 1, tensors)
    tensors["model.table"][[2, 5]] = -1.0
    bitmap = torch.zeros(10, dtype=torch.bool)
    bitmap[[2, 5]] = True
    save(run, 2, tensors, base=1, touched={"model.table": bitmap})


def commit_contents(run: str, step: int, contents: bytes) -> None:
    """Puts other contents in place, with a marker that vouches for them: what no accident does."""
    url = checkpoint_url(run, step)
    Path(url, CONTENTS).write_bytes(contents)
    marker = read_marker(run, step).model_copy(update={"contents": checksum(contents)})
    Path(url, MARKER).write_text(marker.as_json())


@st.composite
def mutations(draw: st.DrawFn) -> tuple[int, Any]:
    """Which leaf or branch to change, and to what."""
    values = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-2, 50),
        st.sampled_from([-(2**63), 2**31, 2**62, 2**63, 2**200]),
        st.floats(),
        st.sampled_from(["", "int8", "float64", "exact", "../x.bin", "0-00000000.bin", "/etc/passwd", "0" * 16]),
        st.lists(st.integers(-1, 5), max_size=3),
        st.just({}),
    )
    return draw(st.integers(0, 500)), draw(values)


def places(value: Any, found: list[tuple[Any, Any]]) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        found.append((value, key))
        places(inner, found)
    return found


@given(changes=st.lists(mutations(), min_size=1, max_size=3))
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_changed_contents_are_read_or_refused(tmp_path: Path, changes: list[tuple[int, Any]]) -> None:
    run = str(tmp_path / "run")
    storage.remove(run)
    differential(run)
    contents = json.loads(Path(checkpoint_url(run, 2), CONTENTS).read_bytes())
    for which, value in changes:
        where = places(contents, [])
        if where:
            container, key = where[which % len(where)]
            container[key] = value
    commit_contents(run, 2, json.dumps(contents).encode())
    try:
        found = read_tensors(run, 2)
    except CheckpointError as error:
        message = str(error)
    else:
        assert set(found) == set(contents["tensors"])
        return
    assert "step-0000000" in message
    assert "remedy" in message
    listed(run, verify=True)


@pytest.mark.parametrize(
    "contents",
    [b"", b"\xff", b"[]", b"null", b"{}", b"[" * 100_000, b'{"block": 8388608, "tensors": {"x": 1}}', b'{"a": NaN}'],
)
def test_what_are_no_contents_is_refused(contents: bytes) -> None:
    with pytest.raises(CheckpointError, match="contents cannot be read") as caught:
        parsed_contents(contents, "run/contents.json")
    assert caught.value.where == "run/contents.json"


def test_a_gap_an_overlap_and_a_wrong_size_are_told(tmp_path: Path) -> None:
    run = str(tmp_path)
    differential(run)
    good = json.loads(Path(checkpoint_url(run, 1), CONTENTS).read_bytes())

    def refused(**chunk: Any) -> str:
        bad = json.loads(json.dumps(good))
        bad["tensors"]["model.table"]["chunks"][0] |= chunk
        with pytest.raises(CheckpointError) as caught:
            parsed_contents(json.dumps(bad).encode(), "x")
        return str(caught.value)

    assert "row 0 is missing" in refused(start=1)
    assert "10 rows, its chunks 9" in refused(rows=9)
    assert "another size than its rows" in refused(data={"at": 0, "bytes": 159, "checksums": ["0"]})
    assert "checksums than blocks" in refused(data={"at": 0, "bytes": 160, "checksums": []})
    assert "String should match pattern" in refused(file="../0-00000000.bin")


class Malicious:
    """A pickle that, loaded, makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)

    def __reduce__(self) -> Any:
        return os.mkdir, (self.path,)


@pytest.mark.parametrize("name", ["0.bin", CONTENTS, MARKER, ".metadata"])
def test_a_malicious_pickle_in_any_file_does_nothing(tmp_path: Path, name: str) -> None:
    run, loaded = str(tmp_path / "run"), tmp_path / "loaded"
    save(run, 1, state())
    folder = Path(checkpoint_url(run, 1))
    path = next(folder.glob("*.bin")) if name == "0.bin" else folder / name
    whole = path.stat().st_size if path.exists() else 0
    path.write_bytes(pickle.dumps(Malicious(loaded)).ljust(whole, b"\0"))
    assert committed_steps(run) == [1]
    if name == ".metadata":  # where torch's own format has its pickle: nothing looks at it
        assert torch.equal(read_tensors(run, 1)["model.table"], state()["model.table"])
    else:
        with pytest.raises(CheckpointError):
            read_tensors(run, 1)
    listed(run, verify=True)
    assert not loaded.exists()
    pickle.loads(pickle.dumps(Malicious(loaded)))
    assert loaded.exists(), "the pickle is a malicious one"


def test_a_checkpoint_of_the_first_format_is_refused_and_its_pickle_is_not_loaded(tmp_path: Path) -> None:
    run, loaded = str(tmp_path / "run"), tmp_path / "loaded"
    folder = Path(checkpoint_url(run, 1))
    storage.make_folder(str(folder))
    (folder / ".metadata").write_bytes(pickle.dumps(Malicious(loaded)))
    (folder / MARKER).write_text(json.dumps({"version": 1, "release": "0.1.0"}))
    with pytest.raises(CheckpointError, match="another version") as caught:
        read_tensors(run, 1)
    assert "Use the release that wrote it" in str(caught.value)
    assert not loaded.exists()
