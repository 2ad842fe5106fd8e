"""Measure the inner loop where embedding rows adapt or layers are normalised: the low-rank engine beside vmap.

    python tools/bench_adapted.py [--threads 1] [--rounds 5] [--random N] [--json FILE]

One meta-gradient of an MLP with skip, squared error and learned rates, to weights, rows, fixed inputs and rates. A task
has a row for each of its events' items (width 32), 18 genres of which an event has three (16), and one of its own (16).
Runs are interleaved and medians shown, so that a busy machine slows both alike. `picked` is the engine that `auto`
takes by counted cost, and `lost` how much longer than the other it takes, where it does. `--random` draws that many
small and odd configurations in place of the list, to try the choice where the engines are close.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_common import versions, write_json

from metatrain.meta.engine import VmapEngine, rows_key
from metatrain.meta.episode import Episodes, Examples, Slots
from metatrain.meta.losses import event_loss, mean_over_events
from metatrain.meta.low_rank import LowRankEngine
from metatrain.meta.low_rank_choice import ChoosingEngine
from metatrain.meta.maml import matching_parameters
from metatrain.model.learners.mlp import MLP

_SQUARED = event_loss("squared")
#: Feature → ids of an event, ids that a task's events draw from (None: one an event), embedding width.
FEATURES: dict[str, tuple[int, int | None, int]] = {"genres": (3, 18, 16), "item": (1, None, 32), "own": (1, 1, 16)}


@dataclass(frozen=True)
class Case:
    """One configuration."""

    rows: str = "item"  # features whose rows adapt, by a comma
    adapt: str = "*"  # pattern of the parameters that adapt; empty: none
    norm: str = "none"
    support: int = 20
    query: int = 10
    width: int = 64  # of the fixed inputs
    hidden: tuple[int, ...] = (64, 64)
    steps: int = 3
    order: int = 2
    tasks: int = 64


CASES = (
    Case(),
    Case(width=256),
    Case(width=1024),
    Case(rows="genres,item,own"),
    Case(adapt="head.*"),
    Case(adapt=""),
    Case(steps=1),
    Case(steps=5),
    Case(order=1),
    Case(support=5),
    Case(support=64),
    Case(support=64, query=32, hidden=()),
    Case(support=64, query=32, hidden=(32,), adapt="head.*"),
    Case(rows="", norm="layer", width=256),
    Case(rows="", norm="layer", width=256, order=1),
    Case(rows="", norm="layer", support=64),
    Case(norm="layer", width=256),
)


def drawn(number: int) -> tuple[Case, ...]:
    """Random configurations, most of them small."""
    draw = random.Random(number)
    return tuple(
        Case(
            draw.choice(["", "item", "own", "genres", "genres,item"]),
            draw.choice(["*", "*", "head.*", "layers.*"]),
            draw.choice(["none", "layer"]),
            draw.choice([3, 10, 30, 100]),
            draw.choice([1, 10, 30]),
            draw.choice([4, 16, 64, 200]),
            draw.choice([(8,), (32,), (64,), (16, 16), (64, 32)]),
            draw.choice([1, 2, 4]),
            draw.choice([1, 2]),
            draw.choice([4, 16, 64]),
        )
        for _ in range(number)
    )


def episodes(case: Case) -> Episodes:
    """Random tasks."""
    draw, names = torch.Generator().manual_seed(1), [name for name in case.rows.split(",") if name]

    def side(events: int, first: int) -> Examples:
        slots = {}
        for name in names:
            ids, most, _ = FEATURES[name]
            shape = (case.tasks, events, ids)
            index = torch.arange(first, first + events).view(1, -1, 1).expand(shape).contiguous()
            if most is not None:
                index = torch.randint(0, most, shape, generator=draw)
            slots[name] = Slots(index, torch.ones(shape))
        x = torch.randn(case.tasks, events, case.width, generator=draw).requires_grad_()
        labels = torch.randn(case.tasks, events, generator=draw)
        return Examples(x, slots, labels, torch.ones_like(labels))

    rows = {}
    for name in names:
        _, most, width = FEATURES[name]
        shape = (case.tasks, case.support + case.query if most is None else most, width)
        rows[name] = (0.1 * torch.randn(shape, generator=draw)).requires_grad_()
    return Episodes(side(case.support, 0), side(case.query, case.support), rows)


def runs(case: Case) -> tuple[dict[str, Callable[[], object]], str]:
    """One meta-gradient by each engine, and the name of the one that `auto` takes."""
    torch.manual_seed(0)
    data = episodes(case)
    width = case.width + sum(rows.shape[2] for rows in data.rows.values())
    learner = MLP(width, case.hidden, "relu", norm=case.norm)
    names = matching_parameters(learner, [case.adapt] if case.adapt else [])
    keys = (*names, *(rows_key(name) for name in sorted(data.rows)))
    rates = [{key: torch.tensor(0.01, requires_grad=True) for key in keys} for _ in range(case.steps)]
    parameters: dict[str, Tensor] = {**dict(learner.named_parameters()), **dict(learner.named_buffers())}
    low_rank, vmap = LowRankEngine(learner, "squared", case.order), VmapEngine(learner, _SQUARED, case.order)

    def by_low_rank() -> object:
        return low_rank.query_loss(parameters, names, rates, data, "squared").total.backward()

    def by_vmap() -> object:
        fast = vmap.adapt(parameters, names, rates, data.support, data.rows)
        scores = vmap.predict(parameters, fast, data.query)
        return mean_over_events(_SQUARED(scores, data.query.labels), data.query.mask).sum().backward()

    choice = ChoosingEngine(learner, "squared", case.order).choice(
        names, case.steps, data.support, data.query, data.rows
    )
    return {"low_rank": by_low_rank, "vmap": by_vmap}, choice.engine


def measure(case: Case, rounds: int) -> dict[str, object]:
    """One row."""
    engines, picked = runs(case)
    seconds: dict[str, list[float]] = {name: [] for name in engines}
    for number in range(rounds + 1):
        for name, run in engines.items():
            start = time.perf_counter()
            run()
            if number:
                seconds[name].append(time.perf_counter() - start)
    middle = {name: statistics.median(s) for name, s in seconds.items()}
    return {
        **asdict(case),
        "hidden": "-".join(map(str, case.hidden)),
        "low_rank_tasks_per_second": round(case.tasks / middle["low_rank"], 1),
        "vmap_tasks_per_second": round(case.tasks / middle["vmap"], 1),
        "low_rank_is_times": round(middle["vmap"] / middle["low_rank"], 2),
        "picked": picked,
        "lost": round(middle[picked] / min(middle.values()) - 1, 3),
    }


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--random", type=int, default=0, help="so many random configurations in place of the list")
    parser.add_argument("--json", type=Path, help="write machine, versions, configuration and rows there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    rows = []
    for case in drawn(options.random) if options.random else CASES:
        row = measure(case, options.rounds)
        rows.append(row)
        if len(rows) == 1:
            print("  ".join(row))
        print("  ".join(f"{value!s:>{len(name)}}" for name, value in row.items()), flush=True)
    write_json(options.json, options, rows, versions(["torch"]))


if __name__ == "__main__":
    main()
