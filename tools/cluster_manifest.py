"""Writes cluster/rayjob.yaml: what `metatrain submit configs/cluster-gpu.yaml --render rayjob` prints, with a head."""

from __future__ import annotations

from metatrain.config import load_config
from metatrain.submit.rayjob import manifest

HEAD = """\
# A run on Kubernetes in one file: KubeRay (1.5.1 or newer) makes the cluster, trains the recipe inside, and removes the
# cluster ten minutes after. Written by tools/cluster_manifest.py from configs/cluster-gpu.yaml; of your own recipe,
# `metatrain submit RECIPE.yaml --render rayjob --image IMAGE` makes one, checked against its dataset. Not applied to a
# real cluster yet; its fields are checked by tests/cluster, and its entrypoint is that of `metatrain submit`.
#
#   kubectl apply -f rayjob.yaml
#   kubectl logs --follow job/cluster-gpu
"""
#: Bytes of a worker's tables in the example: 200,000 items of width 8, and room to grow.
TABLES = 3 * 1024**3


def main() -> None:
    """Writes the file."""
    text = manifest(load_config("configs/cluster-gpu.yaml"), "metatrain:latest-gpu", {}, TABLES)
    with open("cluster/rayjob.yaml", "w", encoding="utf-8") as file:
        file.write(HEAD + text)


if __name__ == "__main__":
    main()
