"""The pair of a recipe: its base learner and its meta-learner over a dataset's features. Torch alone, no tables.

What settings a learner has, and which pairs do not go together, is known when they are made.
"""

from __future__ import annotations

import math

import torch
from torch import nn

from metatrain.config import Config, MetaConfig, ModelConfig
from metatrain.data.schema import LabelKind, Schema
from metatrain.errors import ConfigError
from metatrain.learners import BASE_LEARNERS, META_LEARNERS
from metatrain.meta.layout import Layout
from metatrain.meta.learner import MetaLearner
from metatrain.meta.link import Staircase
from metatrain.model.choices import check_loss
from metatrain.model.construct import Setting, made, named
from metatrain.model.features import Featurizer

_PRECISIONS = {"float32": None, "bfloat16": torch.bfloat16}
# A share of clicks of exactly 0 or 1 has no finite logit.
_LEAST_SHARE = 1e-4


def build_pair(schema: Schema, config: Config) -> tuple[Featurizer, MetaLearner]:
    """The features' assembler, and the meta-learner around its base learner. Weights are drawn from torch's state.

    Raises:
        ConfigError: A learner, feature, pattern, loss or option that doesn't fit the dataset or the other learner.
    """
    featurizer = Featurizer(schema, config.model, config.meta.adapt_rows, config.train.seed)
    check_loss(schema, config.meta.loss)
    learner = _base_learner(schema, config, featurizer.layout)
    return featurizer, _meta_learner(schema, config, featurizer.layout, learner)


def _base_learner(schema: Schema, config: Config, layout: Layout) -> nn.Module:
    model, default = config.model, ModelConfig()
    kind = named(model.learner, BASE_LEARNERS, nn.Module, "model.learner")
    settings = [
        Setting("layout", layout),
        Setting("offset", _offset(schema, config.meta.loss)),
        *(
            Setting(name, getattr(model, name), f"model.{name}", getattr(model, name) != getattr(default, name))
            for name in ("hidden", "activation", "skip", "norm")
        ),
    ]
    return made(kind, (layout.width,), settings, model.options, "model")


def _meta_learner(schema: Schema, config: Config, layout: Layout, learner: nn.Module) -> MetaLearner:
    meta, default = config.meta, MetaConfig()
    kind = named(meta.algorithm, META_LEARNERS, MetaLearner, "meta.algorithm")

    def setting(field: str, name: str = "", value: object = None) -> Setting:
        given = getattr(meta, field)
        changed = given != getattr(default, field)
        return Setting(name or field, given if value is None else value, f"meta.{field}", changed)

    precision = config.train.precision
    settings = [
        Setting("layout", layout),
        Setting("relevant_from", 0.5 if schema.label is LabelKind.CLICK else schema.label_mean),
        Setting("label_range", (schema.label_min, schema.label_max)),
        Setting("offset", _offset(schema, meta.loss)),
        Setting("precision", _PRECISIONS[precision], "train.precision", precision != "float32"),
        setting("memory", value=meta.memory << 20)._replace(changed=False),
        setting("learned_rates", "learn_rates", meta.learned_rates == "layer_step"),
        setting("checkpoint_steps", "keep"),
        *map(
            setting,
            ("order", "steps", "rate", "adapt", "adapt_rows", "chunk", "loss", "inner_loss", "huber_delta", "engine"),
        ),
    ]
    built = made(kind, (learner,), settings, meta.options, "meta")
    if config.model.levels:
        built.link = _link(schema, config, built)
    elif config.model.own_levels:
        raise ConfigError(
            "There is no staircase that tasks could have of their own.",
            where="model.own_levels",
            got=True,
            remedy="Leave it at its default, or set `model.levels`.",
        )
    return built


def _link(schema: Schema, config: Config, meta: MetaLearner) -> Staircase:
    """The staircase of a recipe that asks for one; ConfigError where it would do nothing or harm."""
    levels, loss = config.model.levels, config.meta.loss
    reason = ""
    if schema.label is not LabelKind.RATING:
        reason = "labels are clicks"
    elif not meta.links:
        reason = f"{type(meta).__name__} takes its query loss in its inner loop, of scores alone"
    elif loss == "squared":
        reason = "under squared error the best prediction is a mean, which is no level"
    if not reason:
        try:
            return Staircase(schema.label_min, schema.label_max, levels, own=config.model.own_levels)
        except ValueError as error:
            reason = str(error)
    raise ConfigError(
        f"A staircase of levels can't be used: {reason}.",
        where="model.levels",
        got=levels,
        remedy="Set `model.levels: 0`, or another loss or meta-learner.",
    )


def _offset(schema: Schema, loss: str) -> float:
    """The score of an event about which nothing is known: the labels' mean, as a logit where scores are logits."""
    if loss != "binary_cross_entropy":
        return schema.label_mean
    share = min(max(schema.label_mean, _LEAST_SHARE), 1 - _LEAST_SHARE)
    return math.log(share / (1 - share))
