"""One family of errors. Each says what happened, where, the value got, and what to do next.

The command line prints them without a traceback and exits with status 2. They cross process
borders (Ray pickles them), so every field survives pickling.
"""

from __future__ import annotations


class MetatrainError(Exception):
    """Base of every error that a user can mend.

    Args:
        what: What happened, one sentence without the place.
        where: File and place in it (a line, a column, a row group), or the configuration's field.
        got: The offending value, shown by `repr`.
        remedy: What to do next, an imperative sentence.
    """

    def __init__(
        self,
        what: str,
        *,
        where: str | None = None,
        got: object = None,
        remedy: str | None = None,
    ) -> None:
        # `got` is kept as text: an arbitrary value might not pickle.
        self.what, self.where, self.remedy = what, where, remedy
        self.got = None if got is None else got if isinstance(got, str) else repr(got)
        super().__init__(what)

    def __str__(self) -> str:
        lines = [self.what]
        lines += [f"  {name}: {text}" for name in ("where", "got", "remedy") if (text := getattr(self, name))]
        return "\n".join(lines)

    def __reduce__(self):
        return _rebuild, (type(self), self.what, self.where, self.got, self.remedy)


def _rebuild(kind: type[MetatrainError], what: str, where: str | None, got: str | None, remedy: str | None):
    return kind(what, where=where, got=got, remedy=remedy)


class ConfigError(MetatrainError):
    """A configuration (file or flag) that cannot be used."""


class SourceError(MetatrainError):
    """A raw log that cannot be read: a missing file or column, a bad line, an impossible value."""


class DatasetError(MetatrainError):
    """A task dataset that is missing, broken, or of another version."""


class ShardError(DatasetError):
    """A shard that is missing, of another size or content than the manifest says, or that cannot be decoded.

    Args:
        what: As of every error.
        path: The shard's path inside the dataset, as the manifest has it.
        where: Its URL, with the place in it.
        got: As of every error.
        remedy: As of every error.
    """

    def __init__(
        self,
        what: str,
        *,
        path: str,
        where: str | None = None,
        got: object = None,
        remedy: str | None = None,
    ) -> None:
        super().__init__(what, where=where, got=got, remedy=remedy)
        self.path = path

    def __reduce__(self):
        return _rebuild_shard_error, (self.path, self.what, self.where, self.got, self.remedy)


def _rebuild_shard_error(path: str, what: str, where: str | None, got: str | None, remedy: str | None) -> ShardError:
    return ShardError(what, path=path, where=where, got=got, remedy=remedy)


class CheckpointError(MetatrainError):
    """A checkpoint that is missing, broken, or of another model."""


class StorageError(MetatrainError):
    """A path that cannot be reached, read or written."""


class RequestError(MetatrainError):
    """A request for recommendations that cannot be served."""


class TrainingError(MetatrainError):
    """A run that cannot go on: no eligible task, a loss that is not finite."""


class ClusterError(MetatrainError):
    """A cluster that cannot be reached, or that refuses a job."""
