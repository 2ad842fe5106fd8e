"""The order of the tests: fast ones first, then several processes, then Ray, then faults.

A mistake in a formula should not wait for a cluster to start. Tests that use Ray in a module that doesn't import it
carry the mark `ray`. Those with several processes or Ray get the mark `processes`: they wait for others within limits,
or take all cores, so they run alone. Those of faults get the mark `faults`: they mostly wait, for minutes, within
limits that allow for a busy machine, so they run two at a time, the longest first.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from metatrain import collector

if at_once := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    # They share the cores, and so do the processes that they start.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // at_once)))

collector.relax()  # this process imports and collects all there is

_TESTS = Path(__file__).parent
#: The last stage.
_FAULTS = 3


@pytest.hookimpl(tryfirst=True)  # before pytest looks at marks
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=_order)  # stable: else the order is that of collection
    for item in items:
        if stage := _stage(item):
            item.add_marker(pytest.mark.faults if stage == _FAULTS else pytest.mark.processes)


def _order(item: pytest.Item) -> tuple[int, float]:
    limit = item.get_closest_marker("timeout") if _stage(item) == _FAULTS else None
    return _stage(item), -limit.args[0] if limit else 0.0


def _stage(item: pytest.Item) -> int:
    folder = item.path.relative_to(_TESTS).parts[0]
    if folder == "faults" or item.path.name == "test_cluster_run.py":
        return _FAULTS
    if item.get_closest_marker("ray") or "ray" in vars(getattr(item, "module", item)):
        return 2
    return 1 if folder == "distributed" else 0


@pytest.fixture(scope="session")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The plan of faults, empty but for tests that write one, which every process started from now on reads."""
    from metatrain import faults

    path = str(tmp_path_factory.mktemp("faults") / "plan.json")
    faults.write_plan(path, [])
    os.environ[faults.VARIABLE] = path
    return path


@pytest.fixture
def fault_plan(plan_file: str) -> Iterator[str]:
    """The plan's file, to be written to; empty again after the test."""
    from metatrain import faults

    yield plan_file
    faults.write_plan(plan_file, [])


@pytest.fixture(scope="session")
def ray_session(plan_file: str) -> Iterator[None]:
    """One small local Ray for every test that asks for it: starting one takes longer than most tests."""
    import ray

    from metatrain.local_ray import local_ray
    from metatrain.train.session import LOCAL_SETTINGS

    os.environ.update(LOCAL_SETTINGS)
    if ray.is_initialized():
        yield
        return
    with local_ray(
        num_cpus=6,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=300 * 1024**2,
    ):
        yield
