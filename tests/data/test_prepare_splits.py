"""Splits of users and items, and the hash under them: no user in two, a given one followed to the letter."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from metatrain.config import ItemSplit, PrepareConfig, UserSplit
from metatrain.data.hashing import hash_text, normal, unit
from metatrain.data.prepare_splits import LEFT_OUT, check_splits, new_items, time_thresholds, user_splits
from metatrain.data.randomness import hashed
from metatrain.errors import ConfigError, MetatrainError, SourceError

NEVER = np.iinfo(np.int64).max
keys = st.lists(st.text(st.characters(codec="utf-8", exclude_categories=("Cs",))), unique=True, max_size=40)


def tasks(names: list[str], first: list[int] | None = None, split: list[str | None] | None = None) -> pa.Table:
    columns = {"key": pa.array(names, type=pa.string()), "first": pa.array(first or [0] * len(names), type=pa.int64())}
    return pa.table(columns | {"split": pa.array(split or [None] * len(names), type=pa.string())})


@settings(deadline=None)
@given(names=keys, cut=st.integers(0, 40), salt=st.text(max_size=5))
def test_a_text_hash_is_of_the_text_alone(names: list[str], cut: int, salt: str):
    array = pa.array(names, type=pa.string())
    whole = hash_text(array, salt)
    assert len(set(whole.tolist())) == len(names)
    chunks = pa.chunked_array([array.slice(0, cut), array.slice(cut)])
    np.testing.assert_array_equal(hash_text(chunks, salt), whole)
    np.testing.assert_array_equal(hash_text(array.slice(cut), salt), whole[cut:])


def test_hashes_are_fixed_for_all_time():
    # A change here would move users between the splits of datasets that are prepared again.
    np.testing.assert_array_equal(hash_text(pa.array(["1", "anna"]), "users"), KNOWN)


KNOWN = np.array([2603928308311478256, 7672493855712811380], dtype=np.uint64)


def test_hashes_are_uniform_and_their_normals_normal():
    u = unit(hash_text(pa.array([str(i) for i in range(20_000)]), "users"))
    counts, _ = np.histogram(u, bins=20, range=(0, 1))
    assert np.abs(counts - 1000).max() < 150
    other = unit(hash_text(pa.array([str(i) for i in range(20_000)]), "items"))
    assert abs(np.corrcoef(u, other)[0, 1]) < 0.03
    n = normal(hashed(5, np.arange(20_000)))
    assert abs(n.mean()) < 0.03
    assert abs(n.std() - 1) < 0.03


@settings(deadline=None)
@given(names=keys, cut=st.integers(0, 40))
def test_a_users_split_depends_on_its_key_alone(names: list[str], cut: int):
    split = UserSplit(validation=0.3, test=0.3)
    whole = user_splits(tasks(names), split, None)
    assert set(whole.tolist()) <= {0, 1, 2}
    apart = np.concatenate([user_splits(tasks(names[:cut]), split, None), user_splits(tasks(names[cut:]), split, None)])
    np.testing.assert_array_equal(whole, apart)


def test_hash_shares_are_as_wished():
    codes = user_splits(tasks([str(i) for i in range(10_000)]), UserSplit(validation=0.1, test=0.2), None)
    np.testing.assert_allclose(np.bincount(codes) / 10_000, [0.7, 0.1, 0.2], atol=0.015)
    other = user_splits(tasks([str(i) for i in range(10_000)]), UserSplit(validation=0.1, test=0.2, salt="b"), None)
    assert (codes != other).mean() > 0.3


@settings(deadline=None)
@given(
    first=st.lists(st.integers(-(10**9), 2 * 10**9), min_size=1, max_size=60),
    validation=st.floats(0, 0.45),
    test=st.floats(0, 0.45),
    pieces=st.integers(1, 4),
)
def test_time_puts_the_latest_users_aside(first: list[int], validation: float, test: float, pieces: int):
    split = UserSplit(by="time", validation=validation, test=test)
    times = np.array(first)
    thresholds = time_thresholds(lambda: np.array_split(times, pieces), split)
    codes = user_splits(tasks([str(i) for i in range(len(first))], first), split, thresholds)
    held, tested = (codes > 0).sum(), (codes == 2).sum()
    assert held <= (validation + test) * len(first) + 1e-9
    assert tested <= test * len(first) + 1e-9
    for code in (1, 2):
        earlier = times[codes < code]
        assert not len(earlier) or not (codes == code).any() or times[codes == code].min() > earlier.max()
    # As many as may be: the next later time would be too many.
    remaining = times[codes < 2]
    assert tested + (remaining == remaining.max()).sum() > test * len(first) - 1e-9


@settings(deadline=None)
@given(names=keys, data=st.data())
def test_a_given_split_is_followed_to_the_letter(names: list[str], data: st.DataObject):
    values = data.draw(
        st.lists(st.sampled_from(["train", "validation", "test", None]), min_size=len(names), max_size=len(names))
    )
    codes = user_splits(tasks(names, split=values), UserSplit(by="given", column="fold"), None)
    assert codes.tolist() == [{"train": 0, "validation": 1, "test": 2, None: LEFT_OUT}[v] for v in values]


def test_a_given_split_of_another_name_is_refused():
    with pytest.raises(SourceError, match="train, validation, test") as error:
        user_splits(tasks(["a", "b"], split=["train", "dev"]), UserSplit(by="given", file="split.csv"), None)
    assert (error.value.where, error.value.got) == ("split.csv: key b", "dev")


ITEMS = pa.table(
    {
        "key": ["a", "b", "c", "d"],
        "year": ["1999", None, "1990", "2001"],
        "fold": ["new", "existing", "new", "existing"],
    }
)


def new(split: ItemSplit, first: list[int] | None = None) -> list[bool]:
    return new_items(ITEMS["key"].combine_chunks(), np.array(first or [NEVER] * 4), ITEMS, split).tolist()


def test_new_items_by_each_rule(tmp_path: Path):
    assert new(ItemSplit()) == [False] * 4
    assert new(ItemSplit(by="time", column="year", after=1998)) == [True, False, False, True]
    assert new(ItemSplit(by="given", column="fold")) == [True, False, True, False]
    assert new(ItemSplit(by="time", new=0.3), [1, 5, NEVER, 3]) == [False, False, False, False]
    assert new(ItemSplit(by="time", new=0.4), [1, 5, NEVER, 3]) == [False, True, False, False]
    (tmp_path / "items.csv").write_text("key,split\nd,new\na,existing\n")
    assert new(ItemSplit(by="given", file=str(tmp_path / "items.csv"))) == [False, False, False, True]
    many = pa.array([str(i) for i in range(5000)])
    hashed_split = new_items(many, np.zeros(5000, np.int64), pa.table({"key": many}), ItemSplit(by="hash", new=0.25))
    assert abs(hashed_split.mean() - 0.25) < 0.02


@pytest.mark.parametrize(
    "split",
    [
        ItemSplit(by="time", column="yeer", after=1),
        ItemSplit(by="time", column="fold", after=1),
        ItemSplit(by="given", column="year"),
    ],
)
def test_item_splits_that_cannot_be(split: ItemSplit):
    with pytest.raises(MetatrainError):
        new(split)


@pytest.mark.parametrize(
    "settings_",
    [
        {"user_split": UserSplit(by="given")},
        {"user_split": UserSplit(by="given", column="a", file="b")},
        {"user_split": UserSplit(file="b")},
        {"user_split": UserSplit(column="fold")},
        {"user_split": UserSplit(by="time", column="fold")},
        {"item_split": ItemSplit(by="hash", column="fold")},
        {"item_split": ItemSplit(by="hash", after=3)},
        {"item_split": ItemSplit(by="given", column="fold", after=3)},
        {"item_split": ItemSplit(by="time", file="b")},
        {"item_split": ItemSplit(column="year", after=3)},
        {"user_split": UserSplit(validation=0.5, test=0.5)},
        {"item_split": ItemSplit(by="given")},
        {"item_split": ItemSplit(by="time", column="year")},
    ],
)
def test_contradictions_are_refused_before_anything_is_read(settings_: dict):
    with pytest.raises(ConfigError):
        check_splits(PrepareConfig(**settings_))
