"""The model of a configuration over a dataset's features: what is made of which settings, and what is refused."""

from __future__ import annotations

import torch

from metatrain.config import Config
from metatrain.data.schema import Schema
from metatrain.model.metamodel import MetaModel
from metatrain.model.pair import build_pair
from metatrain.model.tables import Tables


def build_model(
    schema: Schema,
    config: Config,
    device: torch.device | str = "cpu",
    *,
    tables_device: torch.device | str | None = None,
) -> MetaModel:
    """The model of a configuration over a dataset's features, with the initial weights of `train.seed`.

    Args:
        schema: The dataset's.
        config: The recipe.
        device: Where the model computes.
        tables_device: "meta" for a model that `sharding.distribute` will shard. Default: `device`.

    Raises:
        ConfigError: A learner, feature, pattern, loss or option that doesn't fit the dataset or the other learner.
    """
    # Initial weights depend on the seed alone, and nobody else's random numbers on them.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.train.seed)
        featurizer, meta = build_pair(schema, config)
        # After the learners: tables on the meta device draw no random numbers, others do.
        tables = Tables(
            featurizer.table_specs(),
            dedup=config.model.dedup,
            device=tables_device or device,
            seed=config.train.seed,
            scale=config.model.init_scale,
        )
    whole = MetaModel(tables, featurizer, meta, config.train.optimizer.table_decay, config.meta.size_weight)
    whole.meta.to(device)
    return whole
