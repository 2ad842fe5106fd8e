"""The command line. Commands import their rooms when called, so that `--help` is quick."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Literal, TypeVar

import tyro
from pydantic import ValidationError

from metatrain import __version__, collector, storage
from metatrain.config import Config, EvaluateConfig, PrepareConfig, explained, load_config, to_yaml, validated
from metatrain.errors import CheckpointError, ConfigError, MetatrainError

USAGE = f"""metatrain {__version__}: meta-train recommenders that adapt to a new user from a handful of events

  metatrain prepare SOURCE --out URL          a raw log becomes a task dataset
  metatrain prepare RECIPE.yaml               the same, as the recipe says
  metatrain verify DATASET                    whether a dataset is whole: every file, every row
  metatrain train RECIPE.yaml [--a.b value]   meta-train on Ray; the same command again goes on
  metatrain evaluate RUN                      quality on users and items never seen, beside baselines
  metatrain compare BOARD.yaml --out FOLDER   train and judge several methods alike: a leaderboard
  metatrain replay RUN                        where the step that a run ended on stops being finite
  metatrain recommend RUN --events FILE       adapt to events, rank the catalogue
  metatrain board RUN…                        TensorBoard: curves, settings, items, of one run or several
  metatrain status RUN [--watch]              a run's progress, rate, last checkpoint and faults
  metatrain checkpoints RUN                   what a run has saved: list, verify, compare, prune, remove
  metatrain submit RECIPE.yaml --address URL  train it on a Ray cluster, as a job; the same again goes on
  metatrain job list|status|logs|stop [ID]    the jobs of a cluster
  metatrain config RECIPE.yaml [--a.b value]  print the resolved configuration
  metatrain doctor                            what this machine has, and what is wrong with it

`metatrain COMMAND --help` describes every option. RUN is a run's folder, or the recipe that trained it.
DATASET is a dataset's folder or URL, or a recipe that names it. BOARD.yaml is a leaderboard file
(configs/leaderboards/); recipes and run folders do in its place.
SOURCE is movielens-100k, movielens-1m, movielens, netflix, events or synthetic. Recipes are in configs/."""

Options = TypeVar("Options")
# Options of a nested section appear without the section's prefix.
Flat = tyro.conf.arg(name="")


@dataclass(frozen=True)
class PrepareArguments:
    """Makes a task dataset from a raw log: reads, splits users and items, encodes, writes Parquet shards."""

    out: str
    """URL of the task dataset to make."""
    prepare: Annotated[PrepareConfig, Flat]
    overwrite: bool = False
    """Replace a dataset that is there already, prepared in another way."""
    address: str | None = None
    """A Ray cluster: `auto`, `host:port` or `ray://host:port`. Default: a local Ray, for this command alone."""


@dataclass(frozen=True)
class TrainArguments:
    """Meta-trains a recipe on Ray. The same command again goes on from the last checkpoint."""

    recipe: Annotated[Config, Flat]
    address: str | None = None
    """A Ray cluster: `auto`, `host:port` or `ray://host:port`. Default: a local Ray, for this run alone."""
    profile: str | None = None
    """Steps to profile, `FIRST:END`: `10:15` is five steps. The same as `--train.profile`; see docs/watching.md."""


@dataclass(frozen=True)
class SubmitArguments:
    """Trains a recipe on a Ray cluster, as a job: checks it here, shows what it will take, submits, follows the log and
    exits with the job's code. Interrupted, the job goes on. The same command again goes on from the last checkpoint.
    Paths must mean the same on every node: name datasets and `run.storage` by URLs (s3://…), or on a shared disk."""

    recipe: Annotated[Config, Flat]
    address: str | None = None
    """The cluster's job server, `http://HEAD:8265`. Default: the variable RAY_API_SERVER_ADDRESS."""
    wait: bool = True
    """Follow the job's log to its end; `--no-wait` returns once it is submitted."""
    submission_id: str | None = None
    """Of the job. Default: the run's name with a number."""
    metadata: tuple[str, ...] = ()
    """NAME=VALUE pairs to show beside the job."""
    env: tuple[str, ...] = ()
    """NAME=VALUE pairs: variables of the job's processes on every node. The dashboard shows them: no secrets here."""
    code: Literal["upload", "installed"] = "upload"
    """upload: this package's code, and learners of your own, are sent to the nodes; installed: what their image has
    runs."""
    dry_run: bool = False
    """Check and show, and submit nothing."""
    render: Literal["rayjob"] | None = None
    """Print a manifest in place of submitting: `kubectl apply -f` makes the cluster and trains. See docs/cluster.md."""
    image: str = "metatrain:latest"
    """Of the manifest's containers (see cluster/)."""


@dataclass(frozen=True)
class JobArguments:
    """Looks at a cluster's jobs: `metatrain job list`, or `status`, `logs` or `stop` with a job's submission ID, or a
    recipe or a run's folder, whose newest job is meant. `logs` follows to the job's end and exits with its code."""

    address: str | None = None
    """The cluster's job server, `http://HEAD:8265`. Default: the variable RAY_API_SERVER_ADDRESS."""
    wait: bool = True
    """logs: follow to the job's end; `--no-wait` prints what is there."""


@dataclass(frozen=True)
class EvaluateArguments:
    """Judges a run on new users, new items and both, beside baselines. Writes evaluation.json and evaluation.png
    into the run's folder. Defaults are the recipe's where a recipe is given, else those the run was trained with."""

    evaluate: Annotated[EvaluateConfig, Flat]
    checkpoint: int | None = None
    """Step of the checkpoint. Default: the best by validation loss."""
    dataset: str | None = None
    """Where the run's task dataset now lies. Default: where it was trained."""


@dataclass(frozen=True)
class CompareArguments:
    """Trains each entry of a leaderboard file with each seed, judges all alike, and writes leaderboard.md, .png, .json
    and .txt. What is trained or judged already is not done again. Exits with 1 where an entry failed."""

    out: str
    """Folder of the runs and of the leaderboard."""
    seeds: tuple[int, ...] = ()
    """Every entry is trained with each. Default: the file's, or 0."""
    minutes: float | None = None
    """Wall clock of the whole command; what does not fit is listed. 0: as long as it takes. Default: the file's."""
    report: bool = False
    """Make the leaderboard again of what is trained, and train nothing."""
    address: str | None = None
    """A Ray cluster: `auto`, `host:port` or `ray://host:port`. Default: a local Ray, shared by all trainings."""


@dataclass(frozen=True)
class ReplayArguments:
    """Trains again, in one process, from the checkpoint before the step that a run ended on, because a loss or gradient
    was not finite or exploded; then shows all that this step read and made, and what was first not finite."""

    format: Literal["table", "json"] = "table"
    """A table for people, or JSON."""


@dataclass(frozen=True)
class RecommendArguments:
    """Adapts a run's model to users' events, and ranks the catalogue for each."""

    events: str | None = None
    """CSV, JSON lines or Parquet with the columns `item` and `label`, and `user`, `timestamp` and the user's features
    where there are any. Where the run's tasks are items: `user` and `label`, and `item`, `title`, `timestamp` and the
    item's features."""
    user: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    """Users of the dataset, by key, in place of a file: their own events are the support. `--user 5 7`, or
    `--user 5 --user 7`."""
    item: Annotated[tuple[tuple[str, ...], ...], tyro.conf.UseAppendAction] = ()
    """Items of the dataset, by key, where its tasks are items: `--item 50 172`. Users of the catalogue are ranked."""
    top: int = 10
    """Length of each list."""
    checkpoint: int | None = None
    """Step of the checkpoint. Default: the best by validation loss."""
    dataset: str | None = None
    """Where the run's task dataset now lies. Default: where it was trained."""
    format: Literal["table", "json"] = "table"
    """A table for people, or JSON lines."""
    keep_seen: bool = False
    """Also recommend what the user has events on."""
    min_events: int = 0
    """Leave out items with fewer events of training users: what two people loved may rank high."""


@dataclass(frozen=True)
class CheckpointsArguments:
    """Lists a run's checkpoints: step, epoch, full or differential (over which full one), size, age, validation loss,
    and whether it is whole. At most one option; without one, files are looked at but not read."""

    verify: bool = False
    """Read every byte, and compare it with its checksum. Exits with 2 where a checkpoint is broken."""
    prune: int | None = None
    """Remove all but the newest so many, the best, and what these build on. Not while the run trains."""
    remove: tuple[int, ...] = ()
    """Remove the checkpoints of these steps, whole or broken. Not while the run trains."""
    diff: tuple[int, int] | None = None
    """Steps of two checkpoints: which fields of the configuration differ, and how much each tensor does."""


@dataclass(frozen=True)
class BoardArguments:
    """Opens TensorBoard on runs: their folders, recipes or URLs. What lies on an object store is copied to this
    machine, and kept up to date."""

    host: str = "127.0.0.1"
    """The address to listen at. TensorBoard asks for no password: by default only this machine reaches it."""
    port: int | None = None
    """The port; 0 for any that is free. Default: 6006, or the first free one above."""


@dataclass(frozen=True)
class StatusArguments:
    """Shows what a run is doing: progress, rate, time left, the last checkpoint, faults, and whether it is alive."""

    watch: bool = False
    """Show it again and again, until the run is over."""
    seconds: float = 5.0
    """Between two looks, with `--watch`."""
    format: Literal["text", "json"] = "text"
    """Lines for people, or the JSON that the run publishes."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The `metatrain` command; exits with 2 after an error that the user can mend."""
    given = list(sys.argv[1:] if arguments is None else arguments)
    collector.relax()
    logging.basicConfig(format="%(asctime)s %(message)s", datefmt="%H:%M:%S", stream=sys.stderr, level=logging.WARNING)
    logging.getLogger("metatrain").setLevel(logging.INFO)
    commands = {
        "prepare": _prepare,
        "verify": _verify,
        "train": _train,
        "evaluate": _evaluate,
        "compare": _compare,
        "replay": _replay,
        "recommend": _recommend,
        "board": _board,
        "status": _status,
        "checkpoints": _checkpoints,
        "submit": _submit,
        "job": _job,
        "config": _config,
        "doctor": _doctor,
    }
    if not given or given[0] in ("-h", "--help", "help"):
        print(USAGE)
        return
    if given[0] == "--version":
        print(__version__)
        return
    try:
        if given[0] not in commands:
            raise ConfigError("There is no such command.", got=given[0], remedy=f"One of: {', '.join(commands)}.")
        commands[given[0]](given[1:])
    except MetatrainError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): no error, and nothing more to print.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


def _subject(given: list[str], command: str, what: str) -> tuple[str, list[str]]:
    """The command's first argument and the rest; without one, only `--help` makes sense."""
    if given and not given[0].startswith("-"):
        return given[0], given[1:]
    if given and given[0] in ("-h", "--help"):
        return "", given
    raise ConfigError(f"`metatrain {command}` needs {what} first.", remedy=f"See `metatrain {command} --help`.")


def _is_recipe(text: str) -> bool:
    return text.endswith((".yaml", ".yml"))


def _recipe(subject: str, given: Sequence[str]) -> Config:
    """The recipe of a command; all defaults where none is named.

    Help on a recipe's fields is given whatever the file holds: it is what a broken one is mended by.
    """
    if not subject:
        return Config()
    try:
        return load_config(subject)
    except MetatrainError as error:
        if not {"-h", "--help"} & set(given):
            raise
        print(f"note: {subject} cannot be read ({error.what.rstrip('.')}): defaults are shown", file=sys.stderr)
        return Config()


def _parse(kind: type[Options], default: Options, given: list[str], command: str) -> Options:
    try:
        return tyro.cli(kind, default=default, args=given, prog=f"metatrain {command}", use_underscores=True)
    except ValidationError as error:  # of a section whose values do not fit one another
        raise explained(error, "the command line") from error


def _prepare(given: list[str]) -> None:
    subject, rest = _subject(given, "prepare", "a SOURCE or a recipe")
    if _is_recipe(subject):
        recipe = _recipe(subject, rest)
        default = PrepareArguments(recipe.data.dataset, recipe.prepare)
    else:
        out = tyro.MISSING_NONPROP
        default = PrepareArguments(out, PrepareConfig(source=subject or None))
    options = _parse(PrepareArguments, default, rest, "prepare SOURCE|RECIPE.yaml")
    from metatrain.data.prepare import prepare, summary

    print(summary(prepare(options.prepare, options.out, overwrite=options.overwrite, address=options.address)))
    print(f"prepared: {options.out}")
    if _is_recipe(subject):
        print(f"  metatrain train {subject}")


def _verify(given: list[str]) -> None:
    subject, rest = _subject(given, "verify", "a DATASET (its folder or URL, or a recipe)")

    @dataclass(frozen=True)
    class VerifyArguments:
        """Checks a dataset wholly against its manifest: sizes, checksums, that every row decodes, ids, time order, the
        catalogue and the vocabularies, and that no key is there twice. Names every bad file. Exits with 2 where there
        is one."""

    _parse(VerifyArguments, VerifyArguments(), rest, "verify DATASET")
    from metatrain.data.verify import verify

    found = verify(load_config(subject).data.dataset if _is_recipe(subject) else subject)
    print(found.table())
    if not found.whole:
        sys.exit(2)


def _train(given: list[str]) -> None:
    subject, rest = _subject(given, "train", "a recipe (a YAML file)")
    recipe = _recipe(subject, rest)
    options = _parse(TrainArguments, TrainArguments(recipe), rest, "train RECIPE.yaml")
    recipe = options.recipe
    if options.profile is not None:
        asked = recipe.model_dump()
        asked["train"]["profile"] = options.profile
        recipe = validated(asked, where="--profile")
    from metatrain.train.launch import launch

    launch(recipe, options.address)
    print(f"trained: {recipe.run_url}")
    if storage.exists(storage.join(recipe.run_url, "quarantine.json")):
        from metatrain.data.dataset import TaskDataset
        from metatrain.data.quarantine import read_quarantine

        lost = read_quarantine(recipe.run_url, TaskDataset.open(recipe.data.dataset)).told()
        print(f"  {lost}")
    print(f"  metatrain evaluate {recipe.run_url}")
    print(f"  metatrain board {recipe.run_url}")


def _submit(given: list[str]) -> None:
    subject, rest = _subject(given, "submit", "a recipe (a YAML file)")
    recipe = _recipe(subject, rest)
    options = _parse(SubmitArguments, SubmitArguments(recipe), rest, "submit RECIPE.yaml")
    metadata, environment = _pairs(options.metadata, "--metadata"), _pairs(options.env, "--env")
    from metatrain.data.dataset import TaskDataset

    # The commonest mistake is told in a second, before torch and Ray are imported.
    TaskDataset.open(options.recipe.data.dataset)
    from metatrain.submit.commands import render, submit

    if options.render:
        print(render(options.recipe, options.image, environment), end="")
        return
    sys.exit(
        submit(
            options.recipe,
            options.address,
            submission_id=options.submission_id,
            metadata=metadata,
            environment=environment,
            upload=options.code == "upload",
            wait=options.wait,
            dry_run=options.dry_run,
        )
    )


def _job(given: list[str]) -> None:
    actions = ("list", "status", "logs", "stop")
    action, rest = _subject(given, "job", f"one of {', '.join(actions)}")
    if action and action not in actions:
        raise ConfigError("There is no such action.", got=action, remedy=f"One of: {', '.join(actions)}.")
    subject, rest = (rest[0], rest[1:]) if rest and not rest[0].startswith("-") else ("", rest)
    options = _parse(JobArguments, JobArguments(), rest, f"job {action or '|'.join(actions)}")
    if action != "list" and not subject:
        raise ConfigError(f"`metatrain job {action}` needs a job's ID, a recipe or a run.", remedy="Name it.")
    from metatrain.submit.commands import job

    sys.exit(job(action, _run_url(subject) if _is_run(subject) else subject, options.address, wait=options.wait))


def _pairs(texts: Sequence[str], where: str) -> dict[str, str]:
    """NAME=VALUE texts as a mapping."""
    for text in texts:
        if not text.partition("=")[0].strip() or "=" not in text:
            raise ConfigError("Not a NAME=VALUE pair.", where=where, got=text, remedy="Write NAME=VALUE.")
    return {name: value for name, _, value in (text.partition("=") for text in texts)}


def _is_run(subject: str) -> bool:
    """Whether a recipe or a run's folder is named, rather than a job."""
    return _is_recipe(subject) or "/" in subject


def _run_url(subject: str) -> str:
    return load_config(subject).run_url if _is_recipe(subject) else storage.absolute(subject)


def _evaluate(given: list[str]) -> None:
    subject, rest = _subject(given, "evaluate", "a RUN (its folder, or its recipe)")
    run = _run_url(subject) if subject else ""
    # A recipe's own protocol, which may have changed since: it is the recipe that the user names.
    asked = subject if _is_recipe(subject) else storage.join(run, "config.yaml")
    default = load_config(asked).evaluate if run and storage.exists(asked) else EvaluateConfig()
    options = _parse(EvaluateArguments, EvaluateArguments(default), rest, "evaluate RUN")
    from metatrain.evaluate.evaluation import evaluate_run

    report = evaluate_run(run, evaluate=options.evaluate, checkpoint=options.checkpoint, dataset=options.dataset)
    print(report.table())


def _compare(given: list[str]) -> None:
    _subject(given, "compare", "a leaderboard file, recipes or run folders")
    first = next((n for n, text in enumerate(given) if text.startswith("-")), len(given))
    subjects, rest = given[:first], given[first:]
    default = CompareArguments(tyro.MISSING_NONPROP)
    options = _parse(CompareArguments, default, rest, "compare BOARD.yaml|RECIPE.yaml…|RUN…")
    if options.minutes is not None and not options.minutes >= 0:
        raise ConfigError("A budget is not negative.", where="--minutes", got=options.minutes, remedy="0: no budget.")
    from metatrain.compare.comparison import compare
    from metatrain.compare.entries import read_comparison
    from metatrain.compare.tables import text

    asked = read_comparison(subjects)
    asked = replace(
        asked,
        seeds=options.seeds or asked.seeds,
        minutes=asked.minutes if options.minutes is None else options.minutes,
    )
    board = compare(asked, options.out, address=options.address, report=options.report)
    print(text(board), end="")
    if board.failed:
        sys.exit(1)


def _replay(given: list[str]) -> None:
    subject, rest = _subject(given, "replay", "a RUN (its folder, or its recipe)")
    options = _parse(ReplayArguments, ReplayArguments(), rest, "replay RUN")
    from metatrain.train.replay import replay

    seen = replay(_run_url(subject))
    print(seen.model_dump_json(indent=1) if options.format == "json" else seen.text())


def _recommend(given: list[str]) -> None:
    subject, rest = _subject(given, "recommend", "a RUN (its folder, or its recipe)")
    options = _parse(RecommendArguments, RecommendArguments(), rest, "recommend RUN")
    named = {"user": options.user, "item": options.item}
    if sum([options.events is not None, bool(options.user), bool(options.item)]) != 1:
        raise ConfigError(
            "`metatrain recommend` needs `--events FILE`, `--user KEY` or `--item KEY`.", remedy="Give one of them."
        )
    run = _run_url(subject)
    if options.events is not None:
        _check_events(options.events, run, options.dataset)
    from metatrain.recommend.recommender import Recommender

    recommender = Recommender.load(run, checkpoint=options.checkpoint, dataset=options.dataset)
    task = recommender.dataset.manifest.task
    if options.events is None and not named[task]:
        raise ConfigError(f"The run's tasks are {task}s.", where=recommender.dataset.url, remedy=f"Give --{task} KEY.")
    tasks = [key for keys in named[task] for key in keys]
    adapted = recommender.adapt(options.events) if options.events is not None else recommender.adapt_users(tasks)
    render = adapted.json_lines if options.format == "json" else adapted.table
    print(render(options.top, exclude_seen=not options.keep_seen, min_events=options.min_events))


def _check_events(events: str, run: str, dataset: str | None) -> None:
    """Refuses a file of events that cannot be used, before torch is imported and a model is loaded for it."""
    from metatrain.data.dataset import TaskDataset
    from metatrain.recommend.event_tables import read_table
    from metatrain.recommend.events import check_columns

    recorded = storage.join(run, "config.yaml")
    if dataset is None and storage.exists(recorded):
        dataset = load_config(recorded).data.dataset
    if dataset is None or not storage.exists(dataset):
        read_table(events)  # what lacks besides, loading tells
        return
    check_columns(events, TaskDataset.open(dataset))


def _checkpoints(given: list[str]) -> None:
    subject, rest = _subject(given, "checkpoints", "a RUN (its folder, or its recipe)")
    options = _parse(CheckpointsArguments, CheckpointsArguments(), rest, "checkpoints RUN")
    if sum([options.verify, options.prune is not None, bool(options.remove), options.diff is not None]) > 1:
        raise ConfigError(
            "`metatrain checkpoints` does one thing at a time.",
            remedy="Give one of --verify, --prune, --remove and --diff.",
        )
    if options.prune is not None and options.prune < 1:
        raise ConfigError("At least one checkpoint is kept.", where="--prune", got=options.prune, remedy="1 or more.")
    from metatrain.checkpoint import listing, retention
    from metatrain.checkpoint.differences import differences

    run = _run_url(subject)
    if subject and not storage.exists(run):
        raise CheckpointError("There is no such run.", where=run, remedy="Check its name and storage.")
    if options.diff is not None:
        print(differences(run, *options.diff).text())
        return
    if options.prune is not None or options.remove:
        gone = retention.remove(run, options.remove) if options.remove else retention.prune(run, options.prune or 1)
        print(f"removed: {', '.join(map(str, gone)) or 'nothing'}", file=sys.stderr)
    if options.verify:
        from tqdm import tqdm

        total = sum(line.bytes or 0 for line in listing.listed(run))
        with tqdm(total=total, unit="B", unit_scale=True, disable=not sys.stderr.isatty(), desc="verifying") as bar:
            lines = listing.listed(run, verify=True, progress=bar.update)
    else:
        lines = listing.listed(run)
    print(listing.table(lines))
    if options.verify and any(line.broken for line in lines):
        sys.exit(2)


def _board(given: list[str]) -> None:
    _subject(given, "board", "RUNs (their folders, or their recipes)")
    first = next((n for n, text in enumerate(given) if text.startswith("-")), len(given))
    options = _parse(BoardArguments, BoardArguments(), given[first:], "board RUN…")
    from metatrain.observe.board import Boards

    with contextlib.closing(Boards([_run_url(run) for run in given[:first]], options.host, options.port)) as boards:
        print(f"TensorBoard: {boards.url}  (ends with Ctrl-C)", flush=True)
        threading.Event().wait()


def _status(given: list[str]) -> None:
    subject, rest = _subject(given, "status", "a RUN (its folder, or its recipe)")
    options = _parse(StatusArguments, StatusArguments(), rest, "status RUN")
    from metatrain.observe.status import read_status
    from metatrain.observe.status_text import alive, rendered

    run = _run_url(subject)
    while True:
        status = read_status(run)
        text = status.model_dump_json() if options.format == "json" else rendered(status)
        # On a terminal in place; elsewhere one after the other.
        print(f"\033[2J\033[H{text}" if options.watch and sys.stdout.isatty() else text, flush=True)
        if not options.watch or not alive(status, time.time()):
            return
        time.sleep(options.seconds)


def _config(given: list[str]) -> None:
    subject, rest = _subject(given, "config", "a recipe (a YAML file)")
    recipe = _recipe(subject, rest)

    @dataclass(frozen=True)
    class ConfigArguments:
        """Prints a recipe with everything resolved: `extends`, defaults, options."""

        recipe: Annotated[Config, Flat]

    print(to_yaml(_parse(ConfigArguments, ConfigArguments(recipe), rest, "config RECIPE.yaml").recipe), end="")


def _doctor(given: list[str]) -> None:
    from metatrain.observe.doctor import examine

    @dataclass(frozen=True)
    class DoctorArguments:
        """Reports versions, devices, Ray, disk and shared memory, and what is wrong, with a remedy."""

    _parse(DoctorArguments, DoctorArguments(), given, "doctor")
    report = examine()
    print(report.render())
    if not report.healthy:
        sys.exit(1)
