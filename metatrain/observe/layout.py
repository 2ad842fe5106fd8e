"""The curves of a run, by the question that they answer: the page "Custom scalars" of TensorBoard.

A curve's name is `group/name`. Groups: learning, gain_by_support and validation (does it learn?), health, rates and
meta (is it healthy?), speed and time (how fast, and what holds it back?), final (what it came to).
docs/watching.md says what each curve means.
"""

from __future__ import annotations

from collections.abc import Iterable
from itertools import pairwise

#: Support sizes from which on a curve of `gain_by_support` begins.
SUPPORT_FROM = (0, 1, 3, 6, 11, 21, 51)


def support_names() -> tuple[str, ...]:
    """The names of the curves of `gain_by_support`, in the order of sizes, and of their sorted names."""
    ranges = [f"{low:02d}" if high == low + 1 else f"{low:02d}-{high - 1:02d}" for low, high in pairwise(SUPPORT_FROM)]
    return (*ranges, f"{SUPPORT_FROM[-1]} and more")


#: What judges a run in the tab "HParams", beside what an evaluation finds: curves with one point, at its end.
FINAL = (
    "final/validation_loss",
    "final/validation_gain",
    "final/training_loss",
    "final/tasks_per_second",
)

#: Question → chart → what the names of its lines match, from their beginning.
_CHARTS: dict[str, dict[str, str]] = {
    "1 Does it learn?": {
        "query loss, before and after adaptation": "learning/loss_(before|after)$",
        "validation loss, before and after adaptation": "validation/loss_(before|after)$",
        "gain: before less after": "(learning|validation)/gain$",
        "gain by number of support events": "gain_by_support/",
        "share of tasks that gained": "learning/improved_share$",
    },
    "2 Is it healthy?": {
        "norm of the meta-gradient: mean and greatest": "health/gradient_norm",
        "share of steps whose gradient was clipped": "health/clipped_share$",
        "norm of the dense parameters": "health/parameter_norm$",
        "norm of a row": "health/row_norm$",
        "rows touched a step": "health/rows_touched$",
        "tasks skipped: too few events": "health/skipped_tasks$",
        "steps skipped: not finite": "health/skipped_steps$",
        "outer learning rates": "rates/(outer|tables)$",
        "learned inner rates": "rates/inner ",
        "what the method learned": "meta/",
    },
    "3 How fast, and what holds it back?": {
        "tasks a second": "speed/tasks_per_second$",
        "events a second": "speed/events_per_second$",
        "shares of the time": "time/",
        "seconds of a step": "speed/step_seconds$",
        "seconds that training waits for a checkpoint": "speed/checkpoint_seconds$",
        "memory of a worker, GiB": "speed/memory_gib$",
        "restarts of workers and of readers": "speed/(restarts|reader_restarts)$",
    },
}
#: Charts whose curves not every method has.
_OF_SOME = ("rates/inner ", "meta/")


def layout(of_method: Iterable[str]) -> dict[str, dict[str, list[object]]]:
    """The page for a run, as `SummaryWriter.add_custom_scalars` wants it.

    Args:
        of_method: The names of the curves of the run's meta-learner. A chart that would be empty is left out.
    """
    names = tuple(of_method)
    return {
        question: {
            chart: ["Multiline", [pattern]]
            for chart, pattern in charts.items()
            if pattern not in _OF_SOME or any(name.startswith(pattern) for name in names)
        }
        for question, charts in _CHARTS.items()
    }
