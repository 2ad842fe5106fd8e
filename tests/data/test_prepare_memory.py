"""Preparing holds no more of a log ten times as long: the peak of a process of its own, its pieces made small."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

PIECE = 1 << 15
CODE = """
import sys, threading, time
from pathlib import Path
from metatrain.config import PrepareConfig
from metatrain.data import prepare, prepare_pieces
from metatrain.data.sources import chunks

piece = int(sys.argv[3])
prepare_pieces.RUN_ROWS = chunks._CHUNK_ROWS = prepare._PARTITION_EVENTS = prepare._ONE_PARTITION_EVENTS = piece
peak = 0

def watch():
    global peak
    while True:
        status = Path("/proc/self/status").read_text()
        peak = max(peak, int(status.partition("RssAnon:")[2].split()[0]))
        time.sleep(0.002)

threading.Thread(target=watch, daemon=True).start()
config = PrepareConfig(source="events", path=sys.argv[1], min_events=1, max_events=500)
prepare.prepare(config, sys.argv[2], progress=False)
print(peak)
"""


def peak_kilobytes(folder: Path, events: int, skewed: bool) -> int:
    draw = np.random.default_rng(1)
    user = draw.integers(0, events // 30, events)
    if skewed:
        user[draw.random(events) < 0.5] = 0
    log = pa.table(
        {
            "user_id": user,
            "item_id": draw.integers(0, 1000, events),
            "label": draw.random(events),
            "timestamp": draw.integers(0, 10**6, events),
        }
    )
    path = folder / f"{events}.parquet"
    pq.write_table(log, path, row_group_size=PIECE)
    command = [sys.executable, "-c", CODE, str(path), str(folder / f"out-{events}"), str(PIECE)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    return int(done.stdout)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("skewed", [False, True])
def test_peak_memory_does_not_grow_with_the_log(tmp_path: Path, skewed: bool):
    small, large = (peak_kilobytes(tmp_path, events, skewed) for events in (150_000, 1_500_000))
    # The larger log's rows alone are 38 MB more, and a log that is held is held several times.
    assert large < small + 15 * 1024
