"""Measure the inner loop: tasks a second of one exact second-order MAML gradient, engine beside engine.

    python tools/bench_inner_loop.py [--quick] [--threads 2] [--json FILE] [--peers FOLDER]

The learner is an MLP width-64-64-1 without skip, squared error, fixed rates, every weight adapted. Peers come from
PyPI and are optional: those that cannot be imported are named and left out. To have them apart from the environment:

    pip install --no-deps --target /tmp/peers higher torchopt parallel-metalearn optree graphviz

Each engine's gradient is compared with a float64 loop over single tasks. Runs are interleaved: in every round every
engine runs once untimed, for what the one before left in the caches is not its own, then once timed, so that a busy
machine slows all alike; medians over the rounds are shown. `*` marks the engine of ours that the cost model picks.
`share_of_ceiling` is the time
that the products of the low-rank form need at the rates measured for such products alone, in the same rounds, divided
by the engine's time.

On a machine whose cores others share, `--alone` takes a run again until its cores were its own for nine tenths of it
(bench_quiet.py), and the quietest of `TRIES` runs where none was: `own` is the median share of the cores' time that
this machine had to itself.

Large tensors lie on huge pages (torch's THP_MEM_ALLOC_ENABLE=1, set here for all engines; 0: not): on virtual machines
reading through small ones takes longer than the arithmetic at width 1024.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import os
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # read at torch's first allocation

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_common import versions, write_json
from bench_quiet import Quiet
from peers.inner_loops import PEERS, Peer

from metatrain.meta.engine import VmapEngine
from metatrain.meta.episode import Episodes, Examples
from metatrain.meta.losses import event_loss, mean_over_events
from metatrain.meta.low_rank import LowRankEngine
from metatrain.meta.low_rank_cost import Cost, Shapes, choose, low_rank_cost
from metatrain.meta.low_rank_products import accumulate, multiply
from metatrain.model.learners.mlp import MLP

RATE, QUERY, HIDDEN = 0.01, 10, (64, 64)
#: Runs of an engine in a round, with --alone, and the share of its time that makes one quiet enough.
TRIES, ALONE = 60, 0.9
_SQUARED = event_loss("squared")


@dataclass
class Case:
    """One configuration, its data and its engines."""

    width: int
    steps: int
    support: int
    engines: dict[str, tuple[Callable[[int], object], int]]  # name → (run on the first n tasks, n at a time)
    learner: nn.Module
    cost: Cost
    chosen: str
    ceilings: dict[str, tuple[Callable[[], object], float]]


def episodes(tasks: int, support: int, width: int, dtype: torch.dtype = torch.float32) -> Episodes:
    """Random tasks."""
    generator = torch.Generator().manual_seed(1)

    def examples(events: int) -> Examples:
        x = torch.randn(tasks, events, width, generator=generator).to(dtype)
        y = torch.randn(tasks, events, generator=generator).to(dtype)
        return Examples(x, {}, y, torch.ones_like(y))

    return Episodes(examples(support), examples(QUERY), {})


def first(data: Episodes, tasks: int) -> Episodes:
    """The first so many tasks."""
    return Episodes(data.support.tasks(0, tasks), data.query.tasks(0, tasks), {})


def by_low_rank(learner: nn.Module, data: Episodes, steps: int) -> Callable[[int], object]:
    """Our low-rank engine."""
    engine = LowRankEngine(learner, "squared")
    parameters, names, rates = _inner(learner, steps)

    def run(tasks: int) -> object:
        return engine.query_loss(parameters, names, rates, first(data, tasks), "squared").total.backward()

    return run


def by_vmap(learner: nn.Module, data: Episodes, steps: int) -> Callable[[int], object]:
    """Our vmap engine."""
    engine = VmapEngine(learner, _SQUARED)
    parameters, names, rates = _inner(learner, steps)

    def run(tasks: int) -> object:
        part = first(data, tasks)
        fast = engine.adapt(parameters, names, rates, part.support, {})
        scores = engine.predict(parameters, fast, part.query)
        return mean_over_events(_SQUARED(scores, part.query.labels), part.query.mask).sum().backward()

    return run


def _inner(learner: nn.Module, steps: int) -> tuple[dict[str, Tensor], tuple[str, ...], list[dict[str, Tensor]]]:
    names = tuple(name for name, _ in learner.named_parameters())
    rates = [{name: torch.tensor(RATE, dtype=next(learner.parameters()).dtype) for name in names} for _ in range(steps)]
    return {**dict(learner.named_parameters()), **dict(learner.named_buffers())}, names, rates


def autograd_loop(learner: nn.Module, data: Episodes, steps: int) -> Callable[[int], object]:
    """One task at a time, by torch.autograd.grad with create_graph: what learn2learn's MAML does."""

    def run(tasks: int) -> object:
        for i in range(tasks):
            weights = dict(learner.named_parameters())
            for _ in range(steps):
                loss = functional.mse_loss(
                    functional_call(learner, weights, (data.support.x[i],)), data.support.labels[i]
                )
                found = torch.autograd.grad(loss, list(weights.values()), create_graph=True)
                weights = {n: w - RATE * g for (n, w), g in zip(weights.items(), found, strict=True)}
            functional.mse_loss(functional_call(learner, weights, (data.query.x[i],)), data.query.labels[i]).backward()
        return None

    return run


def make_case(width: int, steps: int, support: int, tasks: int, peers: dict[str, Peer]) -> Case:
    """The engines over one configuration's data."""
    torch.manual_seed(0)
    learner = MLP(width, HIDDEN, "relu", skip=False)
    data = episodes(tasks, support, width)
    alone = min(8, tasks)
    # A quarter of the tasks at a time is where vmap is quickest at most sizes; more only costs it memory.
    batch = min(tasks, 64)
    engines = {
        "low_rank": (by_low_rank(learner, data, steps), tasks),
        "vmap": (by_vmap(learner, data, steps), batch),
        "autograd_loop": (autograd_loop(learner, data, steps), alone),
    }
    for name, peer in peers.items():
        engines[name] = (peer.build(learner, data, steps, RATE), alone if peer.one_at_a_time else batch)
    shapes = Shapes(tasks, support, QUERY, width, HIDDEN, 0, steps, 2, False)
    cost, chosen = low_rank_cost(shapes), choose(shapes).engine
    return Case(width, steps, support, engines, learner, cost, chosen, _ceilings(width, support))


def _ceilings(width: int, support: int) -> dict[str, tuple[Callable[[], object], float]]:
    """The kinds of product alone, at this case's shapes: what to run, and its operations."""
    h, tasks = HIDDEN[0], 64
    events = tasks * (support + QUERY)
    x, w, out, d_w = torch.randn(events, width), torch.randn(h, width), torch.empty(events, h), torch.zeros(h, width)
    a, b, c = torch.randn(tasks, support, h), torch.randn(tasks, h, h), torch.empty(tasks, support, h)
    return {
        "forward": (lambda: multiply(x, w.t(), out=out), 2.0 * x.numel() * h),
        "weights": (lambda: accumulate(d_w, out.t(), x), 2.0 * x.numel() * h),
        "batched": (lambda: torch.bmm(a, b, out=c), 2.0 * a.numel() * h),
    }


def gradient(learner: nn.Module, run: Callable[[int], object], tasks: int) -> Tensor:
    """The meta-gradient over the first so many tasks, scaled to their mean."""
    learner.zero_grad(set_to_none=True)
    run(tasks)
    found = torch.cat([p.grad.flatten().double() for p in learner.parameters() if p.grad is not None])
    return found / found.norm()


def timed(run: Callable[[], object], quiet: Quiet | None) -> tuple[float, float]:
    """Seconds of a run, and the share of them in which the cores were this machine's alone (NaN: not watched)."""
    best = (math.nan, -1.0)
    for _ in range(TRIES if quiet else 1):
        begun = time.monotonic()
        run()
        ended = time.monotonic()
        if quiet is None:
            return ended - begun, math.nan
        share = quiet.share(begun, ended)
        if share > best[1]:
            best = ended - begun, share
        if share >= ALONE:
            break
    return best


def measure(case: Case, rounds: int, threads: int, quiet: Quiet | None) -> list[dict[str, Any]]:
    """Rows of one configuration."""
    exact = copy.deepcopy(case.learner).double()
    few = min(8, min(n for _, n in case.engines.values()))
    data = episodes(max(n for _, n in case.engines.values()), case.support, case.width)
    as_double = Episodes(
        *(Examples(e.x.double(), {}, e.labels.double(), e.mask.double()) for e in (data.support, data.query)), {}
    )
    expected = gradient(exact, autograd_loop(exact, as_double, case.steps), few)
    errors = {n: float((gradient(case.learner, r, few) - expected).norm()) for n, (r, _) in case.engines.items()}
    seconds: dict[str, list[float]] = {name: [] for name in (*case.engines, *case.ceilings)}
    own: dict[str, list[float]] = {name: [] for name in seconds}

    def once(name: str, run: Callable[[], object], amount: float) -> None:
        took, share = timed(run, quiet)
        seconds[name].append(took / amount)
        own[name].append(share)

    for _ in range(rounds):
        for name, (run, tasks) in case.engines.items():

            def whole(run: Callable[[int], object] = run, tasks: int = tasks) -> None:
                case.learner.zero_grad(set_to_none=True)
                run(tasks)

            whole()
            once(name, whole, tasks)
        for name, (product, operations) in case.ceilings.items():
            for _ in range(5):
                once(name, product, operations)
    middle = {name: statistics.median(times) for name, times in seconds.items()}
    # Of the products with shared weights half go forward, half give the weights' gradient.
    shared = (middle["forward"] + middle["weights"]) / 2
    floor = case.cost.shared * shared + case.cost.batched * middle["batched"]
    return [
        {
            "engine": name,
            "chosen": name == case.chosen,
            "width": case.width,
            "steps": case.steps,
            "support": case.support,
            "query": QUERY,
            "tasks": case.engines[name][1],
            "threads": threads,
            "tasks_per_second": round(1 / middle[name], 1),
            "gradient_error": errors[name],
            "share_of_ceiling": round(floor / middle[name], 4),
            **({"own": round(statistics.median(own[name]), 4)} if quiet else {}),
        }
        for name in case.engines
    ]


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="width 256 and 20 support events alone, fewer rounds")
    parser.add_argument("--widths", type=int, nargs="+", default=[64, 256, 1024])
    parser.add_argument("--steps", type=int, nargs="+", default=[1, 5])
    parser.add_argument("--supports", type=int, nargs="+", default=[5, 20, 100])
    parser.add_argument("--tasks", type=int, default=1024, help="tasks of a call of the batched engines")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--alone", action="store_true", help="count runs while no other machine shares the cores")
    parser.add_argument("--json", type=Path, help="write machine, versions, configuration and rows there")
    parser.add_argument("--peers", type=Path, help="folder with the peers' packages (pip install --target)")
    options = parser.parse_args()
    if options.quick:
        options.widths, options.supports, options.rounds = [256], [20], min(options.rounds, 5)
    torch.set_num_threads(options.threads)
    if options.peers:
        sys.path.append(str(options.peers))
    peers: dict[str, Peer] = {}
    found_versions = versions()
    for peer in PEERS:
        try:
            found_versions[peer.package] = peer.check()
            peers[peer.name] = peer
        except ImportError as error:
            print(f"absent: {peer.name} ({error})")
    rows: list[dict[str, Any]] = []
    titles = ("width", "steps", "support", "engine", "tasks/s", "low_rank is", "error", "ceiling")
    print("{:>5} {:>5} {:>7}  {:<18} {:>9} {:>11} {:>8} {:>7}".format(*titles) + "    own" * options.alone)
    with Quiet() if options.alone else nullcontext() as quiet:
        for width, steps, support in itertools.product(options.widths, options.steps, options.supports):
            case = make_case(width, steps, support, options.tasks, peers)
            rows += show(measure(case, options.rounds, options.threads, quiet))
    write_json(options.json, options, rows, found_versions)


def show(found: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Prints rows of one configuration, and returns them."""
    own = found[0]["tasks_per_second"]
    for row in found:
        name = f"{row['engine']}{' *' * bool(row['chosen'])}"
        print(
            f"{row['width']:>5} {row['steps']:>5} {row['support']:>7}  {name:<18} {row['tasks_per_second']:>9.0f} "
            f"{own / row['tasks_per_second']:>10.1f}x {row['gradient_error']:>8.0e} {row['share_of_ceiling']:>7.0%}"
            + (f" {row['own']:>6.0%}" if "own" in row else ""),
            flush=True,
        )
    return found


if __name__ == "__main__":
    main()
