"""Which checkpoints are kept, and how the others go: a kill in between leaves whole ones only."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping

from metatrain import faults, storage
from metatrain.checkpoint.format import MARKER, Marker, checkpoint_url, committed_steps, folders, read_marker
from metatrain.errors import CheckpointError


def prune(run_url: str, keep: int, keep_hours: float = 0.0) -> list[int]:
    """Removes whole checkpoints but those that `kept` names. Returns the removed steps.

    What killed attempts left below the newest whole checkpoint goes too; one with a broken marker stays for people to
    look at.
    """
    markers, whole = readable_markers(run_url), committed_steps(run_url)
    if not markers:
        return []
    for step in folders(run_url):
        if step < whole[-1] and step not in whole:
            storage.remove(checkpoint_url(run_url, step))
    gone = markers.keys() - kept(markers, keep, time.time() - 3600 * keep_hours)
    return _removed(run_url, gone, markers)


def kept(markers: Mapping[int, Marker], keep: int, since: float) -> set[int]:
    """The newest `keep` checkpoints, those committed after `since`, the best, and what any of these builds on."""
    steps = sorted(markers)
    judged = [(loss, s) for s in steps if (loss := markers[s].metrics.get("validation_loss")) is not None]
    found = {*steps[-max(keep, 1) :], *(step for step in steps if markers[step].time > since)}
    found |= {min(judged)[1]} if judged else set()
    return found | {base.step for step in found if (base := markers[step].base)}


def remove(run_url: str, steps: Iterable[int]) -> list[int]:
    """Removes checkpoints, whole or not. Returns their steps.

    Raises:
        CheckpointError: There is no such checkpoint, or another one builds on it.
    """
    asked, there = set(steps), set(folders(run_url))
    if missing := asked - there:
        raise CheckpointError(
            "There is no such checkpoint.",
            where=run_url,
            got=str(sorted(missing)),
            remedy=f"Those of this run: {sorted(there)}." if there else "The run has none.",
        )
    markers = readable_markers(run_url)
    builds = sorted(s for s, marker in markers.items() if marker.base and marker.base.step in asked and s not in asked)
    if builds:
        raise CheckpointError(
            "Other checkpoints build on this one, and would be lost with it.",
            where=run_url,
            got=str(builds),
            remedy=f"Remove them with it: --remove {' '.join(str(step) for step in sorted(asked | set(builds)))}",
        )
    return _removed(run_url, asked, markers)


def readable_markers(run_url: str) -> dict[int, Marker]:
    """The markers that can be read: broken ones are left out."""
    markers = {}
    for step in committed_steps(run_url):
        try:
            markers[step] = read_marker(run_url, step)
        except CheckpointError:
            continue  # for whoever asks for this checkpoint itself to report
    return markers


def _removed(run_url: str, steps: Iterable[int], markers: Mapping[int, Marker]) -> list[int]:
    # Those that build on others before these; of each the marker first: a kill in between leaves a folder that does
    # not count as a checkpoint, and never one without its base.
    order = sorted(steps, key=lambda step: (step not in markers or markers[step].base is None, step))
    for step in order:
        url = checkpoint_url(run_url, step)
        storage.remove(storage.join(url, MARKER))
        faults.point("checkpoint.prune", path=url)
        storage.remove(url)
    return sorted(order)
