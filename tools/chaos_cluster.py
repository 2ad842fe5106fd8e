"""For `tools/chaos.py`: a Ray cluster of several nodes on this machine, and the command that trains on it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from metatrain.config import Config, to_yaml
from metatrain.errors import MetatrainError
from metatrain.train.audit import Attempt, read_attempts

#: Of each node. The head trains nothing.
STORE_BYTES = 100 * 1024**2


class Nodes:
    """A head and nodes with room for one worker each; nodes can be killed and come back.

    Ray's files lie in a folder of its own: what else looks for a Ray on this machine does not find this one.
    """

    def __init__(self, count: int, cpus: int) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="chaos-", ignore_cleanup_errors=True)
        os.environ["RAY_TMPDIR"] = self._folder.name
        from ray.cluster_utils import Cluster  # after the variable is set

        # Sooner than a minute: a node that is killed here is gone at once.
        settings = {
            "health_check_initial_delay_ms": 1000,
            "health_check_period_ms": 1000,
            "health_check_failure_threshold": 5,
            # The head would keep a record of the last hundred thousand calls, which looks like a leak for hours.
            "task_events_report_interval_ms": 0,
        }
        head = {
            "num_cpus": 0,
            "include_dashboard": False,
            "include_log_monitor": False,  # it keeps the last 200 logs open, which looks like a leak too
            "object_store_memory": STORE_BYTES,
            "_system_config": settings,
        }
        self._cluster = Cluster(initialize_head=True, head_node_args=head)
        self._cpus = cpus
        self._nodes: list[Any] = []
        for _ in range(count):
            self.add()

    @property
    def address(self) -> str:
        """Of the head."""
        return str(self._cluster.address)

    @property
    def count(self) -> int:
        """Nodes that train."""
        return len(self._nodes)

    def add(self) -> None:
        """Another node."""
        self._nodes.append(
            self._cluster.add_node(num_cpus=self._cpus, object_store_memory=STORE_BYTES, include_log_monitor=False)
        )

    def kill(self) -> None:
        """SIGKILL to all processes of the newest node's services; its workers end with them."""
        self._cluster.remove_node(self._nodes.pop(), allow_graceful=False)

    def stores(self) -> tuple[int, int]:
        """Objects in the nodes' stores, and their bytes."""
        from ray._private.internal_api import node_stats

        objects = size = 0
        for node in [self._cluster.head_node, *self._nodes]:
            with contextlib.suppress(Exception):  # a node may be on its way out
                stats = node_stats(node.node_ip_address, node.node_manager_port, include_memory_info=False).store_stats
                objects, size = objects + stats.num_local_objects, size + stats.object_store_bytes_used
        return objects, size

    def close(self) -> None:
        """Ends all nodes."""
        self._cluster.shutdown()
        self._folder.cleanup()


class Command:
    """`metatrain train` of a recipe, in a process of its own, given again where it ended.

    Attributes:
        ends: What it ended with before the run was done: seconds since the first start, status, last lines.
    """

    def __init__(self, config: Config, folder: Path, address: str, plan: str) -> None:
        self.config = config
        self._recipe = folder / f"{config.run.name}.yaml"
        self._recipe.write_text(to_yaml(config))
        self._log = folder / f"{config.run.name}.log"
        self._address, self._plan = address, plan
        self.begun = time.time()
        self.ends: list[tuple[float, int, str]] = []
        self.process = self._start()

    def _start(self) -> subprocess.Popen[bytes]:
        command = [
            str(Path(sys.executable).with_name("metatrain")),
            "train",
            str(self._recipe),
            "--address",
            self._address,
        ]
        environment = {**os.environ, "METATRAIN_FAULTS": self._plan, "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.5"}
        with self._log.open("ab") as log:
            return subprocess.Popen(command, env=environment, stdout=log, stderr=log, cwd=self._recipe.parent)

    def ended(self) -> bool:
        """Whether it has come to the run's end; where it ended otherwise, it is noted and given again."""
        status = self.process.poll()
        if status is None or status == 0:
            return status == 0
        self.ends.append((time.time() - self.begun, status, self.tail()))
        self.process = self._start()
        return False

    def kill(self) -> None:
        """SIGKILL to the command alone."""
        self.process.kill()
        self.process.wait()

    def tail(self, size: int = 1500) -> str:
        """The end of what it printed."""
        return self._log.read_bytes()[-size:].decode(errors="replace").strip()


def attempts_so_far(run_url: str) -> list[Attempt]:
    """What the run's audit log says by now; nothing where it has not begun, or is just being begun."""
    try:
        return read_attempts(run_url)
    except MetatrainError:
        return []


def steps_so_far(run_url: str) -> int:
    """Steps that rank 0 of the newest attempt has taken, or that it began with. Reads the end of one file."""
    files = sorted(Path(run_url, "audit").glob("attempt-*-rank-0000.jsonl"))
    for file in reversed(files):
        lines = file.read_bytes()[-20_000:].split(b"\n")[:-1]
        with contextlib.suppress(ValueError, IndexError):
            last = json.loads(lines[-1])
            return int(last["total"]) + 1 if "total" in last else int(last["begins"])
    return 0
