"""Workers that hang: in a call that lets other threads run, and stopped as a whole. Each is named and the run ends."""

from __future__ import annotations

import logging
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from metatrain.checkpoint import committed_steps
from metatrain.config import Config
from metatrain.errors import TrainingError
from metatrain.train.launch import launch
from tests.data.tiny_dataset import write_tiny_dataset
from tests.train.runs import recipe

pytestmark = [pytest.mark.ray, pytest.mark.timeout(580), pytest.mark.usefixtures("ray_session")]

STEPS = 60


def test_hanging_workers_are_named_and_the_group_starts_again_as_often_as_is_allowed(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    write_tiny_dataset(str(tmp_path / "dataset"), users=400, items=60, validation=10)
    rules = {"workers": 2, "max_steps": STEPS, "epochs": 9, "hang_seconds": 22, "validate_every": 0, "max_failures": 1}
    config = recipe(str(tmp_path / "dataset"), str(tmp_path / "runs"), "hangs", rules)
    folder = str(tmp_path)

    def work(config: Config, seat: Any) -> None:  # here, so that Ray sends it by value
        from metatrain.train.step import OuterLoop
        from metatrain.train.worker import train

        step = OuterLoop.step

        def hanging(self: OuterLoop, batch: Any, number: int, *args: Any, **options: Any) -> Any:
            for rank, at, name in ((1, 20, "sleeps"), (0, 40, "stopped")):
                flag = os.path.join(folder, name)
                if (seat.rank, number) == (rank, at) and not os.path.exists(flag):
                    Path(flag).touch()
                    if name == "stopped":
                        os.kill(os.getpid(), signal.SIGSTOP)
                    time.sleep(10_000)
            if number > 20:
                time.sleep(0.25)  # or no heartbeat tells of a step before the second one hangs
            return step(self, batch, number, *args, **options)

        OuterLoop.step = hanging  # pyright: ignore[reportAttributeAccessIssue]
        train(config, seat)

    caplog.set_level(logging.INFO, logger="metatrain")
    with pytest.raises(TrainingError, match=r"train\.max_failures") as caught:
        launch(config, work=work)
    said = [r.getMessage() for r in caplog.records if "hangs and is killed" in r.getMessage()]
    assert len(said) == 2
    assert "rank 1 " in said[0]
    assert "step 20, stage 'read'" in said[0]
    assert "rank 0 " in said[1]
    assert "no sign of life for" in said[1]  # so its step is that of its last one
    assert "rank 0 " in str(caught.value)
    assert committed_steps(config.run_url)[-1] in (35, 40)  # the last one was being written when rank 0 stopped
