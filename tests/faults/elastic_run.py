"""Trains a recipe on a cluster, slowly until a file is there: `elastic_run.py RECIPE ADDRESS SECONDS_A_STEP FILE`."""

from __future__ import annotations

import logging
import os
import sys
import time
from typing import Any

from metatrain.config import Config, load_config
from metatrain.malloc import MALLOC
from metatrain.train.launch import launch


def main(recipe: str, address: str, seconds: float, until: str) -> None:
    def work(config: Config, seat: Any) -> None:  # here, so that Ray sends it by value
        from metatrain.train.step import OuterLoop
        from metatrain.train.worker import train

        step = OuterLoop.step

        def slow(self: OuterLoop, *args: Any, **options: Any) -> Any:
            time.sleep(0.0 if os.path.exists(until) else seconds)
            return step(self, *args, **options)

        assert MALLOC.keys() <= os.environ.keys(), "a worker's malloc is set on any cluster"
        OuterLoop.step = slow
        train(config, seat)

    launch(load_config(recipe), address, work)


if __name__ == "__main__":
    logging.basicConfig(format="%(asctime)s %(message)s", level=logging.WARNING)
    logging.getLogger("metatrain").setLevel(logging.INFO)
    main(sys.argv[1], sys.argv[2], float(sys.argv[3]), sys.argv[4])
