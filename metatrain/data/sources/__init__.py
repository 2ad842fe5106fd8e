"""Sources of raw logs: each a function from the configuration to a `RawLog`. A new one is registered here."""

from __future__ import annotations

import difflib
from collections.abc import Callable

from metatrain.config import PrepareConfig
from metatrain.data.sources.events import read_events
from metatrain.data.sources.movielens import read_movielens
from metatrain.data.sources.netflix import read_netflix
from metatrain.data.sources.rawlog import Chunk, RawLog, Rows, TableChunk, raw_type
from metatrain.data.sources.synthetic import read_synthetic
from metatrain.data.sources.transposed import transposed
from metatrain.errors import SourceError

_RELEASES = ("100k", "1m", "10m", "20m", "25m", "32m", "latest", "latest-small")

#: Every source by its name.
SOURCES: dict[str, Callable[[PrepareConfig], RawLog]] = {
    "movielens": read_movielens,
    **{f"movielens-{release}": read_movielens for release in _RELEASES},
    "netflix": read_netflix,
    "events": read_events,
    "synthetic": read_synthetic,
}

__all__ = ["SOURCES", "Chunk", "RawLog", "Rows", "TableChunk", "raw_type", "read_source"]


def read_source(config: PrepareConfig) -> RawLog:
    """Opens the raw log that a configuration names; its events are read later, by whoever reads the chunks.

    With `prepare.task: item` its sides are exchanged: see `transposed`.

    Raises:
        SourceError: No source of that name, or its files are not there or not of its layout.
    """
    name = config.source
    if name not in SOURCES:
        near = difflib.get_close_matches(name or "", SOURCES, n=1)
        known = f"Sources: {', '.join(SOURCES)}."
        raise SourceError(
            "Unknown source." if name else "No source is named.",
            where="prepare.source",
            got=name,
            remedy=f"Did you mean `{near[0]}`? {known}" if near else known,
        )
    raw = SOURCES[name](config)
    return transposed(raw) if config.task == "item" else raw
