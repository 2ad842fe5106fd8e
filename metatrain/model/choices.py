"""What a recipe chooses of a dataset: its features, their tables, its labels.

Without torch, whose import takes seconds: a choice that cannot be is refused before it.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from metatrain.config import Config, ModelConfig, TableConfig
from metatrain.data.schema import Feature, LabelKind, Schema
from metatrain.errors import ConfigError


@dataclass(frozen=True)
class TableSpec:
    """One table: its rows, their width, and the features that look ids up in it."""

    name: str
    rows: int
    width: int
    features: tuple[str, ...]


def check_choices(schema: Schema, config: Config) -> None:
    """Checks all that is known of a recipe by its dataset's schema alone.

    Raises:
        ConfigError: A feature, table or loss that doesn't fit the dataset.
    """
    features, _ = chosen_features(schema, config.model, config.meta.adapt_rows)
    table_settings(table_specs(features), config.model.tables)
    check_loss(schema, config.meta.loss)


def check_loss(schema: Schema, loss: str) -> None:
    """Refuses a loss of clicks for ratings."""
    if loss == "binary_cross_entropy" and schema.label is not LabelKind.CLICK:
        raise ConfigError(
            "Binary cross-entropy is for clicks; this dataset's labels are ratings.",
            where="meta.loss",
            got=loss,
            remedy="Use squared, absolute or huber, or prepare the dataset with `label: click`.",
        )


def chosen_features(
    schema: Schema, config: ModelConfig, adapt_rows: Iterable[str] = ()
) -> tuple[tuple[Feature, ...], dict[str, Feature]]:
    """The features that a model uses, in the schema's order, and those of them whose rows adapt, by name.

    Raises:
        ConfigError: A name that is no feature, no features, or an adapted feature without embedding rows.
    """
    known = {feature.name: feature for feature in schema.features}
    if config.features is not None:
        for name in config.features:
            _known(name, known, "model.features")
    features = tuple(f for f in schema.features if config.features is None or f.name in config.features)
    used = {feature.name: feature for feature in features}
    adapted = {name: _known(name, used, "meta.adapt_rows") for name in sorted(set(adapt_rows))}
    for feature in adapted.values():
        if not feature.embedded:
            raise ConfigError(
                "This feature has no embedding rows that could adapt.",
                where="meta.adapt_rows",
                got=feature.name,
                remedy=f"Choose among {', '.join(f.name for f in features if f.embedded)}.",
            )
    if not features:
        raise ConfigError("The model has no features.", where="model.features", remedy="Name at least one.")
    return features, adapted


def table_specs(features: Iterable[Feature]) -> list[TableSpec]:
    """The tables that features need."""
    shared: dict[str, list[Feature]] = {}
    for feature in features:
        if feature.embedded:
            shared.setdefault(str(feature.table), []).append(feature)
    return [
        TableSpec(table, int(fs[0].rows or 0), int(fs[0].width or 0), tuple(f.name for f in fs))
        for table, fs in shared.items()
    ]


def table_settings(specs: Sequence[TableSpec], settings: Mapping[str, TableConfig]) -> dict[str, TableConfig]:
    """Each table's settings: those under its own name, else under the first pattern that matches, else the defaults.

    Raises:
        ConfigError: A name or pattern that no table has.
    """
    names = [spec.name for spec in specs]
    for pattern in settings:
        if not fnmatch.filter(names, pattern):
            near = difflib.get_close_matches(pattern, names, n=1)
            raise ConfigError(
                "No embedding table has this name.",
                where=f"model.tables.{pattern}",
                got=pattern,
                remedy=f"Did you mean `{near[0]}`?" if near else f"Tables: {', '.join(names)}.",
            )
    found = {}
    for name in names:
        matching = [pattern for pattern in settings if fnmatch.fnmatchcase(name, pattern)]
        chosen = name if name in settings else next(iter(matching), None)
        found[name] = TableConfig() if chosen is None else settings[chosen]
    return found


def _known(name: str, features: Mapping[str, Feature], where: str) -> Feature:
    if name in features:
        return features[name]
    near = difflib.get_close_matches(name, features, n=1)
    raise ConfigError(
        "There is no feature of this name.",
        where=where,
        got=name,
        remedy=f"Did you mean {near[0]!r}?" if near else f"Known here: {', '.join(features)}.",
    )
