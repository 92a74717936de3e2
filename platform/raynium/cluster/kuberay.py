"""What `kubectl apply` is given for a cluster of pods: KubeRay's RayCluster for one job's config, and who may reach it.

The fields are those of KubeRay 1.7. No secret is in the text: pods get Ray's token and Redis' password from Secrets.
"""

import json
import re
from dataclasses import dataclass
from typing import Any

import yaml

from raynium.config.schema import Config
from raynium.errors import ConfigError
from raynium.hardware.catalog import CPU_INSTANCES, INSTANCES, Instance

# The one that KubeRay itself reads, and the supervisor's container.
TOKEN_KEY = "auth_token"
PASSWORD_KEY = "password"
# As long as an EC2 node of ours may be idle.
IDLE_SECONDS = 900
_NAME = re.compile(r"[a-z]([a-z0-9-]{0,38}[a-z0-9])?")
_ADDRESS = re.compile(r"[A-Za-z0-9.-]+:\d{1,5}")


@dataclass(frozen=True, kw_only=True)
class Pods:
    """What a job's config does not say.

    image: a container image with Raynium, Ray and the Neuron libraries. ray_version: that it has. redis: host:port of a
    Redis outside of the cluster, where Ray's head keeps what must outlive it. service_account: that may read and write
    run.root. token_secret, redis_secret: names of Secrets, with the keys auth_token and password.
    """

    image: str
    ray_version: str
    redis: str
    name: str = "raynium"
    service_account: str = "raynium"
    token_secret: str = "raynium-token"
    redis_secret: str = "raynium-redis"


def render_kuberay(config: Config, pods: Pods) -> str:
    """YAML of a RayCluster and a NetworkPolicy. Raises ConfigError with every problem."""
    if problems := _problems(config, pods):
        raise ConfigError(problems)
    head = (
        f"# {pods.name}: a head, its supervisor, and {config.cluster.nodes} + {config.cluster.spares} pods of "
        f"{config.cluster.instance_type}. Rendered by\n# `raynium cluster kuberay`: render it again rather than edit "
        "it. How to use it: cluster/README.md, Kubernetes.\n"
    )
    documents = [_ray_cluster(config, pods), _network_policy(pods)]
    return head + yaml.safe_dump_all(documents, sort_keys=False, width=120)


def _problems(config: Config, pods: Pods) -> list[str]:
    cluster, types = config.cluster, [*(name for name, each in INSTANCES.items() if each.is_neuron), *CPU_INSTANCES]
    problems = []
    if cluster.instance_type not in types:
        problems.append(f"cluster.instance_type is {cluster.instance_type}; set one of {', '.join(types)}")
    if not config.run.root.startswith("s3://"):
        problems.append(f"run.root is {config.run.root}, which pods do not share: set s3://BUCKET/FOLDER")
    if config.tracking.uri is None:
        problems.append(
            "tracking.uri is null, and pods share no disk for MLflow's database: set a server's http:// URL"
        )
    for name in ("name", "service_account", "token_secret", "redis_secret"):
        if not _NAME.fullmatch(getattr(pods, name)):
            problems.append(
                f"{name} is {getattr(pods, name)!r}; it must be a Kubernetes name of at most 40 characters: lower-case "
                "letters, digits and '-', a letter first"
            )
    if not _ADDRESS.fullmatch(pods.redis):
        # It may hold a password, which is not repeated.
        problems.append("redis is not HOST:PORT: name the server alone; its password is in the Secret redis_secret")
    return problems


def _ray_cluster(config: Config, pods: Pods) -> dict[str, Any]:
    cluster = config.cluster
    password = {"secretKeyRef": {"name": pods.redis_secret, "key": PASSWORD_KEY}}
    return {
        "apiVersion": "ray.io/v1",
        "kind": "RayCluster",
        "metadata": {"name": pods.name},
        "spec": {
            "rayVersion": pods.ray_version,
            "authOptions": {"mode": "token", "secretName": pods.token_secret},
            "gcsFaultToleranceOptions": {"redisAddress": pods.redis, "redisPassword": {"valueFrom": password}},
            "enableInTreeAutoscaling": True,
            "autoscalerOptions": {"idleTimeoutSeconds": IDLE_SECONDS},
            "headGroupSpec": {
                # As on EC2: nothing is placed there but drivers and coordinators, and the dashboard is on its loopback.
                "rayStartParams": {"num-cpus": "0", "dashboard-host": "127.0.0.1"},
                "template": _template(pods, [_container(pods, "ray-head", _HEAD_RESOURCES), _supervisor(config, pods)]),
            },
            "workerGroupSpecs": [
                {
                    "groupName": "nodes",
                    "replicas": cluster.seats,
                    "minReplicas": cluster.min_nodes or cluster.nodes,
                    "maxReplicas": cluster.seats,
                    **_worker_group(config, pods),
                }
            ],
        },
    }


_HEAD_RESOURCES = {
    "requests": {"cpu": "4", "memory": "16Gi"},
    "limits": {"memory": "16Gi"},
}


def _worker_group(config: Config, pods: Pods) -> dict[str, Any]:
    """One pod fills a machine of the type: it takes all devices of it, or, without any, the cores of its ranks."""
    name = config.cluster.instance_type
    assert name is not None
    if name in CPU_INSTANCES:
        cores = config.cluster.ranks_per_node
        resources: dict[str, Any] = {"requests": {"cpu": str(cores)}}
        return {
            "rayStartParams": {"num-cpus": str(cores)},
            "template": _template(pods, [_container(pods, "ray-worker", resources)], instance_type=name),
        }
    instance = INSTANCES[name]
    devices = {"aws.amazon.com/neuron": str(instance.chips)}
    if instance.efa_interfaces:
        devices["vpc.amazonaws.com/efa"] = str(instance.efa_interfaces)
    template = _template(pods, [_container(pods, "ray-worker", {"limits": devices})], instance_type=name)
    template["spec"]["tolerations"] = [{"key": "aws.amazon.com/neuron", "operator": "Exists", "effect": "NoSchedule"}]
    return {
        "rayStartParams": {"num-cpus": str(instance.vcpus), "resources": _ray_resources(instance)},
        "template": template,
    }


def _ray_resources(instance: Instance) -> str:
    """Quoted for the shell that KubeRay starts Ray with. Stated, since KubeRay knows neuroncore devices alone."""
    return f"'{json.dumps({'neuron_cores': instance.cores, 'accelerator_type:aws-neuron-core': 1})}'"


def _container(pods: Pods, name: str, resources: dict[str, Any]) -> dict[str, Any]:
    # Devices and EFA come from device plugins, which need no privileges.
    confined = {"allowPrivilegeEscalation": False}
    return {"name": name, "image": pods.image, "resources": resources, "securityContext": confined}


def _supervisor(config: Config, pods: Pods) -> dict[str, Any]:
    """Beside the head, so that a new one has it at once. KubeRay gives the token to Ray's own containers only."""
    token = {"secretKeyRef": {"name": pods.token_secret, "key": TOKEN_KEY}}
    return {
        **_container(pods, "supervisor", {"requests": {"cpu": "100m", "memory": "512Mi"}, "limits": {"memory": "2Gi"}}),
        "command": ["raynium", "supervisor", "--root", config.run.root],
        "env": [{"name": "RAY_AUTH_MODE", "value": "token"}, {"name": "RAY_AUTH_TOKEN", "valueFrom": token}],
    }


def _template(pods: Pods, containers: list[dict[str, Any]], *, instance_type: str | None = None) -> dict[str, Any]:
    selector = {} if instance_type is None else {"nodeSelector": {"node.kubernetes.io/instance-type": instance_type}}
    return {"spec": {"serviceAccountName": pods.service_account, **selector, "containers": containers}}


def _network_policy(pods: Pods) -> dict[str, Any]:
    """Only the cluster's own pods reach its ports; `kubectl port-forward` does not come by the network."""

    def own() -> dict[str, Any]:
        return {"matchLabels": {"ray.io/cluster": pods.name}}

    return {
        "apiVersion": "networking.k8s.io/v1",
        "kind": "NetworkPolicy",
        "metadata": {"name": pods.name},
        "spec": {"podSelector": own(), "policyTypes": ["Ingress"], "ingress": [{"from": [{"podSelector": own()}]}]},
    }
