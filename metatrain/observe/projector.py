"""The files of TensorBoard's projector: vectors of items, and for each its title and what else is known of it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

VECTORS, METADATA, CONFIG = "items.tsv", "items-metadata.tsv", "projector_config.pbtxt"


def files(vectors: np.ndarray, columns: Mapping[str, Sequence[object]], name: str = "items") -> dict[str, str]:
    """File name → content, of one run's projector.

    Args:
        vectors: float [I, D].
        columns: What is known of each item: heading → I values; the first column is the label that is shown. At least
            two, since TensorBoard takes the heading of a single one for a value.
        name: What the vectors are of.
    """
    assert len(columns) > 1, "a single column has no heading"
    assert all(len(values) == len(vectors) for values in columns.values()), "a value for each vector"
    rows = [
        "\t".join(map(_text, columns)),
        *("\t".join(map(_text, row)) for row in zip(*columns.values(), strict=True)),
    ]
    numbers = ["\t".join([f"{value:.5g}" for value in row]) for row in vectors.tolist()]
    config = f'embeddings {{\n  tensor_name: "{name}"\n  tensor_path: "{VECTORS}"\n  metadata_path: "{METADATA}"\n}}\n'
    # The configuration last: it names the others.
    return {VECTORS: "\n".join(numbers) + "\n", METADATA: "\n".join(rows) + "\n", CONFIG: config}


def _text(value: object) -> str:
    """A value in a cell: a line or a tab would end it."""
    return " ".join(str(value).split()) or "-"
