"""Preflight on a real Ray cluster of two nodes, one of them bad: it is named, and the run goes to the other.

The nodes take a metadata service of their own for EC2's, and moto for EC2.
"""

import json
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from aws_server import FakeAws, fake_aws
from metadata import metadata_service
from tiny import build_documents, job_text

from raynium import Client, Run
from raynium.chaos.sessions import kill_started
from raynium.errors import LaunchError, RunFailed
from raynium.rank.ports import free_port
from raynium.tracking.client import mlflow_client

# What is waited for in here has limits of its own.
pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.timeout(600)]

ROOT = Path(__file__).parents[1]
RAY = str(Path(sys.executable).parent / "ray")
HEAD, WORKER = "127.0.0.2", "127.0.0.3"
CHANGES = {
    "cluster.ranks_per_node": 1,
    "evaluate.every_steps": 4,
    "evaluate.max_documents": 1,
    "preflight.before_run": "all",
    "preflight.seconds": 120,
}
# In every process of the head: no host name is short enough.
BAD_NODE = """
import importlib
checks = importlib.import_module("raynium.health.checks")
checks.MAX_HOST_NAME_CHARS = 0
"""
# In every process of either node: the kernel's log is a file of its own.
OWN_KERNEL_LOG = """
import os
really_open = os.open
os.open = lambda path, *rest, **more: really_open("KMSG" if str(path) == "/dev/kmsg" else path, *rest, **more)
"""
DMA_ERROR = "NEURON_HW_ERR=DMA_ERROR instance-id=i-0a1 nd-id=2 nc-id=1 serial-num=7 action=TERMINATE_INSTANCE"
LONG = 120  # steps of a run that is to be interrupted


@dataclass(frozen=True)
class Cluster:
    address: str
    folder: Path
    job_file: Path
    aws: FakeAws
    # Of the worker; the head is another.
    instance_id: str
    start_worker: Callable[[], subprocess.Popen[bytes]]
    worker: subprocess.Popen[bytes]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The head is the bad node, and the smaller one: Ray fills it first."""
    folder = tmp_path_factory.mktemp("cluster")
    build_documents(folder)
    (folder / "job.yaml").write_text(job_text(CHANGES, root=folder))
    for host in (HEAD, WORKER):
        (folder / host).mkdir()
        (folder / host / "kmsg").touch()
        site = OWN_KERNEL_LOG.replace("KMSG", str(folder / host / "kmsg")) + (BAD_NODE if host == HEAD else "")
        (folder / host / "sitecustomize.py").write_text(site)

    environment = {
        "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",  # a job's entrypoint is `python …`
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAYNIUM_HOME": str(folder),
        # Ray gives up after 30 s, which a busy machine may need.
        "RAY_raylet_start_wait_time_s": "150",
    }
    port, dashboard = free_port(HEAD), free_port("127.0.0.1")
    common = ["--block", "--disable-usage-stats", f"--object-store-memory={80 * 2**20}"]
    started: list[subprocess.Popen[bytes]] = []

    def start(command: list[str], name: str, variables: dict[str, str]) -> subprocess.Popen[bytes]:
        with (folder / f"{name}.log").open("wb") as log:
            process = subprocess.Popen(
                command, env=os.environ | variables, stdout=log, stderr=log, start_new_session=True
            )
        started.append(process)
        return process

    with ExitStack() as stack:
        aws = stack.enter_context(fake_aws())
        instance_ids = {HEAD: aws.start_instance(), WORKER: aws.start_instance()}
        metadata = {
            host: {"AWS_EC2_METADATA_SERVICE_ENDPOINT": stack.enter_context(metadata_service(pages=pages))}
            for host, instance_id in instance_ids.items()
            for pages in [
                {"/latest/meta-data/instance-id": instance_id, "/latest/meta-data/placement/region": "us-west-2"}
            ]
        }
        # The credentials of a head's role, of EC2 alone: the store is a folder here.
        environment |= aws.environment("head")
        environment["AWS_ENDPOINT_URL_EC2"] = environment.pop("AWS_ENDPOINT_URL")
        for name, value in environment.items():
            stack.enter_context(pytest.MonkeyPatch.context()).setenv(name, value)
        ray_folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="ray", dir="/tmp"))  # short, for sockets
        head = [
            *(RAY, "start", "--head", *common, "--num-cpus=1", f"--node-ip-address={HEAD}"),
            f"--port={port}",
            *(f"--temp-dir={ray_folder}", "--dashboard-host=127.0.0.1", f"--dashboard-port={dashboard}"),
            *(f"--dashboard-agent-listen-port={free_port(HEAD)}", f"--ray-client-server-port={free_port(HEAD)}"),
        ]
        stack.callback(kill_started, started)
        start(head, "head", {"PYTHONPATH": str(folder / HEAD), **metadata[HEAD]})
        address = f"http://127.0.0.1:{dashboard}"
        _wait_for_jobs(address, folder / "head.log")
        worker = [
            *(RAY, "start", f"--address={HEAD}:{port}", *common, "--num-cpus=3", f"--node-ip-address={WORKER}"),
            f"--dashboard-agent-listen-port={free_port(WORKER)}",
        ]

        def start_worker() -> subprocess.Popen[bytes]:
            process = start(worker, "worker", {"PYTHONPATH": str(folder / WORKER), **metadata[WORKER]})
            _wait_for_node(folder / "worker.log")
            return process

        yield Cluster(address, folder, folder / "job.yaml", aws, instance_ids[WORKER], start_worker, start_worker())


def _wait_for_node(log: Path) -> None:
    deadline = time.monotonic() + 200
    while "Ray runtime started" not in log.read_text():
        assert time.monotonic() < deadline, log.read_text()[-3000:]
        time.sleep(0.2)


def _wait_for_jobs(address: str, log: Path) -> None:
    from raynium.launch.jobs import connect_jobs

    deadline = time.monotonic() + 200
    while True:
        try:
            connect_jobs(address).list_jobs()
            return
        except LaunchError:
            assert time.monotonic() < deadline, log.read_text()[-3000:]
            time.sleep(0.5)


def preflight_job(cluster: Cluster, *overrides: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [
            *(RAY, "job", "submit", "--address", cluster.address, "--runtime-env", "cluster/runtime_env.yaml", "--"),
            *("python", "jobs/preflight.py", str(cluster.job_file), *overrides),
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
    )


def test_the_job_names_the_bad_node_and_checks_the_others(cluster: Cluster) -> None:
    done = preflight_job(cluster)
    assert done.returncode == 0, done.stdout + done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith('{"needed_nodes"')]
    report = json.loads(line)
    fit = {node["host"]: node["fit"] for node in report["nodes"]}
    assert fit == {HEAD: False, WORKER: True} and report["may_start"] is True
    checks = {node["host"]: {check["name"]: check["status"] for check in node["checks"]} for node in report["nodes"]}
    assert checks[HEAD]["host name"] == "failed" and "matrix product" not in checks[HEAD]
    assert checks[WORKER]["host name"] == "ok" and checks[WORKER]["ranks"] == "ok"
    assert f"preflight: node {HEAD} is left out: host name" in done.stdout
    assert not list(cluster.folder.glob("preflight-*"))


def test_a_run_is_placed_on_the_other_node_and_its_page_has_the_report(cluster: Cluster) -> None:
    run = Client(cluster.address).submit(cluster.job_file, name="around-it")
    finished = run.wait(240)
    assert finished.state == "finished"
    assert finished.agents is not None and [agent["host"] for agent in finished.agents] == [WORKER]
    assert f"preflight: node {HEAD} is left out: host name" in run.logs()
    assert f"preflight: 1 fit node(s), without {HEAD} (host name)" in run.logs()
    (artifact,) = cluster.folder.rglob("preflight.json")
    assert {node["host"]: node["fit"] for node in json.loads(artifact.read_text())["nodes"]}[WORKER] is True


def test_a_run_that_needs_the_bad_node_is_refused_by_name(cluster: Cluster) -> None:
    run = Client(cluster.address).submit(cluster.job_file, overrides={"cluster.nodes": 2}, name="needs-both")
    with pytest.raises(RunFailed, match=rf"found 1 fit node\(s\), and the run needs 2(.|\n)*node {HEAD}: host name"):
        run.wait(240)


def test_a_run_leaves_a_node_that_a_verdict_names_and_stays_where_no_other_is_free(cluster: Cluster) -> None:
    often = {"checkpoint.every_steps": 5, "evaluate.every_steps": LONG}
    overrides = {"preflight.before_run": "none", "train.steps": LONG, "fault.bad_instance": "reboot", **often}
    run = Client(cluster.address).submit(cluster.job_file, overrides=overrides, name="leaves")
    first = _break_node(cluster, run, steps=5)
    second = _break_node(cluster, run, steps=30, besides=first)
    finished = run.wait(200)
    assert (finished.state, finished.step) == ("finished", LONG), run.logs()
    assert [agent["host"] for agent in finished.agents or ()] == [second]
    faults = finished.node_faults or []
    assert [(each["host"], each["action"], each["evidence"]) for each in faults] == [
        (first, "reboot", DMA_ERROR),
        (second, "reboot", DMA_ERROR),
    ]
    logs = run.logs()
    assert f"the run leaves {first} and goes on on other nodes" in logs
    assert f"the run stays on {second}: no other node that it could take is free" in logs
    assert f"generation 1: {faults[0]['text']}" in logs  # its last lines are those of `raynium status`
    assert re.search(r"generation \d+: 1 ranks on 1 node\(s\), from the checkpoint of step \d+", logs)
    assert finished.mlflow_uri is not None and finished.mlflow_run_id is not None
    with mlflow_client(finished.mlflow_uri, timeout_seconds=10) as client:
        tags = client.get_run(finished.mlflow_run_id).data.tags
    assert [tags["node_fault.1"], tags["node_fault.2"]] == [each["text"] for each in faults]

    # EC2 was asked for the one that neither the driver nor Ray's head runs on.
    (asked,) = cluster.aws.asked("RebootInstances")
    assert (asked.caller, asked.values["InstanceId.1"]) == ("head", cluster.instance_id)
    acts = {each["where"]: each["cause"] for each in finished.incidents or () if each["what"] == "node"}
    assert acts[WORKER].startswith(f"EC2 was asked to reboot {cluster.instance_id}: ")
    assert "this driver, or the cluster's head, runs there" in acts[HEAD]


@pytest.mark.timeout(600)
def test_a_node_that_was_rebooted_runs_ranks_again_once_it_has_passed_a_preflight(cluster: Cluster) -> None:
    """Moto reboots nothing: we do. It is run after the one above, and needs what that has left in the store."""
    mark = cluster.folder / "bad+nodes" / f"{WORKER}.json"
    assert json.loads(mark.read_text())["asked"] == "reboot"
    kill_started([cluster.worker])
    cluster.start_worker()
    changes = {"preflight.before_run": "none", "preflight.seconds": 200, "cluster.nodes": 2}
    run = Client(cluster.address).submit(cluster.job_file, overrides=changes, name="comes-back")
    try:
        assert run.wait(500).state == "finished"
    except TimeoutError:
        pytest.fail(run.logs())
    assert f"node {WORKER} was rebooted, passes its preflight, and is admitted again" in run.logs()
    assert not mark.exists()


def _break_node(cluster: Cluster, run: Run, *, steps: int, besides: str = "") -> str:
    """The kernel of the run's node reports broken hardware, and its rank dies. Once it has so many steps in the store.

    Returns the host. besides: it is not there that the run is waited for.
    """
    agents: list[dict[str, Any]] = []
    deadline = time.monotonic() + 240
    rank = None
    while rank is None or agents[0]["host"] == besides or run.checkpoints()[-1].step < steps:
        assert time.monotonic() < deadline, run.logs()
        time.sleep(0.2)
        agents = (run.record().agents or []) if run.checkpoints() else []  # before the first there may be no record
        rank = _rank_pid(agents[0]["pid"]) if agents else None
    with (cluster.folder / agents[0]["host"] / "kmsg").open("a") as kernel_log:
        kernel_log.write(f"3,1,1,-;{DMA_ERROR}\n")
    os.kill(rank, signal.SIGKILL)
    return agents[0]["host"]


def _rank_pid(agent_pid: int) -> int | None:
    """The rank that this agent's template forked; None before it has."""

    def children(pid: int) -> list[int]:
        found = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
        return [int(each) for each in found.stdout.split()]

    # The first of its template's children; the uploader came later.
    return min((forked for template in children(agent_pid) for forked in children(template)), default=None)
