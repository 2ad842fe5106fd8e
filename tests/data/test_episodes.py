from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metatrain.config import EpisodeConfig
from metatrain.data.episodes import _drawn, split_events
from metatrain.data.randomness import hashed
from metatrain.errors import ConfigError

pytestmark = pytest.mark.usefixtures("both_ways")

LENGTHS = st.lists(st.integers(0, 25), max_size=12).map(lambda lengths: np.array(lengths, np.int64))


@st.composite
def episodes(draw) -> EpisodeConfig:
    support_min, query_min = draw(st.integers(0, 4)), draw(st.integers(1, 4))
    events_min = draw(st.integers(1, 6))
    return EpisodeConfig(
        by=draw(st.sampled_from(["time", "random"])),
        cut=draw(st.sampled_from(["last", "uniform"])),
        support_min=support_min,
        support_max=draw(st.integers(max(support_min, 1), 8)),
        query_min=query_min,
        query_max=draw(st.integers(query_min, 7)),
        events_min=events_min,
        events_max=draw(st.integers(events_min, 30)),
    )


def one_task(n: int, episode: EpisodeConfig, seed: int, epoch: int, ordinal: int) -> tuple[list[int], list[int]] | None:
    """Slow and obvious: support and query positions of one task, or None where it is skipped."""
    if n < episode.support_min + episode.query_min or not episode.events_min <= n <= episode.events_max:
        return None
    share = (int(hashed(3, seed, epoch, ordinal)) >> 11) * 2.0**-53
    query_size = min(episode.query_max, n - episode.support_min)
    if episode.by == "random":
        of_task = hashed(4, seed, epoch, ordinal)
        ranked = sorted(range(n), key=lambda position: int(hashed(int(of_task), position)))
        support_size = min(episode.support_max, n - query_size)
        if episode.cut == "uniform":
            sizes = [s for s in range(episode.support_min, episode.support_max + 1) if n - s >= episode.query_min]
            support_size = sizes[int(share * len(sizes))]
            query_size = min(episode.query_max, n - support_size)
        rest = ranked[query_size:]
        return sorted(rest[:support_size]), sorted(ranked[:query_size])
    if episode.cut == "last":
        cut = n - query_size
    else:
        points = [c for c in range(n + 1) if c >= episode.support_min and n - c >= episode.query_min]
        cut = points[int(share * len(points))]
    return list(range(cut))[-episode.support_max :], list(range(cut, n))[: episode.query_max]


@settings(deadline=None, max_examples=300)
@given(LENGTHS, episodes(), st.integers(-5, 2**66), st.integers(0, 9), st.integers(0, 2**40))
def test_equals_a_loop_over_tasks(lengths, episode, seed, epoch, first_ordinal):
    ordinals = np.arange(len(lengths)) + first_ordinal
    found = split_events(lengths, episode, seed, epoch, ordinals)
    starts = np.cumsum(lengths) - lengths
    expected = [one_task(int(n), episode, seed, epoch, int(o)) for n, o in zip(lengths, ordinals, strict=True)]
    eligible = [i for i, e in enumerate(expected) if e is not None]
    assert found.tasks.tolist() == eligible
    assert found.skipped == len(lengths) - len(eligible)
    assert found.support_lengths.tolist() == [len(expected[i][0]) for i in eligible]
    assert found.query_lengths.tolist() == [len(expected[i][1]) for i in eligible]
    flat = [starts[i] + p for i in eligible for part in expected[i] for p in part]
    assert found.events.tolist() == flat


@settings(deadline=None, max_examples=200)
@given(LENGTHS, episodes(), st.integers(0, 99), st.integers(0, 9))
def test_support_precedes_query_and_bounds_hold(lengths, episode, seed, epoch):
    found = split_events(lengths, episode, seed, epoch, np.arange(len(lengths)))
    starts = (np.cumsum(lengths) - lengths)[found.tasks]
    assert (found.support_lengths >= episode.support_min).all()
    assert (found.support_lengths <= episode.support_max).all()
    assert (found.query_lengths >= episode.query_min).all()
    assert (found.query_lengths <= episode.query_max).all()
    parts = np.split(found.events, np.cumsum(found.support_lengths + found.query_lengths)[:-1] if len(starts) else [])
    for first, n, size, events in zip(starts, lengths[found.tasks], found.support_lengths, parts, strict=False):
        support, query = events[:size], events[size:]
        assert len(set(events.tolist())) == len(events)
        assert ((events >= first) & (events < first + n)).all()
        assert (np.diff(support) > 0).all()
        assert (np.diff(query) > 0).all()
        if episode.by == "time" and len(support):
            assert support.max() < query.min()
            assert support.max() == query.min() - 1


@settings(deadline=None)
@given(LENGTHS, episodes(), st.randoms(use_true_random=False))
def test_a_task_is_split_the_same_in_any_batch(lengths, episode, random):
    ordinals = np.arange(len(lengths)) + 100
    starts = np.cumsum(lengths) - lengths
    whole = split_events(lengths, episode, 5, 2, ordinals)
    order = random.sample(range(len(lengths)), len(lengths))
    mixed = split_events(lengths[order], episode, 5, 2, ordinals[order], starts[order])

    def by_task(selection, ids) -> dict:
        cuts = np.cumsum(selection.support_lengths + selection.query_lengths)[:-1]
        parts = np.split(selection.events, cuts) if len(selection.tasks) else []
        return {
            int(ids[t]): (int(s), part.tolist())
            for t, s, part in zip(selection.tasks, selection.support_lengths, parts, strict=True)
        }

    assert by_task(whole, ordinals) == by_task(mixed, ordinals[order])


@pytest.mark.parametrize("by", ["time", "random"])
def test_uniform_cuts_are_uniform_and_change_with_the_epoch(by):
    episode = EpisodeConfig(by=by, cut="uniform", support_min=2, support_max=100, query_min=3, query_max=3)
    lengths, ordinals = np.full(4000, 10), np.arange(4000)
    cuts = split_events(lengths, episode, 0, 0, ordinals).support_lengths
    counts = np.bincount(cuts, minlength=8)
    assert counts[:2].sum() == 0
    assert counts[2:8].min() > 550  # 667 expected
    assert (cuts != split_events(lengths, episode, 0, 1, ordinals).support_lengths).mean() > 0.7
    assert (cuts != split_events(lengths, episode, 1, 0, ordinals).support_lengths).mean() > 0.7


def test_random_draws_are_uniform_over_positions():
    episode = EpisodeConfig(by="random", support_max=3, query_max=2)
    found = split_events(np.full(4000, 10), episode, 0, 0, np.arange(4000))
    drawn = found.events.reshape(4000, 5) % 10
    assert np.abs(np.bincount(drawn[:, 3:].ravel(), minlength=10) - 800).max() < 130
    assert np.abs(np.bincount(drawn[:, :3].ravel(), minlength=10) - 1200).max() < 150


@settings(deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(0, 30) | st.integers(90, 110) | st.integers(200, 400),
            st.sampled_from([0, 1, 20, 96, 150, 400]),
            st.sampled_from([0, 1, 7, 64, 400]),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_the_least_draws_are_the_query_and_the_next_ones_the_support(tasks):
    """Against a loop: of tasks small enough that draws are compared with one another, and of such as are sorted."""
    n = np.array([task[0] for task in tasks], np.int64)
    query = np.minimum([task[1] for task in tasks], n)
    support = np.minimum([task[2] for task in tasks], n - query)
    keys, first, expected = hashed(3, np.arange(len(n))), np.cumsum(n) - n, []
    for task in range(len(n)):
        order = np.argsort(hashed(keys[task : task + 1], np.arange(n[task])))
        parts = order[query[task] : query[task] + support[task]], order[: query[task]]
        expected += [first[task] + i for part in parts for i in sorted(part)]
    assert _drawn(n, first, keys, support, query).tolist() == expected


def test_bounds_that_contradict_are_refused():
    episode = EpisodeConfig.model_construct(**{**EpisodeConfig().model_dump(), "support_min": 9, "support_max": 3})
    with pytest.raises(ConfigError, match="least size is above"):
        split_events(np.array([20]), episode, 0, 0, np.array([0]))
