"""A meta-learner of the user's, outside the package, trains on Ray, resumes, loads and is judged like one of ours."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from metatrain.checkpoint import committed_steps
from metatrain.config import Config, load_config
from metatrain.errors import ConfigError
from metatrain.evaluate.evaluation import evaluate_run
from metatrain.recommend.recommender import Recommender
from metatrain.train import launch as launching
from metatrain.train.launch import check, launch
from tests.data.tiny_dataset import write_tiny_dataset
from tests.pages import example_meta_learner
from tests.train.runs import curve, recipe
from tests.train.without_ray import train_on_ranks

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    url = str(tmp_path_factory.mktemp("dataset"))
    write_tiny_dataset(url, users=80, items=30)
    return url


def own(dataset: str, runs: Path, algorithm: str, max_steps: int) -> Config:
    return recipe(
        dataset,
        str(runs),
        "own",
        {"max_steps": max_steps, "validate_every": 0},
        meta={"algorithm": algorithm, "options": {"shrinkage": 3.0}},
    )


@pytest.mark.timeout(300)
def test_a_file_of_the_users_trains_resumes_loads_and_is_judged(
    dataset: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ray_session: None
) -> None:
    (tmp_path / "my_methods.py").write_text(example_meta_learner())
    # As the command does in the file's folder; the workers have another one.
    monkeypatch.chdir(tmp_path)
    short = own(dataset, tmp_path / "runs", "my_methods.py:ShrunkBias", 4)
    launch(short)
    assert committed_steps(short.run_url)[-1] == 4
    monkeypatch.chdir("/")
    # The same file by its whole path, from elsewhere: it goes on from step 4.
    longer = own(dataset, tmp_path / "runs", f"{tmp_path}/my_methods.py:ShrunkBias", 8)
    check(longer)
    train_on_ranks(longer, 1)
    assert committed_steps(longer.run_url)[-1] == 8
    assert sorted(curve(longer, "learning/loss_after")) == list(range(1, 9))
    assert curve(longer, "meta/shrinkage")[1] == pytest.approx(3.0, rel=0.01)
    assert load_config(f"{longer.run_url}/config.yaml").meta.algorithm == longer.meta.algorithm
    assert type(Recommender.load(longer.run_url).model.meta).__name__ == "ShrunkBias"
    assert "adapted" in evaluate_run(longer.run_url).table()
    with monkeypatch.context() as patched:
        patched.setattr(launching, "_fit", lambda config, work: pytest.fail("workers were started"))
        launch(longer)
    # Moved: the run is the same one, and where its file lies now is what config.yaml says.
    (tmp_path / "elsewhere").mkdir()
    shutil.move(tmp_path / "my_methods.py", tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match="no such file"):
        Recommender.load(longer.run_url)
    moved = own(dataset, tmp_path / "runs", f"{tmp_path}/elsewhere/my_methods.py:ShrunkBias", 8)
    check(moved)
    file = Path(longer.run_url, "config.yaml")
    file.write_text(file.read_text().replace("/my_methods.py", "/elsewhere/my_methods.py"))
    assert type(Recommender.load(longer.run_url).model.meta).__name__ == "ShrunkBias"


@pytest.mark.timeout(300)
def test_a_module_that_the_command_finds_is_found_by_the_workers(
    dataset: str, tmp_path: Path, ray_session: None
) -> None:
    config = own(dataset, tmp_path / "runs", "tests.train.page_method:ShrunkBias", 2)
    launch(config)
    assert committed_steps(config.run_url)[-1] == 2
    assert type(Recommender.load(config.run_url).model.meta).__module__ == "tests.train.page_method"
