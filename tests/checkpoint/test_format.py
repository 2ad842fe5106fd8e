"""Which folders are checkpoints, which is the best, and what of a marker is refused."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from metatrain import storage
from metatrain.checkpoint import format as layout
from metatrain.errors import CheckpointError
from tests.checkpoint.made_up import commit


def test_a_folder_without_its_marker_is_not_a_checkpoint(tmp_path: Path) -> None:
    run = str(tmp_path)
    commit(run, 10)
    storage.write_atomic(storage.join(layout.checkpoint_url(run, 20), "0-00000000.bin"), b"half")
    storage.write_atomic(storage.join(layout.checkpoints_url(run), "step-abc", layout.MARKER), b"{}")
    assert layout.committed_steps(run) == [10]


def test_the_best_is_the_lowest_validation_loss_else_the_newest(tmp_path: Path) -> None:
    run = str(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        layout.best_step(run)
    commit(run, 10)
    commit(run, 20)
    assert layout.best_step(run) == 20
    commit(run, 30, validation_loss=0.5)
    commit(run, 40, validation_loss=0.7)
    assert layout.best_step(run) == 30


def test_a_marker_of_another_version_is_refused(tmp_path: Path) -> None:
    run = str(tmp_path)
    commit(run, 10)
    path = storage.join(layout.checkpoint_url(run, 10), layout.MARKER)
    storage.write_atomic(path, storage.read_text(path).replace('"version": 2', '"version": 1'))
    with pytest.raises(CheckpointError, match="another version") as caught:
        layout.read_marker(run, 10)
    assert "got: 1" in str(caught.value)
    assert "train again under another `run.name`" in str(caught.value)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        layout.read_marker(run, 11)


@given(st.data())
@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_marker_with_any_byte_changed_is_read_as_it_was_or_refused(tmp_path: Path, data: st.DataObject) -> None:
    run = str(tmp_path)
    path = Path(layout.checkpoint_url(run, 10), layout.MARKER)
    commit(run, 10, validation_loss=0.25)
    whole = layout.read_marker(run, 10)
    content = bytearray(path.read_bytes())
    at = data.draw(st.integers(0, 1 << 20)) % len(content)  # its length is not always the same: it holds a time
    content[at] = data.draw(st.integers(0, 255))
    path.write_bytes(content)
    try:
        found = layout.read_marker(run, 10)
    except CheckpointError as error:
        message = str(error)
    else:
        assert found == whole  # white space, or the byte that was there
        return
    assert layout.MARKER in message
    assert "remedy" in message


@pytest.mark.parametrize("text", ["", "[]", "null", '{"version": 2}', "[" * 100_000, "\ud800"])
def test_what_is_no_marker_is_refused(tmp_path: Path, text: str) -> None:
    run = str(tmp_path)
    commit(run, 10)
    Path(layout.checkpoint_url(run, 10), layout.MARKER).write_bytes(text.encode("utf-8", "surrogatepass"))
    with pytest.raises(CheckpointError, match="marker cannot be read") as caught:
        layout.read_marker(run, 10)
    assert f"metatrain checkpoints {run} --remove 10" in str(caught.value)
    assert "from the beginning" in str(caught.value)


def test_a_marker_says_what_it_was_given(tmp_path: Path) -> None:
    run = str(tmp_path)
    commit(run, 10, validation_loss=0.1)
    commit(run, 20, base=10)
    marker = layout.read_marker(run, 20)
    assert marker.base == layout.Base(step=10, contents=layout.read_marker(run, 10).contents, number=1)
    assert json.loads(marker.as_json())["cursor"] == {"epoch": 0, "step": 20, "total": 20}
