"""Rankings as text: side by side for people, JSON lines for programs."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from metatrain.recommend.adapted import Adapted, Recommendation

#: Widest title shown whole.
_TITLE = 44


def side_by_side(adapted: Adapted, k: int, exclude_seen: bool, min_events: int) -> str:
    """A block a user: rank, title and score before adaptation, the same after; `+` marks what adaptation brought in."""
    blocks = []
    for place, (user, before, after) in enumerate(_rankings(adapted, k, exclude_seen, min_events)):
        known = {line.item for line in before}
        width = min(_TITLE, max((_width(line.title) for line in [*before, *after]), default=0))
        width = max(width, len("before adaptation") - 8)
        rule = "-" * (4 + 2 * (width + 8) + 4)
        lines = [
            f"{adapted.named(user)}: adapted to {len(adapted.requests.supports[place][0])} events",
            rule,
            f"{'':4}{'before adaptation'.ljust(width + 8)}    after adaptation",
            rule,
        ]
        for rank in range(max(len(before), len(after))):
            left = _line(before[rank] if rank < len(before) else None, width)
            right = after[rank] if rank < len(after) else None
            mark = "+" if right is not None and right.item not in known else " "
            lines.append(f"{rank + 1:>3} {left}  {mark} {_line(right, width)}".rstrip())
        blocks.append("\n".join(lines))
    notes = [f"note: {warning}" for warning in adapted.warnings]
    return "\n\n".join(blocks + (["\n".join(notes)] if notes else []))


def as_json_lines(adapted: Adapted, k: int, exclude_seen: bool, min_events: int) -> str:
    """One object a task; what was left out is in the `warnings` of each."""
    lines = []
    for place, (user, before, after) in enumerate(_rankings(adapted, k, exclude_seen, min_events)):
        content = {
            **({"user": user} if of_users(adapted) else {"item": user, "title": adapted.titles.get(user, user)}),
            "support": len(adapted.requests.supports[place][0]),
            "adapted": [_as_object(adapted, line) for line in after],
            "unadapted": [_as_object(adapted, line) for line in before],
            "warnings": adapted.warnings,
        }
        lines.append(json.dumps(content, ensure_ascii=False))
    return "\n".join(lines)


def of_users(adapted: Adapted) -> bool:
    """Whether the tasks are users, who are given items; else they are items, which are given users."""
    return adapted.recommender.dataset.manifest.task == "user"


def _as_object(adapted: Adapted, line: Recommendation) -> dict[str, Any]:
    return line._asdict() if of_users(adapted) else {"user": line.item, "score": line.score}


def _rankings(
    adapted: Adapted, k: int, exclude_seen: bool, min_events: int
) -> Iterator[tuple[str, list[Recommendation], list[Recommendation]]]:
    """Each user's key, ranking before adaptation, and after."""
    asked = (k, exclude_seen, min_events)
    return zip(adapted.users, adapted.unadapted.top(*asked), adapted.top(*asked), strict=True)


def _line(line: Recommendation | None, width: int) -> str:
    if line is None:
        return " " * (width + 8)
    return f"{_fitted(line.title, width)}{line.score:8.2f}"


def _fitted(text: str, width: int) -> str:
    """Cut or filled to `width` columns of a terminal, in which some letters take two and some none."""
    if _width(text) > width:
        while text and _width(text) > width - 1:
            text = text[:-1]
        text = text.rstrip() + "…"
    return text + " " * (width - _width(text))


def _width(text: str) -> int:
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
