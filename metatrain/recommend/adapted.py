"""Users that a model has adapted to: their rankings, and why an item stands where it does.

Users adapt once; then the catalogue is scored in pieces of bounded size.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from metatrain.errors import RequestError
from metatrain.recommend.events import Requests

if TYPE_CHECKING:
    from metatrain.recommend.explanation import Explanation
    from metatrain.recommend.recommender import Recommender

#: (User, item) pairs scored at a time, and most items of a piece.
PAIRS_AT_A_TIME, ITEMS_AT_A_TIME = 65_536, 8_192


class Recommendation(NamedTuple):
    """One line of a ranking."""

    item: str  # the catalogue's key
    title: str  # the key again, where the catalogue has no title
    score: float


#: A user's recommendations, best first.
Ranking = list[Recommendation]


class Adapted:
    """U users, in the order in which their events came.

    Attributes:
        users: Their keys; "you" for events without a user column. Where tasks are items, the items' keys.
        titles: Of the tasks, by key; of items alone, where they are known.
        warnings: What was left out by choice, in words.
        unknown_items: Items that the catalogue doesn't hold, and how many events named each.
    """

    def __init__(self, recommender: Recommender, requests: Requests) -> None:
        self.recommender, self.requests = recommender, requests
        self.users, self.warnings = list(requests.users), list(requests.warnings)
        self.unknown_items, self.titles = dict(requests.unknown_items), dict(requests.titles)
        self._ranked: dict[tuple[int, bool, int], tuple[list[Ranking], list[Ranking]]] = {}

    def top(self, k: int = 10, exclude_seen: bool = True, min_events: int = 0) -> list[Ranking]:
        """Each user's k best items after adaptation; equal scores in the catalogue's order.

        Args:
            k: Length of a ranking; shorter where the catalogue has no more.
            exclude_seen: Whether items that a user has events on are left out.
            min_events: Items with fewer training events are left out: an item that two people loved may rank high.
        """
        return self._rankings(k, exclude_seen, min_events)[1]

    @property
    def unadapted(self) -> Unadapted:
        """The same users before adaptation."""
        return Unadapted(self)

    def table(self, k: int = 10, exclude_seen: bool = True, min_events: int = 0) -> str:
        """Both rankings side by side, a block a user, in plain text."""
        from metatrain.recommend.rendering import side_by_side

        return side_by_side(self, k, exclude_seen, min_events)

    def json_lines(self, k: int = 10, exclude_seen: bool = True, min_events: int = 0) -> str:
        """A JSON object a user: `user`, `support`, `adapted` and `unadapted` (lists of item, title, score)."""
        from metatrain.recommend.rendering import as_json_lines

        return as_json_lines(self, k, exclude_seen, min_events)

    def explain(self, item: str, top: int = 3, user: str | None = None) -> Explanation:
        """Why an item has its score for a user: what adaptation changed, and which support events did most.

        Raises:
            RequestError: An unknown item or user, or no user where there are several.
        """
        from metatrain.recommend.explanation import explain

        return explain(self, item, top, user)

    def user_index(self, user: str | None) -> int:
        """A user's place in `users`; None means the only one."""
        if user is None and len(self.users) == 1:
            return 0
        if user not in self.users:
            task = self.recommender.dataset.manifest.task
            raise RequestError(
                f"There is no such {task} among those adapted to." if user is not None else f"Which {task} is meant?",
                got=user,
                remedy=f"One of: {', '.join(self.users[:10])}{', …' if len(self.users) > 10 else ''}.",
            )
        return self.users.index(user)

    def named(self, user: str) -> str:
        """A task as people read it: `user 7`, or `item 50 (Star Wars)`."""
        title = f" ({self.titles[user]})" if user in self.titles else ""
        return f"{self.recommender.dataset.manifest.task} {user}{title}"

    def _rankings(self, k: int, exclude_seen: bool, min_events: int) -> tuple[list[Ranking], list[Ranking]]:
        if k < 1:
            raise RequestError("A ranking has one item at least.", got=k, remedy="Ask for 1 or more.")
        asked = (k, exclude_seen, min_events)
        if asked not in self._ranked:
            parts = list(self._by_users(*asked))
            self._ranked[asked] = ([r for part in parts for r in part[0]], [r for part in parts for r in part[1]])
        return self._ranked[asked]

    def _by_users(self, k: int, exclude_seen: bool, min_events: int) -> Iterator[tuple[list[Ranking], list[Ranking]]]:
        catalogue = len(self.recommender.dataset.catalogue)
        rare = self.recommender.dataset.catalogue.training_events < min_events
        width = min(catalogue, ITEMS_AT_A_TIME)
        users_at_a_time = max(1, PAIRS_AT_A_TIME // max(1, width))
        for start in range(0, len(self.users), users_at_a_time):
            tasks = np.arange(start, min(start + users_at_a_time, len(self.users)))
            score = self.recommender.scorer(self.requests.batch(self.recommender.dataset, tasks))
            best = [_Best(len(tasks), k), _Best(len(tasks), k)]
            for low in range(0, catalogue, width):
                items = np.arange(low, min(low + width, catalogue))
                hidden = (
                    self._seen(tasks, low, len(items)) if exclude_seen else np.zeros((len(tasks), len(items)), bool)
                )
                hidden = hidden | rare[items]
                for merged, scores in zip(best, score(items), strict=True):
                    merged.add(items, np.where(hidden, -np.inf, scores))
            yield self._named(best[0]), self._named(best[1])

    def _seen(self, tasks: np.ndarray, low: int, width: int) -> np.ndarray:
        lengths = [len(self.requests.seen[t]) for t in tasks]
        rows = np.concatenate([self.requests.seen[t] for t in tasks]) - low
        place = np.repeat(np.arange(len(tasks)), lengths)
        inside = (rows >= 0) & (rows < width)
        hidden = np.zeros((len(tasks), width), dtype=bool)
        hidden[place[inside], rows[inside]] = True
        return hidden

    def _named(self, best: _Best) -> list[Ranking]:
        catalogue = self.recommender.dataset.catalogue

        def line(row: int, score: float) -> Recommendation:
            key = str(catalogue.keys[row])
            return Recommendation(key, str(catalogue.titles[row] or key), float(score))

        return [
            [line(row, score) for row, score in zip(items, scores, strict=True) if np.isfinite(score)]
            for items, scores in zip(best.items.tolist(), best.scores.tolist(), strict=True)
        ]


class Unadapted:
    """The users of an `Adapted`, scored with the shared parameters alone."""

    def __init__(self, adapted: Adapted) -> None:
        self.users, self._adapted = adapted.users, adapted

    def top(self, k: int = 10, exclude_seen: bool = True, min_events: int = 0) -> list[Ranking]:
        """Each user's k best items before adaptation; see `Adapted.top`."""
        return self._adapted._rankings(k, exclude_seen, min_events)[0]


class _Best:
    """The k best of what was added, best first; of equal scores, the earlier catalogue row."""

    def __init__(self, users: int, k: int) -> None:
        self.k = k
        self.items = np.zeros((users, 0), np.int64)
        self.scores = np.zeros((users, 0))

    def add(self, items: np.ndarray, scores: np.ndarray) -> None:
        every_item = np.concatenate([self.items, np.broadcast_to(items, scores.shape)], axis=1)
        every_score = np.concatenate([self.scores, scores], axis=1)
        # Stable, and what was there comes first: ties stay in the catalogue's order.
        order = np.argsort(-every_score, axis=1, kind="stable")[:, : self.k]
        self.items = np.take_along_axis(every_item, order, 1)
        self.scores = np.take_along_axis(every_score, order, 1)
