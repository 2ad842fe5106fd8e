"""TensorBoard over one run or several: local folders as they are, those on an object store through a local copy."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
import threading
from collections.abc import Sequence

from metatrain import storage
from metatrain.errors import ConfigError, StorageError
from metatrain.observe.copies import EVENTS, Copy, board_url

log = logging.getLogger("metatrain")

#: Between two looks for what is new on an object store, and in the copy.
SECONDS_BETWEEN_COPIES, SECONDS_BETWEEN_READS = 15.0, 5
POINTS_OF_A_CURVE = 10_000


class Boards:
    """TensorBoard over runs, until it is closed.

    Args:
        runs: Their folders.
        host: The address to listen at. By default this machine alone can reach it: TensorBoard asks for no password.
        port: The port; 0 for any that is free. Default: 6006, or the first free one above.

    Raises:
        StorageError: A run that has no board yet.
        ConfigError: The port is taken, or the address is not this machine's.
    """

    def __init__(self, runs: Sequence[str], host: str = "127.0.0.1", port: int | None = None) -> None:
        self._folder = tempfile.mkdtemp(prefix="metatrain-board-")
        self._copies: list[Copy] = []
        self._over = threading.Event()
        try:
            for name, run in names_of(runs).items():
                self._add(name, run)
            for copy in self._copies:
                copy.refresh()
            #: Where a browser finds it.
            self.url = self._serve(host, port)
        except BaseException:
            self.close()
            raise
        if self._copies:
            threading.Thread(target=self._keep_fresh, name="board-copies", daemon=True).start()

    def close(self) -> None:
        """Ends the copying, and removes the copies; the server ends with the process."""
        self._over.set()
        shutil.rmtree(self._folder, ignore_errors=True)

    def _add(self, name: str, run: str) -> None:
        url = board_url(run)
        if not any(file.startswith(EVENTS) for file in storage.list_folder(url)):
            raise StorageError(
                "This run has no curves yet.",
                where=url,
                remedy="Check the run's name and storage, or train it with `metatrain train`.",
            )
        place = os.path.join(self._folder, name)
        if storage.is_local(url):
            os.symlink(storage.filesystem(url)[1], place, target_is_directory=True)
        else:
            self._copies.append(Copy(url, place))

    def _serve(self, host: str, port: int | None) -> str:
        # Here: it takes seconds, which a mistaken name of a run should not cost.
        from tensorboard import default, program

        board = program.TensorBoard(plugins=default.get_plugins())
        flags = ["--logdir", self._folder, "--host", host, "--reload_interval", str(SECONDS_BETWEEN_READS)]
        # Of a longer curve TensorBoard shows as many of its points, drawn at random: by default 1,000.
        flags += ["--samples_per_plugin", f"scalars={POINTS_OF_A_CURVE},histograms=200"]
        if port is not None:
            flags += ["--port", str(port)]
        board.configure(["tensorboard", *flags])
        try:
            return board.launch()
        except program.TensorBoardServerException as error:
            raise ConfigError(
                f"TensorBoard cannot listen there: {' '.join(error.msg.split())}",
                where="--host, --port",
                got=host if port is None else f"{host}:{port}",
                remedy="Give another --port (0: any that is free), or an address of this machine.",
            ) from error

    def _keep_fresh(self) -> None:
        failing = False
        while not self._over.wait(SECONDS_BETWEEN_COPIES):
            try:
                for copy in self._copies:
                    copy.refresh()
                failing = False
            except Exception as error:  # whatever a store's own package raises
                if not failing and not self._over.is_set():
                    log.warning("Curves cannot be fetched for now: %s: %s", type(error).__name__, error)
                failing = True


def names_of(runs: Sequence[str]) -> dict[str, str]:
    """Runs by the names that TensorBoard shows: each one's folder, with as much of what is above as tells them apart.

    Raises:
        ConfigError: A run that is named twice.
    """
    parts = [[p for p in run.rstrip("/").replace("://", "/").split("/") if p] for run in runs]
    for depth in range(1, max(map(len, parts), default=0) + 1):
        names = ["/".join(p[-depth:]) for p in parts]
        if len(set(names)) == len(names):
            # One folder a run: TensorBoard shows the path between a folder of runs and a run's own.
            return {name.replace("/", "·"): run for name, run in zip(names, runs, strict=True)}
    raise ConfigError("A run is named twice.", got=", ".join(runs), remedy="Name each run once.")
