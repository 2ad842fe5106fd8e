"""The demonstration: real ratings to recommendations, by the public commands alone.

Prepares MovieLens-100K, meta-trains on two Ray workers, judges the run on users it never saw, and recommends films to
one of them. Run it by `make demo`; a second run finds the data prepared and the model trained, and shows the results.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

from metatrain.config import EpisodeConfig, load_config
from metatrain.data.manifest import ItemSet, Split
from metatrain.data.reader import iterate

RECIPE = "configs/demo.yaml"


def run(*arguments: str) -> None:
    """Shows and runs one `metatrain` command; ends with its status where it fails."""
    print(
        f"\n\033[1m$ metatrain {' '.join(arguments)}\033[0m"
        if sys.stdout.isatty()
        else f"\n$ metatrain {' '.join(arguments)}",
        flush=True,
    )
    status = subprocess.run([str(Path(sys.executable).with_name("metatrain")), *arguments], check=False).returncode
    if status:
        sys.exit(status)


def main() -> None:
    """The whole way, once."""
    start = time.monotonic()
    config = load_config(RECIPE)
    run("prepare", RECIPE)
    run("train", RECIPE)
    run("evaluate", RECIPE)
    # The first test user with a history of a usual length.
    usual = EpisodeConfig(events_min=30, events_max=80)
    user = next(
        key for _, keys in iterate(config.data.dataset, Split.TEST, ItemSet.ALL, usual, keys=True) for key in keys
    )
    print(f"\nUser {user} is a test user: no event of theirs was seen in training.")
    run("recommend", RECIPE, "--user", user, "--top", "10", "--min_events", "20")
    print(f"\nAll done in {time.monotonic() - start:.0f} s. The curves of training:")
    print(f"  .venv/bin/metatrain board {RECIPE}")
    print(f"The table and the plot: {config.run_url}/evaluation.json, {config.run_url}/evaluation.png")


if __name__ == "__main__":
    main()
