"""The configuration of a run: frozen classes, one docstring a field, checked when made.

A YAML file may begin with `extends: other.yaml` (a path beside it, or a list of them): mappings merge key by key,
anything else replaces. A file that names another meta-learner than the one it extends inherits of `meta` only what
every meta-learner has (`loss`, `huber_delta`, `memory`, `size_weight`), and of a base learner no `options`. The command
line overrides the file: `--train.epochs 3`.
"""

from __future__ import annotations

import difflib
import os
import types
import typing
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    model_validator,
)

from metatrain import storage
from metatrain.credentials import REMEDY, holds_credential
from metatrain.documents import YAML_CHARACTERS, parse_yaml
from metatrain.errors import ConfigError
from metatrain.learners import BASE_LEARNERS, META_LEARNERS, remedy_for

Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
# FBGEMM's kernels move rows four numbers at a time.
Width = Annotated[int, Field(gt=0, multiple_of=4)]
PositiveFloat = Annotated[float, Field(gt=0)]
NotNegativeFloat = Annotated[float, Field(ge=0)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _one_of(known: Mapping[str, str]) -> AfterValidator:
    def check(name: str) -> str:
        if remedy := remedy_for(name, known):
            raise ValueError(f"There is none of this name. {remedy}")
        return name

    return AfterValidator(check)


MetaLearnerName = Annotated[str, _one_of(META_LEARNERS)]
BaseLearnerName = Annotated[str, _one_of(BASE_LEARNERS)]
RankingMetric = Literal["AUC", "nDCG", "hit rate", "recall", "precision", "MAP"]


def _range(value: Any) -> Any:
    """`{min: 1, max: 8}` as `(1, 8)`; anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    if value.keys() != {"min", "max"}:
        raise ValueError(f"a range has the keys min and max, not {', '.join(map(str, value)) or 'none'}")
    return value["min"], value["max"]


#: A number, or the least and the greatest.
NumberOrRange = Annotated[
    Positive | tuple[Positive, Positive],
    BeforeValidator(_range),
    PlainSerializer(
        lambda v: dict(zip(("min", "max"), v, strict=True)) if isinstance(v, tuple) else v, when_used="json"
    ),
]
#: Of a learner's own; checked by the learner's constructor.
Option = bool | int | float | str | tuple[int, ...]


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, fields documented by the docstring under each."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        use_attribute_docstrings=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,  # which may hold what must not be shown
    )

    @model_validator(mode="after")
    def _without_credentials(self) -> Self:
        # A configuration is written into the run's folder, TensorBoard and the dataset's manifest.
        for name, value in self:
            texts = [value] if isinstance(value, str) else value.values() if isinstance(value, dict) else ()
            if any(isinstance(text, str) and holds_credential(text) for text in texts):
                raise ValueError(f"`{name}` is a URL with a credential in it. {REMEDY}")
        return self


# --- prepare -------------------------------------------------------------------------------------------------------


class UserSplit(Section):
    """How tasks (users; items, with `task: item`) go to training, validation and test."""

    by: Literal["hash", "time", "given"] = "hash"
    """hash: by a hash of the key and `salt`; time: users whose first event is latest are test, before them validation;
    given: as `column` of the user table (with `task: item` of the item table), or the two-column file `file`, says
    (train, validation or test)."""
    validation: Fraction = 0.1
    """Share of users for validation (hash and time)."""
    test: Fraction = 0.2
    """Share of users for test (hash and time)."""
    salt: str = "users"
    """Another salt is another draw of the hash split."""
    column: str | None = None
    """User column that names each key's split, for `given`."""
    file: str | None = None
    """CSV with the header `key,split`, for `given`."""


class ItemSplit(Section):
    """Which items (users, with `task: item`) are new: held out of training with all their events."""

    by: Literal["none", "hash", "time", "given"] = "none"
    """none: no item is new; hash: by a hash of the key; time: items whose first event is latest, or, with `column`,
    those whose value is above `after`; given: as `column` or `file` says (existing or new)."""
    new: Fraction = 0.2
    """Share of items that are new (hash and time without a column)."""
    salt: str = "items"
    """Another salt is another draw of the hash split."""
    column: str | None = None
    """Item column: compared with `after` (time), or naming the split (given)."""
    after: float | None = None
    """Items whose `column` is greater than this are new, for `time`."""
    file: str | None = None
    """CSV with the header `key,split`, for `given`."""


class Synthetic(Section):
    """The synthetic log: users with latent tastes over items with latent factors, and noise of known size."""

    users: Positive = 1000
    """Number of users."""
    items: Positive = 500
    """Number of items."""
    events_per_user: Positive = 30
    """Mean number of events a user (at least 5 each)."""
    rank: Positive = 4
    """Dimension of tastes and factors."""
    noise: NotNegativeFloat = 0.5
    """Standard deviation of a rating's noise: the Bayes-optimal error of a rating."""
    label: Literal["rating", "click"] = "rating"
    """Real-valued ratings, or clicks drawn with the logistic of the rating."""
    seed: int = 0
    """Seed of everything drawn."""
    users_per_shard: Positive = 10_000
    """Users made at a time."""


class Columns(Section):
    """Columns of a generic event log, and how its features are read. See docs/configuration.md for an example."""

    task: str = "user_id"
    """Column of the user's key (the task's, where tasks are users)."""
    item: str = "item_id"
    """Column of the item's key."""
    label: str | None = "label"
    """Column of the label; null: every event is a click of 1."""
    timestamp: str = "timestamp"
    """Column of the time: seconds, milliseconds, or an ISO 8601 text."""


class FeatureSource(Section):
    """A feature to read from a raw table."""

    name: str
    """Column in the raw table, and the feature's name."""
    level: Literal["task", "item", "event"]
    """The table that holds it: users (task), items, or events."""
    kind: Literal["categorical", "multi", "numeric", "vector"]
    """How it is stored and embedded."""
    width: Positive = 16
    """Embedding width, a multiple of 4 (categorical, multi), or the vector's length."""
    table: str | None = None
    """Embedding table; features naming the same one share it and its vocabulary. Default: the feature's name."""
    buckets: Annotated[int, Field(ge=2, lt=2**31)] | None = None
    """Hash ids into this many buckets, in place of a vocabulary: for ids without bound."""
    separator: str | None = "|"
    """Between the values of a multi-valued feature stored as text."""

    @model_validator(mode="after")
    def _embeddable(self) -> FeatureSource:
        if self.kind in ("categorical", "multi") and self.width % 4:
            raise ValueError(f"the embedding width of {self.name!r} ({self.width}) must be a multiple of 4")
        return self

    min_count: Positive = 1
    """Values seen fewer times than this by training users (items: by trained items) get the unknown id."""


class PrepareConfig(Section):
    """From a raw log to a task dataset."""

    source: str | None = None
    """movielens-100k, movielens-1m, movielens (any layout, with `path`), netflix, events, or synthetic."""
    task: Literal["user", "item"] = "user"
    """What a task is: all events of a user, or (item) all events of an item, for items that are new. With item the
    sides are exchanged: the catalogue holds the users, with their features at level item, and the items' features are
    at level task. `user_split` then splits the items into training, validation and test, `item_split` the users into
    existing and new, `min_events` and `max_events` are of an item, and `item_width` is that of a user's id. What
    describes the raw log (`users`, `items`, `columns`, the level of `features`) stays as the log has it."""
    path: str | None = None
    """Where the raw files are: a file, folder, zip, URL or pattern. Default: download, where the source can."""
    extras: str | None = None
    """MovieLens-1M: `movies_extrainfos.dat` or a zip of it: year, certificate, directors, actors."""
    users: str | None = None
    """events: the table of users (Parquet, CSV or JSON lines), with the task column as key."""
    items: str | None = None
    """events: the table of items, with the item column as key; its column `title`, where there is one, is shown."""
    columns: Columns = Columns()
    """events: which columns hold what."""
    features: tuple[FeatureSource, ...] = ()
    """events: features to read; for the other sources, empty means all that the source has."""
    label: Literal["rating", "click"] = "rating"
    """What labels are. For clicks of a rated source, see `click_threshold`."""
    click_threshold: float | None = None
    """With `label: click`: ratings of at least this become 1, others 0. Null: labels are 0 or 1 already."""
    item_width: Width = 32
    """Embedding width of the item's own id, a multiple of 4."""
    feature_width: Width = 16
    """Embedding width of the sources' own features (MovieLens, Netflix, synthetic), a multiple of 4."""
    min_events: Positive = 5
    """Users (items, with `task: item`) with fewer events are left out, and counted."""
    max_events: Positive = 10_000
    """Of a task's events beyond this many the oldest are left out, and counted."""
    row_group_tasks: Positive | None = None
    """Tasks in a row group, the unit of reading. Default: by the dataset's size, 16 to 512."""
    shards: Positive | None = None
    """Hash partitions, each a file a split. Default: by the number of events."""
    skip_bad_rows: bool = False
    """Count and skip rows that cannot be parsed, in place of an error."""
    user_split: UserSplit = UserSplit()
    """Users (items, with `task: item`): training, validation, test."""
    item_split: ItemSplit = ItemSplit()
    """Items (users, with `task: item`): existing, new."""
    synthetic: Synthetic = Synthetic()
    """Settings of the synthetic source."""

    @property
    def catalogued(self) -> str:
        """What a row of the catalogue is: "item", or "user" where items are the tasks."""
        return "item" if self.task == "user" else "user"


# --- data ----------------------------------------------------------------------------------------------------------


class EpisodeConfig(Section):
    """How a task's events become support and query. A task with fewer than `support_min` + `query_min` events is
    skipped, and counted."""

    by: Literal["time", "random"] = "time"
    """time: the query is later than the support; random: the query is drawn at random."""
    cut: Literal["last", "uniform"] = "last"
    """last: the query is as large as can be; uniform: how many events are support is drawn for each task and epoch, so
    that training sees supports of all sizes. By time, the query is the last events, or begins at a point drawn."""
    support_min: NotNegative = 1
    """Fewest support events."""
    support_max: Positive = 64
    """Most support events: by time, the latest before the query; at random, a draw."""
    query_min: Positive = 1
    """Fewest query events."""
    query_max: Positive = 10
    """Most query events."""
    events_min: Positive = 1
    """Fewest events a task may have (within the partition)."""
    events_max: Positive = 1_000_000_000
    """Most events a task may have (within the partition)."""


class DataConfig(Section):
    """The feed of training."""

    dataset: str = "data/dataset"
    """URL of the task dataset."""
    episode: EpisodeConfig = EpisodeConfig(cut="uniform")
    """Support and query in training."""
    tasks_per_step: Positive = 64
    """Tasks in the global batch of a step, a multiple of `lanes`."""
    lanes: Positive = 8
    """Logical streams that an epoch is dealt into: the most workers that can ever train the run."""
    shuffle_row_groups: Positive = 8
    """Row groups in a lane's shuffle window: memory against randomness."""
    readers_per_worker: Positive | Literal["auto"] = 1
    """TaskReader actors that feed a worker. auto: one at the start, then as many as keep up, by the measured rates of
    readers and worker, up to `most_readers_per_worker`. Batches don't depend on it."""
    most_readers_per_worker: Positive = 4
    """With `readers_per_worker: auto`: the most there may be. Those after the first take CPUs that are free: on the
    worker's node, else on nodes without GPUs, in the same zone where nodes are labelled with theirs."""
    prefetch: Positive | Literal["auto"] = "auto"
    """Steps that a reader works ahead. It makes up to half of them in one call, which small steps need to come fast.
    auto: as many as make two calls of 16 MiB for each of the worker's readers, and 16 at the least."""
    prefetch_memory: Positive = 512
    """MiB of batches that may wait for a worker in the object store: large steps are prefetched less far."""
    verify: Literal["sizes", "checksums"] = "sizes"
    """What is compared with the manifest before training starts. sizes: of every shard, by one listing a folder;
    checksums: every byte of the training and validation shards is read."""
    bad_shards: Literal["stop", "quarantine"] = "stop"
    """When a training shard is missing, changed, or cannot be decoded. stop: the run ends with its name. quarantine:
    it goes on without the shard's tasks, from the last checkpoint where there is one, and RUN/quarantine.json lists
    what is lost."""
    quarantine_share: Fraction = 0.1
    """Greatest share of the training tasks that may be quarantined; beyond it the run ends."""

    @property
    def first_readers(self) -> int:
        """Readers of a worker at the start."""
        return 1 if self.readers_per_worker == "auto" else self.readers_per_worker

    @property
    def most_readers(self) -> int:
        """Readers that a worker may come to have."""
        return self.most_readers_per_worker if self.readers_per_worker == "auto" else self.readers_per_worker

    @model_validator(mode="before")
    @classmethod
    def _cut_is_drawn(cls, given: Any) -> Any:
        # The default of training's episodes, where some of their fields are given and this one isn't.
        if isinstance(given, dict) and isinstance(given.get("episode"), dict):
            return {**given, "episode": {"cut": "uniform", **given["episode"]}}
        return given

    @model_validator(mode="after")
    def _divides(self) -> DataConfig:
        if self.tasks_per_step % self.lanes:
            raise ValueError(f"tasks_per_step ({self.tasks_per_step}) must be a multiple of lanes ({self.lanes})")
        return self


# --- model and meta ------------------------------------------------------------------------------------------------


class TableConfig(Section):
    """How an embedding table is spread over the workers. It may change when a run is resumed."""

    sharding: Literal["row_wise", "table_wise", "column_wise", "data_parallel", "auto"] = "row_wise"
    """row_wise: each worker holds a block of the rows; table_wise: one worker holds all of it; column_wise: workers
    hold columns (not with `rowwise_adagrad`, whose state is of whole rows); data_parallel: every worker holds all of
    it, and its whole gradient is all-reduced (for small tables); auto: TorchRec's planner chooses."""
    kernel: Literal["fused", "fused_uvm", "fused_uvm_caching"] = "fused"
    """fused: rows in the memory of the device that computes; fused_uvm: in the host's, read by the GPU;
    fused_uvm_caching: in the host's, with a cache on the GPU. The latter two need `train.gpus`, and were not tried on a
    GPU yet."""
    cache: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """fused_uvm_caching: share of the rows that the GPU's cache holds."""

    @model_validator(mode="after")
    def _replicated_in_place(self) -> TableConfig:
        if self.sharding == "data_parallel" and self.kernel != "fused":
            raise ValueError(
                f"a data_parallel table lies on the device that computes: kernel {self.kernel!r} is for others"
            )
        return self


class ModelConfig(Section):
    """The base learner over the features of user, item and context."""

    learner: BaseLearnerName = "mlp"
    """Base learner: mlp, factorisation, content (items by their features alone), hybrid (both of these, mixed), deepfm,
    cross (DCN-v2), or the import path of a class of your own (see docs/adding-a-meta-learner.md)."""
    options: dict[str, Option] = {}
    """Settings that this base learner alone has, by the names of its constructor's arguments."""
    hidden: tuple[Positive, ...] = (64, 64)
    """Widths of the hidden layers."""
    activation: Literal["relu", "gelu", "tanh", "silu"] = "relu"
    """Between the layers."""
    norm: Literal["none", "layer"] = "none"
    """layer: a layer normalisation between each hidden layer and its activation; its gain (`norms.N.weight`) and bias
    (`norms.N.bias`) are parameters like others, and adapt where `meta.adapt` says so."""
    skip: bool = True
    """Whether the head also sees the MLP's inputs: a linear model beside the MLP, so that a head that adapts can fold
    a user in as a factorisation would."""
    id_dropout: Fraction = 0.0
    """Share of items whose own id is hidden in a step, so that content carries items that are new."""
    support_dropout: Fraction = 0.0
    """Share of tasks whose support is hidden in a step, so that the model serves tasks without any event, too."""
    levels: NotNegative = 0
    """Levels of a rating, evenly spaced (5: whole stars of 1 to 5; 10: half stars to 5). With `meta.loss: absolute` a
    learned staircase then turns scores into predictions: the best guess of stars under absolute error is a level.
    0: scores are the predictions."""
    own_levels: bool = False
    """The staircase has thresholds and widths of each task's own, by how its support uses the levels; not all tasks
    share one."""
    features: tuple[str, ...] | None = None
    """Features to use, by name. Default: all of the dataset's."""
    dedup: bool = True
    """Look each id up once a step."""
    init_scale: PositiveFloat = 0.05
    """Standard deviation of the tables' initial rows."""
    numeric_scale: PositiveFloat = 0.1
    """Factor of numeric and vector features: standardised numbers beside small embeddings would rule the inner loop."""
    tables: dict[str, TableConfig] = {}
    """How embedding tables are spread over the workers, by name or pattern (`"*": {sharding: auto}`). A table's own
    name goes before patterns, and the first pattern before later ones; a table that none matches is sharded by rows."""


class MetaConfig(Section):
    """The meta-learner. Each names the settings that it has; one that it doesn't have may not be changed."""

    algorithm: MetaLearnerName = "maml"
    """Meta-learner. By gradient steps: maml, fomaml, anil, boil, meta_sgd, imaml, reptile, mamo; in closed form: ridge,
    logistic; by likeness to the support: matching, prototypical, kernel, sequence; by a network over the support: tanp,
    hypernetwork; from a task's own features: metaembedding, mwuf; none, to compare with: joint. Or the import path of a
    class of your own, `package.module:Class` or `path/to/file.py:Class` (see docs/adding-a-meta-learner.md)."""
    options: dict[str, Option] = {}
    """Settings that this meta-learner alone has, by the names of its constructor's arguments."""
    order: Literal[1, 2] = 2
    """2: differentiates through the inner gradients; 1: takes them as constants (FOMAML)."""
    steps: NotNegative = 3
    """Inner steps on the support set."""
    rate: PositiveFloat = 0.05
    """Inner learning rate; where it is learned, its start."""
    learned_rates: Literal["none", "layer_step"] = "layer_step"
    """none: `rate` throughout; layer_step: one learned rate a parameter tensor a step, as MAML++."""
    adapt: tuple[str, ...] = ("*",)
    """What adapts: patterns over the base learner's parameter names (`head.*`, `layers.0.weight`, `*`)."""
    adapt_rows: tuple[str, ...] = ()
    """Features whose gathered embedding rows adapt too, a task its own copy."""
    engine: Literal["auto", "low_rank", "vmap"] = "auto"
    """Inner-loop engine: auto chooses by counted cost, and logs why. All give the same gradient."""
    chunk: NotNegative = 0
    """Tasks adapted at a time. 0: as many as `memory` allows."""
    memory: Positive = 1024
    """MiB that the inner loop of a worker may hold at a time. Lower it where a worker runs out of memory; raise it for
    a GPU, or where `metatrain train` tells of small chunks."""
    checkpoint_steps: NotNegative | Literal["auto"] = "auto"
    """vmap engine: inner steps whose intermediate results are kept at a time; those of the others are computed again,
    which takes about a third more time, and memory no longer grows with `steps`. 0: all are kept. auto: all, unless
    fewer than 16 tasks would then fit `memory`."""
    loss: Literal["squared", "absolute", "huber", "binary_cross_entropy"] = "squared"
    """Loss of query events: ratings, or clicks."""
    inner_loss: Literal["squared", "absolute", "huber", "binary_cross_entropy"] | None = None
    """Loss of support events. Default: the same."""
    huber_delta: PositiveFloat = 1.0
    """Where the Huber loss turns from square to line, in units of the label."""
    size_weight: Annotated[float, Field(ge=0, le=1)] = 0.0
    """What a task counts in training: the number of its query events to this power. 0: every task the same, however
    few events it has; 1: every event the same, whoever's it is. The higher, the better rows are learned of items that
    frequent users alone know; the lower, the more users with few events count."""


# --- train ---------------------------------------------------------------------------------------------------------


class OptimizerConfig(Section):
    """The outer loop's optimizers: one for dense parameters, one fused into the tables' backward pass."""

    rate: PositiveFloat = 1e-3
    """Peak learning rate of dense parameters (Adam)."""
    table_rate: PositiveFloat = 0.05
    """Peak learning rate of the tables."""
    table: Literal["sgd", "adagrad", "rowwise_adagrad"] = "rowwise_adagrad"
    """Optimizer fused into the tables' backward pass."""
    weight_decay: NotNegativeFloat = 0.0
    """Decoupled decay of the weights of dense layers (AdamW); biases, inner rates, λ and thresholds have none."""
    table_decay: NotNegativeFloat = 0.0
    """L2 of the rows that a step touches, added to the loss: its gradient is `table_decay` × row."""
    clip: NotNegativeFloat = 10.0
    """Greatest norm of the dense meta-gradient. 0: no clipping."""
    warmup_steps: NotNegative = 20
    """Steps over which rates grow linearly from 0."""
    schedule: Literal["constant", "cosine", "linear"] = "constant"
    """After the warm-up: constant, or down to `final_share` of the peak at the last step."""
    final_share: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Share of the peak rate at the last step (cosine and linear)."""


class EarlyStopping(Section):
    """Ends training when the validation loss has stopped falling."""

    patience: NotNegative = 0
    """Validations without improvement before training ends. 0: never."""
    tolerance: NotNegativeFloat = 0.0
    """Least improvement that counts."""


class CheckpointConfig(Section):
    """When checkpoints are written and which are kept."""

    every_steps: NotNegative = 100
    """Steps from one checkpoint, whatever it was made for (the best validation loss, say), to the next. 0: only by time
    and at the end."""
    every_minutes: NotNegativeFloat = 0.0
    """Minutes between checkpoints. 0: only by steps and at the end."""
    keep: Positive = 3
    """Newest checkpoints kept; the best by validation loss is kept besides."""
    keep_hours: NotNegativeFloat = 0.0
    """Checkpoints of the last so many hours are kept besides. 0: none."""
    full_every: Positive = 1
    """1: every checkpoint is full. M: of M checkpoints one is full, and the others are differential: of the tables they
    hold the rows that were touched since the full one, which is kept as long as they are."""
    rows: Literal["exact", "bfloat16", "int8"] = "exact"
    """Tables' rows in differential checkpoints: exact, or in fewer bits. A resume from a full or an exact checkpoint
    is bit for bit; bfloat16 is off by at most 2⁻⁸ of a number, int8 by at most 1/510 of the range of its row's.
    Full checkpoints, dense parameters and optimizers' state are always exact."""


def profiled_steps(steps: str) -> tuple[int, int]:
    """The first step of `FIRST:END`, and the one behind the last."""
    first, _, end = steps.partition(":")
    return int(first), int(end)


class TrainConfig(Section):
    """The outer loop."""

    epochs: Positive = 10
    """Passes over the training tasks."""
    max_steps: NotNegative = 0
    """Ends training after this many steps. 0: after `epochs`."""
    workers: NumberOrRange = 1
    """Training workers, at most `data.lanes`. `{min: 1, max: 8}` (on the command line `1 8`): as many as the cluster
    has room for. A node that is lost or comes changes their number, and the run goes on with the same global batches.
    """
    resize_seconds: PositiveFloat = 60.0
    """Where `workers` is a range: seconds between looks at whether the cluster has room for more of them."""
    threads_per_worker: NotNegative = 1
    """CPU threads of a worker's tensor operations. 0: torch's choice."""
    gpus: bool = False
    """Whether each worker takes a GPU."""
    placement: Literal["pack", "spread"] = "pack"
    """pack: workers on as few nodes as have room, so that they exchange rows through memory; spread: over all nodes, so
    that each has more of a node's memory, network and disk."""
    precision: Literal["float32", "bfloat16"] = "float32"
    """bfloat16: mixed precision of the base learner, where the device has it."""
    optimizer: OptimizerConfig = OptimizerConfig()
    """Outer optimizers."""
    validate_every: NotNegative = 1
    """Epochs between validations. 0: never."""
    early_stopping: EarlyStopping = EarlyStopping()
    """When to end before the last epoch."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Checkpoints."""
    max_failures: Annotated[int, Field(ge=-1)] = 3
    """Restarts of the worker group after failures, in the whole run; a node that is taken away with notice is none. -1:
    without bound. Ten restarts in a row without a step between them end the run in any case."""
    backoff_seconds: NotNegativeFloat = 2.0
    """Wait before the second restart in a row without a step between; twice as long each time, up to a minute."""
    hang_seconds: NotNegativeFloat = 600.0
    """Seconds without progress after which a worker counts as hanging: it is named, killed, and the group starts again
    from the last checkpoint, which counts as a failure. More than the longest step, read or checkpoint. 0: never."""
    not_finite: Literal["stop", "skip"] = "stop"
    """On a loss or gradient that is not finite, or that explodes. stop: the run ends, and `metatrain replay RUN` shows
    that step. skip: its update is left out on all ranks, tables and all, and counted; the ranks then agree on every
    step before they update, which costs an exchange a step."""
    explosion: NotNegativeFloat = 0.0
    """A gradient norm of more than this many times its running mean counts as exploding. 0: never."""
    log_every: Positive = 10
    """Steps between lines in TensorBoard."""
    seed: int = 0
    """Seed of the initial weights and of the epoch plans."""
    profile: Annotated[str, Field(pattern=r"^\d+:\d+$")] | None = None
    """Steps to profile, `FIRST:END`: `10:15` is five steps, when ten are done. Each worker writes a trace into
    RUN/profile/. Default: none."""
    audit: bool = False
    """Whether every rank writes down which tasks it trained in which step, in RUN/audit, a folder on a disk:
    `tools/audit.py RUN` then tells whether the weights have seen every task exactly once an epoch."""

    @property
    def least_workers(self) -> int:
        """Workers without which the run does not train."""
        return self.workers[0] if isinstance(self.workers, tuple) else self.workers

    @property
    def most_workers(self) -> int:
        """Workers that the run takes where there is room."""
        return self.workers[1] if isinstance(self.workers, tuple) else self.workers

    @model_validator(mode="after")
    def _least_workers_first(self) -> TrainConfig:
        if self.least_workers > self.most_workers:
            raise ValueError(f"workers: min ({self.least_workers}) must be at most max ({self.most_workers})")
        return self

    @model_validator(mode="after")
    def _profiles_some_steps(self) -> TrainConfig:
        if self.profile is not None:
            first, end = profiled_steps(self.profile)
            if not 0 < end - first <= 100:
                raise ValueError(f"profile ({self.profile}) must be of 1 to 100 steps: FIRST:END, such as 10:15")
        return self

    @model_validator(mode="after")
    def _stops_by_what_is_measured(self) -> TrainConfig:
        if self.early_stopping.patience and not self.validate_every:
            raise ValueError("early_stopping.patience needs validations: set validate_every to 1 or more")
        return self


class EvaluateConfig(Section):
    """The evaluation's protocol."""

    episode: EpisodeConfig = EpisodeConfig(cut="last")
    """Support and query in validation and evaluation."""
    draws: Positive = 1
    """Draws of support and query, for `by: random`."""
    seed: int = 0
    """Seed of the draws."""
    existing_users: bool = False
    """Also measure training users on existing items. Their events were trained on: this tells how well the model fits,
    not how well it does on anything new."""
    metrics: tuple[RankingMetric, ...] = ("AUC", "nDCG", "hit rate", "recall")
    """Ranking metrics of the table, beside the errors (MAE and RMSE) that ratings always have."""
    k: tuple[Positive, ...] = (1, 5, 10)
    """Cut-offs of ranking metrics."""
    relevant: float | Literal["support mean"] | None = None
    """Ratings of at least this are relevant to AUC, hit rate, recall, precision and MAP. support mean: of at least the
    mean of the task's own support (the training users' mean where it has none), never of its query. Default: the
    training users' mean."""
    support_sizes: tuple[NotNegative, ...] = (0, 1, 2, 5, 10, 20, 50)
    """Support sizes of the curve: the newest so many support events. Those above `episode.support_max` are left out."""
    confidence: Annotated[float, Field(gt=0, lt=1)] = 0.95
    """Of the intervals over tasks."""
    tasks_per_batch: Positive = 256
    """Tasks scored at a time."""
    max_tasks: NotNegative = 20_000
    """Tasks measured of each partition, to the end of the batch that reaches it: the first ones, which lie in the
    shards by a hash of their key. 0: all."""


class RunConfig(Section):
    """What the run is called and where it is kept. Name and storage are its identity: the same again resumes."""

    name: str = "run"
    """Folder of the run."""
    storage: str = "runs"
    """URL under which runs are kept."""


class Config(Section):
    """A recipe: where the data comes from, the model, how it is trained and judged."""

    run: RunConfig = RunConfig()
    """Name and place."""
    prepare: PrepareConfig = PrepareConfig()
    """From the raw log to the task dataset."""
    data: DataConfig = DataConfig()
    """The feed."""
    model: ModelConfig = ModelConfig()
    """Base learner and features."""
    meta: MetaConfig = MetaConfig()
    """Meta-learner."""
    train: TrainConfig = TrainConfig()
    """Outer loop."""
    evaluate: EvaluateConfig = EvaluateConfig()
    """Protocol."""

    @property
    def run_url(self) -> str:
        """Folder of the run."""
        return storage.join(storage.absolute(self.run.storage), self.run.name)

    @model_validator(mode="after")
    def _tables_can_be_held(self) -> Config:
        for name, table in self.model.tables.items():
            if table.kernel != "fused" and not self.train.gpus:
                raise ValueError(
                    f"model.tables.{name}.kernel ({table.kernel}) is for GPUs: set train.gpus, or kernel: fused"
                )
            if table.sharding == "column_wise" and self.train.optimizer.table == "rowwise_adagrad":
                raise ValueError(
                    f"model.tables.{name}.sharding (column_wise) splits rows, of which train.optimizer.table "
                    "(rowwise_adagrad) keeps one sum: set the optimizer to adagrad or sgd, or another sharding"
                )
        return self

    @model_validator(mode="after")
    def _workers_have_lanes(self) -> Config:
        if self.train.most_workers > self.data.lanes:
            raise ValueError(
                f"train.workers ({self.train.most_workers}) must be at most data.lanes ({self.data.lanes})"
            )
        return self


# --- reading -------------------------------------------------------------------------------------------------------


def load_config(path: str, changes: Mapping[str, Any] | None = None, where: str | None = None) -> Config:
    """Reads a YAML recipe, its `extends` first.

    Args:
        path: The file.
        changes: What a recipe that extends this one would say.
        where: The place of the changes, for messages. Default: the file.

    Raises:
        ConfigError: The file is missing, is not YAML, or has an unknown or unusable field.
    """
    raw = _read(path, (), {})
    return validated(_over(raw, dict(changes)) if changes else raw, where=where or path)


def read_yaml(path: str) -> dict[str, Any]:
    """A YAML file's mapping as it stands; `env:NAME` is the text of an environment variable, as a cluster's job has it.

    Raises:
        ConfigError: The file is missing, is not YAML, or holds something else.
    """
    text: str | bytes | None = None
    if path.startswith("env:"):
        text = os.environ.get(path.removeprefix("env:"))
        if text is None:
            raise ConfigError("There is no such environment variable.", where=path, remedy="Set it, or name a file.")
    elif not storage.exists(path):
        raise ConfigError(
            "There is no such configuration file.", where=path, remedy="Check the path; recipes are in configs/."
        )
    try:
        if text is None:
            with storage.open_file(path) as file:
                # A character has at most four bytes: what is longer is refused there, and not read whole here.
                text = file.read(4 * YAML_CHARACTERS + 1)
        raw = parse_yaml(text or "")
    except (ValueError, IsADirectoryError) as error:
        raise ConfigError(f"The YAML cannot be read: {error}.", where=path, remedy="Mend the file.") from error
    if raw is None:
        return {}
    if not isinstance(raw, dict):
        raise ConfigError(
            "A configuration is a mapping of sections.",
            where=path,
            got=type(raw).__name__,
            remedy="See configs/demo.yaml.",
        )
    return raw


def beside(path: str, other: str) -> str:
    """`other` as a file at `path` means it: a path beside that file, unless it is absolute or a URL."""
    if "://" in other or other.startswith("/"):
        return other
    return storage.join(path.rpartition("/")[0] or ".", other)


def to_yaml(config: BaseModel) -> str:
    """A configuration as YAML, in the order of its fields: what `load_config` reads back to an equal one."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def validated(raw: Any, where: str) -> Config:
    """Checks a mapping; an unknown key is answered with the nearest known one."""
    try:
        return Config.model_validate(raw)
    except ValidationError as error:
        raise explained(error, where) from error


def explained(error: ValidationError, where: str) -> ConfigError:
    """The first of pydantic's complaints as an error of ours."""
    problem = error.errors()[0]
    path = [str(part) for part in problem["loc"]]
    place = f"{where}: {'.'.join(path) or '(top level)'}"
    others = len(error.errors()) - 1
    more = f" ({others} more to mend after this)" if others else ""
    if problem["type"] == "extra_forbidden":
        known = _fields_at(path[:-1])
        near = difflib.get_close_matches(path[-1], known, n=1)
        remedy = f"Did you mean `{near[0]}`?" if near else f"Known here: {', '.join(known)}."
        return ConfigError(f"Unknown configuration key{more}.", where=place, got=path[-1], remedy=remedy)
    got = problem.get("input")
    return ConfigError(
        problem["msg"].removeprefix("Value error, ") + more,
        where=place,
        got=got if not isinstance(got, dict | BaseModel) else None,
        remedy="Mend the value; `metatrain config FILE --help` describes every field.",
    )


def _fields_at(path: list[str]) -> list[str]:
    section: Any = Config
    for part in path:
        if part not in section.model_fields:  # a place in a list, or a key of a mapping to sections
            continue
        section = _section_of(section.model_fields[part].annotation)
        if section is None:
            return []
    return list(section.model_fields)


def _section_of(annotation: Any) -> type[BaseModel] | None:
    """The section class inside an annotation such as `tuple[FeatureSource, ...]`."""
    if (
        isinstance(annotation, type)
        and not isinstance(annotation, types.GenericAlias)
        and issubclass(annotation, BaseModel)
    ):
        return annotation
    return next((s for a in typing.get_args(annotation) if (s := _section_of(a)) is not None), None)


#: Files of a chain of `extends`.
_LONGEST_CHAIN = 32


def _read(path: str, chain: tuple[str, ...], known: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """A file over those that it extends; `known` holds the files that were read already."""
    place = storage.absolute(path)  # one file, however its path is written
    if place in known:
        return known[place]
    if place in chain or len(chain) == _LONGEST_CHAIN:
        what = "`extends` goes in a circle." if place in chain else f"`extends` goes through {len(chain)} files."
        raise ConfigError(what, where=" → ".join((*chain, place)), remedy="Remove one of them.")
    raw = read_yaml(path)
    parents = raw.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) and parent for parent in parents):
        raise ConfigError(
            "`extends` is a file or a list of files.",
            where=path,
            got=parents,
            remedy="Name them as they lie from here.",
        )
    merged: dict[str, Any] = {}
    for parent in parents:
        merged = _merged(merged, _read(beside(path, parent), (*chain, place), known))
    known[place] = _over(merged, raw)
    return known[place]


def _over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    return _merged(_inherited(below, above), above)


#: Fields of a section that mean the same for every learner; the others are the named learner's.
_OF_ANY_LEARNER = {"meta": ("algorithm", ("loss", "huber_delta", "memory", "size_weight")), "model": ("learner", None)}


def _inherited(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """What a recipe inherits: where it names another learner, nothing that was set for the one below."""
    result = dict(below)
    for section, (name, common) in _OF_ANY_LEARNER.items():
        inherited, own = below.get(section), above.get(section)
        if not (isinstance(inherited, dict) and isinstance(own, dict) and name in own):
            continue
        default = Config.model_fields[section].default
        if own[name] != inherited.get(name, getattr(default, name)):
            kept = [key for key in inherited if (key in common if common else key != "options")]
            result[section] = {key: inherited[key] for key in kept}
    return result


def _merged(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    result = dict(below)
    for key, value in above.items():
        both = isinstance(value, dict) and isinstance(result.get(key), dict)
        result[key] = _merged(result[key], value) if both else value
    return result
