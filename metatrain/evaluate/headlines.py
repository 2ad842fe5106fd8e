"""The few figures of an evaluation that judge a run beside others: curves with one point, in the tab "HParams"."""

from __future__ import annotations

from metatrain.config import EvaluateConfig
from metatrain.data.dataset import TaskDataset
from metatrain.evaluate.protocols import Judge, partitions_of
from metatrain.evaluate.report import ADAPTED, Report


def headline_names(dataset: TaskDataset, config: EvaluateConfig) -> tuple[str, ...]:
    """The curves that an evaluation of a run on this dataset by this protocol has."""
    manifest = dataset.manifest
    names = [part.name for part in partitions_of(config, manifest.task, manifest.catalogued)]
    return tuple(_name(metric, name) for name in names for metric in Judge(dataset.schema, config).headlines)


def headline_values(report: Report, dataset: TaskDataset, config: EvaluateConfig) -> dict[str, float]:
    """Curve → value of the adapted model, of those that were measured."""
    names = headline_names(dataset, config)
    found = {_name(row.metric, row.partition): row.value for row in report.rows if row.model == ADAPTED}
    return {name: found[name] for name in names if name in found}


def _name(metric: str, partition: str) -> str:
    return f"final/{metric}, {partition}"
