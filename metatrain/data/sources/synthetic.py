"""A synthetic log of known structure: any number of users, made shard by shard, the same whatever the shards.

A user has a taste, an item has factors, both pulled towards those of their segment or category (a visible feature):

    rating(u, i) = 3.5 + bias_u + bias_i + <taste_u, factors_i> / √rank + noise × N(0, 1)

Every draw is a hash of (seed, what it is for, user, item), so no draw depends on another user's. The error of a model
that knows everything but the noise is `noise` (RMSE) and `noise` × √(2/π) (MAE). A click is drawn with the logistic
of 2 × (the rating without noise − 3.5); its best log loss and AUC are estimated on a sample, and say so.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from metatrain.config import FeatureSource, PrepareConfig, Synthetic
from metatrain.data.hashing import normal, unit
from metatrain.data.randomness import hashed
from metatrain.data.sources.features import chosen_features
from metatrain.data.sources.rawlog import RawLog, Rows, Several, TableChunk

_CENTRE = 3.5
_SEGMENTS, _CATEGORIES, _TAGS = 8, 12, 20
_FEWEST_EVENTS = 5
_EPOCH_START = 1_577_836_800  # 2020-01-01
_YEAR_SECONDS = 365 * 86_400
_MEAN_GAP_SECONDS = 3_600
_CANDIDATES = 3  # items looked at for each that is taken: how strongly popular items are preferred
_BAYES_USERS = 2_000
_CHUNK_EVENTS = 1 << 20  # that one task makes


class _Draw(IntEnum):
    """What a hash is for: one stream of draws each."""

    COUNT = 1
    START = 2
    GAP = 3
    ORDER = 4
    TAKE = 5
    TASTE = 6
    USER_BIAS = 7
    SEGMENT = 8
    SEGMENT_TASTE = 9
    FACTOR = 10
    ITEM_BIAS = 11
    CATEGORY = 12
    CATEGORY_FACTOR = 13
    POPULARITY = 14
    TAG = 15
    NOISE = 16
    CLICK = 17
    AGE = 18


@dataclass(frozen=True)
class UsersChunk:
    """The events, or the rows, of users from `start` to `stop`."""

    settings: Synthetic
    start: int
    stop: int
    what: str  # "events" or "users"

    def read(self):
        """Yields the table, made here and now."""
        users = np.arange(self.start, self.stop)
        if self.what == "users":
            s = _segment(self.settings, users)
            age = 20 + 5.0 * s + 4.0 * normal(hashed(self.settings.seed, _Draw.AGE, users))
            yield Rows(pa.table({"key": _names(users), "segment": _names(s, "segment-"), "age": age}))
            return
        user, item, label, _, timestamp = draw_events(self.settings, users)
        columns = {"key": _names(user), "item": _names(item), "label": label, "timestamp": timestamp}
        yield Rows(pa.table(columns))


def read_synthetic(config: PrepareConfig) -> RawLog:
    """Opens the synthetic log of `config.synthetic`."""
    s = config.synthetic
    starts = range(0, s.users, s.users_per_shard)
    spans = [(start, min(start + s.users_per_shard, s.users)) for start in starts]
    together = max(_CHUNK_EVENTS // (s.users_per_shard * s.events_per_user), 1)
    width = config.feature_width
    features = (
        FeatureSource(name="segment", level="task", kind="categorical", width=width),
        FeatureSource(name="age", level="task", kind="numeric"),
        FeatureSource(name="category", level="item", kind="categorical", width=width),
        FeatureSource(name="tags", level="item", kind="multi", width=width),
        FeatureSource(name="quality", level="item", kind="numeric"),
    )
    return RawLog(
        name="synthetic",
        events=_several([UsersChunk(s, *span, "events") for span in spans], together),
        events_estimate=s.users * s.events_per_user,
        tasks=_several([UsersChunk(s, *span, "users") for span in spans], together),
        items=[TableChunk(_items(s))],
        features=chosen_features(features, config),
        facts=bayes_errors(s),
    )


def _several(chunks: list[UsersChunk], together: int) -> list[Several]:
    return [Several(tuple(chunks[i : i + together])) for i in range(0, len(chunks), together)]


def draw_events(s: Synthetic, users: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """All events of users [n]: user, item, label, expected rating or chance of a click, timestamp; each [events].

    A user's items are distinct, its times increase.
    """
    counts = _counts(s, users)
    candidates = np.minimum(counts * _CANDIDATES, s.items)
    user = np.repeat(users, candidates)
    place = np.arange(candidates.sum()) - np.repeat(np.cumsum(candidates) - candidates, candidates)
    item = _shuffled(s, user, place)
    # Of a user's candidates popular ones come first: thinning makes popularity uneven, and items stay distinct.
    taken = unit(hashed(s.seed, _Draw.TAKE, user, item)) < _known_items(s).popularity[item]
    chosen = _taken_first(taken, place, candidates, counts)
    user, item = np.repeat(users, counts), item[chosen]
    expected = _expected_rating(s, users, item, counts)
    nth = np.arange(len(user)) - np.repeat(np.cumsum(counts) - counts, counts)
    gaps = 1 + (-_MEAN_GAP_SECONDS * np.log1p(-unit(hashed(s.seed, _Draw.GAP, user, nth)))).astype(np.int64)
    start = _EPOCH_START + (unit(hashed(s.seed, _Draw.START, users)) * _YEAR_SECONDS).astype(np.int64)
    total = np.cumsum(gaps)
    before = np.repeat(total[np.cumsum(counts) - counts] - gaps[np.cumsum(counts) - counts], counts)
    timestamp = np.repeat(start, counts) + total - before
    if s.label == "click":
        chance = 1.0 / (1.0 + np.exp(-2.0 * (expected - _CENTRE)))
        label = (unit(hashed(s.seed, _Draw.CLICK, user, item)) < chance).astype(np.float32)
        return user, item, label, chance, timestamp
    label = (expected + s.noise * normal(hashed(s.seed, _Draw.NOISE, user, item))).astype(np.float32)
    return user, item, label, expected, timestamp


def bayes_errors(s: Synthetic) -> dict[str, Any]:
    """The least error that any model can have."""
    if s.label == "rating":
        return {"bayes_rmse": s.noise, "bayes_mae": s.noise * math.sqrt(2.0 / math.pi)}
    _, _, label, chance, _ = draw_events(s, np.arange(min(s.users, _BAYES_USERS)))
    p = np.clip(chance, 1e-12, 1 - 1e-12)
    rank = np.empty(len(p))
    rank[np.argsort(p, kind="stable")] = np.arange(1, len(p) + 1)
    positive = label > 0
    clicks, others = int(positive.sum()), int((~positive).sum())
    pairs = max(clicks * others, 1)
    return {
        "bayes_log_loss": float(-(p * np.log(p) + (1 - p) * np.log(1 - p)).mean()),
        "bayes_auc": float((rank[positive].sum() - clicks * (clicks + 1) / 2) / pairs),
        "bayes_estimated_on_events": len(p),
    }


def _counts(s: Synthetic, users: np.ndarray) -> np.ndarray:
    """Events of each user: 5 and a geometric rest, `events_per_user` in the mean, at most half the items."""
    rest = max(s.events_per_user - _FEWEST_EVENTS, 0)
    u = unit(hashed(s.seed, _Draw.COUNT, users))
    more = (
        np.floor(np.log1p(-u) / math.log(rest / (rest + 1))).astype(np.int64)
        if rest
        else np.zeros(len(users), np.int64)
    )
    return np.minimum(_FEWEST_EVENTS + more, max(s.items // 2, min(_FEWEST_EVENTS, s.items)))


def _shuffled(s: Synthetic, user: np.ndarray, place: np.ndarray) -> np.ndarray:
    """The item at a place of the user's own permutation of all items: a Feistel network, walked into range."""
    half = max((max(s.items - 1, 1).bit_length() + 1) // 2, 1)
    mask = (1 << half) - 1
    item = _round(s, user, place, half, mask)
    outside = np.flatnonzero(item >= s.items)
    while len(outside):
        walked = _round(s, user[outside], item[outside], half, mask)
        item[outside] = walked
        outside = outside[walked >= s.items]
    return item


def _round(s: Synthetic, user: np.ndarray, item: np.ndarray, half: int, mask: int) -> np.ndarray:
    left, right = item >> half, item & mask
    for level in range(4):
        word = hashed(s.seed, _Draw.ORDER, level, user, right) & np.uint64(mask)
        left, right = right, left ^ word.astype(np.int64)
    return (left << half) | right


def _popularity(s: Synthetic, item: np.ndarray) -> np.ndarray:
    return 0.02 + 0.98 * unit(hashed(s.seed, _Draw.POPULARITY, item)) ** 4


def _taken_first(taken: np.ndarray, place: np.ndarray, candidates: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Of each user's candidates, which lie behind one another, the first `counts`: those taken, then others."""
    ends = np.cumsum(candidates)
    first = ends - candidates
    so_far = np.cumsum(taken)
    before = np.repeat(so_far[first] - taken[first], candidates)
    of_user = np.repeat(so_far[ends - 1], candidates) - before
    nth = np.where(taken, so_far - before - 1, place - (so_far - before) + of_user)
    stays = np.flatnonzero(nth < np.repeat(counts, candidates))
    chosen = np.empty(len(stays), np.int64)
    start = np.cumsum(counts) - counts
    chosen[np.repeat(start, candidates)[stays] + nth[stays]] = stays
    return chosen


def _segment(s: Synthetic, users: np.ndarray) -> np.ndarray:
    return (hashed(s.seed, _Draw.SEGMENT, users) % np.uint64(_SEGMENTS)).astype(np.int64)


def _category(s: Synthetic, items: np.ndarray) -> np.ndarray:
    return (hashed(s.seed, _Draw.CATEGORY, items) % np.uint64(_CATEGORIES)).astype(np.int64)


def _item_bias(s: Synthetic, items: np.ndarray) -> np.ndarray:
    return 0.4 * normal(hashed(s.seed, _Draw.ITEM_BIAS, items))


def _expected_rating(s: Synthetic, users: np.ndarray, item: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Of users [n] with the items of each behind one another: [events]."""
    known = _known_items(s)
    product = np.zeros(len(item))
    for d in range(s.rank):
        taste = 0.6 * normal(hashed(s.seed, _Draw.SEGMENT_TASTE, d, _segment(s, users)))
        taste += 0.8 * normal(hashed(s.seed, _Draw.TASTE, d, users))
        product += np.repeat(taste, counts) * known.factors[d][item]
    bias = np.repeat(0.4 * normal(hashed(s.seed, _Draw.USER_BIAS, users)), counts) + known.bias[item]
    return _CENTRE + bias + product / math.sqrt(s.rank)


@dataclass(frozen=True)
class _KnownItems:
    """What is drawn for an item alone, drawn once."""

    popularity: np.ndarray
    bias: np.ndarray
    factors: list[np.ndarray]


def _known_items(s: Synthetic) -> _KnownItems:
    return _drawn_items(s.seed, s.rank, s.items)


@lru_cache(maxsize=1)
def _drawn_items(seed: int, rank: int, number: int) -> _KnownItems:
    s, items = Synthetic(seed=seed, rank=rank, items=number), np.arange(number)
    factors = []
    for d in range(s.rank):
        factor = 0.6 * normal(hashed(s.seed, _Draw.CATEGORY_FACTOR, d, _category(s, items)))
        factors.append(factor + 0.8 * normal(hashed(s.seed, _Draw.FACTOR, d, items)))
    return _KnownItems(_popularity(s, items), _item_bias(s, items), factors)


def _items(s: Synthetic) -> pa.Table:
    items = np.arange(s.items)
    category = _category(s, items)
    first = (hashed(s.seed, _Draw.TAG, 0, items) % np.uint64(_TAGS)).astype(np.int64)
    # The category names the second tag, so that tags tell something of the factors.
    tags = np.stack([first, _TAGS + category], axis=1).ravel()
    offsets = pa.array(np.arange(0, 2 * s.items + 1, 2, dtype=np.int32))
    return pa.table(
        {
            "key": _names(items),
            "title": _names(items, "Item "),
            "category": _names(category, "category-"),
            "tags": pa.ListArray.from_arrays(offsets, _names(tags, "tag-")),
            "quality": _item_bias(s, items),
        }
    )


def _names(numbers: np.ndarray, prefix: str = "") -> pa.Array:
    text = pc.cast(pa.array(numbers), pa.string())
    return pc.binary_join_element_wise(prefix, text, "") if prefix else text
