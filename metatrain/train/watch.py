"""Those who follow a run from the command that launched it: the terminal, RUN/status.json, Ray's metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

from metatrain.config import Config
from metatrain.observe.progress import TrainingProgress
from metatrain.observe.status import StatusFile
from metatrain.train.metrics import RunMetrics


class Watch:
    """Passes the workers' messages on to all who follow."""

    def __init__(self, config: Config) -> None:
        self.status = StatusFile(config.run_url, config.train.epochs)
        self._run, self._progress = config.run.name, TrainingProgress()
        self._metrics: RunMetrics | None = None

    def take(self, message: dict[str, Any]) -> None:
        """Takes a message: `start`, `say`, `step` with the curves, `validation_loss`, `checkpoint`, `fault`, `done`."""
        # Messages come where Ray is there; the watch begins before, while it starts.
        self._metrics = self._metrics or RunMetrics(self._run)
        for follower in (self._progress, self.status, self._metrics):
            follower.take(message)

    def tick(self) -> None:
        """Lets the status file say that the run is alive. Call it every second or so."""
        self.status.tick()

    def close(self) -> None:
        """Ends the terminal's bar."""
        self._progress.close()


@contextlib.contextmanager
def watching(config: Config) -> Iterator[Watch]:
    """A watch over the training inside the block; how the block ends is how the run ended."""
    watch = Watch(config)
    try:
        yield watch
    except (KeyboardInterrupt, SystemExit):  # Ctrl-C, or a signal that asks the command to end
        watch.status.end("interrupted")
        raise
    except BaseException as error:
        watch.status.end("failed", str(error).partition("\n")[0] or type(error).__name__)
        raise
    else:
        watch.status.end("finished")
    finally:
        watch.close()
