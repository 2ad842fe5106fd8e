"""Credentials in URLs: known, refused wherever a URL comes in, and never shown."""

from __future__ import annotations

from pathlib import Path

import pytest

from metatrain import storage
from metatrain.cli import main
from metatrain.config import load_config
from metatrain.credentials import holds_credential, redacted
from metatrain.errors import ConfigError, StorageError

SECRET = "hunter2/x"
WITH = [
    f"s3://AKIA:{SECRET}@bucket/path",
    f"ftp://user:{SECRET}@host/file.csv",
    f"https://host/file.csv?sig={SECRET}",
    f"https://host/file.csv?a=1&X-Amz-Signature={SECRET}&b=2",
    f"https://host/x?X-Amz-Security-Token={SECRET}",
    f"filecache::https://user:{SECRET}@host/x",
    f"abfs://c@a.dfs.core.windows.net/x?sv=1&sig={SECRET}",
]
WITHOUT = [
    "s3://bucket/path/*.parquet",
    "sftp://user@host/file",
    "https://host:8080/path@2/file?versionId=3",
    "https://host/x?page=1",
    "/a/path?token=of-a-file-name",
    "runs:token@x",
    "simplecache::s3://bucket/x",
]


@pytest.mark.parametrize("url", WITH)
def test_a_credential_is_known_and_left_out(url: str):
    assert holds_credential(url)
    assert SECRET not in redacted(url)
    assert not holds_credential(redacted(url).replace("…", ""))
    with pytest.raises(StorageError) as caught:
        storage.exists(url)
    assert SECRET not in str(caught.value)
    assert "credential" in str(caught.value)


@pytest.mark.parametrize("url", WITHOUT)
def test_what_is_no_credential_stays(url: str):
    assert not holds_credential(url)
    assert redacted(url) == url


@pytest.mark.parametrize(
    "field", ["data: {dataset: URL}", "run: {storage: URL}", "prepare: {path: URL, source: events}"]
)
def test_a_recipe_with_a_credential_is_refused_without_showing_it(tmp_path: Path, field: str):
    path = tmp_path / "recipe.yaml"
    path.write_text(field.replace("URL", repr(WITH[0])))
    with pytest.raises(ConfigError, match="credential in it") as caught:
        load_config(str(path))
    assert SECRET not in str(caught.value)
    assert "environment" in str(caught.value)


@pytest.mark.parametrize(
    "arguments",
    [
        ["prepare", "events", "--path", WITH[0], "--out", "OUT"],
        ["prepare", "synthetic", "--out", WITH[0]],
        ["verify", WITH[0]],
        ["config", "RECIPE", "--data.dataset", WITH[0]],
        ["train", "RECIPE", "--run.storage", WITH[0]],
        ["evaluate", WITH[0]],
    ],
)
def test_no_command_shows_one_or_goes_on(
    tmp_path: Path, arguments: list[str], capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("run: {name: x}")
    places = {"OUT": str(tmp_path / "out"), "RECIPE": str(recipe)}
    with pytest.raises(SystemExit) as ended:
        main([places.get(argument, argument) for argument in arguments])
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert SECRET not in shown.out + shown.err + caplog.text
    assert "credential" in shown.err
