"""What becomes of a bad node's instance: EC2 is asked over HTTP (moto), and who was rebooted must pass a preflight."""

import threading
from collections.abc import Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from aws_server import FakeAws, fake_aws
from metadata import metadata_service
from tiny import job_text

from raynium.cluster.instances import ask_ec2
from raynium.config.load import parse_config
from raynium.errors import LaunchError, StoreError
from raynium.health.faults import Fault
from raynium.health.host import Check
from raynium.health.metadata_service import Instance, this_instance
from raynium.health.report import NodeReport, Report
from raynium.launch import bad_nodes as bad_nodes_module
from raynium.launch.bad_nodes import BadNodes
from raynium.node.preflight import NodeProbe, storage_checks
from raynium.node.readmission import REBOOT_SECONDS, STORAGE, Readmission, checked
from raynium.run.bad_nodes import mark_of, remember, remembered
from raynium.run.protocol import AgentInfo, NodeFault, Status
from raynium.storage.store import Store
from raynium.tracking.incidents import Incidents

HOST = "10.0.0.7"
BROKEN = Fault("hbm-uncorrectable", "its memory is broken", "replace", "node")
WELL, SICK = Check("ranks", "ok", "2", "all end"), Check("ranks", "failed", "rank 1 hung", "all end", "replace it")


def found(instance: Instance | None, node_id: str = "first-life", host: str = HOST) -> NodeFault:
    return NodeFault(3, 0, host, node_id, BROKEN, instance)


def status(**changes: Any) -> Status:
    """Of a run whose ranks are on the bad node, in its step 7."""
    agents = (AgentInfo("a", 0, 1, HOST, 29500, pid=1, node_id="first-life"),)
    return Status(1, True, None, 7, {}, None, None, agents, None, None, **changes)


@pytest.fixture(scope="module")
def moto() -> Iterator[FakeAws]:
    with fake_aws() as fake:
        yield fake


@pytest.fixture(scope="module")
def instance(moto: FakeAws) -> Instance:
    return Instance(moto.start_instance(), "us-west-2")


@pytest.fixture
def aws(moto: FakeAws, monkeypatch: pytest.MonkeyPatch) -> FakeAws:
    for name, value in moto.environment("driver").items():
        monkeypatch.setenv(name, value)
    moto.calls.clear()
    return moto


class Driver:
    """The part of a driver that sees to bad nodes; Ray is not asked, and says what the test says."""

    def __init__(self, root: Path, call: str, monkeypatch: pytest.MonkeyPatch):
        self.lines: list[str] = []
        self.own: set[str] = set()
        self.users: list[str] = []
        monkeypatch.setattr(bad_nodes_module, "own_nodes", lambda: self.own)
        monkeypatch.setattr(bad_nodes_module, "users_of", lambda node_id: self.users)
        self.root = Store(root)
        self.incidents = Incidents("driver", unix=lambda: 1000.0, steady=lambda: 0.0)
        config = parse_config(job_text({"fault.bad_instance": call}, root=root))
        self.bad_nodes = BadNodes(config, Store(root / "run"), self.lines.append, self.incidents)

    def finds(self, fault: NodeFault) -> str:
        """What it notes of it."""
        self.bad_nodes.remember(fault)
        self.bad_nodes.act(status())
        self.bad_nodes._calls.submit(lambda: None).result(60)
        self.bad_nodes.act(status())
        return self.noted

    @property
    def noted(self) -> str:
        newest = self.incidents.seen()[-1]
        assert (newest.what, newest.where, newest.step, newest.seconds) == ("node", HOST, 7, 0.0)
        assert self.lines[-1] == f"node {HOST}: {newest.cause}"
        return newest.cause


# ------------------------------------------------------------------------------------------------- EC2


def test_an_instance_knows_itself_by_its_metadata_service() -> None:
    pages = {"/latest/meta-data/instance-id": "i-0a1", "/latest/meta-data/placement/region": "us-west-2"}
    with metadata_service(pages=pages) as address:
        assert this_instance(address) == Instance("i-0a1", "us-west-2")
    with metadata_service(pages={}) as address:
        assert this_instance(address) is None
    assert this_instance(address) is None


def test_a_bad_node_is_marked_its_instance_is_rebooted_and_the_run_notes_it(
    aws: FakeAws, instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(tmp_path, "reboot", monkeypatch)
    driver.bad_nodes.remember(found(instance))
    mark = mark_of(driver.root, HOST)
    assert mark is not None and (mark.instance_id, mark.asked) == (instance.id, "")
    assert not aws.asked("RebootInstances"), "the run has not left it yet"
    driver.bad_nodes.close(step=7)
    assert driver.noted == f"EC2 was asked to reboot {instance.id}: its memory is broken"
    (call,) = aws.asked("RebootInstances")
    assert (call.caller, call.values["InstanceId.1"]) == ("driver", instance.id)
    mark = mark_of(driver.root, HOST)
    assert mark is not None and (mark.instance_id, mark.asked, mark.node_id) == (instance.id, "reboot", "first-life")


def test_an_instance_is_not_asked_for_while_the_run_would_lose_something_with_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver, asked = Driver(tmp_path, "reboot", monkeypatch), list[str]()
    monkeypatch.setattr(bad_nodes_module, "ask_ec2", lambda call, *, instance_id, region: asked.append(instance_id))
    driver.bad_nodes.remember(found(Instance("i-1", "us-west-2")))
    driver.bad_nodes.remember(replace(found(Instance("i-1", "us-west-2")), generation=4))
    driver.bad_nodes.act(status(busy_nodes=frozenset({"first-life"})))
    driver.bad_nodes.act(replace(status(), agents=()))
    assert not driver.bad_nodes._asked, "a coordinator that knows of no agent does not know who is busy"
    driver.bad_nodes.act(status(busy_nodes=frozenset({"another"})))
    driver.bad_nodes.close(step=7)
    assert asked == ["i-1"] and len(driver.lines) == 1, "its second fault came before it could be rebooted"


def test_a_bad_instance_is_terminated_and_its_address_is_free_for_others(
    aws: FakeAws, instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(tmp_path, "terminate", monkeypatch)
    assert driver.finds(found(instance)) == f"EC2 was asked to terminate {instance.id}: its memory is broken"
    (page,) = aws.client("ec2").describe_instances(InstanceIds=[instance.id])["Reservations"]
    assert page["Instances"][0]["State"]["Name"] in ("shutting-down", "terminated")
    (mark,) = remembered(driver.root, now_unix=0.0, seconds=1.0)
    assert mark.is_this("first-life", HOST) and not mark.is_this("another-instance", HOST)


def test_nothing_is_asked_of_ec2_unless_the_config_says_so(
    aws: FakeAws, instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(tmp_path, "keep", monkeypatch)
    driver.bad_nodes.remember(found(instance))
    driver.bad_nodes.close(step=7)
    assert not aws.asked("RebootInstances") and not driver.incidents.seen() and not driver.lines


def test_an_instance_is_kept_where_others_would_end_with_it_and_told_why(
    aws: FakeAws, instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(tmp_path, "reboot", monkeypatch)
    kept = "its instance is kept, though fault.bad_instance is reboot: "
    assert driver.finds(found(None)).startswith(kept + "it is no EC2 instance")
    driver.own = {"first-life"}
    assert driver.finds(found(instance)).startswith(kept + "this driver, or the cluster's head, runs there")
    driver.own, driver.users = set(), ["run other", "Ray job 05"]
    assert driver.finds(found(instance)).startswith(kept + "it is used by run other, Ray job 05 as well")
    assert not aws.asked("RebootInstances")
    driver.users = []
    driver.finds(found(instance))
    again = driver.finds(found(instance, node_id="second-life"))
    assert again == f"{kept}EC2 was asked to reboot {instance.id} before, and it broke again: replace it by hand"
    assert len(aws.asked("RebootInstances")) == 1


def test_what_ec2_refuses_is_told_with_what_to_do_and_ends_nothing(
    aws: FakeAws, instance: Instance, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(tmp_path, "reboot", monkeypatch)
    gone = driver.finds(found(Instance("i-0123456789abcdef0", "us-west-2")))
    assert gone.startswith("EC2 would not reboot i-0123456789abcdef0 (us-west-2): InvalidInstanceID.NotFound: ")
    assert gone.endswith("it is gone already, or of another account: nothing is left to do")
    mark = mark_of(driver.root, HOST)
    assert mark is not None and mark.asked == "", "who was not rebooted is no rebooted one"


def test_rights_that_are_missing_are_told_with_where_they_come_from(monkeypatch: pytest.MonkeyPatch) -> None:
    """As EC2 answers it; moto has another name for it."""
    message = f"You are not authorized to perform this operation. Encoded authorization failure message: {'A' * 500}"
    error = f"<Code>UnauthorizedOperation</Code><Message>{message}</Message>"
    body = f"<Response><Errors><Error>{error}</Error></Errors></Response>"

    class Refuses(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(403)
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Refuses) as server:
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}).start()
        monkeypatch.setenv("AWS_ENDPOINT_URL_EC2", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setenv("AWS_ACCESS_KEY_ID", "worker")
        monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
        with pytest.raises(LaunchError, match="raynium cluster policy head") as refused:
            ask_ec2("reboot", instance_id="i-0a1", region="us-west-2")
        server.shutdown()
    words = "UnauthorizedOperation: You are not authorized to perform this operation: let the driver's role do it"
    assert str(refused.value).startswith(f"EC2 would not reboot i-0a1 (us-west-2): {words}")
    assert "AAAA" not in str(refused.value)


def test_a_driver_without_credentials_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    for name in ("AWS_SHARED_CREDENTIALS_FILE", "AWS_CONFIG_FILE"):
        (tmp_path / name).touch()
        monkeypatch.setenv(name, str(tmp_path / name))
    with pytest.raises(LaunchError, match=r"could not be asked to terminate i-1 \(us-west-2\): Unable to locate cred"):
        ask_ec2("terminate", instance_id="i-1", region="us-west-2")


def test_a_store_that_is_away_stops_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = Driver(tmp_path, "keep", monkeypatch)

    monkeypatch.setattr(Store, "list", away)
    driver.bad_nodes.passed(Report(1, (NodeReport("second-life", HOST, (WELL,)),), (), (), 1.0))
    assert driver.lines == ["nodes that were rebooted stay left out: no answer of S3"]


# ------------------------------------------------------------------------------------------------- admitted again


class Node:
    """The agent's part, on a node that comes back. checks: what each preflight finds; then the reboot is over."""

    def __init__(self, root: Path, *checks: Check, node_id: str = "second-life", instance: str | None = "i-0a1"):
        self.root, self.checks = Store(root), list(checks)
        self.lines: list[str] = []
        self.slept: list[float] = []
        config = parse_config(job_text({}, root=root))
        here = None if instance is None else Instance(instance, "us-west-2")
        self.readmission = Readmission(
            config,
            self.root,
            host=HOST,
            node_id=node_id,
            tell=self.lines.append,
            check=lambda config, root, host: [WELL, self.checks.pop(0)],
            ask_instance=lambda: here,
            sleep=self.slept.append,
            clock=lambda: sum(self.slept),
        )

    def is_marked(self) -> bool:
        return mark_of(self.root, HOST) is not None


def mark(root: Path, asked: Any = "reboot", run: str = "broke") -> None:
    remember(Store(root), found(Instance("i-0a1", "us-west-2")), run=run, now_unix=0.0, asked=asked)


def test_a_rebooted_node_runs_nothing_before_it_passes_and_only_that_lifts_its_mark(tmp_path: Path) -> None:
    mark(tmp_path)
    assert len(remembered(Store(tmp_path), now_unix=1e6, seconds=1.0)) == 1, "time alone does not"
    node = Node(tmp_path, *[SICK] * 6, WELL)
    marked: list[bool] = []
    node.readmission._sleep = lambda seconds: (node.slept.append(seconds), marked.append(node.is_marked()))
    node.readmission.wait()
    assert (node.slept, marked) == ([30, 60, 120, 240, 300, 300], [True] * 6)
    assert "does not pass its preflight: ranks: rank 1 hung" in node.lines[0] and "terminate i-0a1" in node.lines[0]
    assert node.lines[-1] == f"node {HOST} was rebooted, passes its preflight, and is admitted again"
    assert not node.is_marked() and not node.checks


def test_a_node_whose_reboot_is_still_to_come_waits_for_it(tmp_path: Path) -> None:
    mark(tmp_path)
    node = Node(tmp_path, node_id="first-life")
    # The reboot would end the agent; here the mark goes.
    node.readmission._sleep = lambda seconds: (node.slept.append(seconds), node.root.delete(f"bad+nodes/{HOST}.json"))
    node.readmission.wait()
    assert node.slept == [REBOOT_SECONDS] and "waits for the reboot that run broke" in node.lines[0]


@pytest.mark.parametrize("asked", [None, "terminate"])
def test_who_was_not_rebooted_is_left_to_the_drivers(tmp_path: Path, asked: Any) -> None:
    Node(tmp_path).readmission.wait()
    mark(tmp_path, asked)
    node = Node(tmp_path)
    node.readmission.wait()
    assert not node.lines and node.is_marked()


def test_another_instance_with_that_address_is_taken_at_once_and_where_none_can_say_it_is_checked(
    tmp_path: Path,
) -> None:
    mark(tmp_path)
    other = Node(tmp_path, instance="i-0b2")
    other.readmission.wait()
    assert not other.lines and not other.is_marked()
    mark(tmp_path)
    unknown = Node(tmp_path, WELL, instance=None)
    unknown.readmission.wait()
    assert not unknown.checks and not unknown.is_marked()


def away(self: Store, *arguments: Any, **settings: Any) -> Any:
    raise StoreError("no answer of S3")


def test_a_mark_that_cannot_be_lifted_is_left_to_later_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mark(tmp_path)
    node = Node(tmp_path, WELL)
    monkeypatch.setattr(Store, "delete", away)
    node.readmission.wait()
    assert node.lines[-1] == f"later runs will check node {HOST} again: no answer of S3"


def test_a_node_of_which_the_store_does_not_say_waits_for_its_word(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One error of the store's admits no rebooted node unchecked."""
    mark(tmp_path)
    node = Node(tmp_path, SICK, WELL)
    with monkeypatch.context() as broken:
        broken.setattr(Store, "read", away)

        def sleep(seconds: float) -> None:
            node.slept.append(seconds)
            if len(node.slept) == 3:
                broken.undo()

        node.readmission._sleep = sleep
        node.readmission.wait()
    assert node.slept == [2, 4, 8, 30] and not node.checks and not node.is_marked()
    assert [line.partition(":")[0] for line in node.lines] == [
        f"whether node {HOST} was found bad before is not known",
        f"node {HOST} was rebooted and does not pass its preflight",
        f"node {HOST} was rebooted, passes its preflight, and is admitted again",
    ]


def test_a_store_that_is_away_for_hours_keeps_no_node_away_that_passes_all_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mark(tmp_path)
    no_store = Check("storage", "failed", "no answer of S3", "write, read and delete under run.root")
    node = Node(tmp_path, SICK, no_store)
    with monkeypatch.context() as broken:
        broken.setattr(Store, "read", away)
        node.readmission.wait()
    asked = [2, 4, 8, 16, 32, *[60] * 8, 58]
    assert node.slept == [*asked, 30, *asked] and sum(asked) == 600
    assert node.lines[1].startswith(f"node {HOST} may have been rebooted and does not pass its preflight: ranks: ")
    assert node.lines[-1] == f"node {HOST} may have been rebooted, passes its preflight, and is admitted again"
    assert len(node.lines) == 4 and node.is_marked(), "the store has not been asked"
    known = Node(tmp_path, no_store, WELL)
    known.readmission.wait()
    assert known.slept == [30], "who is known to have been bad must reach the store as well"


def test_what_is_looked_at_on_a_node_needs_no_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its agent would die of the error, as often as a run bears."""
    trials: list[float] = []

    def look(probe: NodeProbe) -> list[Check]:
        return storage_checks(str(tmp_path), probes=probe._probes, node="here")

    monkeypatch.setattr(NodeProbe, "look", look)
    monkeypatch.setattr(NodeProbe, "trial_here", lambda probe, host, seconds: trials.append(seconds) or [WELL])
    config, root = parse_config(job_text({}, root=tmp_path)), Store(tmp_path)
    assert [each.status for each in checked(config, root, HOST)] == ["ok"] * 3
    assert not list(tmp_path.glob("preflight-*/*"))
    for method in ("replace", "delete_prefix", "check_writable"):
        monkeypatch.setattr(Store, method, away)
    storage, ranks = checked(config, root, HOST)
    assert (storage.name, storage.found, ranks) == (STORAGE, "no answer of S3", WELL)
    assert trials == [config.preflight.seconds] * 2
    monkeypatch.setattr(NodeProbe, "look", lambda probe: [SICK])
    assert checked(config, root, HOST) == [SICK] and len(trials) == 2


def test_a_preflight_before_a_run_lifts_the_marks_of_rebooted_nodes_that_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = Driver(tmp_path, "keep", monkeypatch)

    def after(node_id: str, check: Check) -> bool:
        mark(tmp_path)
        driver.bad_nodes.passed(Report(1, (NodeReport(node_id, HOST, (check,)),), (), (), 1.0))
        return mark_of(driver.root, HOST) is not None

    assert after("second-life", SICK)
    assert after("first-life", WELL), "its reboot is still to come"
    assert not after("second-life", WELL)
    assert driver.lines == [f"node {HOST} was rebooted, passes its preflight, and is admitted again"]


# ------------------------------------------------------------------------------------------------- whether it is left


@pytest.mark.parametrize(
    ("changes", "free", "left", "told"),
    [
        ({}, ["other"], True, "the run leaves 10.0.0.7 and goes on on other nodes, from its newest checkpoint"),
        ({}, [], False, "the run stays on 10.0.0.7: no other node that it could take is free"),
        ({"has_spares": True}, ["other"], False, "the run goes on without 10.0.0.7: a spare takes over"),
        ({"waits_for_seats": True}, ["other"], False, "the run stays on 10.0.0.7: it waits for another node already"),
    ],
)
def test_a_run_leaves_a_bad_node_if_another_is_free_and_no_spare_takes_over(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, bool], free: list[str], left: bool, told: str
) -> None:
    driver, asked = Driver(tmp_path, "keep", monkeypatch), list[list[str]]()
    driver.bad_nodes.excluded = ["unfit"]
    monkeypatch.setattr(bad_nodes_module, "free_nodes", lambda resources, besides: asked.append([*besides]) or free)
    assert driver.bad_nodes.are_left([found(None)], status(**changes)) is left
    assert driver.lines == [told] and asked in ([], [["unfit", "first-life"]])
    assert driver.bad_nodes.excluded == (["unfit", "first-life"] if left else ["unfit"])
    assert not driver.bad_nodes.are_left([found(None)] if left else [], status(**changes)) and len(driver.lines) == 1
