"""What `auto` becomes on a Ray cluster, before any node of it is asked for."""

from pathlib import Path
from typing import Any

import pytest
from tiny import job_text

from raynium.config.load import parse_config
from raynium.errors import LaunchError
from raynium.launch.settle import settled

pytestmark = pytest.mark.quick

# ray.cluster_resources() of the clusters that cluster/*.yaml start, while only the head is there (CPU: 0).
HEAD = {"node:10.0.16.9": 1.0, "memory": 24e9, "object_store_memory": 8e9, "node:__internal_head__": 1.0}


@pytest.fixture
def accelerator(tmp_path: Path) -> Any:
    def settle(resources: dict[str, float], **cluster: Any) -> str:
        config = parse_config(job_text({"cluster.accelerator": "auto"}, root=tmp_path))
        asked = config.model_copy(update={"cluster": config.cluster.model_copy(update=cluster)})
        return settled(asked, cluster_resources=HEAD | resources, saved=None).cluster.accelerator

    return settle


def test_auto_is_what_the_nodes_have(accelerator: Any) -> None:
    assert accelerator({"CPU": 192.0, "neuron_cores": 64.0}) == "neuron"
    assert accelerator({"CPU": 96.0, "GPU": 8.0}) == "cuda"
    assert accelerator({"CPU": 16.0}) == "cpu"


def test_a_head_without_nodes_does_not_make_a_trainium_cluster_train_on_its_cpus(accelerator: Any) -> None:
    with pytest.raises(LaunchError, match="no node of the cluster that could train has started yet"):
        accelerator({})
    assert accelerator({}, accelerator="cpu") == "cpu"
    assert accelerator({}, instance_type="trn2.48xlarge") == "neuron"
    assert accelerator({}, instance_type="p5.48xlarge") == "cuda"
