"""The manifest of a KubeRay RayJob for a run: a cluster that is made for it, trains it, and goes.

The recipe is in the manifest, so that it can be kept and reviewed as one file. A lost head is a new cluster and a new
job (`backoffLimit`), which goes on from the run's last checkpoint; lost workers are the run's own to bear.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from importlib.metadata import version
from typing import Any

import yaml

from metatrain import __version__
from metatrain.config import Config
from metatrain.data.stream import READER_CPUS
from metatrain.submit.jobs import ENTRYPOINT, RUN, runtime_env
from metatrain.train.session import worker_cpus

#: GiB of a pod besides its worker's tables and inner loop: Python and torch, its readers, its object store.
BESIDE_GIB = 4
#: A pod of readers.
READER_POD_CPUS, READER_POD_GIB = 4, 16
#: New clusters after the first, each where a head was lost.
ATTEMPTS = 3
#: Seconds that a finished job's cluster is left for a look at it.
LINGERS = 600

# Labels by which the clouds tell nodes that may be taken away; `NotIn` also holds of nodes without the label.
_SPOT = {
    "karpenter.sh/capacity-type": "spot",
    "eks.amazonaws.com/capacityType": "SPOT",
    "cloud.google.com/gke-spot": "true",
    "kubernetes.azure.com/scalesetpriority": "spot",
}


def manifest(config: Config, image: str, environment: Mapping[str, str], table_bytes: int) -> str:
    """A RayJob as YAML.

    Args:
        config: The run, with absolute paths.
        image: Of all containers: it has metatrain installed.
        environment: Variables of the job's processes.
        table_bytes: Of a worker's tables on its node, with all that goes with them.
    """
    spec = {
        "entrypoint": ENTRYPOINT,
        "runtimeEnvYAML": _yaml(runtime_env(config, environment, None)),
        "metadata": {RUN: config.run_url, "metatrain.version": __version__},
        "backoffLimit": ATTEMPTS,
        "shutdownAfterJobFinishes": True,
        "ttlSecondsAfterFinished": LINGERS,
        "rayClusterSpec": {
            "rayVersion": version("ray"),
            "authOptions": {"mode": "token"},
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {"idleTimeoutSeconds": 300},
            "headGroupSpec": _head(image),
            "workerGroupSpecs": _groups(config, image, table_bytes),
        },
    }
    return _yaml(
        {"apiVersion": "ray.io/v1", "kind": "RayJob", "metadata": {"name": _dns_name(config.run.name)}, "spec": spec}
    )


def _head(image: str) -> dict[str, Any]:
    """On demand, and without CPUs for Ray: it runs the job's driver alone, whose end would be the job's."""
    stays = [{"key": key, "operator": "NotIn", "values": [value]} for key, value in _SPOT.items()]
    return {
        "rayStartParams": {"num-cpus": "0", "dashboard-host": "0.0.0.0"},
        "template": {
            "spec": {
                "affinity": {
                    "nodeAffinity": {
                        "requiredDuringSchedulingIgnoredDuringExecution": {
                            "nodeSelectorTerms": [{"matchExpressions": stays}]
                        }
                    }
                },
                "containers": [
                    {
                        **_container("ray-head", image, cpus=2, gibibytes=8),
                        "ports": [
                            {"name": "gcs-server", "containerPort": 6379},
                            {"name": "dashboard", "containerPort": 8265},
                            {"name": "client", "containerPort": 10001},
                        ],
                    }
                ],
            }
        },
    }


def _groups(config: Config, image: str, table_bytes: int) -> list[dict[str, Any]]:
    """A pod a worker with its first readers, on spot nodes where there are any; beside GPUs, pods for more readers."""
    least, most, gpus = config.train.least_workers, config.train.most_workers, config.train.gpus
    cpus = math.ceil(worker_cpus(config))
    gibibytes = math.ceil(table_bytes / 1024**3 + config.meta.memory / 1024) + BESIDE_GIB
    groups = [_group("workers", image, cpus, gibibytes, 0, least, most, gpus=int(gpus))]
    further = most * (config.data.most_readers - config.data.first_readers) * READER_CPUS
    if gpus and further:
        # There from the start: further readers take CPUs that are free, and ask for none that are not.
        pods = math.ceil(further / READER_POD_CPUS)
        groups.append(_group("readers", image, READER_POD_CPUS, READER_POD_GIB, pods, pods, pods))
    return groups


def _group(
    name: str, image: str, cpus: int, gibibytes: int, least: int, first: int, most: int, gpus: int = 0
) -> dict[str, Any]:
    prefer = [
        {"weight": 10, "preference": {"matchExpressions": [{"key": key, "operator": "In", "values": [value]}]}}
        for key, value in _SPOT.items()
    ]
    tolerations = [{"key": key, "operator": "Exists"} for key in (*_SPOT, "nvidia.com/gpu")[: None if gpus else -1]]
    return {
        "groupName": name,
        "replicas": first,
        "minReplicas": least,
        "maxReplicas": most,
        "rayStartParams": {},
        "template": {
            "spec": {
                "affinity": {"nodeAffinity": {"preferredDuringSchedulingIgnoredDuringExecution": prefer}},
                "tolerations": tolerations,
                "containers": [_container("ray-worker", image, cpus, gibibytes, gpus)],
            }
        },
    }


def _container(name: str, image: str, cpus: int, gibibytes: int, gpus: int = 0) -> dict[str, Any]:
    # Memory's request is its limit: a pod that is ended for memory which another took would be a fault of ours.
    size = {"cpu": str(cpus), "memory": f"{gibibytes}Gi", **({"nvidia.com/gpu": str(gpus)} if gpus else {})}
    return {"name": name, "image": image, "resources": {"requests": size, "limits": dict(size)}}


def _dns_name(name: str) -> str:
    """A name that KubeRay takes: it begins with a letter, and services of the cluster have up to 16 characters more."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "run"
    return (words if words[0].isalpha() else f"run-{words}")[:40].strip("-")


class _Dumper(yaml.SafeDumper):
    """Texts of several lines stay so, and nothing is an alias."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _text(dumper: yaml.SafeDumper, value: str) -> yaml.ScalarNode:
    return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)


_Dumper.add_representer(str, _text)


def _yaml(value: Any) -> str:
    return yaml.dump(value, Dumper=_Dumper, sort_keys=False, width=110)
