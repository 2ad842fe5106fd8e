"""Buckets: every task once, never counted slower than one bucket, few shapes, a function of the lengths alone."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from metatrain.meta.buckets import UNITS, cut, rounded
from metatrain.meta.maml import MAML
from metatrain.model.learners.mlp import MLP

LENGTHS = st.lists(st.tuples(st.integers(0, 300), st.integers(0, 40)), min_size=1, max_size=70)


def by_places(overhead: float):
    return lambda tasks, support, query: overhead + tasks * (support + query)


@given(LENGTHS, st.sampled_from([0.0, 50.0, 1e9]))
def test_every_task_is_in_one_bucket_that_holds_it(lengths: list[tuple[int, int]], overhead: float) -> None:
    support, query = torch.tensor(lengths).unbind(1)
    buckets = cut(support, query, by_places(overhead))
    assert torch.cat([bucket.tasks for bucket in buckets]).sort().values.tolist() == list(range(len(lengths)))
    longest = rounded(int(support.max()), 16), rounded(int(query.max()), 16)
    for bucket in buckets:
        assert int(support[bucket.tasks].max()) <= bucket.support <= longest[0]
        assert int(query[bucket.tasks].max()) <= bucket.query <= longest[1]
    seconds = by_places(overhead)
    assert sum(seconds(len(b.tasks), b.support, b.query) for b in buckets) <= seconds(len(lengths), *longest)
    assert len(buckets) == 1 or overhead < 1e9


def test_cuts_are_where_padding_is_saved() -> None:
    support, query = torch.tensor([60, 1, 64, 2, 1, 9, 62, 10]), torch.full((8,), 4)
    found = cut(support, query, by_places(10.0))
    assert [(b.tasks.tolist(), b.support, b.query) for b in found] == [
        ([1, 4, 3], 2, 4), ([5, 7], 12, 4), ([0, 6, 2], 64, 4)
    ]  # fmt: skip
    # Of the tasks' order only the order inside a bucket is left.
    shuffled = cut(support.flip(0), query, by_places(10.0))
    assert [sorted(7 - b.tasks) for b in shuffled] == [sorted(b.tasks) for b in found]


def test_like_batches_have_like_shapes() -> None:
    draw = torch.Generator().manual_seed(0)
    shapes = set()
    for _ in range(200):
        lengths = torch.randint(1, 65, (2, 64), generator=draw)
        shapes |= {(len(b.tasks), b.support, b.query) for b in cut(*lengths, by_places(100.0))}
    assert len(shapes) <= 64  # of some thousand lengths; the low-rank engine keeps so many recorded programs
    assert {tasks % (64 // UNITS) for tasks, *_ in shapes} == {0}


def test_rounded_wastes_at_most_a_half() -> None:
    ladder = [rounded(n) for n in range(2000)]
    assert ladder == sorted(ladder)
    assert all(n <= r <= max(8, 1.5 * n) for n, r in enumerate(ladder) if n)
    assert all(n <= rounded(n, 16) <= max(n + 3, 1.125 * n) for n in range(1, 2000))
    assert [r for n, r in enumerate(ladder) if n == r] == [
        1, 2, 4, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536
    ]  # fmt: skip


def test_a_meta_learner_cuts_by_its_engines_cost() -> None:
    support, query = torch.tensor([1, 64] * 256), torch.full((512,), 10)
    learner = MLP(64, (64, 64))
    many = MAML(learner, steps=3).buckets(support, query, 64, {})
    assert [(len(b.tasks), b.support) for b in many] == [(256, 1), (256, 64)]
    # A few tasks are not worth a call of their own.
    assert len(MAML(learner, steps=3).buckets(support[:2], query[:2], 64, {})) == 1
    assert len(MAML(learner, steps=0).buckets(support, query, 64, {})) >= 1


def test_no_tasks_no_buckets() -> None:
    nothing = torch.zeros(0, dtype=torch.int64)
    assert cut(nothing, nothing, by_places(1.0)) == []
