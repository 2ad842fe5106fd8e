"""Episodes: which of a task's events are support and which are query, for many tasks at once.

The draw of a task is a function of (seed, epoch, the task's ordinal, the event's position) alone: never of the other
tasks in the batch, nor of who reads it. No Python loop over tasks.

A task of n events, bounds support_min 1, support_max 3, query_max 2::

    time, last       . . . s s s q q         query: the last min(query_max, n - support_min) events
    time, uniform    . s s s q q . .         query: begins at a point drawn among those that leave support_min before
                                             and query_min behind; support: the latest support_max before it
    random, last     s q . s . . q s         query: a draw of min(query_max, n - support_min); support: of the rest
    random, uniform  . q . s . s q .         support: a draw, of a size drawn among those that leave query_min; query:
                                             a draw of the rest
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from metatrain.config import EpisodeConfig
from metatrain.data.kernels import address, kernels
from metatrain.data.randomness import below, hashed
from metatrain.data.segments import segments
from metatrain.errors import ConfigError

# Tags that keep these draws apart from one another and from the plan's.
_CUT, _DRAW = 3, 4


@dataclass(frozen=True)
class Selection:
    """The chosen events of the eligible tasks (K of them, N events), in the order of a `TaskBatch`."""

    tasks: np.ndarray  # int64 [K]: positions of the eligible tasks among those given
    support_lengths: np.ndarray  # int64 [K]
    query_lengths: np.ndarray  # int64 [K]
    starts: np.ndarray  # int64 [K]: the first event of each task, whose others follow it (unless `drawn`)
    drawn: np.ndarray | None  # int64 [N]: the events in the batch's order, where they do not follow one another
    skipped: int  # tasks given that are not eligible

    @property
    def events(self) -> np.ndarray:
        """The events, a task's support, then its query, each in time order: int64 [N]."""
        if self.drawn is not None:
            return self.drawn
        return segments(self.starts, self.support_lengths + self.query_lengths)


def split_events(
    lengths: np.ndarray,
    episode: EpisodeConfig,
    seed: int,
    epoch: int,
    ordinals: np.ndarray,
    starts: np.ndarray | None = None,
) -> Selection:
    """Chooses support and query of each task.

    Args:
        lengths: Events of each task, in time order: int64 [T].
        episode: How, and the bounds. A task outside of them is left out and counted.
        seed: Seed of the draws.
        epoch: Another epoch is another draw.
        ordinals: Each task's number in the split: int64 [T].
        starts: Where each task's events begin in the columns that `Selection` points into: int64 [T].
            Default: the tasks' events are behind one another.

    Raises:
        ConfigError: Bounds that contradict one another.
    """
    if episode.support_min > episode.support_max or episode.query_min > episode.query_max:
        raise ConfigError(
            "An episode's least size is above its greatest.",
            got=f"support {episode.support_min}…{episode.support_max}, query {episode.query_min}…{episode.query_max}",
            remedy="Change support_min, support_max, query_min or query_max.",
        )
    lengths = np.asarray(lengths, np.int64)
    if starts is None:
        starts = np.cumsum(lengths) - lengths
    least = max(episode.support_min + episode.query_min, episode.events_min)
    tasks = np.flatnonzero((lengths >= least) & (lengths <= episode.events_max))
    n, first, who = lengths[tasks], np.asarray(starts, np.int64)[tasks], np.asarray(ordinals, np.int64)[tasks]
    skipped = len(lengths) - len(tasks)
    if episode.by == "random":
        support, query, events = _at_random(n, first, who, episode, seed, epoch)
        return Selection(tasks, support, query, first, events, skipped)
    support, query, begins = _by_time(n, first, who, episode, seed, epoch)
    return Selection(tasks, support, query, begins, None, skipped)


def _by_time(
    n: np.ndarray, first: np.ndarray, ordinals: np.ndarray, episode: EpisodeConfig, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if episode.cut == "last":
        cut = n - np.minimum(episode.query_max, n - episode.support_min)
    else:
        choices = n - episode.support_min - episode.query_min + 1
        cut = episode.support_min + below(choices, hashed(_CUT, seed, epoch, ordinals))
    support = np.minimum(cut, episode.support_max)
    query = np.minimum(n - cut, episode.query_max)
    # Support ends where the query begins: one run of events a task.
    return support, query, first + cut - support


def _at_random(
    n: np.ndarray, first: np.ndarray, ordinals: np.ndarray, episode: EpisodeConfig, seed: int, epoch: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if episode.cut == "last":
        query = np.minimum(episode.query_max, n - episode.support_min)
        support = np.minimum(episode.support_max, n - query)
    else:
        choices = np.minimum(episode.support_max, n - episode.query_min) - episode.support_min + 1
        support = episode.support_min + below(choices, hashed(_CUT, seed, epoch, ordinals))
        query = np.minimum(episode.query_max, n - support)
    return support, query, _drawn(n, first, hashed(_DRAW, seed, epoch, ordinals), support, query)


def _drawn(n: np.ndarray, first: np.ndarray, keys: np.ndarray, support: np.ndarray, query: np.ndarray) -> np.ndarray:
    """Each task's events of the least draws: `query` of them its query, the next `support` its support; int64 [N].

    An event's draw is hashed(its task's key, its position).
    """
    library = kernels()
    if library is not None:
        events = np.empty(int(support.sum() + query.sum()), np.int64)
        parts = ((n, np.int64), (first, np.int64), (support, np.int64), (query, np.int64), (keys, np.uint64))
        given = [np.ascontiguousarray(part, kind) for part, kind in parts]
        wrong = library.metatrain_draw(address(events), len(events), *map(address, given), len(n))
        if wrong == -2:
            raise MemoryError(f"no memory to draw from {n.max()} events of a task")
        assert wrong == -1, f"task {wrong} has fewer events than are to be drawn"
        return events
    task = np.repeat(np.arange(len(n)), n)
    position = segments(np.zeros_like(n), n)
    draw = hashed(keys[task], position)
    shuffled = np.lexsort((draw, task))  # within each task, its events by their draw
    rank = np.empty_like(position)
    rank[shuffled] = position
    is_query = rank < query[task]
    chosen = np.flatnonzero(rank < (query + support)[task])
    # Stable: time order stays within a task's support and within its query.
    order = np.argsort(task[chosen] * 2 + is_query[chosen], kind="stable")
    return (first[task] + position)[chosen[order]]
