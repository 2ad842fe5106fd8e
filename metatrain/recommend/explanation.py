"""Why an item: what adaptation did to its score, and which of the user's events did most of it.

An event's influence is the item's score minus the score that adaptation gives without the event: positive where it
raised the item. All events are left out at once, one in each copy of the user.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from metatrain.errors import RequestError

if TYPE_CHECKING:
    from metatrain.recommend.adapted import Adapted


class Reason(NamedTuple):
    """A support event, and what it adds to the item's score."""

    item: str
    title: str
    label: float
    influence: float


class Explanation(NamedTuple):
    """An item's score for a user, before and after adaptation, and the strongest reasons."""

    user: str
    item: str
    title: str
    before: float
    after: float
    reasons: list[Reason]
    #: The task as people read it.
    named: str = ""

    def __str__(self) -> str:
        whose = self.named or f"user {self.user}"
        lines = [f"{self.title} for {whose}: {self.before:.2f} before adaptation, {self.after:.2f} after"]
        lines += [f"  {r.influence:+.3f}  from {r.title} ({r.label:g})" for r in self.reasons]
        return "\n".join(lines)


def explain(adapted: Adapted, item: str, top: int, user: str | None) -> Explanation:
    """See `Adapted.explain`."""
    catalogue = adapted.recommender.dataset.catalogue
    task = adapted.user_index(user)
    row = int(np.asarray(catalogue.rows_of([str(item)]))[0])
    if row < 0:
        raise RequestError(
            f"The catalogue doesn't hold this {adapted.recommender.dataset.manifest.catalogued}.",
            got=str(item),
            remedy="Give a key of the catalogue.",
        )
    whole = adapted.requests.supports[task]
    positions = np.arange(len(whole[0]))
    kept = [positions, *(np.delete(positions, n) for n in positions)]
    batch = adapted.requests.batch(adapted.recommender.dataset, np.full(len(kept), task), kept)
    before, after = adapted.recommender.scorer(batch)(np.array([row]))
    influence = after[0, 0] - after[1:, 0]
    strongest = np.argsort(-np.abs(influence), kind="stable")[:top]

    def title(of: int) -> str:
        return str(catalogue.titles[of] or catalogue.keys[of])

    reasons = [
        Reason(str(catalogue.keys[i]), title(i), float(label), float(change))
        for i, label, change in zip(whole[0][strongest], whole[1][strongest], influence[strongest], strict=True)
    ]
    return Explanation(
        user=adapted.users[task],
        item=str(catalogue.keys[row]),
        title=title(row),
        before=float(before[0, 0]),
        after=float(after[0, 0]),
        reasons=reasons,
        named=adapted.named(adapted.users[task]),
    )
