"""Rankings as text: side by side for people, JSON lines for programs."""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from metatrain.recommend.adapted import Adapted, Recommendation

#: Widest title and widest key shown whole.
_TITLE, _KEY = 44, 20
#: Of scores: the fewest by which they can be told apart.
_DECIMALS = (2, 3, 4)


def side_by_side(adapted: Adapted, k: int, exclude_seen: bool, min_events: int) -> str:
    """A block a user: rank, item and score before adaptation, the same after; `+` marks what adaptation brought in."""
    blocks, brought = [], False
    for place, (user, before, after) in enumerate(_rankings(adapted, k, exclude_seen, min_events)):
        known = {line.item for line in before}
        brought = brought or any(line.item not in known for line in after)
        style = _Style.of([*before, *after])
        rule = "-" * (4 + 2 * style.width + 4)
        events = len(adapted.requests.supports[place][0])
        lines = [
            f"{adapted.named(user)}: adapted to {events} event{'s' * (events != 1)}",
            rule,
            f"{'':4}{'before adaptation'.ljust(style.width)}    after adaptation",
            rule,
        ]
        for rank in range(max(len(before), len(after))):
            left = style.line(before[rank] if rank < len(before) else None)
            right = after[rank] if rank < len(after) else None
            mark = "+" if right is not None and right.item not in known else " "
            lines.append(f"{rank + 1:>3} {left}  {mark} {style.line(right)}".rstrip())
        blocks.append("\n".join(lines))
    notes = [f"+ not among the first {k} before adaptation"] if brought else []
    notes += [f"note: {warning}" for warning in adapted.warnings]
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


class _Style(NamedTuple):
    """Widths of a block's columns, and the decimals of its scores."""

    key: int  # 0: the items have no titles beside their keys
    title: int
    decimals: int

    @classmethod
    def of(cls, lines: list[Recommendation]) -> _Style:
        """What those lines need."""
        titled = any(line.title != line.item for line in lines)
        key = min(_KEY, max((_width(line.item) for line in lines), default=0)) + 2 if titled else 0
        title = min(_TITLE, max((_width(line.title) for line in lines), default=0))
        title = max(title, len("before adaptation") - 8 - key)
        # On a step of a staircase scores differ little, but it is by them that the items are in this order.
        scores = {line.score for line in lines}
        told = (d for d in _DECIMALS if len({f"{score:.{d}f}" for score in scores}) == len(scores))
        return cls(key, title, next(told, _DECIMALS[-1]) if scores else _DECIMALS[0])

    @property
    def width(self) -> int:
        """Of a line."""
        return self.key + self.title + 6 + self.decimals

    def line(self, line: Recommendation | None) -> str:
        """An item with its score."""
        if line is None:
            return " " * self.width
        key = _fitted(line.item, self.key - 2) + "  " if self.key else ""
        return f"{key}{_fitted(line.title, self.title)}{line.score:{6 + self.decimals}.{self.decimals}f}"


def _fitted(text: str, width: int) -> str:
    """Cut or filled to `width` columns of a terminal, in which some letters take two and some none."""
    if _width(text) > width:
        while text and _width(text) > width - 1:
            text = text[:-1]
        text = text.rstrip() + "…"
    return text + " " * (width - _width(text))


def _width(text: str) -> int:
    return sum(0 if unicodedata.combining(c) else 2 if unicodedata.east_asian_width(c) in "WF" else 1 for c in text)
