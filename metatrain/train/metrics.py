"""A run's gauges and counters in Ray's metrics, for Prometheus and cluster/grafana/metatrain.json.

The command that trains the run sets them, from what its workers tell: each of them is of all workers. Prometheus sees
the names with `ray_` before them.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from ray.util.metrics import Counter, Gauge


class Named(NamedTuple):
    """A metric's name and what it is."""

    name: str
    what: str


#: Gauges that are a curve's last value.
OF_CURVES: dict[str, Named] = {
    "learning/loss_before": Named("metatrain_loss_before", "Query loss before adaptation, of the last steps' tasks"),
    "learning/loss_after": Named("metatrain_loss_after", "Query loss after adaptation, of the last steps' tasks"),
    "health/gradient_norm": Named("metatrain_gradient_norm", "Norm of the dense meta-gradient"),
    "speed/tasks_per_second": Named("metatrain_tasks_per_second", "Tasks trained a second"),
    "speed/events_per_second": Named("metatrain_events_per_second", "Events trained a second"),
    "speed/step_seconds": Named("metatrain_step_seconds", "Seconds of a step"),
    "speed/memory_gib": Named("metatrain_worker_memory_gib", "Memory of a worker, GiB, the mean of all"),
    "time/wait": Named("metatrain_wait_share", "Share of the time that workers wait for batches"),
}
STEP = Named("metatrain_step", "Steps that are done")
STEPS = Named("metatrain_steps", "Steps of the whole run")
WORKERS = Named("metatrain_workers", "Training workers")
VALIDATION_LOSS = Named("metatrain_validation_loss", "Query loss after adaptation, of validation tasks")
CHECKPOINT_STEP = Named("metatrain_checkpoint_step", "Step of the last whole checkpoint")
CHECKPOINT_SECONDS = Named("metatrain_checkpoint_seconds", "Seconds that training stood still for the last checkpoint")
TIME_SHARE = Named("metatrain_time_share", "Share of the workers' time, by stage of a step")
WORKER_RESTARTS = Named("metatrain_worker_restarts_total", "Restarts of the group of workers by this command")
READER_RESTARTS = Named("metatrain_reader_restarts_total", "Readers that died and were replaced")

GAUGES = (
    *OF_CURVES.values(), STEP, STEPS, WORKERS, VALIDATION_LOSS, CHECKPOINT_STEP, CHECKPOINT_SECONDS, TIME_SHARE,
)  # fmt: skip
COUNTERS = (WORKER_RESTARTS, READER_RESTARTS)


class RunMetrics:
    """Takes the workers' messages; Ray must be initialised. `run` is the tag that tells runs apart."""

    def __init__(self, run: str) -> None:
        self._tags = {"run": run}
        self._gauges = {
            named: Gauge(named.name, named.what, ("run", "stage") if named is TIME_SHARE else ("run",))
            for named in GAUGES
        }
        self._counters = {named: Counter(named.name, named.what, ("run",)) for named in COUNTERS}
        self._started, self._reader_restarts = False, 0.0

    def take(self, message: dict[str, Any]) -> None:
        """Takes a message."""
        if "start" in message:
            self._set(WORKERS, message["start"])
            if self._started:
                self._counters[WORKER_RESTARTS].inc(1, self._tags)
            self._started, self._reader_restarts = True, 0.0
        if "validation_loss" in message:
            self._set(VALIDATION_LOSS, message["validation_loss"])
        elif "checkpoint" in message:
            self._set(CHECKPOINT_STEP, message["checkpoint"])
            self._set(CHECKPOINT_SECONDS, message["checkpoint_seconds"])
        elif "step" in message:
            self._line(message)

    def _line(self, message: dict[str, Any]) -> None:
        self._set(STEP, message["step"])
        self._set(STEPS, message["steps"])
        for curve, named in OF_CURVES.items():
            if curve in message:
                self._set(named, message[curve])
        for name, value in message.items():
            group, _, stage = name.partition("/")
            if group == "time":
                self._gauges[TIME_SHARE].set(value, self._tags | {"stage": stage})
        died = message.get("speed/reader_restarts", 0.0)
        if died > self._reader_restarts:
            self._counters[READER_RESTARTS].inc(died - self._reader_restarts, self._tags)
        self._reader_restarts = died

    def _set(self, named: Named, value: float) -> None:
        self._gauges[named].set(value, self._tags)
