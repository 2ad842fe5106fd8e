"""A profile of some steps: torch.profiler's trace with the stages in it, and on a GPU a snapshot of its memory.

Stages are named in the trace (`stage: forward`, `part: inner_loop`) only while it is made: at other times nothing of
this costs anything. The GPU's path (its activities in the trace, the snapshot) has not been run.
"""

from __future__ import annotations

import functools
import os
import tempfile
from collections.abc import Callable
from typing import Any, cast

import torch
from torch.profiler import ProfilerActivity, profile, record_function

from metatrain import storage
from metatrain.config import Config, profiled_steps
from metatrain.model.metamodel import MetaModel
from metatrain.train.pulse import Pulse

#: Where in a run's folder profiles are.
FOLDER = "profile"
#: Lines of the table of operators.
_TABLE_ROWS = 40
#: Allocations that the memory snapshot remembers.
_ALLOCATIONS = 100_000


class Profile:
    """Profiles a worker's steps as `train.profile` says; without it, nothing.

    Files in RUN/profile/: `rank-R.steps-A-B.pt.trace.json.gz` for https://ui.perfetto.dev (or chrome://tracing, or
    TensorBoard with the plugin torch-tb-profiler), `….txt`, the operators that took longest, and on a GPU
    `….memory.pickle` for https://pytorch.org/memory_viz.

    Args:
        config: The recipe.
        rank: Every rank writes files of its own.
        model: Whose parts are named in the trace.
        pulse: Whose stages are.
        device: Of the model.
        say: Told where the files are.
    """

    def __init__(
        self,
        config: Config,
        rank: int,
        model: MetaModel,
        pulse: Pulse,
        device: torch.device,
        say: Callable[[str], None],
    ) -> None:
        self._steps = range(*profiled_steps(config.train.profile)) if config.train.profile else range(0)
        self._folder = storage.join(config.run_url, FOLDER)
        self._rank, self._model, self._pulse, self._device, self._say = rank, model, pulse, device, say
        self._running: Any = None
        self._stage: record_function | None = None
        self._begun = 0

    def at(self, step: int) -> None:
        """Begins or ends the profile, where `step` steps are done and the next one has not begun."""
        if self._running is None and step in self._steps:
            self._begin(step)
        elif self._running is not None and step not in self._steps:
            self.end(step)

    def end(self, step: int) -> None:
        """Ends the profile, if one is running, and writes its files."""
        if (running := self._running) is None:
            return
        self._running = None
        self._enter(None)
        self._pulse.on_enter = None
        for owner, name in self._parts():
            del owner.__dict__[name]
        running.__exit__(None, None, None)
        name = f"rank-{self._rank}.steps-{self._begun}-{step}"
        with tempfile.TemporaryDirectory(prefix="metatrain-profile-") as folder:
            trace = os.path.join(folder, f"{name}.pt.trace.json.gz")
            running.export_chrome_trace(trace)
            by = "self_cuda_time_total" if self._device.type == "cuda" else "self_cpu_time_total"
            with open(os.path.join(folder, f"{name}.txt"), "w", encoding="utf-8") as file:
                file.write(running.key_averages().table(sort_by=by, row_limit=_TABLE_ROWS))
            if self._device.type == "cuda":
                torch.cuda.memory._dump_snapshot(os.path.join(folder, f"{name}.memory.pickle"))
                torch.cuda.memory._record_memory_history(enabled=None)
            for file_name in sorted(os.listdir(folder)):
                with open(os.path.join(folder, file_name), "rb") as file:
                    storage.write_atomic(storage.join(self._folder, file_name), file.read())
        self._say(
            f"a profile of steps {self._begun} to {step} is in {self._folder}; open it at https://ui.perfetto.dev"
        )

    def _begin(self, step: int) -> None:
        activities = [ProfilerActivity.CPU]
        if self._device.type == "cuda":
            activities.append(ProfilerActivity.CUDA)
            torch.cuda.memory._record_memory_history(max_entries=_ALLOCATIONS)
        self._begun = step
        self._running = profile(activities=activities, record_shapes=True, profile_memory=True)
        self._running.__enter__()
        self._pulse.on_enter = self._enter
        for owner, name in self._parts():
            owner.__dict__[name] = _recorded(f"part: {_PARTS.get(name, name)}", getattr(owner, name))

    def _enter(self, stage: str | None) -> None:
        """Ends the range of the stage before, and begins this one's."""
        if self._stage is not None:
            self._stage.__exit__(None, None, None)
        self._stage = record_function(f"stage: {stage}") if stage is not None else None
        if self._stage is not None:
            self._stage.__enter__()

    def _parts(self) -> list[tuple[Any, str]]:
        model = self._model
        return [
            (model.tables, "request"),
            (model.tables, "lookup"),
            (model.featurizer, "assemble"),
            (model.meta, "forward"),
        ]


#: Names of methods as the trace has them.
_PARTS = {"request": "lookup, ids sent", "forward": "inner_loop"}


def _recorded(name: str, method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def inside(*args: Any, **kwargs: Any) -> Any:
        with record_function(name):
            return method(*args, **kwargs)

    return cast(Callable[..., Any], inside)
