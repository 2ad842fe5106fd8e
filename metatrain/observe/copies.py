"""A run's board on an object store, which cannot append: put there while it grows, and copied from there to look at."""

from __future__ import annotations

import logging
import os
import threading

from metatrain import storage

log = logging.getLogger("metatrain")

#: Where a run's board lies in its folder.
FOLDER = "tensorboard"
#: Begins the names of files that are appended to, and never changed.
EVENTS = "events.out.tfevents."
#: The least time between two rounds: a round puts every file that has grown, whole.
SECONDS_BETWEEN_ROUNDS = 10.0


def board_url(run_url: str) -> str:
    """The folder of a run's TensorBoard."""
    return storage.join(run_url, FOLDER)


class Upload:
    """Puts the files of a folder at a URL, again whenever they have grown, and removes those that have ended.

    A store that fails does not end training: it is told in the log, and tried again with the next round.

    Args:
        folder: The local folder.
        url: Where its files go.
    """

    def __init__(self, folder: str, url: str) -> None:
        self._folder, self._url = folder, url
        self._ended: set[str] = set()
        self._put: dict[str, tuple[int, int]] = {}  # size and time of change of what is on the store
        self._asked, self._over = threading.Event(), threading.Event()
        self._failed = False
        self._thread = threading.Thread(target=self._rounds, name="tensorboard-upload", daemon=True)
        self._thread.start()

    def soon(self) -> None:
        """Asks for a round."""
        self._asked.set()

    def ended(self, name: str) -> None:
        """Says that a file is written to its end: it is removed here once it is on the store."""
        self._ended.add(name)

    def close(self) -> bool:
        """A last round; returns whether everything is on the store."""
        self._over.set()
        self._asked.set()
        self._thread.join()
        if not self._round():
            log.warning("Curves could not be written to %s: they are in %s on this machine.", self._url, self._folder)
            return False
        return True

    def _rounds(self) -> None:
        while not self._over.is_set():
            self._asked.wait()
            self._asked.clear()
            if not self._over.is_set():
                self._round()
                self._over.wait(SECONDS_BETWEEN_ROUNDS)

    def _round(self) -> bool:
        ended = set(self._ended)  # as it is before the files are read
        try:
            for name in sorted(os.listdir(self._folder)):
                if storage.published_name(name) != name:
                    continue  # half written
                path = os.path.join(self._folder, name)
                with open(path, "rb") as file:
                    found = os.fstat(file.fileno())
                    change = (found.st_size, found.st_mtime_ns)
                    if change != self._put.get(name):
                        storage.write_atomic(storage.join(self._url, name), file.read())
                        self._put[name] = change
                if name in ended:
                    os.unlink(path)
        except Exception as error:  # whatever a store's own package raises
            if not self._failed:
                log.warning("Curves cannot be written to %s for now: %s: %s", self._url, type(error).__name__, error)
            self._failed = True
            return False
        self._failed = False
        return True


class Copy:
    """A local copy of a folder on an object store, brought up to date by `refresh`.

    Files of events grow in place, so that a TensorBoard that has one open reads on; others are replaced whole.
    """

    def __init__(self, url: str, folder: str) -> None:
        self._url, self._folder = url, folder
        self._sizes: dict[str, int] = {}
        os.makedirs(folder, exist_ok=True)

    def refresh(self) -> int:
        """Fetches what is new; the number of bytes."""
        fetched = 0
        for name, size in storage.file_sizes(self._url).items():
            grows, have = name.startswith(EVENTS), self._sizes.get(name, 0)
            if size == have and grows:
                continue
            path = os.path.join(self._folder, name)
            content = storage.read_bytes(storage.join(self._url, name))
            if grows:
                with open(path, "ab") as file:
                    file.write(content[have:])
            else:
                storage.write_atomic(path, content)
            # As long as what was read, which may have grown since it was listed.
            self._sizes[name] = len(content)
            fetched += len(content)
        return fetched
