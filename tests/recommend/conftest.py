from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from metatrain.config import Config, DataConfig, EpisodeConfig, EvaluateConfig, MetaConfig, ModelConfig
from metatrain.data.dataset import TaskDataset
from metatrain.data.schema import LabelKind
from metatrain.model.build import build_model
from metatrain.recommend.recommender import Recommender
from tests.data.tiny_dataset import write_tiny_dataset


@pytest.fixture(scope="session")
def recommender_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recommender]:
    """An untrained recommender over a tiny dataset, with weights large enough that adaptation shows."""

    def make(label: LabelKind = LabelKind.RATING, **settings) -> Recommender:
        url = str(tmp_path_factory.mktemp("tiny"))
        write_tiny_dataset(url, label=label, **settings)
        config = Config(
            data=DataConfig(dataset=url),
            model=ModelConfig(hidden=(8,), init_scale=0.5),
            meta=MetaConfig(
                rate=0.02,
                steps=2,
                adapt_rows=("item", "shade"),
                loss="squared" if label is LabelKind.RATING else "binary_cross_entropy",
            ),
            evaluate=EvaluateConfig(
                episode=EpisodeConfig(support_max=6, query_max=4), k=(1, 2), support_sizes=(0, 3), tasks_per_batch=7
            ),
        )
        dataset = TaskDataset.open(url)
        model = build_model(dataset.schema, config, "cpu")
        generator = torch.Generator().manual_seed(0)
        for name, parameter in model.named_parameters():
            if "rate" not in name:
                parameter.data.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        return Recommender(model, dataset, config, run_url=str(tmp_path_factory.mktemp("run")), step=3)

    return make


@pytest.fixture(scope="session")
def recommender(recommender_of) -> Recommender:
    return recommender_of()
