"""The RayCluster for KubeRay: fields that its CRD has, pods that fit the machine and the config, and no secret in it.

Tried here without a cluster. The field names are of KubeRay 1.7's CRD (ray.io_rayclusters.yaml) and of Kubernetes.
"""

import json
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny import job_text
from typer.testing import CliRunner

from raynium.cli.app import app
from raynium.cluster.kuberay import Pods, render_kuberay
from raynium.config.load import parse_config
from raynium.config.schema import Config
from raynium.errors import ConfigError

pytestmark = pytest.mark.quick

PODS = Pods(image="registry/raynium:1", ray_version="2.60.0", redis="redis.ray.svc:6379")
# Of each object that we write: every field that may stand in it. "" is what a list or a free table holds.
CONTAINER = {"name", "image", "resources", "securityContext", "command", "env"}
KNOWN: dict[str, set[str]] = {
    "": {"apiVersion", "kind", "metadata", "spec"},
    "metadata": {"name"},
    "spec": {
        *("rayVersion", "authOptions", "gcsFaultToleranceOptions", "enableInTreeAutoscaling", "autoscalerOptions"),
        *("headGroupSpec", "workerGroupSpecs"),
    },
    "spec.authOptions": {"mode", "secretName", "enableK8sTokenAuth"},
    "spec.gcsFaultToleranceOptions": {"redisAddress", "redisPassword", "redisUsername", "externalStorageNamespace"},
    "spec.autoscalerOptions": {"idleTimeoutSeconds", "version", "upscalingMode", "resources"},
    "spec.headGroupSpec": {"rayStartParams", "template", "serviceType"},
    "spec.workerGroupSpecs": {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"},
}
POD = {"serviceAccountName", "nodeSelector", "containers", "tolerations"}


def config(**changes: Any) -> Config:
    named = {"instance_type": "trn2.48xlarge", "accelerator": "neuron", "ranks_per_node": 64, "nodes": 4, **changes}
    changes = {f"cluster.{name}": value for name, value in named.items()} | {"tracking.uri": "http://mlflow:5000"}
    return parse_config(job_text(changes, root="s3://bucket/runs"))


def rendered(pods: Pods = PODS, **changes: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    cluster, policy = yaml.safe_load_all(render_kuberay(config(**changes), pods))
    return cluster, policy


def workers_of(cluster: dict[str, Any]) -> dict[str, Any]:
    (group,) = cluster["spec"]["workerGroupSpecs"]
    return group


def test_every_field_is_one_that_kuberay_knows() -> None:
    assert "&id" not in render_kuberay(config(), PODS), "an anchor is hard to read"
    cluster, policy = rendered(spares=1)
    assert (cluster["apiVersion"], cluster["kind"]) == ("ray.io/v1", "RayCluster")
    for path, known in KNOWN.items():
        found: Any = cluster
        for part in filter(None, path.split(".")):
            found = found[part]
        for each in found if isinstance(found, list) else [found]:
            assert set(each) <= known, path
    for group in (cluster["spec"]["headGroupSpec"], workers_of(cluster)):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values()), "KubeRay takes strings only"
        assert set(group["template"]) == {"spec"} and set(group["template"]["spec"]) <= POD
        for container in group["template"]["spec"]["containers"]:
            assert set(container) <= CONTAINER and set(container["resources"]) <= {"requests", "limits"}
    assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")


@pytest.mark.parametrize(
    ("instance_type", "accelerator", "ranks", "devices", "cores"),
    [
        ("trn1.32xlarge", "neuron_xla", 32, {"aws.amazon.com/neuron": "16", "vpc.amazonaws.com/efa": "8"}, 32),
        ("trn2.48xlarge", "neuron", 64, {"aws.amazon.com/neuron": "16", "vpc.amazonaws.com/efa": "16"}, 64),
        ("trn2.3xlarge", "neuron", 4, {"aws.amazon.com/neuron": "1", "vpc.amazonaws.com/efa": "1"}, 4),
    ],
)
def test_a_pod_takes_all_devices_of_its_machine_and_tells_ray_of_their_cores(
    instance_type: str, accelerator: str, ranks: int, devices: dict[str, str], cores: int
) -> None:
    cluster, _ = rendered(instance_type=instance_type, accelerator=accelerator, ranks_per_node=ranks)
    group = workers_of(cluster)
    spec = group["template"]["spec"]
    assert spec["containers"][0]["resources"] == {"limits": devices}
    assert spec["nodeSelector"] == {"node.kubernetes.io/instance-type": instance_type}
    assert [each["key"] for each in spec["tolerations"]] == ["aws.amazon.com/neuron"]
    # KubeRay writes `ray start --resources=<this>` into a shell's command line.
    (words,) = shlex.split(group["rayStartParams"]["resources"])
    assert json.loads(words) == {"neuron_cores": cores, "accelerator_type:aws-neuron-core": 1}


def test_there_are_as_many_pods_as_the_run_takes_and_at_least_what_it_goes_on_with() -> None:
    def sizes(**changes: Any) -> tuple[int, int, int]:
        group = workers_of(rendered(**changes)[0])
        return group["minReplicas"], group["replicas"], group["maxReplicas"]

    assert sizes() == (4, 4, 4)
    assert sizes(spares=2) == (4, 6, 6)
    assert sizes(spares=1, min_nodes=2) == (2, 5, 5)


def test_pods_without_a_device_take_the_cores_of_their_ranks() -> None:
    group = workers_of(rendered(instance_type="m7i.4xlarge", accelerator="cpu", ranks_per_node=8)[0])
    assert group["rayStartParams"] == {"num-cpus": "8"}
    assert group["template"]["spec"]["containers"][0]["resources"] == {"requests": {"cpu": "8"}}
    assert "tolerations" not in group["template"]["spec"]


def test_what_the_head_knows_outlives_it_in_redis_and_its_supervisor_stands_beside_it() -> None:
    cluster, _ = rendered()
    assert cluster["spec"]["gcsFaultToleranceOptions"] == {
        "redisAddress": "redis.ray.svc:6379",
        "redisPassword": {"valueFrom": {"secretKeyRef": {"name": "raynium-redis", "key": "password"}}},
    }
    ray_head, supervisor = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert ray_head["name"] == "ray-head", "the first container is Ray's"
    assert supervisor["command"] == ["raynium", "supervisor", "--root", "s3://bucket/runs"]
    done = CliRunner().invoke(app, [*supervisor["command"][1:], "--help"])
    assert done.exit_code == 0, done.output


def test_nobody_comes_in_without_a_token_nor_from_outside_of_the_cluster() -> None:
    cluster, policy = rendered(replace(PODS, name="mine", token_secret="ray-token"))
    text = yaml.safe_dump_all([cluster, policy])
    assert cluster["spec"]["authOptions"] == {"mode": "token", "secretName": "ray-token"}
    assert cluster["spec"]["headGroupSpec"]["rayStartParams"]["dashboard-host"] == "127.0.0.1"
    for word in ("hostNetwork", "hostPort", "NodePort", "LoadBalancer", "ngress:\n  host", "privileged", "hostPath"):
        assert word not in text
    own = {"matchLabels": {"ray.io/cluster": "mine"}}
    assert policy["spec"] == {
        "podSelector": own,
        "policyTypes": ["Ingress"],
        "ingress": [{"from": [{"podSelector": own}]}],
    }


def test_secrets_are_named_and_never_written() -> None:
    cluster, _ = rendered()
    found: list[dict[str, Any]] = []

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if re.search("(?i)token|password", str(node.get("name", ""))) and "value" in node:
                found.append(node)
            for each in node.values():
                walk(each)
        elif isinstance(node, list):
            for each in node:
                walk(each)

    walk(cluster)
    assert found == []
    env = cluster["spec"]["headGroupSpec"]["template"]["spec"]["containers"][1]["env"]
    assert env[1]["valueFrom"] == {"secretKeyRef": {"name": "raynium-token", "key": "auth_token"}}


@pytest.mark.parametrize(
    ("pods", "changes", "problem"),
    [
        (PODS, {"instance_type": None}, r"instance_type is None; set one of trn1.2xlarge, .*m7i.2xlarge"),
        (replace(PODS, name="Raynium_1"), {}, "name is 'Raynium_1'; it must be a Kubernetes name of at most 40"),
        (replace(PODS, token_secret=""), {}, "token_secret is ''; it must be a Kubernetes name"),
        (
            replace(PODS, redis="redis://:hunter2@redis"),
            {},
            r"^redis is not HOST:PORT: name the server alone; its password is in the Secret redis_secret$",
        ),
    ],
)
def test_a_wrong_request_is_refused_with_the_rule(pods: Pods, changes: dict[str, Any], problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        render_kuberay(config(**changes), pods)


def test_all_problems_come_at_once(tmp_path: Path) -> None:
    local = parse_config(job_text({}, root=tmp_path))
    with pytest.raises(ConfigError, match=rf"run.root is {tmp_path}, which pods do not share: set s3://") as refused:
        render_kuberay(local, replace(PODS, redis="nowhere"))
    assert len(refused.value.problems) == 4
    assert any("tracking.uri is null, and pods share no disk" in problem for problem in refused.value.problems)


def test_the_command_writes_it(tmp_path: Path) -> None:
    (tmp_path / "job.yaml").write_text(job_text({"cluster.instance_type": "m7i.2xlarge"}, root="s3://bucket/runs"))
    command = [
        "cluster",
        "kuberay",
        str(tmp_path / "job.yaml"),
        "cluster.nodes=3",
        "--image",
        "raynium:1",
        "tracking.uri=http://mlflow:5000",
    ]
    done = CliRunner().invoke(app, [*command, "--redis", "redis:6379", "--output", str(tmp_path / "ray/cluster.yaml")])
    assert done.exit_code == 0, done.output
    cluster, _ = yaml.safe_load_all((tmp_path / "ray/cluster.yaml").read_text())
    assert workers_of(cluster)["replicas"] == 3 and re.fullmatch(r"2\.\d+\.\d+", cluster["spec"]["rayVersion"])
