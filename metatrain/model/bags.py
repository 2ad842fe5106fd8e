"""On CPUs: rows of fused tables looked up as bags of one id each, in place of rows without bags.

FBGEMM has two operators for the CPU. The one that TorchRec takes for rows without bags collects every row's gradients
in a hash map, at some 1.5 µs a row; the one for bags sorts the ids, at 0.1 to 0.2 µs (row-wise Adagrad 0.5). A bag of
one id is its row, and both update tables alike. The operator for bags has as many bags for every table, so the tables
of a kernel, which lie one behind the other in one piece of memory, are taken for one.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from fbgemm_gpu.split_embedding_configs import EmbOptimType
from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation, PoolingMode
from torch import Tensor, nn
from torchrec.distributed.batched_embedding_kernel import BatchedFusedEmbedding
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.sparse.jagged_tensor import KeyedJaggedTensor

_STATES = {EmbOptimType.EXACT_SGD: 0, EmbOptimType.EXACT_ADAGRAD: 1, EmbOptimType.EXACT_ROWWISE_ADAGRAD: 1}
#: FBGEMM's operator for bags numbers a table's rows by 32 bits.
_MOST_ROWS = 2**31 - 2


def look_up_as_bags(module: nn.Module) -> None:
    """Changes, in place, how a module's fused tables in main memory are looked up and updated."""
    for collection in module.modules():
        if isinstance(collection, ShardedEmbeddingCollection):
            for lookup in collection._lookups:  # in a list, where `modules` does not see them
                for kernel in lookup.modules():
                    if isinstance(kernel, BatchedFusedEmbedding) and _alike(kernel):
                        kernel.forward = _Bags(kernel)


def _alike(kernel: BatchedFusedEmbedding) -> bool:
    """Whether its tables lie in main memory, are of one width, have one feature each, and can be taken for one."""
    tables = cast(Any, kernel.emb_module)
    specs = tables.embedding_specs
    if sum(spec[0] for spec in specs) > _MOST_ROWS:
        return False
    places, widths = {spec[2] for spec in specs}, {spec[1] for spec in specs}
    one_each = list(tables.feature_table_map) == list(range(len(specs)))
    return places == {EmbeddingLocation.HOST} and len(widths) == 1 and one_each and tables.optimizer in _STATES


class _Bags:
    """The forward of a kernel: ids [K] by table → their rows [K, D]."""

    def __init__(self, kernel: BatchedFusedEmbedding) -> None:
        self._tables = tables = cast(Any, kernel.emb_module)
        rows, width = [spec[0] for spec in tables.embedding_specs], tables.embedding_specs[0][1]
        self._starts = torch.tensor([0, *rows]).cumsum(0)[:-1]
        whole = sum(rows)
        # What the operator is told. What tables and optimizer states are cut by, the physical offsets, stays.
        tables.pooling_mode, tables.is_nobag = PoolingMode.SUM, False
        tables.feature_table_map, tables.total_D = [0], width
        tables.D_offsets = tables.D_offsets.new_tensor([0, width])
        tables.rows_per_table = tables.rows_per_table.new_tensor([whole])
        tables.hash_size_cumsum = tables.hash_size_cumsum.new_tensor([0, whole])
        tables.total_hash_size_bits = whole.bit_length()
        for name in ("weights", "momentum1")[: 1 + _STATES[tables.optimizer]]:
            for of_table in (f"{name}_offsets", f"{name}_placements"):
                setattr(tables, of_table, getattr(tables, of_table)[:1])

    def __call__(self, features: KeyedJaggedTensor) -> Tensor:
        ids = features.values().long()
        if len(self._starts) > 1:
            counts = features.lengths().view(len(self._starts), -1).sum(1)
            ids = ids + self._starts.repeat_interleave(counts, output_size=len(ids))
        return self._tables(ids, torch.arange(len(ids) + 1))
