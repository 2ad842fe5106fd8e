"""What runs functions on several ranks refuses what may crash gloo later."""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from ranks import RankError, run_ranks
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard


def gathered_on_rank(rank: int, world_size: int, how: str) -> float:
    """The sum of this rank's rows, where nothing is gathered."""
    group = dist.group.WORLD
    assert group is not None
    rows = DTensor.from_local(torch.ones(2, 3), DeviceMesh.from_group(group, "cpu"), [Shard(0)])
    if how == "whole":
        rows.full_tensor()
    elif how == "anew":
        rows.redistribute(placements=[Replicate()])
    return float(rows.to_local().sum())


@pytest.mark.parametrize("how", ["whole", "anew"])
def test_what_gathers_a_dtensor_is_refused(how: str) -> None:
    with pytest.raises(RankError, match="Functional collectives may crash gloo"):
        run_ranks(gathered_on_rank, 2, how)


def test_what_gathers_nothing_is_not() -> None:
    assert run_ranks(gathered_on_rank, 2, "not") == [6.0, 6.0]
