from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest

from metatrain.data.kernels import kernels
from tests.data.tiny_dataset import write_tiny_dataset


@pytest.fixture(scope="session")
def tiny_dataset(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """`tiny_dataset(users=…)` writes a dataset once for its arguments (see `write_tiny_dataset`) and gives its URL."""
    known: dict[str, str] = {}

    def make(fresh: bool = False, **settings: Any) -> str:
        """`fresh`: a copy of its own, for a test that breaks it."""
        name = repr(sorted(settings.items()))
        if fresh or name not in known:
            url = str(tmp_path_factory.mktemp("tiny"))
            write_tiny_dataset(url, **settings)
            if fresh:
                return url
            known[name] = url
        return known[name]

    return make


@pytest.fixture(scope="module", params=[True, False], ids=["kernels", "numpy"])
def both_ways(request: pytest.FixtureRequest) -> Iterator[None]:
    """Rows are gathered by the reader's kernels, then by numpy."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("METATRAIN_KERNELS", str(int(request.param)))
        kernels.cache_clear()
        assert (kernels() is not None) == request.param, "this machine has no C++ compiler"
        yield
    kernels.cache_clear()
