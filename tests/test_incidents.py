"""What went wrong in a run: one record for each fault, what it cost, and who outside is told of it."""

import json
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any, ClassVar
from xml.etree import ElementTree

import pytest
from pydantic import ValidationError
from tiny import job_text

from raynium.config.fault import FaultSection
from raynium.config.load import parse_config
from raynium.errors import ConfigError
from raynium.launch.notify import NOTIFY_SECONDS, Notifier
from raynium.run.record import RunRecord, claim, read_record
from raynium.storage.process import this_process
from raynium.storage.store import Store
from raynium.terminal.report import page_of
from raynium.tracking.chart import COLOURS, time_chart
from raynium.tracking.incidents import KEPT, Incident, Incidents, merged, row, settled
from raynium.tracking.ledger import CAUSES, Ledger


class Clock:
    now = 100.0


@pytest.fixture
def incidents() -> Incidents:
    return Incidents("a", unix=lambda: 1000.0 + Clock.now, steady=lambda: Clock.now)


@pytest.fixture(autouse=True)
def clock() -> None:
    Clock.now = 100.0


def test_an_incident_lasts_until_a_step_is_done_and_counts_what_is_taken_again(incidents: Incidents) -> None:
    incidents.opens("ranks", where="10.0.0.3", cause="rank 1: killed by SIGKILL", step=57)
    incidents.began_from(50)
    (lasting,) = incidents.seen()
    assert (lasting.key, lasting.unix, lasting.seconds, lasting.steps) == ("a-1", 1100.0, None, 7)
    Clock.now += 1.5
    incidents.stepped()
    Clock.now += 10
    incidents.stepped()
    (over,) = incidents.seen()
    assert (over.seconds, over.steps) == (1.5, 7)
    assert row(over.to_json()) == ("ranks on 10.0.0.3", "rank 1: killed by SIGKILL", "57", "1.5 s, 7 step(s) again")


def test_a_second_failure_before_any_step_is_an_incident_of_its_own_and_both_end_with_that_step(
    incidents: Incidents,
) -> None:
    incidents.opens("ranks", where="", cause="first", step=57)
    incidents.began_from(50)
    Clock.now += 2
    incidents.opens("agents", where="", cause="second", step=50)
    incidents.began_from(40)
    Clock.now += 3
    incidents.stepped()
    assert [(each.cause, each.seconds, each.steps) for each in incidents.seen()] == [
        ("first", 5.0, 17),
        ("second", 3.0, 10),
    ]


def test_what_the_run_gets_on_with_costs_nothing_and_closes_nothing_else(incidents: Incidents) -> None:
    incidents.opens("ranks", where="", cause="lasts", step=9)
    incidents.notes("checkpoint", where="", cause="AccessDenied", step=10)
    assert [(each.what, each.seconds) for each in incidents.seen()] == [("ranks", None), ("checkpoint", 0.0)]
    Clock.now += 1
    incidents.stepped()
    assert [each.seconds for each in incidents.seen()] == [1.0, 0.0]


def test_one_that_is_seen_again_lasts_again_and_costs_the_sum(incidents: Incidents) -> None:
    incidents.opens("step", where="", cause="leapt", step=57, key="bad-steps-57")
    incidents.began_from(50)
    Clock.now += 2
    incidents.stepped()
    Clock.now += 10
    for _ in range(2):
        incidents.opens("step", where="", cause="leapt twice", step=55, key="bad-steps-57")
        incidents.began_from(47)
        Clock.now += 1
    # What is noted of it meanwhile does not end it.
    incidents.notes("step", where="", cause="left out", step=49, key="bad-steps-57")
    (lasting,) = incidents.seen()
    assert (lasting.seconds, lasting.cause, lasting.unix) == (None, "leapt twice", 1100.0)
    incidents.stepped()
    incidents.notes("step", where="", cause="and one more", step=60, key="bad-steps-57")
    (over,) = incidents.seen()
    assert (over.seconds, over.steps, over.step, over.cause) == (4.0, 15, 60, "and one more")


def test_a_run_of_months_keeps_the_newest(incidents: Incidents) -> None:
    for number in range(KEPT + 5):
        incidents.notes("coordinator", where="", cause=f"{number}", step=number)
    assert len(incidents.seen()) == KEPT and incidents.seen()[-1].cause == str(KEPT + 4)
    known = [each.to_json() for each in incidents.seen()]
    Clock.now += 1
    incidents.notes("coordinator", where="", cause="newest", step=0)
    both = merged(known, incidents.seen())
    assert len(both) == KEPT and both[-1]["cause"] == "newest" and len({each["key"] for each in both}) == KEPT


def test_what_nobody_lived_to_see_the_end_of_is_over_once_a_step_is_done() -> None:
    lost = {"key": "b-1", "unix": 1000.0, "what": "driver", "where": "head", "cause": "?", "step": 30, "seconds": None}
    (over,) = settled([lost | {"steps": 0}], unix=1090.0, resume_step=25)
    assert (over["seconds"], over["steps"]) == (90.0, 5)
    assert settled([over], unix=2000.0, resume_step=99) == [over]


def test_a_driver_that_was_killed_is_an_incident_of_the_run_that_goes_on(tmp_path: Path) -> None:
    store, config = Store(tmp_path / "run"), parse_config(job_text()).model_dump(mode="json")
    claim(store, "test", config)
    left = json.loads(store.read("run.json"))
    left["owner"] |= {"pid_started": "0"}
    store.replace("run.json", json.dumps(left).encode())
    (died,) = claim(store, "test", config).record.incidents or []
    assert died["what"] == "driver" and "ended without a word" in died["cause"] and died["seconds"] is None
    found = read_record(store)
    assert found is not None and found.incidents == [died]


# ---- who is told ----------------------------------------------------------------------------------------------------

INCIDENT = Incident("a-1", 0.0, "ranks", "", "rank 1: killed by SIGKILL", 1200).to_json()
TEXT = "Raynium run first: ranks at step 1,200: rank 1: killed by SIGKILL"


def record(*keys: str) -> RunRecord:
    return RunRecord(
        *("first", {}, "running", this_process(), 0.0, 0.0),
        mlflow_uri="http://page", mlflow_experiment_id="1", mlflow_run_id="2",
        incidents=[INCIDENT | {"key": key} for key in keys or ("a-1",)],
    )  # fmt: skip


class Webhook(BaseHTTPRequestHandler):
    got: ClassVar[list[Any]] = []

    def do_POST(self) -> None:
        self.got.append((self.path, json.loads(self.rfile.read(int(self.headers["Content-Length"])))))
        self.send_response(200 if "good" in self.path else 500)
        self.end_headers()

    def log_message(self, format: str, *args: Any) -> None: ...


@pytest.fixture
def webhook() -> Iterator[str]:
    Webhook.got = []
    server = HTTPServer(("127.0.0.1", 0), Webhook)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()


def notifier(
    told: list[str], environment: Mapping[str, str], *, notified: Sequence[str] = (), **fault: Any
) -> Notifier:
    return Notifier(FaultSection(**fault), notified=notified, environment=environment, tell=told.append)


def test_a_command_reads_the_incident_and_a_webhook_gets_the_same(webhook: str, tmp_path: Path) -> None:
    told: list[str] = []
    command = (sys.executable, "-c", f"import sys; open({str(tmp_path / 'got')!r}, 'w').write(sys.stdin.read())")
    sender = notifier(told, {"HOOK": f"{webhook}/good/secret"}, notify_command=command, notify_url="$HOOK")
    sender.hear(record())
    sender.close()
    (posted,) = Webhook.got
    message = {"text": TEXT, "run": "first", "page": page_of(record()), "incident": INCIDENT}
    assert posted == ("/good/secret", message)
    assert json.loads((tmp_path / "got").read_text()) == message and told == []


@pytest.mark.parametrize(
    ("fault", "environment", "words"),
    [
        ({"notify_url": "$HOOK"}, {}, "is $HOOK, which holds no http(s) address"),
        ({"notify_url": "$HOOK"}, {"HOOK": "file:///secret"}, "is $HOOK, which holds no http(s) address"),
        ({"notify_url": "$HOOK"}, {"HOOK": "http://[secret"}, "did not take an incident: ValueError"),
        ({"notify_url": "$HOOK"}, {"HOOK": "http://127.0.0.1:secret/"}, "did not take an incident: InvalidURL"),
        ({"notify_url": "$HOOK"}, {"HOOK": "http://127.0.0.1:1/secret key"}, "did not take an incident: InvalidURL"),
        ({"notify_url": "$HOOK"}, {"HOOK": "http://127.0.0.1:1/secret"}, "take an incident: Connection refused"),
        ({"notify_command": (sys.executable, "-c", "import sys; sys.exit('secret')")}, {}, "ended with 1"),
        ({"notify_command": ("curl", "$HOOK")}, {}, "has the word $HOOK, which is not set where the driver runs"),
        ({"notify_command": ("/proc/secret",)}, {}, "could not be run: FileNotFoundError"),
    ],
)  # fmt: skip
def test_what_cannot_be_told_is_said_once_without_what_is_secret(
    fault: dict[str, Any], environment: dict[str, str], words: str
) -> None:
    told: list[str] = []
    sender = notifier(told, environment, **fault)
    sender.hear(record("a-1", "a-2"))
    sender.close()
    (line,) = told
    assert words in line and "secret" not in line


def test_a_webhook_that_refuses_is_told_without_its_address(webhook: str) -> None:
    told: list[str] = []
    sender = notifier(told, {"HOOK": f"{webhook}/bad/secret"}, notify_url="$HOOK")
    sender.hear(record())
    sender.close()
    (line,) = told
    assert "did not take an incident: HTTP Error 500" in line and "secret" not in line


def test_what_a_driver_did_not_come_to_send_the_next_one_sends_and_nothing_twice(webhook: str) -> None:
    told: list[str] = []
    sender = notifier(told, {"HOOK": f"{webhook}/good"}, notified=["a-1"], notify_url="$HOOK")
    sender.hear(record("a-1", "a-2"))
    sender.hear(record("a-1", "a-2", "driver-7"))
    sender.close()
    assert [posted["incident"]["key"] for _, posted in Webhook.got] == ["a-2", "driver-7"] and told == []
    assert sender.notified(record("a-1", "a-2", "driver-7").incidents or ()) == ["a-1", "a-2", "driver-7"]


def test_who_asks_to_be_told_only_now_hears_nothing_old_and_a_variable_that_is_missing_loses_nothing() -> None:
    for fault, notified in (({}, ["a-1"]), ({"notify_url": "$HOOK"}, [])):
        sender = notifier([], {}, **fault)
        sender.hear(record())
        sender.close()
        assert sender.notified([INCIDENT]) == notified


SILENT = """
import os, socket
from raynium.config.fault import FaultSection
from raynium.launch import notify
from raynium.run.record import RunRecord
from raynium.storage.process import this_process

notify.CLOSE_SECONDS = 0.5
server = socket.create_server(("127.0.0.1", 0))
hook = {"HOOK": f"http://127.0.0.1:{server.getsockname()[1]}/secret"}
sender = notify.Notifier(FaultSection(notify_url="$HOOK"), notified=(), environment=hook, tell=print)
incidents = [{"key": str(n), "what": "ranks", "step": n, "cause": ""} for n in range(3)]
record = RunRecord("first", {}, "running", this_process(), 0.0, 0.0, incidents=incidents)
sender.hear(record)
sender.close()
print(sender.notified(incidents))
"""


def test_a_webhook_that_is_silent_keeps_no_driver_that_has_ended() -> None:
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", SILENT], capture_output=True, text=True, check=True, timeout=60)
    assert time.monotonic() - began < NOTIFY_SECONDS
    assert done.stdout == "3 incident(s) could not be sent within 0.5 s of the run's end\n[]\n"


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"fault.notify_url": "https://hooks.example/x3c"}, "fault.notify_url is something that is not repeated here"),
        ({"fault.notify_url": ["https://hooks.example/x3c"]}, r"it must be \$NAME of an environment variable"),
        ({"fault.notify_url": "https://hooks.example/x3c\0"}, "not repeated here.* which is not valid text"),
        ({"fault.notify_command": ["curl", "https://hooks.example/services/x3c"]}, r"give \$NAME as the word"),
        ({"fault.notify_command": ["curl", "hooks.example/x3c"]}, "fault.notify_command is something that is not"),
        ({"fault.notify_command": ["sh", "-c", "curl -d@- 'HTTPS://hooks.example?x3c'"]}, "or into a script"),
        ({"fault.notify_command": ["apprise", "tgram://x3c@chat"]}, "a list of words without an address in them"),
        ({"tracking.uri": ["https://me:x3c@mlflow.example"]}, "tracking.uri is something that is not repeated here"),
    ],
)  # fmt: skip
def test_what_may_be_a_secret_is_refused_without_being_repeated(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError, match=words) as refused:
        parse_config(job_text(), fields)
    assert "x3c" not in str(refused.value)
    with pytest.raises(ValidationError) as from_python:
        FaultSection(notify_url="https://hooks.example/x3c")
    assert "x3c" not in str(from_python.value)


@pytest.mark.parametrize(
    "command",
    [("./notify.sh",), ("/opt/my.tools/notify.sh", "--host", "https://hooks.example/"), ("curl", "$HOOK", "-d@/a.b/c")],
)
def test_commands_without_an_address_are_taken(command: tuple[str, ...]) -> None:
    assert parse_config(job_text(), {"fault.notify_command": command}).fault.notify_command == command


def test_a_word_of_the_command_may_name_a_variable(tmp_path: Path) -> None:
    told: list[str] = []
    write = "import sys; open(sys.argv[1], 'w').write(sys.stdin.read())"
    sender = notifier(told, {"FILE": str(tmp_path / "got")}, notify_command=(sys.executable, "-c", write, "$FILE"))
    sender.hear(record())
    sender.close()
    assert json.loads((tmp_path / "got").read_text())["incident"] == INCIDENT and told == []


# ---- the chart of the run's time ------------------------------------------------------------------------------------


def test_the_chart_is_one_bar_of_the_whole_time_cut_by_cause() -> None:
    ledger = Ledger(train=75.0, restart=20.0, load=5.0)
    chart = ElementTree.fromstring(time_chart(ledger))
    bars = [each.attrib for each in chart if each.tag.endswith("rect") and each.attrib["y"] == "0"]
    assert [(float(bar["x"]), float(bar["width"])) for bar in bars] == [(0, 540), (540, 144), (684, 36)]
    words = [each.text for each in chart if each.tag.endswith("text")]
    assert words == ["train 75.0 s (75.0 %)", "restart 20.0 s (20.0 %)", "load 5.0 s (5.0 %)"]
    assert set(COLOURS) == set(CAUSES) and len(set(COLOURS.values())) == len(CAUSES)
    assert len(ElementTree.fromstring(time_chart(Ledger()))) == 1
