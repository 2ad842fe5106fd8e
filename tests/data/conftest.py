from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def _loaded() -> Any:
    # By path: it works in every import mode, and from the conftest of any other folder.
    spec = importlib.util.spec_from_file_location("tiny_dataset", Path(__file__).with_name("tiny_dataset.py"))
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`tiny_dataset(users=…)` writes a dataset once for its arguments (see `write_tiny_dataset`) and gives its URL."""
    module = _loaded()
    known: dict[str, str] = {}

    def make(fresh: bool = False, **settings: Any) -> str:
        """`fresh`: a copy of its own, for a test that breaks it."""
        name = repr(sorted(settings.items()))
        if fresh or name not in known:
            url = str(tmp_path_factory.mktemp("tiny"))
            module.write_tiny_dataset(url, **settings)
            if fresh:
                return url
            known[name] = url
        return known[name]

    return make
