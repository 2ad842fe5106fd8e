"""What the pages of docs/ show: the blocks of code in them, for tests that run these."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


def blocks(page: Path, language: str) -> list[str]:
    """The page's blocks of a language, in order."""
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


def example_meta_learner() -> str:
    """The source of the meta-learner that docs/adding-a-meta-learner.md writes."""
    [source] = blocks(DOCS / "adding-a-meta-learner.md", "python")
    return source
