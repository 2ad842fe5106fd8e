"""The code of a job: this package and the user's own learners, as a folder that Ray copies to every node.

A job's processes work in their node's copy of that folder, and Python finds there what it imports. So the code that
runs is the code that was checked, whatever release the cluster's image has.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import shutil
import sysconfig
import tempfile
from collections.abc import Iterator
from pathlib import Path

import metatrain
from metatrain.config import Config

#: What is not code. Data, runs and environments are not there: only packages that are imported are copied.
IGNORED = shutil.ignore_patterns("__pycache__", "*.pyc", "*.parquet", "*.pt", ".*")


@contextlib.contextmanager
def packaged(config: Config) -> Iterator[tuple[str, Config]]:
    """A folder with the code of a run, there while the block runs, and the configuration that names the copies."""
    with tempfile.TemporaryDirectory(prefix="metatrain-job-") as folder:
        shutil.copytree(Path(metatrain.__file__).parent, Path(folder) / "metatrain", ignore=IGNORED)
        learner = _copied(config.model.learner, folder)
        algorithm = _copied(config.meta.algorithm, folder)
        yield (
            folder,
            config.model_copy(
                update={
                    "model": config.model.model_copy(update={"learner": learner}),
                    "meta": config.meta.model_copy(update={"algorithm": algorithm}),
                }
            ),
        )


def _copied(name: str, folder: str) -> str:
    """The name that a learner has in the job's folder, where its code is put if it is not installed."""
    module, colon, class_name = name.rpartition(":")
    if not colon:
        return name  # one of ours
    if module.endswith(".py"):
        # As the user wrote it where that is below the working folder: the run's record then means the same there.
        relative = os.path.relpath(module)
        place = Path(module).name if relative.startswith("..") else relative
        (Path(folder) / place).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(module, Path(folder) / place)
        return f"{place}:{class_name}"
    top = module.partition(".")[0]
    spec = importlib.util.find_spec(top)
    if top == "metatrain" or spec is None:
        return name
    installed = tuple(sysconfig.get_path(kind) for kind in ("purelib", "platlib", "stdlib"))
    # A package is a folder, with an `__init__.py` or without; anything else a file.
    found = next(iter(spec.submodule_search_locations or ()), spec.origin)
    if found is None or found.startswith(installed):
        return name
    if spec.submodule_search_locations:
        shutil.copytree(found, Path(folder) / top, ignore=IGNORED, dirs_exist_ok=True)
    else:
        shutil.copy(found, folder)
    return name
