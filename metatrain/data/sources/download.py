"""Raw archives from their official address: cached, checked by the checksum published beside them, or refused.

The cache is ~/.cache/metatrain, or the folder that METATRAIN_CACHE names. A file in the cache is whole.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
import zipfile
from pathlib import Path

from tqdm import tqdm

from metatrain.cache import cache_folder
from metatrain.errors import SourceError

ADDRESS = "https://files.grouplens.org/datasets/movielens"
_CONNECT_SECONDS = 5.0
_PIECE = 1 << 20
_RECBOLE = "recbole==1.2.1"
_RECBOLE_FILES = tuple(f"ml-100k.{part}" for part in ("inter", "item", "user"))

log = logging.getLogger(__name__)


class UnreachableError(Exception):
    """The address cannot be reached from here."""


def movielens_archive(release: str) -> tuple[str, list[str]]:
    """The archive of a MovieLens release (`ml-1m`), downloaded if it isn't cached: path, notes.

    Raises:
        SourceError: It can be had neither from its address nor, for `ml-100k`, from the recbole wheel.
    """
    name = f"{release}.zip"
    target = cache_folder() / "movielens" / name
    if target.exists():
        return str(target), [f"{name} from the cache {target}"]
    if release == "ml-100k" and (copy := cache_folder() / "movielens" / "ml-100k-recbole").is_dir():
        return str(copy), [_note(copy)]
    try:
        checksum = _published_checksum(f"{ADDRESS}/{name}.md5")
        _download(f"{ADDRESS}/{name}", target, checksum)
        how = "its published md5 agrees" if checksum else "no md5 is published for it"
        return str(target), [f"{name} downloaded from {ADDRESS}/{name}; {how}"]
    except UnreachableError as error:
        if release == "ml-100k":
            log.warning(
                "%s/%s cannot be reached (%s): falling back to the copy inside the %s wheel.",
                ADDRESS,
                name,
                error,
                _RECBOLE,
            )
            copy = _recbole_copy(cache_folder() / "movielens" / "ml-100k-recbole")
            return str(copy), [_note(copy)]
        raise SourceError(
            f"The archive cannot be downloaded: {error}.",
            where=f"{ADDRESS}/{name}",
            remedy=f"Download it elsewhere and name it with `prepare.path`, or put it at {target}.",
        ) from error


def _note(copy: Path) -> str:
    return f"MovieLens-100K from the copy inside the {_RECBOLE} wheel, cached at {copy}"


def _published_checksum(url: str) -> str | None:
    """The md5 published beside an archive; None where none is published."""
    try:
        with urllib.request.urlopen(url, timeout=_CONNECT_SECONDS) as reply:
            found = re.search(rb"\b[0-9a-fA-F]{32}\b", reply.read(4096))
            return found.group().decode().lower() if found else None
    except urllib.error.HTTPError as error:
        if error.code in (403, 404):
            return None
        raise UnreachableError(f"the server answers {error.code}") from error
    except OSError as error:
        raise UnreachableError(str(getattr(error, "reason", error))) from error


def _download(url: str, target: Path, checksum: str | None) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = target.with_name(f"{target.name}.{os.getpid()}.part")
    digest = hashlib.md5(usedforsecurity=False)
    try:
        with urllib.request.urlopen(url, timeout=_CONNECT_SECONDS) as reply, partial.open("wb") as file:
            size = int(reply.headers.get("Content-Length") or 0)
            # A bar belongs on a terminal; in a job's log it is noise.
            with tqdm(
                total=size or None, unit="B", unit_scale=True, desc=target.name, disable=not sys.stderr.isatty()
            ) as bar:
                while piece := reply.read(_PIECE):
                    file.write(piece)
                    digest.update(piece)
                    bar.update(len(piece))
        if size and partial.stat().st_size != size:
            raise UnreachableError(f"the connection ended after {partial.stat().st_size} of {size} bytes")
        if checksum and digest.hexdigest() != checksum:
            raise SourceError(
                "The downloaded archive is not the published one: its md5 differs.",
                where=url,
                got=f"{digest.hexdigest()}, published {checksum}",
                remedy="Try again; if it stays, download it by hand and name it with `prepare.path`.",
            )
        partial.replace(target)
    except urllib.error.HTTPError as error:
        raise UnreachableError(f"the server answers {error.code}") from error
    except OSError as error:
        raise UnreachableError(str(getattr(error, "reason", error))) from error
    finally:
        partial.unlink(missing_ok=True)


def _recbole_copy(target: Path) -> Path:
    """Unpacks ml-100k from the recbole wheel, which pip fetches from its index."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent) as folder:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--no-deps",
            "--quiet",
            "--disable-pip-version-check",
            "--dest",
            folder,
            _RECBOLE,
        ]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        wheels = list(Path(folder).glob("recbole-*.whl"))
        if done.returncode or not wheels:
            raise SourceError(
                f"MovieLens-100K can be had neither from {ADDRESS} nor from the {_RECBOLE} wheel.",
                where=" ".join(command),
                got=(done.stderr.strip() or "no wheel")[-500:],
                remedy="Download ml-100k.zip elsewhere and name it with `prepare.path`.",
            )
        unpacked = Path(folder) / "unpacked"
        unpacked.mkdir()
        with zipfile.ZipFile(wheels[0]) as wheel:
            for name in _RECBOLE_FILES:
                with (
                    wheel.open(f"recbole/dataset_example/ml-100k/{name}") as source,
                    (unpacked / name).open("wb") as file,
                ):
                    shutil.copyfileobj(source, file)
        if not target.exists():
            unpacked.replace(target)
    return target
