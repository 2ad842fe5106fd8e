"""Which folders are checkpoints, which is the best, and which are kept."""

import pytest

from metatrain import storage
from metatrain.checkpoint import format as layout
from metatrain.errors import CheckpointError


def commit(run, step, **metrics):
    marker = layout.Marker(
        version=layout.VERSION,
        release="0",
        cursor=layout.Cursor(epoch=0, step=step, total=step),
        identity={},
        loop={},
        configuration={},
        metrics=metrics,
        world_size=1,
    )
    storage.write_atomic(storage.join(layout.checkpoint_url(run, step), layout.MARKER), marker.model_dump_json())


def test_a_folder_without_its_marker_is_not_a_checkpoint(tmp_path):
    run = str(tmp_path)
    commit(run, 10)
    storage.write_atomic(storage.join(layout.checkpoint_url(run, 20), "__0_0.distcp"), b"half")
    storage.write_atomic(storage.join(layout.checkpoints_url(run), "step-abc", layout.MARKER), b"{}")
    assert layout.committed_steps(run) == [10]


def test_the_best_is_the_lowest_validation_loss_else_the_newest(tmp_path):
    run = str(tmp_path)
    with pytest.raises(CheckpointError, match="no checkpoint"):
        layout.best_step(run)
    commit(run, 10)
    commit(run, 20)
    assert layout.best_step(run) == 20
    commit(run, 30, validation_loss=0.5)
    commit(run, 40, validation_loss=0.7)
    assert layout.best_step(run) == 30


def test_pruning_keeps_the_newest_and_the_best(tmp_path):
    run = str(tmp_path)
    commit(run, 10, validation_loss=0.1)
    for step in (20, 30, 40, 50):
        commit(run, step, validation_loss=0.2)
    assert layout.prune(run, 2) == [20, 30]
    assert layout.committed_steps(run) == [10, 40, 50]
    assert storage.list_folder(layout.checkpoints_url(run)) == ["step-00000010", "step-00000040", "step-00000050"]


def test_a_marker_of_another_version_is_refused(tmp_path):
    run = str(tmp_path)
    commit(run, 10)
    path = storage.join(layout.checkpoint_url(run, 10), layout.MARKER)
    storage.write_atomic(path, storage.read_text(path).replace('"version":1', '"version":9'))
    with pytest.raises(CheckpointError, match="another version") as caught:
        layout.read_marker(run, 10)
    assert "got: 9" in str(caught.value)
    with pytest.raises(CheckpointError, match="no such checkpoint"):
        layout.read_marker(run, 11)
