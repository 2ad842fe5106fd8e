"""The code that a job carries."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from ray._private.runtime_env.packaging import get_uri_for_directory

from metatrain.config import Config, validated
from metatrain.submit.package import packaged

LEARNER = "from metatrain.meta.maml import MAML\n\n\nclass Mine(MAML):\n    pass\n"


def config(algorithm: str) -> Config:
    return validated({"meta": {"algorithm": algorithm}}, where="test")


def test_the_package_is_there_without_what_python_made_of_it():
    with packaged(config("maml")) as (folder, same):
        there = {path.relative_to(folder) for path in Path(folder).rglob("*")}
        assert same == config("maml")
        first = get_uri_for_directory(folder, include_gitignore=True)
    assert Path("metatrain/cli.py") in there
    assert Path("metatrain/__main__.py") in there
    assert Path("metatrain/meta/maml.py") in there
    assert not [path for path in there if path.name == "__pycache__" or path.suffix == ".pyc"]
    assert not Path(folder).exists()
    # Ray knows a folder by its content: submitting again sends nothing again.
    with packaged(config("maml")) as (folder, _):
        assert get_uri_for_directory(folder, include_gitignore=True) == first


def test_a_learner_in_a_file_goes_along_under_its_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "learners").mkdir()
    file = tmp_path / "learners/mine.py"
    file.write_text(LEARNER)
    monkeypatch.chdir(tmp_path)
    with packaged(config(f"{file}:Mine")) as (folder, sent):
        assert sent.meta.algorithm == "learners/mine.py:Mine"
        assert (Path(folder) / "learners/mine.py").read_text() == LEARNER
    monkeypatch.chdir(tmp_path / "learners")
    with packaged(config(f"{file}:Mine")) as (folder, sent):
        assert sent.meta.algorithm == "mine.py:Mine"
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    with packaged(config(f"{file}:Mine")) as (folder, sent):
        assert sent.meta.algorithm == "mine.py:Mine"
        assert (Path(folder) / "mine.py").read_text() == LEARNER


def test_a_learner_in_a_package_of_the_users_brings_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    inside = tmp_path / "ourlab/deep"
    inside.mkdir(parents=True)
    (tmp_path / "ourlab/__init__.py").write_text("")
    (inside / "mine.py").write_text(LEARNER)
    (tmp_path / "ourlab/big.parquet").write_bytes(b"x")
    (tmp_path / "single.py").write_text(LEARNER)
    monkeypatch.syspath_prepend(str(tmp_path))
    try:
        with packaged(config("ourlab.deep.mine:Mine")) as (folder, sent):
            assert sent.meta.algorithm == "ourlab.deep.mine:Mine"
            assert (Path(folder) / "ourlab/deep/mine.py").read_text() == LEARNER
            assert not (Path(folder) / "ourlab/big.parquet").exists()
        with packaged(config("single:Mine")) as (folder, _):
            assert (Path(folder) / "single.py").read_text() == LEARNER
    finally:
        sys.modules.pop("ourlab", None)


def test_what_is_installed_is_not_copied():
    with packaged(config("torch.nn:Linear")) as (folder, _):
        assert [path.name for path in Path(folder).iterdir()] == ["metatrain"]
