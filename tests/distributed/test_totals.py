"""A line of the curves is of all ranks' tasks, and its sums are what a loop over tasks would give."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from metatrain.data.batch import TaskBatch
from metatrain.model.metamodel import StepOutput
from metatrain.observe.laps import STAGES, Laps
from metatrain.train.step import Outcome
from metatrain.train.totals import Totals
from tests.distributed.ranks import run_ranks

SUPPORT = [[[0, 1, 2], [7, 60]], [[2, 51], []]]  # rank → step → tasks
NORMS = [3.0, 12.0]  # of the steps' gradients: equal on all ranks
CLIP = 10.0


def gain(support: int) -> float:
    return 0.1 * support - 0.15


def taken(rank: int, step: int) -> tuple[Outcome, TaskBatch]:
    support = torch.tensor(SUPPORT[rank][step], dtype=torch.int64)
    gains = torch.tensor([gain(s) for s in support.tolist()])
    nothing = torch.zeros(0, dtype=torch.int64)
    batch = TaskBatch(
        tasks=torch.arange(len(support)),
        support_lengths=support,
        query_lengths=torch.ones_like(support),
        items=nothing,
        event_items=nothing,
        labels=torch.zeros(int(support.sum()) + len(support)),
        timestamps=nothing,
        skipped=rank,
    )
    after = torch.ones_like(gains)
    output = StepOutput(
        torch.zeros(()), (after + gains).sum(), after.sum(), gains, len(support), 10 * (step + 1), torch.tensor(4.0)
    )
    return Outcome(output, torch.tensor(NORMS[step]), 0.1, 0.2), batch


def line(rank: int, world_size: int) -> Any:
    laps = Laps()
    totals = Totals(torch.device("cpu"), laps, clip=CLIP)
    for step in range(2):
        totals.add(*taken(rank, step))
        laps.lap("inner_loop")
    first = totals.reduce(due=rank == 1, reader_restarts=rank + 1)
    totals.add(*taken(rank, 0))
    return first, totals.reduce(due=False)


def test_a_line_is_of_all_tasks_of_all_ranks() -> None:
    ranks = run_ranks(line, 2)
    (curves, gains, due), (later, _, later_due) = ranks[0]
    assert {n: v for n, v in ranks[1][0][0].items() if "second" not in n} == {
        n: v for n, v in curves.items() if "second" not in n
    }
    assert (due, later_due) == (True, False)
    support = [s for of_rank in SUPPORT for of_step in of_rank for s in of_step]
    expected = [gain(s) for s in support]
    assert curves["learning/gain"] == pytest.approx(sum(expected) / len(support))
    assert curves["learning/loss_after"] == pytest.approx(1.0)
    assert curves["learning/improved_share"] == pytest.approx(sum(g > 0 for g in expected) / len(support))
    by_support = {name.partition("/")[2]: v for name, v in curves.items() if name.startswith("gain_by_support/")}
    assert by_support == pytest.approx(
        {
            "00": gain(0),
            "01-02": (gain(1) + 2 * gain(2)) / 3,
            "06-10": gain(7),
            "51 and more": (gain(51) + gain(60)) / 2,
        }
    )
    assert curves["health/gradient_norm"] == pytest.approx(7.5)
    assert curves["health/gradient_norm_max"] == 12.0
    assert curves["health/clipped_share"] == 0.5
    assert curves["health/rows_touched"] == (10 + 20) * 2 / 2
    assert curves["health/row_norm"] == pytest.approx((16 / 60) ** 0.5)
    assert curves["health/skipped_tasks"] == 2
    assert curves["speed/reader_restarts"] == 3
    assert 0.01 < curves["speed/memory_gib"] < 10
    assert sum(curves[f"time/{stage}"] for stage in STAGES) == pytest.approx(1.0)
    # The gains for the histogram are this rank's own, in the order of its tasks.
    torch.testing.assert_close(gains, torch.tensor([gain(s) for s in (0, 1, 2, 7, 60)]))
    # And the next line begins at nothing.
    assert "gain_by_support/06-10" not in later
    assert later["health/gradient_norm_max"] == 3.0
