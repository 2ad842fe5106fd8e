"""A Ray of this machine alone: it asks for its token, listens on the loopback interface, and leaves nothing behind."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytestmark = [pytest.mark.ray, pytest.mark.timeout(300)]

_CODE = """
import glob, logging, os, subprocess, sys
import ray
from metatrain.local_ray import local_ray
from tests.faults.processes import descendants

def listening():
    local = {}
    for file in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in open(file).read().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A":
                local[f"socket:[{fields[9]}]"] = fields[1].partition(":")[0]
    for pid in descendants(os.getpid()) | {os.getpid()}:
        for link in glob.glob(f"/proc/{pid}/fd/*"):
            try:
                socket = os.readlink(link)
            except OSError:
                continue
            if socket in local:
                yield local[socket]

before = dict(os.environ)
with local_ray(num_cpus=1, log_to_driver=False, logging_level=logging.ERROR, object_store_memory=100 * 2**20):
    assert ray.get(ray.remote(lambda: os.environ["RAY_AUTH_MODE"]).remote()) == "token"
    assert not [pid for pid in descendants(os.getpid()) if b"log_monitor" in open(f"/proc/{pid}/cmdline", "rb").read()]
    hosts = set(listening())
    assert len(hosts) >= 1
    assert hosts <= {"0100007F", "0000000000000000FFFF00000100007F", "00000000000000000000000001000000"}, hosts
    address = ray.get_runtime_context().gcs_address
    join = f"import ray; ray.init({address!r}, log_to_driver=False); print(ray.get(ray.remote(lambda: 'in').remote()))"
    token = os.environ["RAY_AUTH_TOKEN"]
    assert len(token) == 64
    joined = []
    for given in (token, "0" * 64):
        environment = {**os.environ, "RAY_AUTH_TOKEN": given}
        found = subprocess.run([sys.executable, "-c", join], env=environment, capture_output=True, text=True)
        joined.append("in" in found.stdout)
    assert joined == [True, False], joined
names = ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "GLOO_SOCKET_IFNAME")
assert all(os.environ.get(name) == before.get(name) for name in names)
print("well")
"""


def test_only_who_has_its_token_on_this_machine_may_use_it() -> None:
    # In a process of its own: this one's Ray is shared by other tests.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    found = subprocess.run([sys.executable, "-c", _CODE], env=environment, capture_output=True, text=True, check=False)
    assert found.stdout.strip().endswith("well"), found.stderr[-2000:]
