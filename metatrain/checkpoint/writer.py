"""The storage side of saving, as torch.distributed.checkpoint plans it: a file a rank, then contents, then the marker.

The marker is written by rank 0, once all ranks have said that their bytes are on storage; a rank that dies before it
has said so leaves a folder without a marker.
"""

from __future__ import annotations

import dataclasses
import math
import os
import time
import uuid
from collections.abc import Mapping
from typing import Any

from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem
from torch.distributed.checkpoint.storage import StorageWriter, WriteResult
from torch.futures import Future

from metatrain import faults, storage
from metatrain.checkpoint.blocks import BLOCK, PartWriter, sync_folder, view, writing
from metatrain.checkpoint.contents import CONTENTS, Chunk, Columns, Contents, StoredTensor, Touched, dtype_name
from metatrain.checkpoint.format import MARKER, VERSION, Marker, checkpoint_url, checksum
from metatrain.checkpoint.rows import encoded
from metatrain.checkpoint.staging import Staged
from metatrain.errors import CheckpointError
from metatrain.retries import retried


class Writer(StorageWriter):
    """Writes one checkpoint.

    The plan is made of the live tensors' names, shapes and placements; the bytes are those of the staged copies.

    Args:
        run_url: The run.
        staged: This rank's copies, by name.
        marker: The marker's fields, but for those that are known only when all is written.
        rank: This rank.
    """

    def __init__(self, run_url: str, staged: Mapping[str, Staged], marker: Mapping[str, Any], rank: int) -> None:
        self._run_url, self._staged, self._marker = run_url, staged, marker
        self.step, self._rank = int(marker["cursor"].total), rank
        self._url = checkpoint_url(run_url, self.step)
        #: The checkpoint's marker once it is committed, on rank 0 alone.
        self.committed: Marker | None = None
        self._file: PartWriter | None = None

    @property
    def written(self) -> int:
        """Bytes that this rank has written by now."""
        return self._file.at if self._file else 0

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        """Nothing: a writer writes one checkpoint."""

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        """Nothing to set up."""

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        """The plan as it is."""
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        """On rank 0, before any rank writes: makes way, and names each rank's file."""
        if storage.exists(storage.join(self._url, MARKER)):
            raise CheckpointError(
                "This step's checkpoint is there already: another process trains the same run.",
                where=self._url,
                remedy="End one of the two, or give one another `run.name`.",
            )
        storage.remove(self._url)  # what an earlier, killed attempt left there
        storage.make_folder(self._url)
        # A process of that attempt which is still about cannot write into the files of this one.
        attempt = uuid.uuid4().hex[:8]
        return [dataclasses.replace(plan, storage_data=f"{rank}-{attempt}.bin") for rank, plan in enumerate(plans)]

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        """Writes this rank's file; it is on storage when this returns."""
        url = storage.join(self._url, plan.storage_data)
        done: Future[list[WriteResult]] = Future()
        with storage.full_disk_named(url):
            done.set_result(retried(lambda: self._write(plan, url)))
        return done

    def _write(self, plan: SavePlan, url: str) -> list[WriteResult]:
        results = []
        if not plan.items:
            return results
        with writing(url) as file:
            self._file = file
            for item in plan.items:
                faults.point("checkpoint.write", step=self.step, rank=self._rank, path=url)
                chunk = self._put(item, file, plan.storage_data)
                results.append(WriteResult(item.index, sum(part.bytes for part in chunk.parts()), chunk))
        return results

    def _put(self, item: WriteItem, file: PartWriter, name: str) -> Chunk:
        assert item.tensor_data is not None, "a run's state is tensors"
        box, size = item.tensor_data.chunk, item.tensor_data.size
        assert box.sizes[2:] == size[2:], "tensors are sharded by rows and columns"
        columns = None
        if box.sizes[1:] != size[1:]:
            columns = Columns(start=box.offsets[1], count=box.sizes[1])
        staged = self._staged[item.index.fqn]
        first, rows = (box.offsets[0], box.sizes[0]) if size else (0, 1)
        place = {"start": first, "rows": rows, "columns": columns, "file": name}
        if staged.index is None:
            assert staged.data.numel() == math.prod(box.sizes), "the copy is of the planned tensor"
            return Chunk(**place, data=file.put(view(staged.data)))
        data, scales = encoded(staged.data, staged.encoding)
        touched = Touched(
            encoding=staged.encoding,
            count=staged.index.numel(),
            index=file.put(view(staged.index)),
            scales=None if scales is None else file.put(view(scales)),
        )
        return Chunk(**place, data=file.put(view(data)), touched=touched)

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        """On rank 0, when all ranks' bytes are on storage: commits."""
        chunks: dict[str, list[Chunk]] = {}
        for result in [result for of_rank in results for result in of_rank]:
            chunks.setdefault(result.index.fqn, []).append(result.storage_data)
        tensors = {}
        for name, entry in metadata.state_dict_metadata.items():
            assert isinstance(entry, TensorStorageMetadata), "a run's state is tensors"
            tensors[name] = StoredTensor(
                dtype=dtype_name(entry.properties.dtype), size=tuple(entry.size), chunks=tuple(chunks.get(name, ()))
            )
        contents = Contents(block=BLOCK, tensors=tensors)
        data = contents.model_dump_json().encode()
        place = {"step": self.step, "rank": self._rank, "path": self._url}
        faults.point("checkpoint.metadata", **place)
        storage.write_atomic(storage.join(self._url, CONTENTS), data)
        marker = Marker(
            **self._marker,
            version=VERSION,
            contents=checksum(data),
            bytes=sum(contents.files().values()),
            time=time.time(),
        )
        sync_folder(self._url)
        faults.point("checkpoint.commit", **place)
        storage.write_atomic(storage.join(self._url, MARKER), marker.as_json())
        sync_folder(self._url)
        sync_folder(storage.join(self._url, ".."))
        faults.point("checkpoint.committed", **place)
        self.committed = marker

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        """Writers are made for a run, never found by a name."""
        return False
