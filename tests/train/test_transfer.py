from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import torch

from metatrain.data.batch import Ragged, TaskBatch
from metatrain.train.transfer import device_batches

CPU = torch.device("cpu")


def numbered(n: int) -> TaskBatch:
    tasks = np.arange(n, n + 2)
    one = np.ones(2, np.int64)
    features = {"age": np.full(2, n, np.float32), "likes": Ragged(np.arange(3, dtype=np.int32), np.array([1, 2]))}
    return TaskBatch(tasks, one, one, tasks, np.zeros(4, np.int64), np.ones(4, np.float32), np.arange(4), features)


class Recorded:
    """Copies that write down what was asked of them."""

    def __init__(self, ahead: int) -> None:
        self.ahead, self.calls = ahead, []

    def begin(self, batch: TaskBatch) -> TaskBatch:
        self.calls.append(("begin", int(batch.tasks[0])))
        return batch.tensors()

    def end(self, batch: TaskBatch) -> TaskBatch:
        self.calls.append(("end", int(batch.tasks[0])))
        return batch


@pytest.mark.parametrize("ahead", [0, 1, 2])
@pytest.mark.parametrize("count", [0, 1, 2, 5])
def test_batches_come_in_order_with_so_many_copies_ahead(ahead: int, count: int):
    copies = Recorded(ahead)
    found = []
    for batch in device_batches(map(numbered, range(count)), CPU, copies):
        n = len(found)
        found.append(int(batch.tasks[0]))
        # While batch n is used, those behind it are on their way, and no more of them.
        assert [i for what, i in copies.calls if what == "begin"] == list(range(min(n + ahead + 1, count)))
        assert [i for what, i in copies.calls if what == "end"] == list(range(n + 1))
    assert found == list(range(count))


def test_no_batch_is_asked_for_before_it_is_needed():
    asked = []

    def batches() -> Iterator[TaskBatch]:
        for n in range(4):
            asked.append(n)
            yield numbered(n)

    device = device_batches(batches(), CPU)
    assert asked == []
    next(device)
    assert asked == [0]
    device.close()
    assert asked == [0]


def test_on_the_cpu_batches_are_their_tensors():
    batch = next(device_batches([numbered(7)], CPU))
    assert batch.tasks.tolist() == [7, 8]
    assert batch.task_features["age"].dtype == torch.float32
    likes = batch.task_features["likes"]
    assert (likes.values.dtype, likes.values.tolist(), likes.lengths.tolist()) == (torch.int64, [0, 1, 2], [1, 2])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_batches_arrive_whole_while_it_works():
    device = torch.device("cuda")
    busy = torch.randn(2000, 2000, device=device)
    for n, batch in enumerate(device_batches(map(numbered, range(20)), device)):
        busy = busy @ busy / busy.norm()
        assert batch.tasks.device.type == "cuda"
        assert batch.tasks.tolist() == [n, n + 1]
        assert batch.task_features["age"].tolist() == [n, n]
