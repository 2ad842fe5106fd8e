"""Runs a function on several gloo ranks, each a process of its own, and brings back what each returned.

    def rows(rank: int, world_size: int, seed: int) -> torch.Tensor: ...
    first, second = run_ranks(rows, 2, 7)

The function is found by its name in its module, so it must be at a module's top level. A rank that raises ends the
others, and its traceback is the error here; so does a rank that is not done in time, with what it was doing.
"""

from __future__ import annotations

import faulthandler
import os
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, NoReturn

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as functional
import torch.multiprocessing as mp

# A process that others are forked from should have one thread; pyarrow's allocator would start another.
os.environ.setdefault("JE_ARROW_MALLOC_CONF", "background_thread:false")


#: Collectives (DTensors gather by the first) whose names in gloo have more than 15 characters: see `_refused`.
_LONG_NAMES = (
    "all_gather_single",
    "all_gather_single_coalesced",
    "reduce_scatter_single",
    "reduce_scatter_single_coalesced",
    "all_reduce_coalesced",
)


class RankError(AssertionError):
    """A rank failed, or took too long."""


def run_ranks(function: Callable[..., Any], world_size: int, *args: Any, seconds: float = 90.0) -> list[Any]:
    """`function(rank, world_size, *args)` on every rank of a gloo group; the results by rank.

    Raises:
        RankError: With the traceback of the first rank that raised, or the ranks that were not done in `seconds`.
    """
    context = mp.get_context("forkserver")
    # Imported once, by the server that the ranks are forked from: all that training takes is seconds, and a rank has
    # none to lose.
    context.set_forkserver_preload(
        ["metatrain.train.worker", "torch.distributed.checkpoint", "pytest", "hypothesis", "tests.train.runs"]
    )
    with TemporaryDirectory() as folder:
        ranks = [
            context.Process(target=_rank, args=(function, rank, world_size, folder, seconds, args), daemon=True)
            for rank in range(world_size)
        ]
        for process in ranks:
            process.start()
        deadline = time.monotonic() + seconds
        try:
            while any(process.is_alive() for process in ranks) and not _failures(folder):
                if time.monotonic() > deadline:
                    late = [rank for rank, process in enumerate(ranks) if process.is_alive()]
                    doing = "\n".join(path.read_text() for path in sorted(Path(folder).glob("*.doing")))
                    raise RankError(f"ranks {late} of {world_size} were not done in {seconds} s\n{doing}")
                time.sleep(0.05)
            if failures := _failures(folder):
                raise RankError("\n".join(failures))
            if died := {rank: p.exitcode for rank, p in enumerate(ranks) if p.exitcode}:
                raise RankError(f"ranks died without a traceback; exit codes: {died}")
            return [torch.load(Path(folder, f"{rank}.result"), weights_only=False) for rank in range(world_size)]
        finally:
            for process in ranks:
                if process.is_alive():
                    process.kill()
                process.join()


def _refused(*_: object, **__: object) -> NoReturn:
    """What no rank may call: after it gloo's threads may write to freed memory, see docs/decisions.md."""
    raise AssertionError("Functional collectives may crash gloo: gather by dist.all_gather or all_gather_object.")


def _failures(folder: str) -> list[str]:
    return [path.read_text() for path in sorted(Path(folder).glob("*.failure"))]


def _rank(
    function: Callable[..., Any], rank: int, world_size: int, folder: str, seconds: float, args: tuple[Any, ...]
) -> None:
    torch.set_num_threads(1)
    for name in _LONG_NAMES:
        assert hasattr(functional, name)
        setattr(functional, name, _refused)
    # A rank that hangs tells where, a little before the parent's patience ends.
    faulthandler.dump_traceback_later(0.9 * seconds, file=open(Path(folder, f"{rank}.doing"), "w"))  # noqa: SIM115
    try:
        store = dist.FileStore(str(Path(folder, "store")), world_size)
        dist.init_process_group(
            "gloo", rank=rank, world_size=world_size, store=store, timeout=timedelta(seconds=seconds)
        )
        torch.save(function(rank, world_size, *args), Path(folder, f"{rank}.result"))
        dist.barrier()  # a rank that leaves early takes the connections of the others with it
        dist.destroy_process_group()
    except BaseException:
        # Written whole, then named: the parent may look at any time.
        text = Path(folder, f"{rank}.text")
        text.write_text(f"rank {rank} of {world_size}:\n{traceback.format_exc()}")
        text.rename(text.with_suffix(".failure"))
        raise
