"""How the training command ended is what the run's status says."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from metatrain.config import Config, validated
from metatrain.errors import ConfigError, TrainingError
from metatrain.observe.status import RunStatus, read_status
from metatrain.train import session
from metatrain.train import watch as module
from metatrain.train.watch import watching


class NoMetrics:
    """In place of Ray's."""

    def __init__(self, run: str) -> None:
        self.run = run

    def take(self, message: object) -> None:
        pass


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    monkeypatch.setattr(module, "RunMetrics", NoMetrics)
    return validated({"run": {"name": "x", "storage": str(tmp_path)}}, where="test")


def ended(config: Config, error: BaseException | None) -> RunStatus:
    def work() -> None:
        with watching(config) as watch:
            watch.take({"start": 1})
            if error is not None:
                raise error

    if error is None:
        work()
    else:
        with pytest.raises(type(error)):
            work()
    return read_status(config.run_url)


def test_a_run_that_ends_well_is_finished(config: Config) -> None:
    assert ended(config, None).state == "finished"


def test_an_error_is_told_by_its_first_line(config: Config) -> None:
    status = ended(config, TrainingError("The loss is not finite.", where="step 3", remedy="Lower the rate."))
    assert (status.state, status.why) == ("failed", "The loss is not finite.")
    assert [fault.what for fault in status.faults] == ["The loss is not finite."]


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(1)])
def test_who_is_asked_to_end_has_not_failed(config: Config, error: BaseException) -> None:
    status = ended(config, error)
    assert (status.state, status.why, status.faults) == ("interrupted", "", ())


def test_a_ray_that_does_not_start_is_told_and_is_the_run_s_end(
    config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in session.LOCAL_SETTINGS:
        monkeypatch.delenv(name, raising=False)
    seen: dict[str, str] = {}

    def late(**options: object) -> None:
        seen.update(os.environ)
        raise Exception("The current node timed out during startup.")  # as Ray has it: no kind of its own

    monkeypatch.setattr(session.ray, "is_initialized", lambda: False)
    monkeypatch.setattr(session, "local_ray", late)
    with pytest.raises(ConfigError, match="try again") as caught, watching(config), session.ray_session(config, None):
        pytest.fail("there is no Ray")
    assert "timed out during startup" in str(caught.value)
    status = read_status(config.run_url)
    assert (status.state, status.why) == ("failed", "Ray cannot be started: The current node timed out during startup.")
    # What a local Ray's processes are to have in their environment is in the caller's no longer than its session.
    assert session.LOCAL_SETTINGS.items() <= seen.items()
    assert not session.LOCAL_SETTINGS.keys() & os.environ.keys()
