"""A Ray cluster of several nodes by `cluster/local.sh`, and an S3 server, both on the loopback interface, for tests."""

from __future__ import annotations

import contextlib
import os
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import boto3
from botocore.exceptions import BotoCoreError

ROOT = Path(__file__).parents[2]
METATRAIN = (sys.executable, "-W", "ignore", "-m", "metatrain")


def until(condition: Callable[[], object], what: str, seconds: float) -> None:
    """Looks twice a second until it holds. AssertionError after `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, f"waited {seconds:.0f} s for {what}"
        time.sleep(0.5)


@contextlib.contextmanager
def s3_server(bucket: str) -> Iterator[dict[str, str]]:
    """A server of moto with an empty bucket; the variables by which clients find it."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    variables = {
        "AWS_ENDPOINT_URL": f"http://127.0.0.1:{port}",
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    # In a process of its own: this one's must go on while the server answers.
    command = [sys.executable, "-W", "ignore", "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        client = boto3.client(
            "s3",
            endpoint_url=variables["AWS_ENDPOINT_URL"],
            aws_access_key_id="test",
            aws_secret_access_key="test",
            region_name="us-east-1",
        )

        def made() -> bool:
            assert server.poll() is None, "the S3 server ended"
            with contextlib.suppress(BotoCoreError):
                client.create_bucket(Bucket=bucket)
                return True
            return False

        until(made, "the S3 server", 300)
        client.close()
        yield variables
    finally:
        server.kill()
        server.wait()


class LocalCluster:
    """A cluster of `cluster/local.sh`, whose nodes have the environment that this has."""

    def __init__(self, nodes: int, variables: Mapping[str, str]) -> None:
        # Short, since sockets lie in it.
        self._folder = tempfile.TemporaryDirectory(prefix="mc-", dir="/tmp", ignore_cleanup_errors=True)
        self._place = Path(self._folder.name) / "c"
        ray = str(Path(sys.executable).with_name("ray"))
        self._environment = {
            # A plan of faults is for those who were given one.
            **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "METATRAIN_"))},
            **variables,
            "PYTHONPATH": str(ROOT),
            "CLUSTER": str(self._place),
            "RAY": ray,
        }
        try:
            self._script("up", str(nodes))
        except BaseException:
            self.down()
            raise

    def _script(self, *arguments: str) -> str:
        command = [str(ROOT / "cluster/local.sh"), *arguments]
        done = subprocess.run(command, env=self._environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout.strip()

    def add(self) -> str:
        """Another node; its name."""
        return self._script("add")

    def kill(self, node: str) -> None:
        """Ends a node as a power cut would."""
        self._script("kill", node)

    def process(self, node: str) -> int:
        """The process that all others of a node descend from."""
        return int((self._place / node / "pid").read_text().split()[0])

    def down(self) -> None:
        """Ends all nodes."""
        self._script("down")
        self._folder.cleanup()

    def command(self, *arguments: str) -> tuple[list[str], dict[str, str]]:
        """A command in a shell that knows the cluster as docs/cluster.md says, and its environment."""
        return [
            "bash",
            "-c",
            f'eval "$("{ROOT}/cluster/local.sh" env)" && exec "$@"',
            "shell",
            *arguments,
        ], self._environment

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A command to its end."""
        command, environment = self.command(*arguments)
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)

    def metatrain(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """`metatrain ARGUMENT…` to its end."""
        return self.run(*METATRAIN, *arguments)


class Followed:
    """`metatrain ARGUMENT…`, whose output is looked at while it runs."""

    def __init__(self, cluster: LocalCluster, log: Path, *arguments: str) -> None:
        self._log = log
        command, environment = cluster.command(*METATRAIN, *arguments)
        with log.open("w") as file:
            self._process = subprocess.Popen(command, env=environment, stdout=file, stderr=subprocess.STDOUT)

    def text(self) -> str:
        """What it has printed."""
        return self._log.read_text()

    def wait(self, condition: Callable[[], object], what: str, seconds: float) -> None:
        """Until it holds; fails where the command ends before."""

        def holds() -> bool:
            ended = self._process.poll() is not None
            if condition():
                return True
            assert not ended, f"ended with {self._process.returncode} before {what}:\n{self.text()}"
            return False

        try:
            until(holds, what, seconds)
        except AssertionError as error:
            raise AssertionError(f"{error}\n{self.text()}") from error

    def end(self, seconds: float) -> int:
        """Its exit code."""
        try:
            return self._process.wait(seconds)
        except subprocess.TimeoutExpired as error:
            raise AssertionError(f"did not end within {seconds} s:\n{self.text()}") from error

    def kill(self) -> None:
        """Ends it."""
        self._process.kill()
        self._process.wait()
