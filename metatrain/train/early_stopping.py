"""Early stopping: a state that a checkpoint keeps, and one rule."""

from __future__ import annotations

import math
from typing import Any

from metatrain.config import EarlyStopping


class Patience:
    """Counts validations without improvement. `best` is the lowest loss so far, `waited` the validations since."""

    def __init__(self, config: EarlyStopping, state: dict[str, Any] | None = None) -> None:
        self._config = config
        self.best: float = math.inf
        self.waited = 0
        if state:
            # JSON has no infinity: "not judged yet" is null.
            self.best = math.inf if state["best"] is None else float(state["best"])
            self.waited = int(state["waited"])

    def judge(self, loss: float) -> bool:
        """Takes a validation loss; returns whether it is the best so far by more than the tolerance."""
        improved = loss < self.best - self._config.tolerance
        self.best, self.waited = (loss, 0) if improved else (self.best, self.waited + 1)
        return improved

    @property
    def exhausted(self) -> bool:
        """Whether training should end."""
        return bool(self._config.patience) and self.waited >= self._config.patience

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"best": None if math.isinf(self.best) else self.best, "waited": self.waited}
