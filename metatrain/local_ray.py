"""A Ray of this machine alone: whoever uses it has its token, and nothing of it listens on a network.

Ray runs any code for whoever may talk to it. So the Ray that a command starts for itself

- asks for a token, drawn anew each time, which its processes alone know, by their environment. Ray's own default is a
  file in the home folder, readable by all where the home folder is, and the same for all that ever starts there;
- listens on the loopback interface. Ray takes the address that the machine has towards the internet, and binds to all.

`RAY_AUTH_MODE`, `RAY_AUTH_TOKEN` and `RAY_AUTH_TOKEN_PATH` are heeded where they are set. With METATRAIN_RAY_OPEN=1 it
listens on all interfaces, as Ray does.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import ray
import ray._raylet
from ray._private import ray_constants
from ray._private.node import Node

#: Set to 1, a local Ray listens on all interfaces.
OPEN = "METATRAIN_RAY_OPEN"

_MODE, _TOKEN, _TOKEN_PATH = "RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"
# With this, Ray takes the loopback address as the machine's. Meant for other systems, where firewalls ask the user.
_LOOPBACK = ray_constants.ENABLE_RAY_CLUSTERS_ENV_VAR
# The interface of torch's gloo, which would take the host name's.
_GLOO = "GLOO_SOCKET_IFNAME"
_raylet: Any = ray._raylet  # compiled, without types
_here = False


def is_local() -> bool:
    """Whether the Ray of this process is one of `local_ray`'s: nobody else is on it, and it ends with its block."""
    return _here


@contextmanager
def local_ray(**options: Any) -> Iterator[None]:
    """A Ray of this process, which ends with the block. Without a dashboard.

    With `log_to_driver=False` it is also without the process that reads all logs, to send them to whoever launched.

    Args:
        options: Of `ray.init`.
    """
    global _here
    before = {name: os.environ.get(name) for name in (_MODE, _TOKEN, _LOOPBACK, _GLOO)}
    enabled = ray_constants.ENABLE_RAY_CLUSTER
    try:
        if _TOKEN not in os.environ and _TOKEN_PATH not in os.environ:
            os.environ[_TOKEN] = secrets.token_hex(32)
            _raylet.AuthenticationTokenLoader.instance().reset_cache()
        if os.environ.get(OPEN) != "1":
            # In this process it was read when Ray was imported; the processes that it starts read it now.
            os.environ[_LOOPBACK] = "0"
            ray_constants.ENABLE_RAY_CLUSTER = False
            os.environ.setdefault(_GLOO, "lo")
        # "local": without it, Ray would join whatever cluster the environment names.
        with _no_log_monitor() if options.get("log_to_driver") is False else nullcontext():
            ray.init(address="local", include_dashboard=False, **options)
        _here = True
        yield
    finally:
        _here = False
        ray.shutdown()
        # For a cluster that this process may join later, with a token and an address of its own.
        ray_constants.ENABLE_RAY_CLUSTER = enabled
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        _raylet.AuthenticationTokenLoader.instance().reset_cache()
        _raylet.Config.initialize("")


@contextmanager
def _no_log_monitor() -> Iterator[None]:
    """For a Ray that is started within; `ray.init` has no option for it."""
    start = Node.start_log_monitor
    Node.start_log_monitor = lambda self: None
    try:
        yield
    finally:
        Node.start_log_monitor = start
