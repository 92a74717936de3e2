"""Cluster files and policies: the committed ones are current, and what they may never hold."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from raynium.cli.app import app
from raynium.cluster.policies import HOLDERS, Holder, render_policy
from raynium.cluster.render import Workers, render_cluster
from raynium.cluster.site import Site, load_site
from raynium.errors import ConfigError
from raynium.hardware.catalog import CPU_INSTANCES, INSTANCES

pytestmark = pytest.mark.quick

ROOT = Path(__file__).parents[1]
FILES = ("trn1.32xlarge", "trn2.48xlarge", "trn2.3xlarge", "cpu")
BLOCK = "cr-0123456789abcdef0"


@pytest.fixture(scope="module")
def site() -> Site:
    return load_site(ROOT / "cluster/site.yaml")


def refused(workers: Workers, site: Site) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        render_cluster(site, workers)
    return caught.value.problems


# ------------------------------------------------------------------------------------------------- committed files


@pytest.mark.parametrize("name", FILES)
def test_a_committed_file_is_what_its_own_command_renders(name: str):
    committed = (ROOT / f"cluster/{name}.yaml").read_text()
    command = re.search(r"`raynium (cluster render .+)`", committed)
    assert command is not None
    done = CliRunner().invoke(app, [*shlex.split(command[1]), "--site", str(ROOT / "cluster/site.yaml")])
    assert done.exit_code == 0, done.output
    assert done.output == committed, f"render it again: raynium {command[1]} --output cluster/{name}.yaml"


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_committed_policy_is_current(holder: Holder, site: Site):
    committed = (ROOT / f"cluster/policies/{holder}.json").read_text()
    assert committed == render_policy(site, holder), f"raynium cluster policy {holder} --output cluster/policies/…"


def test_the_four_kinds_of_cluster_are_there():
    types = {}
    for name in FILES:
        worker = yaml.safe_load((ROOT / f"cluster/{name}.yaml").read_text())["available_node_types"]["worker"]
        types[name] = (worker["node_config"]["InstanceType"], worker["resources"].get("neuron_cores"))
    assert types == {
        "trn1.32xlarge": ("trn1.32xlarge", 32),
        "trn2.48xlarge": ("trn2.48xlarge", 64),
        "trn2.3xlarge": ("trn2.3xlarge", 4),
        "cpu": ("m7i.4xlarge", None),
    }


# ------------------------------------------------------------------------------------------------- every rendering


@pytest.mark.parametrize(
    "name", [n for n, each in INSTANCES.items() if each.is_neuron and each.markets] + list(CPU_INSTANCES)
)
def test_whatever_can_be_rendered_is_private_and_asks_for_a_token(name: str, site: Site):
    file = yaml.safe_load(render_cluster(site, Workers(instance_type=name, market=first_market(name))))
    assert file["provider"]["use_internal_ips"] is True
    start = " ".join(file["head_start_ray_commands"])
    assert "--dashboard-host=127.0.0.1" in start and "0.0.0.0" not in start
    for node_type in file["available_node_types"].values():
        config = node_type["node_config"]
        assert config["MetadataOptions"]["HttpTokens"] == "required"
        assert "SubnetIds" not in config and "SecurityGroupIds" not in config  # Ray refuses both places at once
        for interface in config["NetworkInterfaces"]:
            assert interface["Groups"] == [site.security_group]
    for command in [*file["head_start_ray_commands"], *file["worker_start_ray_commands"]]:
        assert command.startswith("source ~/.raynium-env && ")
    assert "RAY_AUTH_MODE=token" in (ROOT / "cluster/setup_node.sh").read_text()
    assert file["available_node_types"]["head"]["resources"] == {"CPU": 0}


def first_market(name: str) -> Any:
    return "on-demand" if name in CPU_INSTANCES else (INSTANCES[name].markets or ())[0]


def test_nodes_that_are_paid_for_all_start(site: Site):
    workers = Workers(instance_type="trn2.48xlarge", max_workers=3, market="capacity-block", reservation=BLOCK)
    worker = yaml.safe_load(render_cluster(site, workers))["available_node_types"]["worker"]
    assert (worker["min_workers"], worker["max_workers"]) == (3, 3)


def test_an_image_of_ones_own_is_taken_by_head_and_workers(site: Site):
    workers = Workers(instance_type="trn2.3xlarge", image="ami-0123456789abcdef0")
    types = yaml.safe_load(render_cluster(site, workers))["available_node_types"]
    assert {each["node_config"]["ImageId"] for each in types.values()} == {"ami-0123456789abcdef0"}


# ------------------------------------------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("workers", "message"),
    [
        (Workers(instance_type="trn2.48xl"), "did you mean trn2.48xlarge or trn2u.48xlarge?"),
        (Workers(instance_type="p5.48xlarge"), "no cluster file can be rendered for instance type 'p5.48xlarge'"),
        (Workers(instance_type="zzz"), "there are trn1.2xlarge, "),
        (Workers(instance_type="trn2u.48xlarge", market="spot"), "EC2 sells trn2u.48xlarge as on-demand, capacity-b"),
        (Workers(instance_type="trn1.32xlarge", max_workers=0), "max_workers is 0; it must be 1 to 1000"),
        (Workers(instance_type="trn1.32xlarge", min_workers=3), "min_workers is 3; it must be 0 to max_workers, 2"),
        (Workers(instance_type="trn1.32xlarge", market="capacity-block"), "started by the id of its reservation"),
        (
            Workers(instance_type="trn1.32xlarge", market="capacity-block", reservation=BLOCK, min_workers=1),
            "all nodes of a Capacity Block start: leave it out",
        ),
        (Workers(instance_type="trn1.32xlarge", reservation=BLOCK), "which only market capacity-block uses"),
        (Workers(instance_type="trn1.32xlarge", image="x}\n"), "it must be an id, ami-…, or resolve:ssm:"),
    ],
)
def test_a_wrong_request_is_refused_with_the_rule(workers: Workers, message: str, site: Site):
    (problem,) = refused(workers, site)
    assert message in problem


def test_all_problems_come_at_once(site: Site):
    workers = Workers(instance_type="m7i.4xlarge", market="capacity-block", max_workers=0, image="latest")
    assert len(refused(workers, site)) == 4


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"subnet": "subnet-1; rm -rf /"}, "it must be a private subnet's id"),
        ({"storage": "s3://bucket"}, "it must be a bucket and a folder of it"),
        ({"account": 123456789012}, "it must be the 12 digits of the account in quotes"),
        ({"cluster_name": "raynium\nx"}, "it must be 2 to 31 of a-z"),
        ({"secuirty_group": "sg-0123456789abcdef0"}, "secuirty_group is not a field; did you mean security_group?"),
        ({"zzz": 1}, "zzz is not a field; they are ['cluster_name'"),
        ({"region": None}, "region is null; it must be a region, like us-west-2"),
        ({"availability_zone": "us-east-1a"}, "availability_zone us-east-1a is not in region us-west-2"),
    ],
)
def test_a_wrong_site_is_refused_with_the_rule(tmp_path: Path, change: dict[str, Any], message: str):
    values = yaml.safe_load((ROOT / "cluster/site.yaml").read_text()) | change
    (tmp_path / "site.yaml").write_text(yaml.safe_dump(values))
    with pytest.raises(ConfigError) as caught:
        load_site(tmp_path / "site.yaml")
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "cannot be read"),
        ("region: \udcff", "cannot be read (it is no UTF-8 text)"),
        ("a: [", "is not YAML"),
        ("- x", "must hold fields"),
        ("{}", "region is missing; give"),
    ],
)
def test_a_site_file_that_is_none_is_refused(tmp_path: Path, text: str | None, message: str):
    path = tmp_path / "site.yaml"
    if text is not None:
        path.write_text(text, encoding="utf-8", errors="surrogateescape")
    with pytest.raises(ConfigError, match=re.escape(message)):
        load_site(path)


# ------------------------------------------------------------------------------------------------- policies


@pytest.mark.parametrize("holder", ["operator", "head", "worker"])
def test_policies_allow_little(holder: Holder, site: Site):
    for statement in json.loads(render_policy(site, holder))["Statement"]:
        actions = [statement["Action"]] if isinstance(statement["Action"], str) else statement["Action"]
        resources = [statement["Resource"]] if isinstance(statement["Resource"], str) else statement["Resource"]
        assert statement["Effect"] == "Allow"
        for action in actions:
            assert "*" not in action
            if action.startswith("iam:"):  # handing on one role, to instances
                assert action == "iam:PassRole" and all(each.startswith("arn:aws:iam::") for each in resources)
                assert all(":role/raynium-" in each and "*" not in each for each in resources)
                assert statement["Condition"] == {"StringEquals": {"iam:PassedToService": "ec2.amazonaws.com"}}
            if action.startswith("s3:") and not action.startswith("s3:ListBucket"):
                assert resources == [f"arn:aws:s3:::{site.bucket}/{site.prefix}/*"]
            if action.startswith("s3:ListBucket"):
                assert resources == [f"arn:aws:s3:::{site.bucket}"]
                assert statement["Condition"]["StringLikeIfExists"]["s3:prefix"] == [site.prefix, f"{site.prefix}/*"]
            if resources == ["*"]:
                assert action.startswith("ec2:Describe")
            if action in ("ec2:TerminateInstances", "ec2:RebootInstances", "ec2:StopInstances", "ec2:StartInstances"):
                assert statement["Condition"]["StringEquals"] == {"aws:ResourceTag/ray-cluster-name": "raynium"}
            if action == "ec2:RunInstances" and any(":instance/" in each for each in resources):
                equal = statement["Condition"]["StringEquals"]
                assert equal["aws:RequestTag/ray-cluster-name"] == "raynium"
                assert equal["ec2:MetadataHttpTokens"] == "required"


def test_a_worker_can_do_nothing_but_read_and_write_the_run_store(site: Site):
    actions = json.dumps(json.loads(render_policy(site, "worker")))
    assert set(re.findall(r"\b(ec2|iam|ssm|s3|sts):", actions)) == {"s3"}


@pytest.mark.parametrize("holder", ["operator", "head", "worker"])
def test_every_right_that_the_store_asks_for_is_given(holder: Holder, site: Site):
    """The store's errors name the right that a call needs; training does not start without any of them."""
    asked = set(re.findall(r'"(s3:[A-Za-z]+)"', (ROOT / "platform/raynium/storage/s3_store.py").read_text()))
    assert len(asked) >= 6
    assert asked <= set(re.findall(r'"(s3:[A-Za-z]+)"', render_policy(site, holder)))


def test_the_head_can_start_workers_but_no_second_head(site: Site):
    text = render_policy(site, "head")
    assert ":role/raynium-worker" in text and ":role/raynium-head" not in text
    assert "ec2:RebootInstances" in text and "ec2:RebootInstances" not in render_policy(site, "operator")
    assert '"m7i.8xlarge"' in text and '"trn2.48xlarge"' in text and '"p5.48xlarge"' not in text
