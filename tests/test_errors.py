"""Errors say what, where, got and remedy, and cross process borders whole."""

import pickle

import pytest

from metatrain import errors


@pytest.mark.parametrize("kind", [errors.ConfigError, errors.SourceError, errors.DatasetError, errors.CheckpointError])
def test_an_error_survives_pickling_with_all_its_parts(kind):
    error = kind("It broke.", where="file.csv: line 3", got=1.5, remedy="Mend it.")
    again = pickle.loads(pickle.dumps(error))
    assert type(again) is kind
    assert str(again) == str(error) == "It broke.\n  where: file.csv: line 3\n  got: 1.5\n  remedy: Mend it."


def test_parts_that_are_absent_are_not_shown():
    assert str(errors.MetatrainError("It broke.")) == "It broke."


def test_an_error_of_a_shard_keeps_its_path():
    error = errors.ShardError("It broke.", path="shards/train/0.parquet", where="here", got=1, remedy="Mend it.")
    again = pickle.loads(pickle.dumps(error))
    assert (type(again), again.path, str(again)) == (errors.ShardError, error.path, str(error))
