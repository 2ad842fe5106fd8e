"""A trained run in use: adapt to users' events, rank the catalogue for each. Evaluation scores through it too.

    recommender = Recommender.load("runs/demo")
    adapted = recommender.adapt([{"item": "50", "label": 5}, {"item": "181", "label": 2}])
    for item, title, score in adapted.top(10)[0]: ...
    adapted.unadapted.top(10)          the same users, before adaptation
    adapted.explain("172")             why this item

Nothing is stored about the users: the same events give the same lists.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from metatrain import storage
from metatrain.checkpoint import load_for_inference
from metatrain.checkpoint.identity import check_scoring, identity
from metatrain.config import Config, load_config
from metatrain.data.batch import Column, Ragged, TaskBatch
from metatrain.data.columns import stored, take
from metatrain.data.dataset import TaskDataset
from metatrain.data.schema import Level
from metatrain.errors import CheckpointError, RequestError
from metatrain.model.build import build_model
from metatrain.model.metamodel import MetaModel
from metatrain.recommend.adapted import Adapted
from metatrain.recommend.event_tables import Events
from metatrain.recommend.events import Requests, read_requests
from metatrain.recommend.known_users import requests_of


@dataclass(frozen=True)
class Scores:
    """Scores of a batch's query events, padded: ratings on the labels' scale, or probabilities of a click."""

    before: np.ndarray  # float64 [T, Q]: without adaptation
    after: np.ndarray  # float64 [T, Q]: adapted to the support
    mask: np.ndarray  # bool [T, Q]


class Recommender:
    """A meta-trained model with its dataset's catalogue and vocabularies. Make one with `load`."""

    def __init__(
        self, model: MetaModel, dataset: TaskDataset, config: Config, *, run_url: str = "", step: int = 0
    ) -> None:
        self.model, self.dataset, self.config, self.run_url, self.step = model.eval(), dataset, config, run_url, step
        self.device = next(model.parameters()).device

    @classmethod
    def load(
        cls,
        run_url: str,
        checkpoint: int | None = None,
        *,
        dataset: str | None = None,
        device: torch.device | str = "cpu",
    ) -> Recommender:
        """Loads a run.

        Args:
            run_url: Folder of the run.
            checkpoint: Step of the checkpoint. Default: the best by validation loss, or the newest.
            dataset: Where the run's dataset now lies, if not where it was trained.
            device: Where the model computes.

        Raises:
            CheckpointError: No checkpoint, or one of another model or dataset, or a config.yaml that doesn't fit it.
            DatasetError: The dataset is missing or broken.
        """
        loaded = load_for_inference(run_url, checkpoint)
        opened = TaskDataset.open(dataset or loaded.config.data.dataset)
        trained_on = loaded.marker.identity.get("dataset")
        if trained_on not in (None, opened.fingerprint):
            # The tables' rows are the vocabularies' of that dataset: another one's ids would look up strangers.
            raise CheckpointError(
                "The run was trained on another task dataset than the one that lies here.",
                where=opened.url,
                got=f"fingerprint {opened.fingerprint[:12]}, trained on {str(trained_on)[:12]}",
                remedy="Prepare it again as it was, train again, or name the right one (--dataset URL).",
            )
        described = {f"{run_url}, checkpoint {loaded.step}": loaded.config}
        # Scoring goes by the checkpoint's own configuration: an edit of the run's file would be without effect, and
        # without a word.
        if storage.exists(file := storage.join(run_url, "config.yaml")):
            described[file] = load_config(file)
        for where, one in described.items():
            check_scoring(loaded.marker.identity, identity(one, opened.fingerprint), where)
        config = _placed_as(loaded.config, described.get(file, loaded.config))
        # The model takes the loaded tensors themselves: tables may be too large to be there twice.
        model = build_model(opened.schema, config, torch.device(device), tables_device="meta")
        try:
            model.load_state_dict({name: value.to(device) for name, value in loaded.state.items()}, assign=True)
        except RuntimeError as error:
            raise CheckpointError(
                "The checkpoint is of another model.",
                where=f"{run_url}, step {loaded.step}",
                got=str(error).replace("\n", " ")[:500],
                remedy="Use the release that wrote it, or train again.",
            ) from error
        return cls(model, opened, config, run_url=run_url, step=loaded.step)

    @property
    def support_max(self) -> int:
        """Most support events that the model takes of a user: as many as it is evaluated with."""
        return self.config.evaluate.episode.support_max

    def scores(self, batch: TaskBatch) -> Scores:
        """Scores of a batch (of numpy columns), before and after adaptation to its supports."""
        found = self.model.adapted_scores(batch.tensors(self.device))
        return Scores(self._shown(found.before), self._shown(found.after), found.mask.cpu().numpy() > 0)

    def scorer(self, batch: TaskBatch) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        """Adapts to a batch's supports once, and scores catalogue rows for all its tasks as often as called:
        rows [C] → (before, after), each float64 [T, C]."""
        tensors = batch.tensors(self.device)
        states = (self.model.adapt(tensors, adapted=False), self.model.adapt(tensors))
        features = {f.name: stored(self.dataset.catalogue.features[f.name]) for f in self.dataset.schema.of(Level.ITEM)}

        def score(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            columns = {name: self._tensors(take(column, rows)) for name, column in features.items()}
            before, after = (self._shown(self.model.score_items(state, columns)) for state in states)
            return before, after

        return score

    def adapt(self, events: Events) -> Adapted:
        """Adapts to the events of one user or many.

        Args:
            events: A list of mappings, a pyarrow table, or the path of a CSV, JSON lines or Parquet file, with the
                columns item, label, and optionally user, timestamp and features of the user. Where the dataset's
                tasks are items: user, label, and optionally item, title, timestamp and features of the item.

        Raises:
            RequestError: Events that cannot be used. Unknown items are not among them: see `Adapted.warnings`.
        """
        return self._adapted(read_requests(events, self.dataset, self.support_max))

    def adapt_users(self, keys: Sequence[str]) -> Adapted:
        """Adapts to all events that the dataset has of its own users (where its tasks are items, items), by key.

        Raises:
            RequestError: A key that the dataset doesn't have.
        """
        return self._adapted(requests_of(keys, self.dataset, self.support_max))

    def _adapted(self, requests: Requests) -> Adapted:
        if not requests.users:
            task = self.dataset.manifest.task
            raise RequestError(f"There is no {task} to adapt to.", remedy="Name one at least.")
        return Adapted(self, requests)

    def _tensors(self, column: Column) -> Column:
        if isinstance(column, Ragged):
            return Ragged(self._tensors(column.values), self._tensors(column.lengths))
        tensor = torch.from_numpy(np.ascontiguousarray(column))
        return (tensor if tensor.is_floating_point() else tensor.long()).to(self.device)

    def _shown(self, scores: torch.Tensor) -> np.ndarray:
        """Scores as people read them: a logit becomes a probability."""
        column = scores.detach().double().cpu().numpy()
        if self.config.meta.loss != "binary_cross_entropy":
            return column
        return 1.0 / (1.0 + np.exp(-np.clip(column, -700, 700)))


def _placed_as(config: Config, now: Config) -> Config:
    """A configuration whose learners' files lie where those of `now` do: `check_scoring` found their names equal.

    For a run whose files were moved since: its config.yaml says where to.
    """
    return config.model_copy(
        update={
            "model": config.model.model_copy(update={"learner": now.model.learner}),
            "meta": config.meta.model_copy(update={"algorithm": now.meta.algorithm}),
        }
    )
