"""Where files are kept from one run to the next: downloads, built kernels."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """~/.cache/metatrain, or the folder that METATRAIN_CACHE names."""
    return Path(os.environ.get("METATRAIN_CACHE") or Path.home() / ".cache" / "metatrain")
