"""Which node a reader goes to: the trainer's own while it has room, else one near it without accelerators."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

#: Ray's labels of a node's place, the nearest first.
_PLACES = ("ray.io/availability-zone", "ray.io/availability-region")


def node_for(
    nodes: Sequence[Mapping[str, Any]], free: Mapping[str, Mapping[str, float]], here: str, cpus: float, turn: int = 0
) -> str:
    """The node for a reader that needs so many CPUs; the trainer's own where none has room.

    Args:
        nodes: As `ray.nodes()` gives them.
        free: Node → resources that nobody has taken.
        here: The trainer's node.
        cpus: Of the reader.
        turn: Spreads readers that would all choose the same among equally good nodes.
    """

    def room(node: str) -> float:
        return free.get(node, {}).get("CPU", 0.0)

    if room(here) >= cpus:
        return here
    alive = {str(node["NodeID"]): node for node in nodes if node["Alive"]}
    mine = alive.get(here, {}).get("Labels", {})

    def distance(node: str) -> tuple[bool, ...]:
        labels = alive[node].get("Labels", {})
        far = [label in mine and labels.get(label) != mine[label] for label in _PLACES]
        # A CPU beside a GPU is one that the GPU's worker may want.
        return (bool(alive[node]["Resources"].get("GPU")), *far)

    able = sorted((node for node in alive if room(node) >= cpus), key=lambda node: (distance(node), node))
    if not able:
        return here
    best = [node for node in able if distance(node) == distance(able[0])]
    return best[turn % len(best)]
