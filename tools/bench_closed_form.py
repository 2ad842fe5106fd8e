"""Measure the solves of closed-form meta-learners: one positive definite system a task, forward and backward.

    python tools/bench_closed_form.py [--threads 1] [--json FILE]

Columns: torch.linalg.solve (LU), Cholesky with torch.cholesky_solve, and Cholesky with two triangular solves, which is
`metatrain.meta.solve`; microseconds a task, forward + backward in float32, medians of interleaved runs.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_common import write_json

from metatrain.meta.solve import solve

TASKS, SIZES = (64, 256, 512), (8, 16, 33, 64, 128)


class _ByCholeskySolve(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, system: Tensor, right: Tensor) -> Tensor:
        factor, _ = torch.linalg.cholesky_ex(system)
        x = torch.cholesky_solve(right.unsqueeze(-1), factor).squeeze(-1)
        ctx.save_for_backward(factor, x)
        return x

    @staticmethod
    def backward(ctx: Any, by_x: Tensor) -> tuple[Tensor, Tensor]:
        factor, x = ctx.saved_tensors
        by_right = torch.cholesky_solve(by_x.unsqueeze(-1), factor).squeeze(-1)
        return -by_right.unsqueeze(-1) * x.unsqueeze(-2), by_right


SOLVES: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "lu": lambda system, right: torch.linalg.solve(system, right.unsqueeze(-1)).squeeze(-1),
    "cholesky_solve": _ByCholeskySolve.apply,
    "ours": solve,
}


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write machine, versions, configuration and rows there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    names = list(SOLVES)
    print("{:>6} {:>5}  {:>15} {:>15} {:>15} {:>8}".format("tasks", "size", *names, "lu/ours"))
    rows: list[dict[str, object]] = []
    for tasks in TASKS:
        for size in SIZES:
            x = torch.randn(tasks, size, size + 5)
            system = (x @ x.mT / size + torch.eye(size)).requires_grad_()
            right, by_x = torch.randn(tasks, size, requires_grad=True), torch.randn(tasks, size)
            seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
            for _ in range(options.rounds):
                for name, run in SOLVES.items():
                    start = time.perf_counter()
                    found = run(system, right)
                    middle = time.perf_counter()
                    torch.autograd.grad(found, (system, right), by_x)
                    seconds[name].append((middle - start, time.perf_counter() - middle))
            row: dict[str, object] = {"tasks": tasks, "size": size, "threads": options.threads}
            both: list[float] = []
            cells = []
            for name in names:
                forward, backward = (1e6 / tasks * statistics.median(t) for t in zip(*seconds[name][1:], strict=True))
                row |= {f"{name}_forward_us": round(forward, 3), f"{name}_backward_us": round(backward, 3)}
                both.append(forward + backward)
                cells.append(f"{forward:>7.2f}+{backward:<7.2f}")
            row["gain"] = round(both[0] / both[-1], 2)
            print("{:>6} {:>5}  {} {} {} {:>7.2f}x".format(tasks, size, *cells, row["gain"]))
            rows.append(row)
    write_json(options.json, options, rows)


if __name__ == "__main__":
    main()
