"""The folder that a preparation writes to: a dataset of the same input stays, another is replaced by a whole one alone.

A preparation that fails, or is killed while it reads and encodes, leaves the dataset that was there as it was. What a
killed one leaves behind is known by its name, and cleared by the next.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from pydantic import ValidationError

from metatrain import __version__, storage
from metatrain.config import PrepareConfig
from metatrain.data import manifest as manifests
from metatrain.data.manifest import Manifest, read_manifest
from metatrain.data.prepare_pieces import STAGING
from metatrain.data.prepare_splits import split_files
from metatrain.data.sources import RawLog
from metatrain.data.sources.files import fingerprints
from metatrain.errors import DatasetError

#: What a dataset has beside its manifest.
_PARTS = ("catalogue.parquet", "vocabularies", "shards")
#: Where files are says nothing of what is in them.
_LOCATIONS: Any = {
    **dict.fromkeys(("path", "users", "items", "extras"), True),
    "user_split": {"file"},
    "item_split": {"file"},
}


def origin_of(config: PrepareConfig, raw: RawLog) -> dict[str, Any]:
    """What the manifest tells of a dataset's making: the release, the configuration, and what the raw files hold."""
    files = raw.files | split_files(config)
    return {
        "metatrain": __version__,
        "source": raw.name,
        "config": config.model_dump(mode="json"),
        "files": {role: fingerprints(found) for role, found in files.items() if found},
        "notes": raw.notes,
    }


def ready_dataset(url: str, origin: dict[str, Any], overwrite: bool) -> Manifest | None:
    """The manifest of the dataset at `url`, when it is the wanted one; None when there is room for it.

    A dataset is the wanted one when its settings are, and its raw files held the same: wherever they were, and
    whichever release prepared it.

    Raises:
        DatasetError: `url` holds another dataset (without `overwrite`), or something that is none.
    """
    there = storage.list_folder(url)
    if manifests.FILE in there:
        if overwrite:
            return None
        manifest = read_manifest(url)
        difference = _first_difference(manifest.prepared_with, origin)
        if difference is None:
            return manifest
        raise DatasetError(
            "There is another dataset here: its configuration or its source files differ.",
            where=url,
            got=difference,
            remedy="Name another folder, or replace this one with --overwrite.",
        )
    ours = (*_PARTS, STAGING, manifests.FILE)
    if strangers := [name for name in there if storage.published_name(name) not in ours]:
        raise DatasetError(
            "The folder holds something that is not a dataset.",
            where=url,
            got=", ".join(strangers[:5]),
            remedy="Name another folder, or empty this one.",
        )
    return None


@contextmanager
def output_folder(url: str) -> Iterator[str]:
    """Gives the URL to write a dataset to, cleared of what a killed preparation left.

    Where a dataset is already, that is a folder of its own, which takes the old one's place when the block ends well.
    """
    there = storage.list_folder(url)
    replaces = manifests.FILE in there
    for name in there:
        unfinished = name != storage.published_name(name) and storage.published_name(name) in (*_PARTS, manifests.FILE)
        if unfinished or name == STAGING or (name in _PARTS and not replaces):
            storage.remove(storage.join(url, name))
    if not replaces:
        yield url
        return
    new = storage.join(url, STAGING, "new")
    try:
        yield new
        # Without a manifest there is no dataset: readers never see files of both.
        storage.remove(storage.join(url, manifests.FILE))
        for name in _PARTS:
            storage.remove(storage.join(url, name))
            storage.move(storage.join(new, name), storage.join(url, name))
        storage.move(storage.join(new, manifests.FILE), storage.join(url, manifests.FILE))
    finally:
        storage.remove(storage.join(url, STAGING))


def _first_difference(before: dict[str, Any], now: dict[str, Any]) -> str | None:
    old, new = _settings(before), _settings(now)
    for name in new:
        if old.get(name) != new[name]:
            return f"prepare.{name}: {old.get(name)!r} there, {new[name]!r} wanted"
    held, hold = before.get("files", {}), now["files"]
    differing = sorted(role for role in held | hold if held.get(role) != hold.get(role))
    return f"other source files ({', '.join(differing)})" if differing else None


def _settings(origin: dict[str, Any]) -> dict[str, Any]:
    """The settings that decide what a dataset holds; those that its release did not know have their defaults."""
    config = origin.get("config") or {}
    try:
        return PrepareConfig.model_validate(config).model_dump(mode="json", exclude=_LOCATIONS)
    except ValidationError:
        return config
