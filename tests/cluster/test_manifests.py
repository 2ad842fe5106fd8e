"""The manifests of cluster/ and those that `metatrain submit --render` writes, against their readers' schemas.

Of three kinds: KubeRay's fields by a schema that was written here after KubeRay's types, and by what its operator
refuses beyond them; pods by Kubernetes' own schema, of the package kubernetes-validate; `ray up` by Ray's own.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import ray
import yaml
from packaging.version import Version

from metatrain.config import load_config, validated
from metatrain.submit.jobs import ENTRYPOINT
from metatrain.submit.rayjob import manifest
from metatrain.train.checks import RECIPE_VARIABLE

ROOT = Path(__file__).parents[2]
SCHEMA = yaml.safe_load((Path(__file__).parent / "kuberay-v1.6.schema.yaml").read_text())
TABLES = 3 * 1024**3
#: Two releases of those that kubernetes-validate knows: an older one and the newest.
KUBERNETES = ("1.33", "1.37")


def check(kind: str, text: str) -> dict[str, Any]:
    """The parsed manifest, which has that kind and KubeRay's fields."""
    found = yaml.safe_load(text)
    jsonschema.validate(found, {**SCHEMA["$defs"][kind], "$defs": SCHEMA["$defs"]})
    check_cluster(found["spec"]["rayClusterSpec"] if kind == "RayJob" else found["spec"])
    return found


def check_cluster(spec: dict[str, Any]) -> None:
    """What KubeRay's operator refuses though its types allow it, and Kubernetes' view of the pods."""
    assert spec["authOptions"]["mode"] == "token"
    assert Version(spec["rayVersion"]) >= Version("2.52.0")  # of tokens; 2.47 is that of the second autoscaler
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert "restartPolicy" not in group["template"]["spec"], "the second autoscaler makes pods anew"
        for version in KUBERNETES:
            pods = {"apiVersion": "v1", "kind": "PodTemplate", "template": group["template"]}
            kubernetes_validate.validate(pods, version, strict=True)
    for group in spec["workerGroupSpecs"]:
        assert 0 <= group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]


def test_the_schema_is_one():
    jsonschema.Draft202012Validator.check_schema(SCHEMA)


@pytest.mark.parametrize("recipe", sorted(path.name for path in (ROOT / "configs").glob("*.yaml")))
def test_every_recipe_renders_to_a_rayjob_that_carries_it(recipe: str):
    config = load_config(str(ROOT / "configs" / recipe))
    job = check("RayJob", manifest(config, "metatrain:1", {"NCCL_DEBUG": "INFO"}, TABLES))
    spec = job["spec"]
    assert spec["entrypoint"] == ENTRYPOINT
    variables = yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]
    assert validated(yaml.safe_load(variables[RECIPE_VARIABLE]), where=recipe) == config
    assert variables["NCCL_DEBUG"] == "INFO"
    groups = {group["groupName"]: group for group in spec["rayClusterSpec"]["workerGroupSpecs"]}
    assert set(groups) == ({"workers", "readers"} if recipe == "cluster-gpu.yaml" else {"workers"})


def test_pods_hold_what_the_run_takes():
    raw = {"run": {"name": "My Run_2"}, "train": {"workers": 3}, "data": {"readers_per_worker": 3}}
    cpu = check("RayJob", manifest(validated(raw, "test"), "metatrain:1", {}, TABLES))
    assert cpu["metadata"]["name"] == "my-run-2"
    (workers,) = cpu["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    (container,) = workers["template"]["spec"]["containers"]
    # A worker and three readers of half a CPU; tables, an inner loop of 1 GiB, and 4 GiB besides.
    assert container["resources"]["limits"] == {"cpu": "3", "memory": "8Gi"}
    assert workers["maxReplicas"] == 3
    raw["train"]["gpus"] = True
    raw["data"] = {"readers_per_worker": "auto", "most_readers_per_worker": 5}
    gpu = check("RayJob", manifest(validated(raw, "test"), "metatrain:1", {}, TABLES))
    workers, readers = gpu["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    limits = workers["template"]["spec"]["containers"][0]["resources"]["limits"]
    assert (limits["cpu"], limits["nvidia.com/gpu"], workers["replicas"]) == ("2", "1", 3)
    # Three workers may come to have four further readers of half a CPU each: two pods of four.
    assert readers["template"]["spec"]["containers"][0]["resources"]["limits"]["cpu"] == "4"
    assert (readers["replicas"], readers["minReplicas"], readers["maxReplicas"]) == (2, 2, 2)


@pytest.mark.parametrize(
    ("run", "job"),
    [
        ("My Run_2", "my-run-2"),
        ("1m-users", "run-1m-users"),
        ("_", "run"),
        ("x" * 60, "x" * 40),
        ("2" * 60, "run-" + "2" * 36),
    ],
)
def test_any_name_of_a_run_becomes_one_that_kubernetes_takes(run: str, job: str):
    config = validated({"run": {"name": run}}, "test")
    assert check("RayJob", manifest(config, "metatrain:1", {}, TABLES))["metadata"]["name"] == job


def test_a_range_of_workers_is_one_of_pods():
    raw = {"train": {"workers": {"min": 2, "max": 6}}}
    job = check("RayJob", manifest(validated(raw, "test"), "metatrain:1", {}, TABLES))
    (workers,) = job["spec"]["rayClusterSpec"]["workerGroupSpecs"]
    assert (workers["replicas"], workers["maxReplicas"]) == (2, 6)


def test_a_misspelt_field_would_be_found():
    job = yaml.safe_load(manifest(load_config(str(ROOT / "configs/demo.yaml")), "metatrain:1", {}, TABLES))
    job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]["toleration"] = []
    with pytest.raises(jsonschema.ValidationError, match="toleration"):
        check("RayJob", yaml.safe_dump(job))


@pytest.mark.parametrize(
    ("where", "value"), [("tolerations", [{"key": 1}]), ("containers", [{"name": "a", "resources": {"limits": 2}}])]
)
def test_kubernetes_own_schema_sees_the_pods(where: str, value: Any):
    job = yaml.safe_load(manifest(load_config(str(ROOT / "configs/demo.yaml")), "metatrain:1", {}, TABLES))
    spec = job["spec"]["rayClusterSpec"]
    spec["workerGroupSpecs"][0]["template"]["spec"][where] = value
    with pytest.raises(kubernetes_validate.ValidationError):
        check_cluster(spec)


def test_the_rayjob_of_the_repository_is_what_is_rendered():
    config = load_config(str(ROOT / "configs/cluster-gpu.yaml"))
    written = check("RayJob", (ROOT / "cluster/rayjob.yaml").read_text())
    rendered = check("RayJob", manifest(config, "metatrain:latest-gpu", {}, TABLES))
    recipes = [yaml.safe_load(job["spec"].pop("runtimeEnvYAML"))["env_vars"] for job in (written, rendered)]
    assert written == rendered, "python tools/cluster_manifest.py writes it anew"
    # Fields that came later have their defaults.
    assert [validated(yaml.safe_load(of[RECIPE_VARIABLE]), where="rayjob.yaml") for of in recipes] == [config, config]


def test_the_cluster_that_stays_has_kuberays_fields():
    cluster = check("RayCluster", (ROOT / "cluster/raycluster.yaml").read_text())
    assert cluster["spec"]["rayVersion"] == ray.__version__
    assert cluster["spec"]["authOptions"] == {"mode": "token"}
    assert cluster["spec"]["headGroupSpec"]["rayStartParams"]["num-cpus"] == "0"
    assert {group["groupName"] for group in cluster["spec"]["workerGroupSpecs"]} == {"cpu", "gpu"}


def test_virtual_machines_are_described_in_rays_own_fields():
    schema = json.loads((Path(ray.__file__).parent / "autoscaler/ray-schema.json").read_text())
    described = yaml.safe_load((ROOT / "cluster/ray-up-aws.yaml").read_text())
    jsonschema.validate(described, schema)
    assert described["head_node_type"] in described["available_node_types"]


@pytest.mark.parametrize("name", ["Dockerfile", "Dockerfile.gpu"])
def test_images_copy_what_there_is(name: str):
    text = (ROOT / "cluster" / name).read_text()
    copied = [word for line in re.findall(r"^COPY (.*)$", text, re.M) for word in line.split()[:-1]]
    required = re.findall(r"/build/(requirements/[\w.-]+)", text)
    assert len(copied) >= 4
    assert required
    for path in (*copied, *required):
        assert (ROOT / path).exists(), path
    ignored = (ROOT / ".dockerignore").read_text().splitlines()
    assert all(f"!{path.split('/')[0]}" in ignored for path in copied)
