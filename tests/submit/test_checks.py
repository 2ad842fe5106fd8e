"""What `metatrain submit` refuses, and that no cluster hears of it."""

from __future__ import annotations

import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest

from metatrain import storage
from metatrain.cli import main
from metatrain.config import Config, to_yaml
from metatrain.errors import CheckpointError
from metatrain.submit import commands, jobs
from metatrain.submit.checks import check_submission
from metatrain.train.checks import located
from tests.data.tiny_dataset import write_tiny_dataset
from tests.train.runs import recipe


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = str(tmp_path_factory.mktemp("submit") / "dataset")
    write_tiny_dataset(folder)
    return folder


@pytest.fixture
def no_cluster(monkeypatch: pytest.MonkeyPatch) -> None:
    def reached(address: str | None) -> None:
        raise AssertionError(f"{address} was reached")

    monkeypatch.setattr(jobs, "Jobs", reached)


def submit(file: Path, config: Config, *options: str) -> int:
    file.write_text(to_yaml(config))
    with pytest.raises(SystemExit) as ended:
        main(["submit", str(file), "--address", "http://127.0.0.1:1", *options])
    return int(ended.value.code or 0)


BROKEN: dict[str, tuple[dict[str, Any], str]] = {
    "a feature that is not there": ({"model": {"features": ["colours"]}}, "colours"),
    "an option that the learner lacks": ({"meta": {"options": {"stepz": 3}}}, "no such option"),
    "an episode that no task has": ({"data": {"episode": {"events_min": 10_000}}}, "enough events"),
    "a pattern that adapts nothing": ({"meta": {"adapt": ["tail.*"]}}, "tail.*"),
}


@pytest.mark.parametrize("what", BROKEN)
@pytest.mark.usefixtures("no_cluster")
def test_what_cannot_work_is_refused_here(what: str, dataset: str, tmp_path: Path, capsys):
    sections, told = BROKEN[what]
    config = recipe(dataset, str(tmp_path / "runs"), "broken")
    changed = config.model_dump()
    for section, values in sections.items():
        for name, value in values.items():
            changed[section][name] = {**changed[section][name], **value} if isinstance(value, dict) else value
    assert submit(tmp_path / "recipe.yaml", Config.model_validate(changed)) == 2
    assert told in capsys.readouterr().err
    assert not storage.exists(str(tmp_path / "runs"))


@pytest.mark.usefixtures("no_cluster")
def test_a_dry_run_shows_what_the_run_takes_and_submits_nothing(dataset: str, tmp_path: Path, capsys):
    config = recipe(dataset, str(tmp_path / "runs"), "dry", {"workers": 2})
    assert submit(tmp_path / "recipe.yaml", config, "--dry-run") == 0
    shown = capsys.readouterr().out
    assert f"{config.run_url}, new" in shown
    assert "2 workers × (1 CPU + 1 readers × 0.5 CPU): at least 3 CPUs" in shown
    assert "every node must see" in shown
    assert not storage.exists(str(tmp_path / "runs"))


@pytest.mark.usefixtures("no_cluster")
def test_a_manifest_says_at_its_top_what_pods_may_lack(dataset: str, tmp_path: Path, capsys):
    config = recipe(dataset, str(tmp_path / "runs"), "rendered")
    (tmp_path / "recipe.yaml").write_text(to_yaml(config))
    main(["submit", str(tmp_path / "recipe.yaml"), "--render", "rayjob"])
    head = [line for line in capsys.readouterr().out.splitlines() if line.startswith("#")]
    assert [line.split()[1] for line in head] == [dataset, config.run_url, "metatrain:latest"]
    main(["submit", str(tmp_path / "recipe.yaml"), "--render", "rayjob", "--image", "registry.example/metatrain:1"])
    assert "metatrain:1 names no registry" not in capsys.readouterr().out


@pytest.mark.usefixtures("no_cluster")
def test_a_run_that_is_at_its_end_is_not_submitted(dataset: str, tmp_path: Path, monkeypatch, capsys):
    monkeypatch.setattr(commands, "finished", lambda config: True)
    assert submit(tmp_path / "recipe.yaml", recipe(dataset, str(tmp_path / "runs"), "over")) == 0
    assert capsys.readouterr().out.startswith("this run is trained to its end")


def test_another_configuration_of_a_name_is_refused_before_the_first_checkpoint(dataset: str, tmp_path: Path):
    config = located(recipe(dataset, str(tmp_path / "runs"), "taken"))
    storage.write_atomic(storage.join(config.run_url, "config.yaml"), to_yaml(config))
    check_submission(config)
    # What a run may change as it goes on is no difference.
    check_submission(config.model_copy(update={"train": config.train.model_copy(update={"workers": 2, "epochs": 9})}))
    other = config.model_copy(update={"meta": config.meta.model_copy(update={"rate": 0.5})})
    with pytest.raises(CheckpointError, match="begun with another model") as caught:
        check_submission(other)
    assert caught.value.got == "meta.rate: was 0.02, is 0.5"
    assert caught.value.where == storage.join(config.run_url, "config.yaml")


def test_another_dataset_under_a_name_is_a_difference(dataset: str, tmp_path: Path):
    config = located(recipe(dataset, str(tmp_path / "runs"), "taken"))
    storage.write_atomic(storage.join(config.run_url, "config.yaml"), to_yaml(config))
    moved = str(tmp_path / "moved")
    write_tiny_dataset(moved, users=61)
    with pytest.raises(CheckpointError, match="begun with another") as caught:
        check_submission(config.model_copy(update={"data": config.data.model_copy(update={"dataset": moved})}))
    assert caught.value.got == f"dataset: was {dataset!r}, is {moved!r}"


#: What is wrong, by an option; what of it is told; and what its telling must not wait for.
SOON = {
    "an unknown field": (["--train.epocs", "3"], "epocs", ("torch", "ray", "pyarrow")),
    "no dataset": (["--data.dataset", "nowhere"], "no task dataset here", ("torch", "ray")),
    "a feature that is not there": (["--model.features", "colours"], "no feature of this name", ("torch", "ray")),
    "a loss of clicks": (["--meta.loss", "binary_cross_entropy"], "for clicks", ("torch", "ray")),
    "an episode that no task has": (["--data.episode.events_min", "10000"], "enough events", ("torch", "ray")),
    "another's name": (["--run.name", "taken"], "meta.rate: was 0.5, is 0.02", ("torch", "ray")),
    "a pattern that adapts nothing": (["--meta.adapt", "tail.*"], "tail.*", ("torchrec", "ray")),
    "a pair that makes no sense": (["--meta.algorithm", "matching"], "", ("torchrec", "ray")),
}
# As `python -m metatrain`, and then the modules that it had imported.
SAYING = (
    "import sys, metatrain.cli\n"
    "try: metatrain.cli.main(sys.argv[1:])\n"
    "finally: print(*sorted({name.partition('.')[0] for name in sys.modules}))"
)


@pytest.mark.timeout(300)
@pytest.mark.parametrize("what", SOON)
def test_a_refusal_waits_for_no_more_than_it_needs(what: str, dataset: str, tmp_path: Path):
    """Importing torch, TorchRec and Ray takes ten times as long as all else. Nobody listens at the address."""
    options, told, unneeded = SOON[what]
    config = recipe(dataset, str(tmp_path / "runs"), "broken")
    (tmp_path / "recipe.yaml").write_text(to_yaml(config))
    other = config.model_copy(update={"meta": config.meta.model_copy(update={"rate": 0.5})})
    storage.write_atomic(storage.join(str(tmp_path / "runs"), "taken", "config.yaml"), to_yaml(other))
    command = [sys.executable, "-W", "ignore", "-c", SAYING, "submit", str(tmp_path / "recipe.yaml")]
    ended = subprocess.run(
        [*command, "--address", "http://127.0.0.1:1", *options], capture_output=True, text=True, cwd=tmp_path
    )
    assert ended.returncode == 2
    assert told in ended.stderr
    imported = set(ended.stdout.split())
    assert "metatrain" in imported
    assert not imported & set(unneeded)


@pytest.mark.timeout(60)
def test_a_broken_recipe_takes_seconds_and_no_connection(dataset: str, tmp_path: Path):
    """By the command as users give it, against a port that counts who knocks."""
    file = tmp_path / "broken.yaml"
    missing = recipe(str(tmp_path / "nowhere"), str(tmp_path / "runs"), "broken")
    file.write_text(to_yaml(missing))
    knocks: list[object] = []
    with socket.create_server(("127.0.0.1", 0)) as server:
        server.settimeout(0.2)
        over = threading.Event()

        def listen() -> None:
            while not over.is_set():
                try:
                    knocks.append(server.accept())
                except TimeoutError:
                    continue

        thread = threading.Thread(target=listen)
        thread.start()
        address = f"http://127.0.0.1:{server.getsockname()[1]}"
        command = [sys.executable, "-m", "metatrain", "submit", str(file), "--address", address]
        # By processor time, which other work on the machine does not stretch.
        code = (
            "import resource, subprocess, sys; ended = subprocess.run(sys.argv[1:], capture_output=True, text=True);"
            "used = resource.getrusage(resource.RUSAGE_CHILDREN);"
            "print(ended.returncode, used.ru_utime + used.ru_stime, ended.stderr)"
        )
        output = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True, check=True)
        over.set()
        thread.join()
    returned, seconds, told = output.stdout.split(" ", 2)
    assert returned == "2"
    assert "no task dataset here" in told
    assert float(seconds) < 5
    assert not knocks
