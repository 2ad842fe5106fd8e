"""What a comparison compares: a leaderboard file's entries, or recipes and run folders named one by one.

A leaderboard file is YAML::

    name: movielens-100k                # of the report; default: the file's name
    base: ../movielens-100k.yaml        # a path beside the file: the recipe that entries change
    seeds: [0, 1, 2]                    # every entry is trained with each; default: 0
    minutes: 60                         # of the whole command; default: as long as it takes
    evaluate: {draws: 5}                # changes of the base's protocol, the same for all
    entries:
      maml: {}                          # the base as it is
      ridge: {meta: {algorithm: ridge}} # as a recipe that extends the base would say it
      own: my-recipe.yaml               # another recipe, beside the file

All entries share a dataset and a protocol: those of the base, or of the first entry where there is no base. An entry
that says otherwise is refused, and so is one whose configuration cannot be used; both are listed in the report, and
the others go on.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field, ValidationError

from metatrain import storage
from metatrain.checkpoint import best_step, read_marker
from metatrain.config import (
    Config,
    EvaluateConfig,
    NotNegativeFloat,
    Section,
    beside,
    load_config,
    read_yaml,
    validated,
)
from metatrain.errors import ConfigError, MetatrainError
from metatrain.evaluate.baselines import Popularity
from metatrain.evaluate.report import ADAPTED, UNADAPTED

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
#: Names of rows that are no entry's.
_TAKEN = (ADAPTED, UNADAPTED, Popularity.name)


class LeaderboardFile(Section):
    """A leaderboard file."""

    name: str = ""
    """Of the report. Default: the file's name."""
    base: str | None = None
    """The recipe that entries change: a path beside the file."""
    seeds: tuple[int, ...] = Field(default=(0,), min_length=1)
    """Every entry is trained with each."""
    minutes: NotNegativeFloat = 0.0
    """Wall clock of the whole command. 0: as long as it takes."""
    evaluate: dict[str, Any] = Field(default={})
    """Changes of the base's protocol."""
    entries: dict[str, str | dict[str, Any]] = Field(min_length=1)
    """Name → changes of the base, or the path of a recipe beside the file."""


@dataclass(frozen=True)
class Entry:
    """One method. Of `config`, `run` and `error` at least one is there."""

    name: str
    configuration: Mapping[str, Any]  # what it is, as the file says it
    config: Config | None = None
    run: str | None = None  # folder of a run that was trained elsewhere
    error: MetatrainError | None = None


@dataclass(frozen=True)
class Comparison:
    """Entries, and what they share."""

    name: str
    entries: tuple[Entry, ...]
    shared: Config  # its `prepare`, `data.dataset` and `evaluate` hold for all
    seeds: tuple[int, ...] = (0,)
    minutes: float = 0.0

    @property
    def dataset(self) -> str:
        """URL of the task dataset."""
        return storage.absolute(self.shared.data.dataset)

    @property
    def evaluate(self) -> EvaluateConfig:
        """The protocol."""
        return self.shared.evaluate


def read_comparison(subjects: Sequence[str]) -> Comparison:
    """The comparison of a leaderboard file, or of recipes and run folders.

    Raises:
        ConfigError: Nothing is named, a name twice, a file that cannot be read, or a mixture of both kinds.
    """
    if not subjects:
        raise ConfigError("There is nothing to compare.", remedy="Name a leaderboard file, recipes or run folders.")
    boards = [s for s in subjects if s.endswith((".yaml", ".yml")) and "entries" in read_yaml(s)]
    if boards and len(subjects) > 1:
        raise ConfigError(
            "A leaderboard file is compared alone.",
            got=", ".join(subjects),
            remedy="Add the others to its `entries`, or leave it out.",
        )
    return _of_file(boards[0]) if boards else _of_subjects(subjects)


def _of_file(path: str) -> Comparison:
    raw = read_yaml(path)
    try:
        board = LeaderboardFile.model_validate(raw)
    except ValidationError as error:
        raise _explained(error, path) from error
    for name in board.entries:
        _check_name(name, f"{path}: entries")
    name = board.name or path.rpartition("/")[2].rpartition(".")[0]
    _check_name(name, f"{path}: name")
    protocol = {"evaluate": board.evaluate} if board.evaluate else {}
    if board.base:
        shared = load_config(beside(path, board.base), protocol, f"{path}: evaluate")
    else:
        first = next(iter(board.entries.values()))
        if not isinstance(first, str):
            raise ConfigError(
                "Without a base, entries are recipes.", where=f"{path}: entries", got=first, remedy="Name a `base`."
            )
        shared = load_config(beside(path, first), protocol, f"{path}: evaluate")
    entries = [_entry(name, given, path, board, shared) for name, given in board.entries.items()]
    return Comparison(name, tuple(entries), shared, board.seeds, board.minutes)


#: What is everyone's, so that no entry's changes may name it.
_SHARED = (("run",), ("prepare",), ("evaluate",), ("data", "dataset"), ("train", "seed"))


def _entry(name: str, given: str | dict[str, Any], path: str, board: LeaderboardFile, shared: Config) -> Entry:
    where = f"{path}: entries.{name}"
    configuration: dict[str, Any] = {"recipe": given} if isinstance(given, str) else given
    try:
        if isinstance(given, str):
            config = load_config(beside(path, given))
            # The file's protocol, where it has one, is everyone's.
            config = _with_protocol(config, shared) if board.evaluate else config
        elif board.base is None:
            raise ConfigError("Without a base, entries are recipes.", where=where, got=given, remedy="Name a `base`.")
        else:
            for keys in _SHARED:
                _refuse(given, keys, where)
            config = _with_protocol(load_config(beside(path, board.base), given, where), shared)
        return Entry(name, configuration, _fitting(config, shared, where))
    except MetatrainError as error:
        return Entry(name, configuration, error=error)


def _refuse(given: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    found: Any = given
    for key in keys:
        if not isinstance(found, Mapping) or key not in found:
            return
        found = found[key]
    raise ConfigError(
        "An entry changes what all entries share.",
        where=f"{where}.{'.'.join(keys)}",
        got=found,
        remedy="Change it in the base, or at the top of the leaderboard file (evaluate, seeds).",
    )


def _with_protocol(config: Config, shared: Config) -> Config:
    return config.model_copy(update={"evaluate": shared.evaluate})


def _of_subjects(subjects: Sequence[str]) -> Comparison:
    entries: list[Entry] = []
    for subject in subjects:
        if subject.endswith((".yaml", ".yml")):
            config, run = load_config(subject), None
        else:
            run = storage.absolute(subject)
            config = validated(read_marker(run, best_step(run)).configuration, where=run)
        name = config.run.name
        _check_name(name, f"{subject}: run.name")
        entries.append(Entry(name, {"run" if run else "recipe": subject}, config, run))
    names = [entry.name for entry in entries]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(
            "Two of them have one name.",
            where="run.name",
            got=", ".join(twice),
            remedy="Give each recipe a `run.name` of its own, or write a leaderboard file, whose entries have names.",
        )
    # A recipe says what is compared now, a run what was meant when it was trained.
    shared = next((entry.config for entry in entries if entry.run is None), entries[0].config)
    assert shared is not None, "all were read"
    checked = [entry if entry.run else _checked(entry, shared) for entry in entries]
    return Comparison("comparison", tuple(checked), shared)


def _checked(entry: Entry, shared: Config) -> Entry:
    assert entry.config is not None, "it was read"
    try:
        return Entry(
            entry.name, entry.configuration, _fitting(entry.config, shared, str(entry.configuration["recipe"]))
        )
    except MetatrainError as error:
        return Entry(entry.name, entry.configuration, error=error)


def _fitting(config: Config, shared: Config, where: str) -> Config:
    """The configuration, if it is of the comparison's dataset and protocol.

    Raises:
        ConfigError: It is of another.
    """

    def same(name: str, own: Any, common: Any) -> None:
        if own != common:
            raise ConfigError(
                f"This entry has another `{name}` than the comparison: its figures could not be compared.",
                where=where,
                got=f"{own!r}, the comparison's is {common!r}",
                remedy=f"Leave `{name}` to the base, or compare them apart.",
            )

    same("data.dataset", storage.absolute(config.data.dataset), storage.absolute(shared.data.dataset))
    # How many are scored at a time changes no figure.
    batch = {"tasks_per_batch": shared.evaluate.tasks_per_batch}
    own, common = config.evaluate.model_copy(update=batch).model_dump(), shared.evaluate.model_dump()
    for field, value in own.items():
        same(f"evaluate.{field}", value, common[field])
    return config


def _check_name(name: str, where: str) -> None:
    if not _NAME.fullmatch(name) or name in _TAKEN:
        raise ConfigError(
            "A name is letters, digits and any of . _ + -, and none of the report's own.",
            where=where,
            got=name,
            remedy=f"Choose another; taken are {', '.join(_TAKEN)}.",
        )


def _explained(error: ValidationError, path: str) -> ConfigError:
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "extra_forbidden":
        known = list(LeaderboardFile.model_fields)
        near = difflib.get_close_matches(place, known, n=1)
        remedy = f"Did you mean `{near[0]}`?" if near else f"Known: {', '.join(known)}."
        return ConfigError("Unknown key of a leaderboard file.", where=f"{path}: {place}", got=place, remedy=remedy)
    return ConfigError(f"{problem['msg']}.", where=f"{path}: {place}", remedy="See docs/comparing.md.")
