"""The one policy of retries: which errors of a store may pass by themselves, how often to try again, how long to wait.

`metatrain.storage` applies it to every call. Nothing else retries storage.
"""

from __future__ import annotations

import errno
import io
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import IO, Any, TypeVar

from tenacity import Retrying, retry_if_exception, stop_after_attempt, wait_random_exponential

from metatrain import faults
from metatrain.errors import ConfigError, StorageError

Result = TypeVar("Result")

#: The number of attempts, from the environment.
VARIABLE = "METATRAIN_STORAGE_ATTEMPTS"


@dataclass(frozen=True)
class Policy:
    """Attempts, and the waits between them: random, up to `first_seconds` × 2ⁿ, never more than `longest_seconds`."""

    attempts: int = 7
    first_seconds: float = 0.2
    longest_seconds: float = 10.0

    @classmethod
    def of_environment(cls) -> Policy:
        """The policy with METATRAIN_STORAGE_ATTEMPTS attempts, where that is set.

        Raises:
            ConfigError: It is no number of attempts.
        """
        text = os.environ.get(VARIABLE)
        if text is None:
            return cls()
        if not text.isdecimal() or int(text) < 1:
            raise ConfigError("Attempts are a whole number from 1.", where=VARIABLE, got=text, remedy="Mend it.")
        return cls(attempts=int(text))


# What another try cannot mend.
_FINAL = (FileNotFoundError, FileExistsError, PermissionError, IsADirectoryError, NotADirectoryError, ValueError)
_FINAL_NUMBERS = frozenset(
    getattr(errno, name)
    for name in ["ENOSPC", "EDQUOT", "EROFS", "EFBIG", "ENAMETOOLONG", "ELOOP", "ENOTEMPTY", "EBADF", "ENOSYS", "EXDEV"]
)
# Throttled, timed out, or failing for now.
_STATUSES = frozenset({408, 425, 429, 500, 502, 503, 504})
_CODES = frozenset(
    [
        "SlowDown",
        "Throttling",
        "ThrottlingException",
        "ThrottledException",
        "RequestThrottled",
        "RequestLimitExceeded",
        "BandwidthLimitExceeded",
        "TooManyRequestsException",
        "RequestTimeout",
        "InternalError",
        "InternalServerError",
        "ServiceUnavailable",
        "OperationAborted",
        "OperationTimedOut",
        "ServerBusy",
    ]
)
# Errors of clients' libraries that are no OSErrors: a connection that broke, a body that ended early. By name (package,
# class), so that no store's library is needed.
_BROKEN_CONNECTIONS = frozenset(
    {
        ("aiohttp", "ClientConnectionError"),
        ("aiohttp", "ClientPayloadError"),
        ("azure", "IncompleteReadError"),
        ("azure", "ServiceRequestError"),
        ("azure", "ServiceResponseError"),
        ("botocore", "ConnectionError"),
        ("botocore", "HTTPClientError"),
        ("botocore", "IncompleteReadError"),
        ("botocore", "ResponseStreamingError"),
        ("http", "BadStatusLine"),
        ("http", "IncompleteRead"),
        ("urllib3", "ProtocolError"),
        ("urllib3", "TimeoutError"),
    }
)


class ShortReadError(OSError):
    """Fewer bytes came than the file has: the connection ended early, or the file is being replaced."""


def transient(error: BaseException) -> bool:
    """Whether the same call may succeed a little later: throttling, time-outs, broken connections, short reads."""
    if isinstance(error, OSError):
        return not isinstance(error, _FINAL) and error.errno not in _FINAL_NUMBERS
    if {(kind.__module__.partition(".")[0], kind.__name__) for kind in type(error).__mro__} & _BROKEN_CONNECTIONS:
        return True
    response: Any = getattr(error, "response", None)  # botocore's: a mapping
    if isinstance(response, dict):
        status = (response.get("ResponseMetadata") or {}).get("HTTPStatusCode")
        return status in _STATUSES or (response.get("Error") or {}).get("Code") in _CODES
    numbers = [getattr(error, name, None) for name in ("status", "status_code", "code")]
    return any(str(number).isdecimal() and int(str(number)) in _STATUSES for number in numbers)


def retried(call: Callable[[], Result]) -> Result:
    """Calls `call`, and again after a transient error, as the policy says; the last error comes out as it is."""
    policy = Policy.of_environment()
    tries = Retrying(
        retry=retry_if_exception(transient),
        stop=stop_after_attempt(policy.attempts),
        wait=wait_random_exponential(multiplier=policy.first_seconds, max=policy.longest_seconds),
        reraise=True,
    )
    return tries(call)


def whole(data: bytes, wanted: int, url: str) -> bytes:
    """The bytes, if they are as many as wanted.

    Raises:
        ShortReadError: They are fewer.
    """
    if len(data) < wanted:
        raise ShortReadError(f"{len(data)} of {wanted} bytes came from {url}")
    return data


def read_whole(url: str, read: Callable[[], bytes]) -> bytes:
    """What `read` gives, tried again after a transient error or a short read.

    Raises:
        StorageError: It keeps coming short.
    """
    try:
        return retried(read)
    except ShortReadError as error:
        raise StorageError(
            "A file is shorter than its store says, however often it is read.",
            where=url,
            got=str(error),
            remedy="Copy the file there again; where another program writes it, wait for its end.",
        ) from error


class SteadyFile(io.RawIOBase):
    """A store's file of `size` bytes whose reads are tried again, by a new connection, and never come back short.

    Args:
        url: Its name, for messages.
        opened: Opens it. Called again after a failure: what is half read or cached then is not to be trusted.
        size: Its bytes.
    """

    def __init__(self, url: str, opened: Callable[[], IO[bytes]], size: int) -> None:
        self._url, self._opened, self._size = url, opened, size
        self._file: IO[bytes] | None = None
        self._at = 0

    def readable(self) -> bool:
        """It is."""
        return True

    def seekable(self) -> bool:
        """It is."""
        return True

    def tell(self) -> int:
        """Where the next read begins."""
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Sets where the next read begins."""
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence])
        return self._at

    def readinto(self, buffer: Any) -> int:
        """Fills the buffer, or what the file has left for it."""
        wanted = max(0, min(len(buffer), self._size - self._at))
        if wanted:
            buffer[:wanted] = read_whole(self._url, lambda: self._read(wanted))
            self._at += wanted
        return wanted

    def close(self) -> None:
        """Closes the connection."""
        if self._file is not None:
            self._file.close()
        super().close()

    def _read(self, wanted: int) -> bytes:
        faults.point("storage.read", path=self._url)
        try:
            self._file = self._file or self._opened()
            self._file.seek(self._at)
            return whole(self._file.read(wanted), wanted, self._url)
        except BaseException:
            file, self._file = self._file, None
            if file is not None:
                file.close()
            raise
