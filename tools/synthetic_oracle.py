"""The best that any learner can do on a synthetic dataset given each user's support, beside the generator's floor.

    python tools/synthetic_oracle.py RECIPE [--max-tasks 20000] [--json FILE]

The oracle knows the items' factors and biases, the noise, and how tastes are spread in each segment: all but the user.
Given these a rating is linear in the user's bias and taste, which are normal, so that their posterior after the
support is normal too, in closed form; its mean predicts the query with the least squared error there is. A learner
must find the item factors as well. Users and episodes are those that `metatrain evaluate` measures.

`expected_rmse` is the error that the oracle's own posterior says: where it is not the measured one, up to sampling,
the oracle is wrong.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from bench_common import write_json

from metatrain.config import Synthetic, load_config
from metatrain.data.batch import TaskBatch
from metatrain.data.dataset import TaskDataset
from metatrain.data.manifest import ItemSet, Split
from metatrain.data.reader import iterate
from metatrain.data.sources import synthetic

PRIOR_TASTE = 0.64  # variance of a taste around its segment's
PRIOR_BIAS = 0.16


def item_truth(settings: Synthetic, items: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Biases [n] and factors [n, rank], these divided by √rank, of items by their number in the generator."""
    category = synthetic._category(settings, items)
    draw, hashed, normal = synthetic._Draw, synthetic.hashed, synthetic.normal
    factors = [
        0.6 * normal(hashed(settings.seed, draw.CATEGORY_FACTOR, d, category))
        + 0.8 * normal(hashed(settings.seed, draw.FACTOR, d, items))
        for d in range(settings.rank)
    ]
    return synthetic._item_bias(settings, items), np.stack(factors, 1) / math.sqrt(settings.rank)


def prior_means(settings: Synthetic, users: np.ndarray) -> np.ndarray:
    """What is known of users before any event: [T, 1 + rank], bias and taste."""
    segment = synthetic._segment(settings, users)
    draw, hashed, normal = synthetic._Draw, synthetic.hashed, synthetic.normal
    tastes = [0.6 * normal(hashed(settings.seed, draw.SEGMENT_TASTE, d, segment)) for d in range(settings.rank)]
    return np.stack([np.zeros(len(users)), *tastes], 1)


def predicted(
    settings: Synthetic, batch: TaskBatch, users: np.ndarray, item_numbers: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of each query event: the posterior mean, the posterior variance of the rating (noise included), its task."""
    bias, factors = item_truth(settings, item_numbers[batch.items])
    bias, factors = bias[batch.event_items], factors[batch.event_items]
    x = np.concatenate([np.ones((len(bias), 1)), factors], 1)  # [N, 1 + rank]
    lengths = batch.support_lengths + batch.query_lengths
    task = np.repeat(np.arange(batch.size), lengths)
    place = np.arange(len(task)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    support = place < batch.support_lengths[task]
    prior = prior_means(settings, users)
    known = 3.5 + bias + (x * prior[task]).sum(1)
    rest = batch.labels - known
    width, noise = x.shape[1], settings.noise**2
    precision = np.zeros((batch.size, width, width))
    np.add.at(precision, task[support], x[support][:, :, None] * x[support][:, None, :] / noise)
    precision += np.diag([1 / PRIOR_BIAS, *[1 / PRIOR_TASTE] * settings.rank])
    pull = np.zeros((batch.size, width))
    np.add.at(pull, task[support], x[support] * (rest[support] / noise)[:, None])
    covariance = np.linalg.inv(precision)
    user = (covariance @ pull[:, :, None])[:, :, 0]
    query, xq = task[~support], x[~support]
    mean = known[~support] + (xq * user[query]).sum(1)
    variance = noise + np.einsum("nd,nde,ne->n", xq, covariance[query], xq)
    return mean, variance, query


def oracle(dataset: TaskDataset, settings: Synthetic, config, max_tasks: int) -> dict[str, float]:
    """The oracle's errors on test users: means over tasks, as `metatrain evaluate` takes them."""
    numbers = dataset.catalogue.keys.astype(np.int64)
    absolute, square, expected, tasks = 0.0, 0.0, 0.0, 0
    for batch, keys in iterate(
        dataset, Split.TEST, ItemSet.EXISTING, config.episode, seed=config.seed, keys=True, tasks_per_batch=256
    ):
        mean, variance, task = predicted(settings, batch, keys.astype(np.int64), numbers)
        place = np.arange(len(batch.labels)) - np.repeat(
            np.cumsum(batch.support_lengths + batch.query_lengths) - batch.support_lengths - batch.query_lengths,
            batch.support_lengths + batch.query_lengths,
        )
        is_query = place >= np.repeat(batch.support_lengths, batch.support_lengths + batch.query_lengths)
        error = batch.labels[is_query] - mean
        weight = 1.0 / batch.query_lengths[task]
        absolute += float((np.abs(error) * weight).sum())
        square += float((error**2 * weight).sum())
        expected += float((variance * weight).sum())
        tasks += batch.size
        if max_tasks and tasks >= max_tasks:
            break
    return {
        "tasks": tasks,
        "oracle_mae": absolute / tasks,
        "oracle_rmse": math.sqrt(square / tasks),
        "expected_rmse": math.sqrt(expected / tasks),
    }


def main() -> None:
    """Parse the command line, compute, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipe")
    parser.add_argument("--dataset", help="default: the recipe's")
    parser.add_argument("--max-tasks", type=int, help="default: the recipe's")
    parser.add_argument("--json", type=Path, help="write machine, versions, configuration and rows there")
    options = parser.parse_args()
    config = load_config(options.recipe)
    dataset = TaskDataset.open(options.dataset or config.data.dataset)
    settings = Synthetic.model_validate(dataset.manifest.prepared_with["config"]["synthetic"])
    limit = config.evaluate.max_tasks if options.max_tasks is None else options.max_tasks
    row = oracle(dataset, settings, config.evaluate, limit)
    facts = dataset.manifest.facts
    row |= {"floor_mae": facts["bayes_mae"], "floor_rmse": facts["bayes_rmse"]}
    print(f"{row['tasks']:,} test users, {settings.users:,} in all")
    print(f"  {'':<10} {'MAE':>8} {'RMSE':>8}")
    print(f"  {'floor':<10} {row['floor_mae']:>8.4f} {row['floor_rmse']:>8.4f}")
    print(
        f"  {'oracle':<10} {row['oracle_mae']:>8.4f} {row['oracle_rmse']:>8.4f}  (expects {row['expected_rmse']:.4f})"
    )
    write_json(options.json, options, [row])


if __name__ == "__main__":
    main()
