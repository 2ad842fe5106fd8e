"""What is known to be wrong with a run before a cluster hears of it."""

from __future__ import annotations

from metatrain import storage
from metatrain.checkpoint.format import committed_steps
from metatrain.checkpoint.identity import check_begun, identity
from metatrain.config import Config, load_config
from metatrain.data.dataset import TaskDataset
from metatrain.train.checks import check


def check_submission(config: Config) -> None:
    """All that launching a run checks, and that no other configuration has the run's name.

    Args:
        config: With absolute paths (`launch.located`).

    Raises:
        MetatrainError: A field, dataset, feature or learner that cannot be used, or a run of this name and storage that
            was submitted or trained with another configuration: every field that differs, with both values.
    """
    check_name(config)
    check(config)


def check_name(config: Config) -> None:
    """Refuses the name of a run that was begun with another configuration and has no checkpoint yet.

    Where there is a checkpoint, `check` compares with what it was trained by.
    """
    recorded = storage.join(config.run_url, "config.yaml")
    if committed_steps(config.run_url) or not storage.exists(recorded):
        return
    fingerprint = TaskDataset.open(config.data.dataset).fingerprint
    earlier = load_config(recorded)
    # The fingerprint of what the other configuration reads is not recorded; where it reads another dataset, its URL is.
    same_data = earlier.data.dataset == config.data.dataset
    check_begun(
        identity(earlier, fingerprint if same_data else earlier.data.dataset),
        identity(config, fingerprint if same_data else config.data.dataset),
        recorded,
    )


def node_paths(config: Config) -> list[str]:
    """Folders that the run uses and that are paths on a disk: every node must see them by the same path."""
    return [url for url in (config.data.dataset, config.run_url) if storage.is_local(url)]
