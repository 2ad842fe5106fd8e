"""`metatrain checkpoints`: what it lists, what it finds broken, how it compares two."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from metatrain import storage
from metatrain.checkpoint import read_tensors
from metatrain.checkpoint.differences import differences
from metatrain.checkpoint.format import MARKER, checkpoint_url
from metatrain.checkpoint.listing import listed, size
from metatrain.cli import main
from metatrain.errors import CheckpointError
from tests.checkpoint.made_up import save


def state(factor: float = 1.0) -> dict[str, Tensor]:
    return {
        "model.table": torch.arange(40.0).reshape(10, 4) * factor,
        "model.dense": torch.ones(3),
        "optimizer.step": torch.tensor(2.0),
    }


@pytest.fixture
def run(tmp_path: Path) -> str:
    """Full at 10, two differential ones over it, full at 40, and a killed attempt."""
    url = str(tmp_path / "run")
    tensors = state()
    save(url, 10, tensors, validation_loss=0.5)
    for step, row in ((20, 3), (30, 7)):
        tensors["model.table"][row] += 1.0
        bitmap = torch.zeros(10, dtype=torch.bool)
        bitmap[[3, row]] = True
        save(url, step, tensors, base=10, touched={"model.table": bitmap}, validation_loss=0.5 + row)
    save(url, 40, tensors)
    storage.make_folder(checkpoint_url(url, 50))
    return url


def flip(url: str, step: int, at: int = 0) -> Path:
    path = next(Path(checkpoint_url(url, step)).glob("*.bin"))
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    return path


def test_the_list_tells_kinds_sizes_and_the_best(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = {line.step: line for line in listed(run)}
    assert [line.base for line in lines.values()] == [10, 10, 10, 40, None]
    assert lines[10].bytes == 40 * 4 + 3 * 4 + 4
    assert lines[30].bytes == 2 * (4 + 16) + 3 * 4 + 4
    assert [step for step, line in lines.items() if line.best] == [10]
    assert not any(line.broken for line in lines.values())
    main(["checkpoints", run])
    shown = capsys.readouterr().out.splitlines()
    assert len(shown) == 6
    assert shown[1].split()[:5] == ["10", "0", "full", "176", "B"]
    assert "over 10" in shown[2]
    assert "no marker" in shown[5]


def test_a_flipped_byte_is_found_by_verify_and_named(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["checkpoints", run, "--verify"])
    capsys.readouterr()
    path = flip(run, 30)
    assert not any(line.broken for line in listed(run))  # of the same length
    with pytest.raises(SystemExit) as ended:
        main(["checkpoints", run, "--verify"])
    assert ended.value.code == 2
    shown = capsys.readouterr().out
    assert f"broken: bytes do not match their checksum. ({path.name}: bytes 0 to" in shown
    assert shown.count("broken") == 1
    with pytest.raises(CheckpointError, match="checksum") as caught:
        read_tensors(run, 30)
    assert str(path) in str(caught.value)
    assert f"metatrain checkpoints {run} --remove 30`" in str(caught.value)
    assert "goes on from step 20" in str(caught.value)


def test_a_broken_full_one_breaks_those_over_it(run: str) -> None:
    path = flip(run, 10)
    lines = {line.step: line for line in listed(run, verify=True)}
    assert [step for step, line in lines.items() if line.broken] == [10, 20, 30]
    assert "step 10" in lines[20].problem
    with pytest.raises(CheckpointError) as caught:
        read_tensors(run, 30)
    assert str(path) in str(caught.value)
    assert "--remove 10 20 30`" in str(caught.value)
    assert torch.equal(read_tensors(run, 40)["model.table"][7], state()["model.table"][7] + 1)


def test_missing_and_short_files_are_broken_without_reading(run: str) -> None:
    next(Path(checkpoint_url(run, 20)).glob("*.bin")).unlink()
    path = next(Path(checkpoint_url(run, 40)).glob("*.bin"))
    path.write_bytes(path.read_bytes()[:-1])
    Path(checkpoint_url(run, 30), "contents.json").unlink()
    problems = {line.step: line.problem for line in listed(run)}
    assert problems[10] == ""
    assert "is not there" in problems[20]
    assert "contents cannot be read" in problems[30]
    assert "in place of" in problems[40]
    for step in (20, 30, 40):
        with pytest.raises(CheckpointError):
            read_tensors(run, step)


def test_another_full_one_of_the_same_step_is_not_built_on(run: str) -> None:
    storage.remove(checkpoint_url(run, 10))
    save(run, 10, state(2.0))
    with pytest.raises(CheckpointError, match="builds on another checkpoint"):
        read_tensors(run, 20)


def test_two_are_compared_tensor_by_tensor(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = differences(run, 10, 30)
    (table,) = found.tensors
    assert (table.name, table.largest, table.rows_changed, table.rows) == ("model.table", 1.0, 2, 10)
    assert table.relative == pytest.approx(8**0.5 / state()["model.table"].norm().item())
    assert found.equal == 2
    main(["checkpoints", run, "--diff", "10", "30"])
    shown = capsys.readouterr().out
    assert "2 of 10" in shown
    assert "2 tensors are equal, 1 differ" in shown


def test_pruning_and_removing_from_the_command_line(run: str, capsys: pytest.CaptureFixture[str]) -> None:
    main(["checkpoints", run, "--prune", "1"])
    assert "removed: 20, 30" in capsys.readouterr().err
    Path(checkpoint_url(run, 40), MARKER).write_text("{}")
    main(["checkpoints", run, "--remove", "40"])
    assert [line.step for line in listed(run)] == [10, 50]
    with pytest.raises(SystemExit):
        main(["checkpoints", run, "--verify", "--prune", "1"])
    assert "one thing at a time" in capsys.readouterr().err


def test_sizes_are_short() -> None:
    assert [size(n) for n in (None, 12, 2048, 3 << 20, 5 << 30)] == ["", "12 B", "2.0 KiB", "3.0 MiB", "5.0 GiB"]
