"""Python's garbage collector, for processes that are ours alone."""

from __future__ import annotations

import gc


def relax() -> None:
    """Has it look for cycles less often: with Python's own settings a quarter of the time that imports take is spent
    looking, again and again, through modules that are there to stay.
    """
    gc.set_threshold(50_000, 10, 10)
