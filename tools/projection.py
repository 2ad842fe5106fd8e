"""Project training to a cluster that could not be measured: a model of a few terms, each measured on one machine.

    python tools/projection.py --step_us 800 --reader_us 60 --prepare_us 0.6 [--users 1e8] [--gpus 64] [--json FILE]

The terms of one task (a user), which the benchmarks print:

    step_us      CPU time of lookup, inner loop, backward and update on one core      bench_train.py, the ceiling
    reader_us    CPU time from Parquet to a batch on one core                         bench_reader.py, through the actor
    prepare_us   time of preparing one event on two cores                             bench_prepare.py

What is counted: operations of the recipe's inner loop (`low_rank_cost`), bytes that cross the network (`step_bytes`:
each distinct id that lies elsewhere, its row there and its gradient back; bench_traffic.py holds it against what is
sent). What is assumed, and can be changed: a GPU's float32 rate and memory rate from its data sheet, the share of
that rate which the inner loop reaches, the network of a GPU, the share of ids that are distinct in a step, and that
the rest of a step takes as long as the inner loop. It is a projection: no run of this size was made.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_common import write_json

from metatrain.meta.low_rank_cost import Shapes, low_rank_cost

ID_BYTES, NUMBER_BYTES = 8, 4
LAUNCH_SECONDS = 5e-6  # of one GPU kernel, from the host


def step_bytes(looked_up: Iterable[tuple[int, float]], workers: int, dense: int) -> dict[str, float]:
    """Bytes that one of the workers sends to the others in a step, by kind, where tables are sharded by rows.

    Ids, and so rows, are spread evenly over the workers: all but one in `workers` of them lie elsewhere. A ring sends
    each of the dense gradients twice, but for the worker's own part.

    Args:
        looked_up: Of each table its width, and the distinct ids that the worker looks up in a step.
        workers: How many there are.
        dense: Numbers in the dense parameters.
    """
    away = (workers - 1) / workers
    found = dict.fromkeys(("ids", "rows", "gradients"), 0.0)
    for width, ids in looked_up:
        found["ids"] += away * ids * ID_BYTES
        found["rows"] += away * ids * width * NUMBER_BYTES
        found["gradients"] += away * ids * width * NUMBER_BYTES
    return found | {"dense": 2 * away * dense * NUMBER_BYTES}


def rows(o: argparse.Namespace) -> list[dict[str, float | str]]:
    """The projection for a CPU cluster of as many cores as the GPUs' readers need, and for the GPUs."""
    inputs, hidden = o.inputs, tuple(o.hidden)
    shapes = Shapes(o.tasks_per_step, o.support, o.query, inputs, hidden, 0, o.steps, 2, True)
    cost = low_rank_cost(shapes)
    events = o.users * o.events_per_user
    distinct = o.distinct * (o.support + o.query)
    bytes_a_task = sum(step_bytes([(o.row_width, distinct)], o.gpus, 0).values())
    # Arithmetic, memory, launches (one chunk a step), twice for what is not the inner loop; then the exchange.
    arithmetic = (cost.shared + cost.batched) / (o.gpu_tflops * 1e12 * o.share)
    memory = (cost.traffic + cost.fresh) / (o.gpu_gbytes * 1e9)
    launches = cost.calls * LAUNCH_SECONDS / o.tasks_per_step
    network = bytes_a_task / (o.network_gbytes * 1e9)
    gpu_seconds = 2 * (arithmetic + memory + launches) + network
    gpu_rate = o.gpus / gpu_seconds
    readers = gpu_rate * o.reader_us * 1e-6
    cpu_rate = readers / ((o.step_us + o.reader_us) * 1e-6)
    prepare_hours = events * o.prepare_us * 2e-6 / readers / 3600
    common = {"users": o.users, "events": events, "row_bytes_a_task": bytes_a_task}
    return [
        {"cluster": f"{o.gpus} GPUs", "tasks_per_second": gpu_rate, "epoch_hours": o.users / gpu_rate / 3600}
        | {"reader_cores": readers, "prepare_hours": prepare_hours, **common}
        | {"network_share": network / gpu_seconds, "launch_share": 2 * launches / gpu_seconds},
        {"cluster": f"{readers:,.0f} cores alone", "tasks_per_second": cpu_rate}
        | {"epoch_hours": o.users / cpu_rate / 3600, "reader_cores": readers, "prepare_hours": prepare_hours, **common},
    ]


def main() -> None:
    """Parse the command line, project, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measured = parser.add_argument_group("measured")
    for name in ("step_us", "reader_us", "prepare_us"):
        measured.add_argument(f"--{name}", type=float, required=True)
    recipe = parser.add_argument_group("the recipe and its data")
    recipe.add_argument("--users", type=float, default=1e8)
    recipe.add_argument("--events_per_user", type=float, default=30)
    recipe.add_argument("--inputs", type=int, default=256, help="width of the learner's input")
    recipe.add_argument("--hidden", type=int, nargs="+", default=[64, 64])
    recipe.add_argument("--support", type=int, default=20)
    recipe.add_argument("--query", type=int, default=10)
    recipe.add_argument("--steps", type=int, default=5)
    recipe.add_argument("--row_width", type=int, default=64, help="numbers looked up for an event")
    recipe.add_argument("--tasks_per_step", type=int, default=4096, help="of one GPU")
    assumed = parser.add_argument_group("assumed")
    assumed.add_argument("--gpus", type=int, default=64)
    assumed.add_argument("--gpu_tflops", type=float, default=67.0, help="float32, outside of the tensor cores (H100)")
    assumed.add_argument("--gpu_gbytes", type=float, default=3350.0, help="of its memory, a second (H100)")
    assumed.add_argument("--share", type=float, default=0.2, help="of the float32 rate that the inner loop reaches")
    assumed.add_argument("--network_gbytes", type=float, default=25.0, help="of one GPU, a second, between nodes")
    assumed.add_argument("--distinct", type=float, default=0.5, help="distinct ids in a step, of its events")
    parser.add_argument("--json", type=Path, help="write machine, versions, configuration and rows there")
    options = parser.parse_args()
    found = rows(options)
    print("a projection: measured terms in a counted model, no run of this size was made")
    titles = ("cluster", "users", "tasks/s", "an epoch", "reader cores", "preparing")
    print("{:<22} {:>8} {:>12} {:>11} {:>13} {:>10}".format(*titles))
    for row in found:
        print(
            f"{row['cluster']:<22} {row['users']:>8.0e} {row['tasks_per_second']:>12,.0f} {row['epoch_hours']:>9.2f} h "
            f"{row['reader_cores']:>13,.0f} {row['prepare_hours']:>8.2f} h"
        )
    print(f"of a GPU's time: {found[0]['network_share']:.0%} network, {found[0]['launch_share']:.0%} launches")
    write_json(options.json, options, found)


if __name__ == "__main__":
    main()
