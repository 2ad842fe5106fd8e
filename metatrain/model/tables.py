"""Embedding tables: one lookup a step for all features, sharded over the ranks, updated inside backward.

`Tables` alone is an unsharded module that works without a process group (evaluation, recommendation); `sharding`
shards the tables of a module in place, by a plan of `table_plan`. These three and `bags`, which says how a shard's rows
are read and updated on CPUs, are the only importers of TorchRec.

Symbols: n_f ids of a feature, K ids of a table in a step (unique ones, where they are deduplicated), D width.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed._shard.sharded_tensor.api import ShardedTensor
from torchrec.distributed.embedding import ShardedEmbeddingCollection
from torchrec.modules.embedding_configs import EmbeddingConfig
from torchrec.modules.embedding_modules import EmbeddingCollection
from torchrec.sparse.jagged_tensor import JaggedTensor, KeyedJaggedTensor

from metatrain.errors import DatasetError
from metatrain.model import hashing
from metatrain.model.choices import TableSpec
from metatrain.model.picking import distinct

# TorchRec asks torch.fx a question whose answer's meaning changed, and every process would print a warning of it.
logging.getLogger("torch.fx._symbolic_trace").setLevel(logging.ERROR)

_WARP = 32
# Rows initialised at a time hold at most this many numbers: so few that the hash's intermediate results stay in the
# processor's cache.
_INITIALISED_AT_ONCE = 1 << 17


class _Exchange:
    """One collection's part of a lookup: ids go to the ranks that hold their rows, the rows come back.

    TorchRec's own `forward` waits for each exchange of a collection before it begins the next collection's.
    """

    def __init__(self, collection: nn.Module, ids: KeyedJaggedTensor, touched: _Touched | None) -> None:
        self._collection, self._ids, self._touched = collection, ids, touched
        if isinstance(collection, ShardedEmbeddingCollection):
            self._context = collection.create_context()
            self._sizes = collection.input_dist(self._context, ids)
            self._values: Any = None

    def send(self) -> None:
        """Sends the ids, once the ranks know how many each of them gets."""
        if isinstance(self._collection, ShardedEmbeddingCollection) and self._values is None:
            self._values = self._sizes.wait()

    def rows(self, mark: Callable[[str], None]) -> Mapping[str, JaggedTensor]:
        """Reads the rows and begins to send them; the first use of the result waits for them."""
        # Only what a backward pass may change: validation reads and leaves no mark.
        touched = self._touched if torch.is_grad_enabled() else None
        if not isinstance(self._collection, ShardedEmbeddingCollection):
            if touched is not None:
                touched.mark(self._ids)
            found = self._collection(self._ids)
            mark("lookup")
            return found
        self.send()
        asked = self._values.wait()
        mark("exchange")
        if touched is not None:
            for ids in asked:  # of this rank's rows, by their places in its shard
                touched.mark(ids)
        rows = cast(Any, self._collection.compute_and_output_dist(self._context, asked))
        mark("lookup")
        return rows


class _Touched:
    """Which of this process's rows of a collection were looked up to be changed: one bitmap for all its tables."""

    def __init__(self, rows: dict[str, int], device: torch.device) -> None:
        self._starts, start = {}, 0
        for table, count in rows.items():
            self._starts[table] = start
            start += count
        self._bitmap = torch.zeros(start, dtype=torch.bool, device=device)
        self.of_table = dict(zip(rows, self._bitmap.split(list(rows.values())), strict=True))

    def mark(self, ids: KeyedJaggedTensor) -> None:
        """Marks the rows of these ids: its keys are tables, its values places among this process's rows."""
        tables, values = ids.keys(), ids.values().long()
        if not tables:  # this rank holds none
            return
        if tables != list(self._starts) or len(tables) > 1:
            starts = torch.tensor([self._starts.get(table, -1) for table in tables])
            untracked = bool((starts < 0).any())
            counts = ids.lengths().view(len(tables), -1).sum(1)
            # With the size told, a GPU need not be waited for.
            starts = starts.to(values.device, non_blocking=True).repeat_interleave(counts, output_size=values.numel())
            values = (values + starts)[starts >= 0] if untracked else values + starts
        self._bitmap.index_fill_(0, values, True)


@dataclass(frozen=True)
class Request:
    """Ids on their way to the rows. Made by `Tables.request`, used up by `Tables.lookup`."""

    asked: dict[str, list[str]]  # table → its features that ask
    sizes: dict[str, int]  # feature → number of its ids
    keys: dict[str, Tensor]  # table → the ids to look up [K]
    positions: dict[str, Tensor]  # table → where its features' ids are in `keys`; empty where nothing is deduplicated
    exchanges: list[tuple[list[TableSpec], _Exchange]]

    def send(self) -> None:
        """The second half of the exchange of ids, which must wait for the first: call it when other work is done."""
        for _, exchange in self.exchanges:
            exchange.send()


@dataclass(frozen=True)
class Lookup:
    """What one lookup brought."""

    features: dict[str, Tensor]  # feature → [n_f, D], a row for each of its ids
    tables: dict[str, tuple[Tensor, Tensor]]  # table → the ids looked up [K], their rows [K, D]
    held: Held | None = None


class Held:
    """Rows whose gradients wait: a backward pass ends at them; `pass_on` takes it further, or zeros in its place."""

    def __init__(self) -> None:
        self._pairs: list[tuple[Tensor, Tensor]] = []  # the rows, and what the loss sees of them

    def hold(self, rows: Tensor) -> Tensor:
        """The rows as a leaf."""
        leaf = rows.detach().requires_grad_()
        self._pairs.append((rows, leaf))
        return leaf

    def gradients(self) -> list[Tensor]:
        """The gradients that wait; zeros where none came."""
        return [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for _, leaf in self._pairs]

    def pass_on(self, taken: bool) -> None:
        """Ends the backward pass, which updates the tables. Collective. Not taken: by zeros, which change no row."""
        gradients = self.gradients()
        # Every table on every rank, or ranks would wait for one another.
        torch.autograd.backward(
            [rows for rows, _ in self._pairs], gradients if taken else [g.zero_() for g in gradients]
        )


class Tables(nn.Module):
    """The embedding tables of a model.

    TorchRec wants one width a collection, so there is a collection (and an exchange between ranks) for each
    different width.

    Args:
        specs: The tables; a feature is in exactly one of them.
        dedup: Look each id of a table up once a step, for all features that share it.
        device: Where the unsharded tables live; "meta" for tables that `distribute` is to shard, so that no rank
            ever holds a whole one.
        seed, scale: Of the initial rows (see `initialise`).
    """

    def __init__(
        self,
        specs: Sequence[TableSpec],
        *,
        dedup: bool,
        device: torch.device | str = "cpu",
        seed: int = 0,
        scale: float = 0.05,
    ) -> None:
        super().__init__()
        self.specs, self._dedup, self._seed, self._scale = tuple(specs), dedup, seed, scale
        self.table_of = {feature: spec for spec in self.specs for feature in spec.features}
        self.spec_of = {spec.name: spec for spec in self.specs}
        #: Tables that every rank holds whole: see `replicate`.
        self.replicated = nn.ParameterDict()
        self._build(device)
        self.initialise()

    def replicate(self, names: Collection[str], device: torch.device | str) -> None:
        """Makes some of the tables dense parameters, equal on all ranks; the others are made anew on the meta device.

        Their rows are not initialised, and their gradient is for DistributedDataParallel and whoever steps them.
        """
        for spec in self.specs:
            if spec.name in names:
                self.replicated[spec.name] = nn.Parameter(torch.zeros(spec.rows, spec.width, device=device))
        self._build("meta")

    def _build(self, device: torch.device | str) -> None:
        self._by_width: dict[str, list[TableSpec]] = {}
        for spec in self.specs:
            if spec.name not in self.replicated:
                self._by_width.setdefault(collection_of(spec), []).append(spec)
        self.collections = nn.ModuleDict(
            {
                width: EmbeddingCollection(
                    [
                        EmbeddingConfig(
                            name=spec.name,
                            num_embeddings=spec.rows,
                            embedding_dim=spec.width,
                            feature_names=[spec.name],
                            init_fn=_let_be,
                        )
                        for spec in specs
                    ],
                    device=torch.device(device),
                )
                for width, specs in self._by_width.items()
            }
        )
        self._touched: dict[str, _Touched] = {}

    def forward(self, ids: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Feature → its ids' rows: int64 [n_f] → float32 [n_f, D]. Every rank must call it, if only with no ids."""
        return self.lookup(self.request(ids)).features

    def request(self, ids: Mapping[str, Tensor]) -> Request:
        """Begins a lookup: the ids go to the ranks that hold their rows, and no row is read yet.

        So the next step's may be on their way while this step still updates the rows. All ranks must make the same
        calls in the same order, if only with no ids. Features that are left out have no ids.

        Raises:
            DatasetError: An id outside its table (checked on the CPU; a GPU would have to wait for the answer).
        """
        asked = {spec.name: [feature for feature in spec.features if feature in ids] for spec in self.specs}
        device = next((tensor.device for tensor in ids.values()), torch.device("cpu"))
        nothing = torch.zeros(0, dtype=torch.int64, device=device)
        flat = {name: torch.cat([nothing, *(ids[f] for f in features)]) for name, features in asked.items()}
        keys, positions = dict(flat), {}
        if self._dedup:
            for name in flat:
                keys[name], positions[name] = distinct(flat[name], self.spec_of[name].rows)
        for spec in self.specs:
            _check_range(spec, keys[spec.name])
        # All exchanges are begun before any is waited for.
        exchanges = [
            (s, _Exchange(self.collections[width], _jagged(s, keys), self._touched.get(width)))
            for width, s in self._by_width.items()
        ]
        sizes = {feature: tensor.numel() for feature, tensor in ids.items()}
        return Request(asked, sizes, keys, positions, exchanges)

    def lookup(self, request: Request, hold: bool = False, mark: Callable[[str], None] = lambda stage: None) -> Lookup:
        """The rows that were asked for, as they are now.

        Args:
            request: From `request`.
            hold: Whether gradients wait at the rows: see `Held`.
            mark: Told "exchange" behind each wait for other ranks, and "lookup" behind the work in between.
        """
        request.send()
        found = [(specs, exchange.rows(mark)) for specs, exchange in request.exchanges]
        keys = request.keys
        tables = {spec.name: (keys[spec.name], rows[spec.name].values()) for specs, rows in found for spec in specs}
        mark("exchange")
        for name, weight in self.replicated.items():
            tables[name] = keys[name], torch.nn.functional.embedding(keys[name], weight)
        held = Held() if hold else None
        if held is not None:
            tables = {name: (ids, held.hold(rows)) for name, (ids, rows) in tables.items()}
        features: dict[str, Tensor] = {}
        for name, names in request.asked.items():
            rows = tables[name][1]
            if name in request.positions:
                rows = rows.index_select(0, request.positions[name])
            features.update(zip(names, rows.split([request.sizes[feature] for feature in names]), strict=True))
        return Lookup(features, tables, held)

    def touched_norm(self, found: Lookup) -> Tensor:
        """This rank's part of the sum of squares of all rows that any rank looked up in this step.

        Each row counts once in the sum over ranks, however many ranks and features asked for it: every rank counts it
        with the weight 1 / (number of requests on all ranks). Where the tables are sharded, all ranks must call it.
        """
        keys, base = [], 0
        for spec in self.specs:
            keys.append(found.tables[spec.name][0] + base)
            base += spec.rows
        local = torch.cat(keys)
        asked, requests = torch.unique(self._of_all_ranks(local), return_counts=True)
        weights = 1.0 / requests[torch.searchsorted(asked, local)]
        squares = torch.cat([found.tables[spec.name][1].square().sum(1) for spec in self.specs])
        return (squares * weights).sum()

    def weight_name(self, table: str) -> str:
        """The name of a table's rows in the state of an unsharded module."""
        return f"collections.{collection_of(self.spec_of[table])}.embeddings.{table}.weight"

    def track(self, but: Collection[str] = ()) -> dict[str, Tensor]:
        """From now on, marks the rows that are looked up where gradients are on: these may change.

        Args:
            but: Tables to leave out; replicated ones are, too.

        Returns:
            Table → bool, one for each of this process's rows: the very bitmap, for others to read and to clear.
        """
        for width, specs in self._by_width.items():
            held = {spec.name: _local_parts(self, spec) for spec in specs}
            rows = {name: sum(len(part) for _, part in parts if part.numel()) for name, parts in held.items()}
            device = next((part.device for parts in held.values() for _, part in parts), torch.device("cpu"))
            self._touched[width] = _Touched(rows, device)
        found = {table: bitmap for touched in self._touched.values() for table, bitmap in touched.of_table.items()}
        return {table: bitmap for table, bitmap in found.items() if table not in but}

    def initialise(self) -> None:
        """Writes the initial rows, in the shards that this process has. See the function `initialise`."""
        initialise(self, self._seed, self._scale)

    def _of_all_ranks(self, keys: Tensor) -> Tensor:
        spread = bool(self.replicated) or any(
            isinstance(collection, ShardedEmbeddingCollection) for collection in self.collections.values()
        )
        if not spread or dist.get_world_size() == 1:
            return keys
        sizes = [torch.zeros(1, dtype=torch.int64, device=keys.device) for _ in range(dist.get_world_size())]
        dist.all_gather(sizes, torch.tensor([keys.numel()], device=keys.device))
        counts = [int(size) for size in sizes]
        padded = keys.new_zeros(max(counts))
        padded[: keys.numel()] = keys
        parts = [torch.empty_like(padded) for _ in counts]
        dist.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def collection_of(spec: TableSpec) -> str:
    """The collection that holds a table: there is one a width."""
    return f"width_{spec.width}"


def _let_be(rows: Tensor) -> None:
    """In place of TorchRec's initial rows, which `initialise` would only write over."""


def _jagged(specs: list[TableSpec], keys: dict[str, Tensor]) -> KeyedJaggedTensor:
    """The ids in bags, all tables having as many as the one with most ids needs.

    What a bag is makes no difference to the rows that come back. But the length of every bag goes to every rank: so
    there is one bag a table, and on a GPU, which works on bags in parallel, one for so many ids as a warp has threads
    (untested: no GPU here).
    """
    values = [keys[spec.name] for spec in specs]
    counts = torch.tensor([v.numel() for v in values])
    longest = max(1, int(counts.max()))
    bag = longest if values[0].device.type == "cpu" else _WARP
    stride = -(-longest // bag)
    lengths = (counts[:, None] - bag * torch.arange(stride)).clamp(0, bag).flatten()
    return KeyedJaggedTensor(
        keys=[spec.name for spec in specs],
        values=torch.cat(values),
        lengths=lengths.to(values[0].device, non_blocking=True),
        stride=stride,
    )


def _check_range(spec: TableSpec, ids: Tensor) -> None:
    # FBGEMM reads row 0 in place of one that isn't there, with a line in the log at most.
    if ids.device.type != "cpu" or not ids.numel():
        return
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= spec.rows:
        raise DatasetError(
            f"An id is outside its embedding table, which has {spec.rows} rows.",
            where=f"table {spec.name!r} (features {', '.join(spec.features)})",
            got=low if low < 0 else high,
            remedy="Prepare the dataset again: its shards or catalogue don't fit its manifest.",
        )


@torch.no_grad()
def initialise(module: nn.Module, seed: int, scale: float) -> None:
    """Writes the initial rows of all tables in a module: row 0 (unknown) is zero, others nearly normal(0, `scale`).

    Each number is a hash of (seed, table, row, column) alone: the same in any shard, at any world size, in any order.
    """
    for tables in [m for m in module.modules() if isinstance(m, Tables)]:
        for spec in tables.specs:
            of_table = hashing.hashed(seed, hashing.of_name(spec.name))
            for (row, column), rows in _local_parts(tables, spec):
                _fill(rows, row, column, of_table, scale)


def _local_parts(tables: Tables, spec: TableSpec) -> list[tuple[tuple[int, int], Tensor]]:
    """The parts of a table that this process holds: first row and column, and the numbers themselves (not a copy)."""
    if spec.name in tables.replicated:
        return [((0, 0), tables.replicated[spec.name].data)]
    weight = tables.collections[collection_of(spec)].state_dict()[f"embeddings.{spec.name}.weight"]
    if isinstance(weight, ShardedTensor):
        return [((s.metadata.shard_offsets[0], s.metadata.shard_offsets[1]), s.tensor) for s in weight.local_shards()]
    return [] if weight.is_meta else [((0, 0), weight)]


def _fill(rows: Tensor, first_row: int, first_column: int, seed: Tensor, scale: float) -> None:
    count, width = rows.shape
    column = torch.arange(width, device=rows.device) + first_column
    at_once = max(1, _INITIALISED_AT_ONCE // width)
    for start in range(0, count, at_once):
        row = torch.arange(start, min(start + at_once, count), device=rows.device) + first_row
        values = hashing.normal(hashing.hashed(seed.to(rows.device), row[:, None], column), scale)
        values[row == 0] = 0.0
        rows[start : start + at_once] = values
