"""Which of a source's features are read, and raw columns as features."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

import pyarrow as pa
import pyarrow.compute as pc

from metatrain.config import FeatureSource, PrepareConfig
from metatrain.data.sources.checks import Check
from metatrain.errors import ConfigError, SourceError


def chosen_features(available: Iterable[FeatureSource], config: PrepareConfig) -> tuple[FeatureSource, ...]:
    """A source's own features: all, or those that `config.features` names, as it describes them.

    Raises:
        ConfigError: A feature that the source doesn't have, or has at another level or of another kind.
    """
    have = {f.name: f for f in available}
    for f in config.features:
        if f.name not in have:
            near = difflib.get_close_matches(f.name, have, n=1)
            hint = f"Did you mean `{near[0]}`? " if near else ""
            raise ConfigError(
                "The source has no such feature.",
                where="prepare.features",
                got=f.name,
                remedy=f"{hint}It has: {', '.join(have) or 'none'}.",
            )
        if (f.level, f.kind) != (have[f.name].level, have[f.name].kind):
            raise ConfigError(
                "The source's feature is of another level or kind.",
                where=f"prepare.features: {f.name}",
                got=f"{f.level}, {f.kind}",
                remedy=f"It is {have[f.name].level}, {have[f.name].kind}.",
            )
    return config.features or tuple(have.values())


def feature_check(feature: FeatureSource) -> Check:
    """What a feature's column must hold in a text file."""
    return Check.NUMBER if feature.kind == "numeric" else Check.TEXT


def feature_column(feature: FeatureSource, column: pa.Array | pa.ChunkedArray, place: str) -> pa.Array:
    """A raw column of any fitting type as the feature's raw type.

    Raises:
        SourceError: The column's type doesn't fit, or its text isn't numbers.
    """
    array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
    try:
        if pa.types.is_null(array.type):
            array = array.cast(pa.string())
        if feature.kind == "categorical":
            return array.cast(pa.string())
        if feature.kind == "numeric":
            numbers = array.cast(pa.float64())
            return pc.if_else(pc.is_nan(numbers), None, numbers)  # NaN is how pandas writes "missing"
        values = pa.string() if feature.kind == "multi" else pa.float32()
        if pa.types.is_string(array.type) or pa.types.is_large_string(array.type):
            text = array.cast(pa.string())
            array = (
                pc.split_pattern(text, feature.separator)
                if feature.separator
                else pa.ListArray.from_arrays(pa.array(range(len(text) + 1), type=pa.int32()), text)
            )
        return array.cast(pa.list_(values))
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError) as error:
        raise SourceError(
            f"A column cannot be read as a {feature.kind} feature: {error}.",
            where=f"{place}, column {feature.name}",
            got=str(array.type),
            remedy="Mend the column, or the feature's `kind` in `prepare.features`.",
        ) from error
