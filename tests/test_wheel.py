"""The wheel holds the package, all of it, and nothing else."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> zipfile.ZipFile:
    # Built from a copy: setuptools packs whatever an earlier build left in `build/`.
    source = tmp_path_factory.mktemp("source") / "repository"
    left_out = {ROOT: {".git", ".venv", "build", "dist", "runs", "data"}}

    def ignored(folder: str, names: list[str]) -> set[str]:
        caches = {name for name in names if name in {"__pycache__", ".hypothesis"} or name.endswith(".egg-info")}
        return caches | left_out.get(Path(folder), set())

    shutil.copytree(ROOT, source, ignore=ignored, symlinks=True)
    target = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(target), str(source)]
    built = subprocess.run(command, capture_output=True, text=True)
    assert built.returncode == 0, built.stdout + built.stderr
    [path] = target.glob("*.whl")
    return zipfile.ZipFile(path)


def test_only_the_package_is_inside(wheel: zipfile.ZipFile):
    tops = {name.split("/")[0] for name in wheel.namelist()}
    info = {top for top in tops if top.endswith(".dist-info")}
    assert len(info) == 1
    assert tops - info == {"metatrain"}


def test_every_module_is_inside(wheel: zipfile.ZipFile):
    package = ROOT / "metatrain"
    modules = {path.relative_to(ROOT).as_posix() for kind in ("*.py", "*.cpp") for path in package.rglob(kind)}
    assert modules == {name for name in wheel.namelist() if name.startswith("metatrain/")}


def test_metadata(wheel: zipfile.ZipFile):
    [info] = {name.split("/")[0] for name in wheel.namelist() if ".dist-info/" in name}
    assert "metatrain = metatrain.cli:main" in wheel.read(f"{info}/entry_points.txt").decode()
    assert "Apache License" in wheel.read(f"{info}/licenses/LICENSE").decode()
    metadata = wheel.read(f"{info}/METADATA").decode()
    assert "License-Expression: Apache-2.0" in metadata
    # On a machine without the NVIDIA driver either of them would bring in the flavour that cannot be imported.
    always = [line for line in metadata.splitlines() if line.startswith("Requires-Dist:") and "extra ==" not in line]
    assert not [line for line in always if "fbgemm" in line or "torchrec" in line]
