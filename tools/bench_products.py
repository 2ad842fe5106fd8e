"""Measure the products of the inner loop: GFLOP/s of torch's MKL and of its oneDNN at the low-rank engine's shapes.

    python tools/bench_products.py [--threads 1] [--json FILE]

Rows: forward (x Wᵀ + b), weights (δᵀ x added up) and inputs (δ W) with weights that all tasks share; medians of
interleaved runs, the copy of oneDNN's result into the engine's buffer included.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_common import write_json

from metatrain.meta import low_rank_products as products

SHAPES = [(events, width, 64) for events in (640, 2560, 5120) for width in (64, 256, 1024)]  # rows, inputs, outputs


def cases(rows: int, inputs: int, outputs: int) -> dict[str, Callable[[], object]]:
    """The three products of a layer."""
    x, weight, bias = torch.randn(rows, inputs), torch.randn(outputs, inputs), torch.randn(outputs)
    h, d_weight, d_x = torch.randn(rows, outputs), torch.zeros(outputs, inputs), torch.empty(rows, inputs)
    out: Tensor = torch.empty(rows, outputs)
    return {
        "forward": lambda: products.multiply_add(bias, x, weight.t(), out=out),
        "weights": lambda: products.accumulate(d_weight, h.t(), x),
        "inputs": lambda: products.multiply(h, weight, out=d_x),
    }


def main() -> None:
    """Parse the command line, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--json", type=Path, help="write machine, versions, configuration and rows there")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    chosen = "oneDNN" if products.prefers_onednn() else "MKL"
    print(f"the engine's choice on this machine: {chosen}")
    print(
        "{:>6} {:>6} {:>7}  {:<8} {:>8} {:>8} {:>6}".format("rows", "inputs", "outputs", "product", "mkl", "onednn", "")
    )
    rows: list[dict[str, object]] = []
    for shape in SHAPES:
        for name, run in cases(*shape).items():
            seconds: dict[bool, list[float]] = {False: [], True: []}
            for _ in range(options.rounds):
                for onednn, times in seconds.items():
                    products.prefers_onednn = lambda onednn=onednn: onednn  # type: ignore[assignment]
                    start = time.perf_counter()
                    run()
                    times.append(time.perf_counter() - start)
            work = 2e-9 * shape[0] * shape[1] * shape[2]
            mkl, onednn = (work / statistics.median(seconds[which][1:]) for which in (False, True))
            print(
                f"{shape[0]:>6} {shape[1]:>6} {shape[2]:>7}  {name:<8} {mkl:>8.0f} {onednn:>8.0f} {onednn / mkl:>5.1f}x"
            )
            rows.append(
                {"rows": shape[0], "inputs": shape[1], "outputs": shape[2], "product": name}
                | {"mkl_gflops": round(mkl, 1), "onednn_gflops": round(onednn, 1), "threads": options.threads}
            )
    write_json(options.json, options, rows)


if __name__ == "__main__":
    main()
