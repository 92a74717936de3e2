"""What `auto` means for one run, decided before anything is written: the config that is logged is the one that ran."""

from collections.abc import Mapping
from typing import Any

from raynium.accelerators import detect, native_dtype, native_fsdp
from raynium.config.schema import Config
from raynium.errors import LaunchError
from raynium.hardware.catalog import INSTANCES
from raynium.launch.ray_environment import session_parent


def settled(
    config: Config, *, cluster_resources: Mapping[str, float] | None, saved: Mapping[str, Any] | None
) -> Config:
    """`cluster.accelerator`, `engine.dtype` and the native engine's `engine.fsdp` without `auto`.

    cluster_resources: Ray's, or None for a cluster that will be started on this machine. saved: the config in the
    run's newest checkpoint; a run keeps the precision it began with, also where another would be faster. An imported
    model's has none, since it was not trained here. Raises LaunchError if nobody can say yet what `auto` is.
    """
    cluster, engine = config.cluster, config.engine
    if cluster.accelerator == "auto":
        cluster = cluster.model_copy(update={"accelerator": _accelerator(config, cluster_resources)})
    if engine.dtype == "auto":
        trained_in = saved["engine"]["dtype"] if saved is not None and "engine" in saved else None
        dtype = trained_in or native_dtype(cluster.accelerator)
        engine = engine.model_copy(update={"dtype": dtype})
    if engine.fsdp == "auto" and engine.kind == "native":
        engine = engine.model_copy(update={"fsdp": native_fsdp(cluster.accelerator, compile=engine.compile)})
    return config.model_copy(update={"cluster": cluster, "engine": engine})


def check_this_machine(config: Config) -> None:
    """Whether a cluster can be started here, and can run this config at all; it would be waited for without an end.

    config: settled. Raises LaunchError.
    """
    session_parent()
    if (cluster := config.cluster).seats > 1:
        spares = f" and cluster.spares {cluster.spares}" if cluster.spares else ""
        raise LaunchError(
            f"cluster.nodes is {cluster.nodes}{spares}, and a Ray cluster that is started here has one node: name "
            "one that runs with --address (for example auto), or set cluster.nodes=1 without spares, and more "
            "cluster.ranks_per_node"
        )
    detect(config.cluster.accelerator)


def _accelerator(config: Config, cluster_resources: Mapping[str, float] | None) -> str:
    if cluster_resources is None:
        return detect("auto").name
    instance = INSTANCES.get(config.cluster.instance_type or "")
    # The rules have seen to it that the engine fits the instance type.
    if "neuron_cores" in cluster_resources or (instance is not None and instance.is_neuron):
        return "neuron_xla" if config.engine.kind == "nxd" else "neuron"
    if "GPU" in cluster_resources or instance is not None:
        return "cuda"
    if "CPU" in cluster_resources:
        return "cpu"
    # A head whose autoscaler has started no node. It may start a Trainium node for its CPUs, if it is asked for CPUs.
    raise LaunchError(
        "cluster.accelerator is 'auto', and no node of the cluster that could train has started yet: set "
        "cluster.accelerator to what its nodes will have (neuron, neuron_xla, cuda or cpu), or cluster.instance_type"
    )
