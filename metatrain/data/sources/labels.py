"""What a log's labels must be, and ratings as clicks."""

from __future__ import annotations

import pyarrow as pa
import pyarrow.compute as pc

from metatrain.config import PrepareConfig
from metatrain.data.sources.checks import Check


def label_check(config: PrepareConfig) -> Check:
    """Clicks without a threshold must be 0 or 1 already; anything else is a rating."""
    return Check.CLICK if config.label == "click" and config.click_threshold is None else Check.RATING


def labelled(ratings: pa.Array | pa.ChunkedArray, threshold: float | None) -> pa.Array | pa.ChunkedArray:
    """Ratings as float32 labels; with a threshold, 1 for those of at least it and 0 for others."""
    return pc.cast(ratings if threshold is None else pc.greater_equal(ratings, threshold), pa.float32())
