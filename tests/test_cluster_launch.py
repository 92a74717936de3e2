"""`ray up`, Ray's node provider and its autoscaler with our cluster files, against moto's EC2 over HTTP and a stub ssh.

Asserted is what EC2 was asked, as it went over the wire: moto's own answers show no card index and no placement group.
"""

import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from aws_server import Call, FakeAws, fake_aws

from raynium.chaos.sessions import kill_sessions
from raynium.cluster.policies import render_policy, role_name
from raynium.cluster.render import Workers, render_cluster
from raynium.cluster.site import Site, load_site

ROOT = Path(__file__).parents[1]
BIN = Path(sys.executable).parent
FILES = ("trn1.32xlarge", "trn2.48xlarge", "trn2.3xlarge", "cpu")
BLOCK = "cr-0123456789abcdef0"


@pytest.fixture(scope="module")
def listening_aws() -> Iterator[FakeAws]:
    with fake_aws() as fake:
        yield fake


def environment_of(aws: FakeAws, caller: str, home: Path, remote: "Remote") -> dict[str, str]:
    """For processes of `caller` that take this for AWS."""
    return {
        **{name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "AWS_"))},
        **aws.environment(caller),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_AUTH_MODE": "token",
        "HOME": str(home),
        "PATH": f"{remote.bin}:{BIN}:{os.environ['PATH']}",
        "STUB_LOG": str(remote.log),
    }


@pytest.fixture(scope="module")
def site(listening_aws: FakeAws) -> Site:
    """The committed site, with a network that exists in moto and the roles made as in the runbook."""
    ec2, iam = listening_aws.client("ec2"), listening_aws.client("iam")
    vpc = ec2.create_vpc(CidrBlock="10.0.0.0/16")["Vpc"]["VpcId"]
    subnet = ec2.create_subnet(VpcId=vpc, CidrBlock="10.0.0.0/20", AvailabilityZone="us-west-2c")["Subnet"]["SubnetId"]
    group = ec2.create_security_group(VpcId=vpc, GroupName="raynium", Description="raynium")["GroupId"]
    found = load_site(ROOT / "cluster/site.yaml").model_copy(
        update={"subnet": subnet, "security_group": group, "availability_zone": "us-west-2c"}
    )
    for holder in ("head", "worker"):
        name = role_name(found, holder)
        iam.create_role(RoleName=name, AssumeRolePolicyDocument=render_policy(found, "trust"))
        # moto refuses a document that is not a well-formed policy.
        iam.put_role_policy(RoleName=name, PolicyName=name, PolicyDocument=render_policy(found, holder))
        iam.create_instance_profile(InstanceProfileName=name)
        iam.add_role_to_instance_profile(InstanceProfileName=name, RoleName=name)
    return found


@pytest.fixture
def aws(listening_aws: FakeAws, site: Site) -> FakeAws:
    """Without instances, and nothing asked yet."""
    if left := [name for name, state in instances(listening_aws).items() if state != "terminated"]:
        listening_aws.client("ec2").terminate_instances(InstanceIds=left)
    listening_aws.calls.clear()
    return listening_aws


def instances(aws: FakeAws) -> dict[str, str]:
    """Id → state of every instance; EC2 shows terminated ones too."""
    pages = aws.client("ec2").describe_instances()["Reservations"]
    return {each["InstanceId"]: each["State"]["Name"] for page in pages for each in page["Instances"]}


# ------------------------------------------------------------------------------------------------- node provider


def launch(text: str, node_type: str, count: int, aws: FakeAws, monkeypatch: pytest.MonkeyPatch) -> Call:
    """What Ray's own code asks EC2 for when it starts `count` nodes of a type: schema, bootstrap, node provider."""
    from ray.autoscaler._private.aws.node_provider import AWSNodeProvider
    from ray.autoscaler._private.util import prepare_config, validate_config

    monkeypatch.setenv("AWS_ENDPOINT_URL", aws.url)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "provider")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    config = prepare_config(yaml.safe_load(text))
    validate_config(config)
    config = AWSNodeProvider.bootstrap_config(config)
    provider = AWSNodeProvider(config["provider"], config["cluster_name"])
    tags = {"ray-node-type": "worker", "ray-user-node-type": node_type, "ray-launch-config": "0"}
    provider.create_node(config["available_node_types"][node_type]["node_config"], tags, count)
    (call,) = aws.asked("RunInstances")
    return call


@pytest.mark.parametrize("name", FILES)
def test_committed_files_pass_rays_schema(name: str):
    from ray.autoscaler._private.util import prepare_config, validate_config

    validate_config(prepare_config(yaml.safe_load((ROOT / f"cluster/{name}.yaml").read_text())))


@pytest.mark.parametrize(
    ("instance_type", "kinds", "devices"),
    [
        ("trn1.32xlarge", ["efa"] + ["efa-only"] * 7, ["0"] + ["1"] * 7),
        ("trn2.48xlarge", ["efa"] + ["efa-only"] * 15, ["0"] + ["1"] * 15),
        ("trn2.3xlarge", ["efa"], ["0"]),
        ("trn1.2xlarge", ["interface"], ["0"]),
        ("m7i.4xlarge", ["interface"], ["0"]),
    ],
)
def test_workers_ask_for_each_network_card_privately(
    aws: FakeAws, site: Site, monkeypatch, tmp_path, instance_type: str, kinds: list[str], devices: list[str]
):
    monkeypatch.setenv("HOME", str(tmp_path))
    call = launch(render_cluster(site, Workers(instance_type=instance_type)), "worker", 2, aws, monkeypatch)

    assert (call.values["InstanceType"], call.values["MaxCount"]) == (instance_type, "2")
    cards = call.items("NetworkInterface")
    assert [card["InterfaceType"] for card in cards] == kinds
    assert [card["NetworkCardIndex"] for card in cards] == [str(index) for index in range(len(kinds))]
    assert [card["DeviceIndex"] for card in cards] == devices
    for card in cards:
        assert (card["SubnetId"], card["SecurityGroupId.1"]) == (site.subnet, site.security_group)
        # With several interfaces EC2 gives no public address, and refuses to be told so.
        assert card.get("AssociatePublicIpAddress") == ("false" if len(cards) == 1 else None)
    assert not any(name.startswith(("SubnetId", "SecurityGroup")) for name in call.values)
    assert call.values["Placement.GroupName"] == site.cluster_name
    assert call.values["MetadataOptions.HttpTokens"] == "required"
    assert call.values["IamInstanceProfile.Arn"].endswith(":instance-profile/raynium-worker")
    assert call.values["BlockDeviceMapping.1.Ebs.Encrypted"] == "true"
    assert call.values["ImageId"].startswith("resolve:ssm:/aws/service/")
    assert call.tags["ray-cluster-name"] == site.cluster_name
    assert not any(name.startswith("InstanceMarketOptions") for name in call.values)


def test_a_capacity_block_is_asked_for_by_its_reservation(aws: FakeAws, site: Site, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    workers = Workers(instance_type="trn2.48xlarge", market="capacity-block", reservation=BLOCK)
    values = launch(render_cluster(site, workers), "worker", 1, aws, monkeypatch).values
    assert values["InstanceMarketOptions.MarketType"] == "capacity-block"
    assert values["CapacityReservationSpecification.CapacityReservationTarget.CapacityReservationId"] == BLOCK
    assert not any(name.startswith("Placement.Group") for name in values)


def test_spot_nodes_end_when_they_are_taken(aws: FakeAws, site: Site, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    workers = Workers(instance_type="trn2.3xlarge", market="spot")
    values = launch(render_cluster(site, workers), "worker", 1, aws, monkeypatch).values
    assert values["InstanceMarketOptions.MarketType"] == "spot"
    assert values["InstanceMarketOptions.SpotOptions.InstanceInterruptionBehavior"] == "terminate"


# ------------------------------------------------------------------------------------------------- a whole cluster

# Says yes to everything, and starts a real Ray node where a worker is told to: on an address of loopback.
SSH = """#!{python}
import json, os, re, subprocess, sys
with open(os.environ["STUB_LOG"], "a") as log:
    log.write(json.dumps(sys.argv) + "\\n")
command = " ".join(sys.argv[sys.argv.index("bash"):]) if "bash" in sys.argv else ""  # the far shell gets one line
if "ray start --address=$RAY_HEAD_IP:6379" in command and "STUB_HEAD" in os.environ:
    command = command.replace("$RAY_HEAD_IP:6379", os.environ["STUB_HEAD"])
    command = command.replace("--object-manager-port=8076", os.environ["STUB_OPTIONS"])
    with open(os.environ["STUB_LOG"] + ".worker", "w") as log:
        node = subprocess.Popen(command, shell=True, stdin=-3, stdout=log, stderr=log, start_new_session=True)
    with open(os.environ["STUB_LOG"] + ".pid", "w") as file:
        file.write(str(node.pid))
"""
RSYNC = """#!{python}
import json, os, shutil, sys
with open(os.environ["STUB_LOG"], "a") as log:
    log.write(json.dumps(sys.argv) + "\\n")
if sys.argv[-1].endswith("ray_bootstrap_config.yaml"):
    shutil.copy(sys.argv[-2], os.environ["STUB_LOG"] + ".bootstrap")
"""


@dataclass
class Remote:
    """Stub ssh and rsync, and what they were told."""

    bin: Path
    log: Path

    def commands(self) -> list[str]:
        """The last argument of each call: what ssh was to run, or where rsync was to copy to."""
        return [json.loads(line)[-1] for line in self.log.read_text().splitlines()]


@pytest.fixture
def remote(tmp_path: Path) -> Remote:
    stubs = Remote(tmp_path / "bin", tmp_path / "remote.log")
    stubs.bin.mkdir()
    for name, text in (("ssh", SSH), ("rsync", RSYNC)):
        (stubs.bin / name).write_text(text.format(python=sys.executable))
        (stubs.bin / name).chmod(0o755)
    stubs.log.touch()
    return stubs


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A home folder with a cluster token, as the runbook makes it, and what setup_node.sh would write."""
    folder = tmp_path / "home"
    (folder / ".ray").mkdir(parents=True)
    (folder / ".ray/auth_token").write_text("0123456789abcdef" * 4)
    (folder / ".raynium-env").write_text(f"export RAY_AUTH_MODE=token PATH={BIN}:$PATH\n")
    (folder / ".bashrc").touch()
    return folder


def run(args: list[str], env: dict[str, str], timeout: float = 240) -> str:
    done = subprocess.run(
        args, env=env, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=timeout
    )
    assert done.returncode == 0, done.stdout
    return done.stdout


def free_ports(address: str, count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind((address, 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@pytest.fixture
def processes(remote: Remote) -> Iterator[list[subprocess.Popen[bytes]]]:
    """Ray nodes to end after the test, each the leader of a session of its own; the stub's worker too."""
    started: list[subprocess.Popen[bytes]] = []
    yield started
    worker = Path(f"{remote.log}.pid")
    leaders = [*(each.pid for each in started), *([int(worker.read_text())] if worker.exists() else [])]
    kill_sessions(leaders)
    for each in started:
        each.wait()


@pytest.fixture
def session_folder() -> Iterator[str]:
    """Short: Ray's sockets lie below it, and a socket's path is at most 107 bytes."""
    with tempfile.TemporaryDirectory(prefix="rc", dir="/tmp", ignore_cleanup_errors=True) as folder:
        yield folder


JOB = """
import os, ray
ray.init(log_to_driver=False)

@ray.remote(num_cpus=1, resources={"neuron_cores": 32})
def cores():
    return os.environ["NEURON_RT_VISIBLE_CORES"], os.environ["MLFLOW_TRACKING_URI"]

print("cores and tracking:", *ray.get(cores.remote()))
"""


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.timeout(900)  # 90 s on two cores that six others used too
def test_a_submitted_job_gets_the_trainium_node_it_asks_for(
    aws: FakeAws, site: Site, remote: Remote, home: Path, tmp_path: Path, session_folder: str, processes: list[Any]
):
    file = tmp_path / "cluster.yaml"
    file.write_text(render_cluster(site, Workers(instance_type="trn1.32xlarge")))
    operator = environment_of(aws, "operator", home, remote)

    # ---- `ray up`: one head, prepared over ssh, and the file that its autoscaler will read
    run([str(BIN / "ray"), "up", "-y", "--no-config-cache", str(file)], operator)
    (head_call,) = aws.asked("RunInstances")
    assert head_call.values["InstanceType"] == site.head_instance_type
    assert head_call.items("NetworkInterface")[0]["AssociatePublicIpAddress"] == "false"
    commands = remote.commands()
    assert any("setup_node.sh neuron" in command for command in commands)
    assert any(f"mlflow.sh install {site.storage}" in command for command in commands)
    (start,) = (command for command in commands if "ray start --head" in command)
    assert "--dashboard-host=127.0.0.1" in start and "source ~/.raynium-env" in start
    (head_id,) = set(re.findall(r"RAY_CLOUD_INSTANCE_ID=(i-\w+)", start))

    # ---- the head, here: the same Ray, the same file, less the mounts, which lie on the real head
    bootstrap = json.loads(Path(f"{remote.log}.bootstrap").read_text())
    assert "ssh_proxy_command" not in bootstrap["auth"]
    bootstrap |= {"file_mounts": {}}
    (home / "ray_bootstrap_key.pem").touch()
    (home / "bootstrap.yaml").write_text(json.dumps(bootstrap))
    gcs, dashboard, agent, client = free_ports("127.0.0.2", 4)
    worker_agent, worker_metrics = free_ports("127.0.0.3", 2)
    head_env = environment_of(aws, "head", home, remote) | {
        "RAY_OVERRIDE_RESOURCES": '{"CPU": 0}',
        "RAY_CLOUD_INSTANCE_ID": head_id,
        "RAY_NODE_TYPE_NAME": "head",
        "RAY_enable_autoscaler_v2": "1",
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_memory_monitor_refresh_ms": "0",  # other processes of this machine are no reason to kill ours
        "MLFLOW_TRACKING_URI": "http://the-head:5000",
        "STUB_HEAD": f"127.0.0.2:{gcs}",
        "STUB_OPTIONS": f"--node-ip-address=127.0.0.3 --dashboard-agent-listen-port={worker_agent} "
        f"--metrics-export-port={worker_metrics} --object-store-memory={80 << 20} --block",
    }
    with (tmp_path / "head.log").open("wb") as log:
        head = subprocess.Popen(
            [
                *(str(BIN / "ray"), "start", "--head", "--block", "--node-ip-address=127.0.0.2", f"--port={gcs}"),
                *("--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}", f"--object-store-memory={80 << 20}"),
                *(f"--dashboard-agent-listen-port={agent}", f"--ray-client-server-port={client}"),
                *(f"--temp-dir={session_folder}", f"--autoscaling-config={home / 'bootstrap.yaml'}"),
            ],
            env=head_env,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    processes.append(head)

    # ---- a job that asks for 32 cores: its node is asked for, prepared, joins, and runs it
    address = f"http://127.0.0.1:{dashboard}"
    wait_for_dashboard(address, head, tmp_path / "head.log")
    submit = [str(BIN / "ray"), "job", "submit", "--address", address, "--", sys.executable, "-c", JOB]
    out = run(submit, operator)
    visible = ",".join(str(core) for core in range(32))
    assert f"cores and tracking: {visible} http://127.0.0.2:5000" in out  # the head's MLflow server

    (worker_call,) = (call for call in aws.asked("RunInstances") if call.caller == "head")
    assert worker_call.values["InstanceType"] == "trn1.32xlarge"
    assert len(worker_call.items("NetworkInterface")) == 8
    (start,) = (command for command in remote.commands() if "ray start --address" in command)
    assert '"neuron_cores":32' in start

    # ---- `ray down`: nothing is left
    assert sorted(state for state in instances(aws).values() if state != "terminated") == ["running", "running"]
    run([str(BIN / "ray"), "down", "-y", str(file)], operator)
    assert set(instances(aws).values()) == {"terminated"}

    # ---- and the policies allow what was done, by whom
    check_policy(site, "operator", aws.calls)
    check_policy(site, "head", aws.calls)


def wait_for_dashboard(address: str, head: subprocess.Popen[bytes], log: Path) -> None:
    import requests

    deadline = time.monotonic() + 90
    while True:
        try:
            # Answers 401 without a token: it is up, and it asks for one.
            if requests.get(f"{address}/api/version", timeout=5).status_code == 401:
                return
        except (requests.ConnectionError, requests.Timeout):
            pass
        assert head.poll() is None and time.monotonic() < deadline, log.read_text()
        time.sleep(0.3)


def check_policy(site: Site, holder: Any, calls: list[Call]) -> None:
    """Every call of the holder is an allowed action, and what it started fulfils the conditions on starting it."""
    statements = json.loads(render_policy(site, holder))["Statement"]
    allowed = {
        action
        for each in statements
        for action in ([each["Action"]] if isinstance(each["Action"], str) else each["Action"])
    }
    made = {f"ec2:{call.action}" for call in calls if call.caller == holder}
    assert "ec2:RunInstances" in made
    assert made <= allowed, f"{holder} called {made - allowed}"
    (condition,) = (
        each["Condition"]
        for each in statements
        if each["Action"] == "ec2:RunInstances" and str(each["Resource"]).endswith(":instance/*")
    )
    for call in calls:
        if (call.caller, call.action) == (holder, "RunInstances"):
            equal = condition["StringEquals"]
            assert call.tags["ray-cluster-name"] == equal["aws:RequestTag/ray-cluster-name"]
            assert call.values["InstanceType"] in equal["ec2:InstanceType"]
            assert call.values["MetadataOptions.HttpTokens"] == equal["ec2:MetadataHttpTokens"]
            assert call.values["IamInstanceProfile.Arn"] in condition["ArnEquals"]["ec2:InstanceProfile"]
