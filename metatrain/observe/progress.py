"""How a long training shows itself on the command line: a bar on a terminal, a line now and then elsewhere."""

from __future__ import annotations

import logging
import sys
import time
from typing import Any

from tqdm import tqdm

log = logging.getLogger("metatrain")


class TrainingProgress:
    """Takes the workers' messages: `say`, `step` with the curves, `validation_loss`, `done`."""

    SECONDS_BETWEEN_LINES = 15.0

    def __init__(self) -> None:
        self._bar: tqdm | None = None
        self._terminal = sys.stderr.isatty()
        self._line_at = 0.0
        self._starts = 0

    def take(self, message: dict[str, Any]) -> None:
        """Shows one message."""
        if "start" in message:
            self._starts += 1
            if self._starts > 1:
                self._say(f"the worker group was started again ({self._starts - 1}), {message['start']} workers")
        if "say" in message:
            self._say(message["say"])
        if "validation_loss" in message:
            best = " (best so far)" if message["best"] else ""
            self._say(f"step {message['step']}: validation loss {message['validation_loss']:.4f}{best}")
        elif "step" in message:
            self._step(message)
        if message.get("stopped_early"):
            self._say("the validation loss has stopped falling")
        if "done" in message:
            self._say(f"training is at its end: {message['done']} of at most {message['steps']} steps")
            if message["skipped"]:
                named = ", ".join(map(str, message["skipped_steps"]))
                more = ", …" if message["skipped"] > len(message["skipped_steps"]) else ""
                self._say(f"skipped steps, not finite or exploding: {message['skipped']} ({named}{more})")

    def close(self) -> None:
        """Ends the bar."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _say(self, text: str) -> None:
        with tqdm.external_write_mode(file=sys.stderr):
            log.info(text)

    def _step(self, message: dict[str, Any]) -> None:
        shown = {
            "epoch": message["epoch"],
            "before": f"{message['learning/loss_before']:.4f}",
            "after": f"{message['learning/loss_after']:.4f}",
            "tasks/s": f"{message['speed/tasks_per_second']:.0f}",
        }
        if self._terminal:
            if self._bar is None:
                self._bar = tqdm(total=message["steps"], initial=message["step"], unit="step", dynamic_ncols=True)
            self._bar.n = message["step"]
            self._bar.set_postfix(shown, refresh=True)
            return
        last = message["step"] == message["steps"]
        if last or time.monotonic() - self._line_at > self.SECONDS_BETWEEN_LINES:
            self._line_at = time.monotonic()
            self._say(f"step {message['step']}/{message['steps']}  " + "  ".join(f"{k} {v}" for k, v in shown.items()))
