"""What HTTP libraries take from the environment by themselves never sends a token astray."""

import os
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from raynium.config.proxies import proxy_for, spare_loopback
from raynium.errors import LaunchError, TrackingError
from raynium.launch.jobs import connect_jobs
from raynium.launch.ray_environment import CLUSTER_VARIABLES, set_ray_environment
from raynium.tracking.client import check_reachable, mlflow_client
from raynium.tracking.runs import read_metric

SECRET = "hunter2"


@dataclass
class Listener:
    """An HTTP server that answers everything in one way, and remembers who asked with which words."""

    status: int
    body: bytes
    address: str = ""
    requests: list[tuple[str, str]] = field(default_factory=list)


def serve(listener: Listener) -> ThreadingHTTPServer:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            listener.requests.append((self.path, self.headers.get("Authorization", "")))
            self.send_response(listener.status)
            self.end_headers()
            self.wfile.write(listener.body)

        do_POST = do_CONNECT = do_GET

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    listener.address = f"http://127.0.0.1:{server.server_address[1]}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


@pytest.fixture
def other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Listener]:
    """A server that nobody has named on the command line."""
    for name in [*os.environ]:
        if name.lower().endswith("_proxy") or name in CLUSTER_VARIABLES or name.startswith(("MLFLOW_", "RAY_AUTH")):
            monkeypatch.delenv(name)
    for name in ("no_proxy", "NO_PROXY"):
        monkeypatch.setenv(name, "")
    monkeypatch.delenv("NETRC", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("RAY_AUTH_TOKEN", SECRET)
    listener = Listener(502, b"gateway")
    with serve(listener) as server:
        yield listener
        server.shutdown()


@pytest.fixture
def named() -> Iterator[Listener]:
    listener = Listener(200, b'{"ray_version": "2.60.0", "version": "4"}')
    with serve(listener) as server:
        yield listener
        server.shutdown()


@pytest.mark.parametrize("name", ["RAY_ADDRESS", "RAY_API_SERVER_ADDRESS", "http_proxy", "HTTP_PROXY", "ALL_PROXY"])
def test_a_clusters_token_goes_to_the_named_dashboard_and_nowhere_else(
    name: str, named: Listener, other: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, other.address)
    connect_jobs(named.address)
    assert {words for _, words in named.requests} == {f"Bearer {SECRET}"}
    assert other.requests == [] and os.environ[name] == other.address


def test_a_token_is_not_shown_to_a_proxy_and_a_netrc_does_not_take_its_place(
    named: Listener, other: Listener, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", other.address.replace("//", f"//me:{SECRET}@"))
    with pytest.raises(
        LaunchError, match=r"would be shown to the proxy 127.0.0.1:.* Add head.internal to NO_PROXY"
    ) as told:
        connect_jobs("http://head.internal:8265")
    assert SECRET not in str(told.value)
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    with pytest.raises(TrackingError, match="MLFLOW_TRACKING_TOKEN would be shown to the proxy"):
        check_reachable("http://mlflow.internal:5000")
    assert proxy_for("http://head.internal:8265") and proxy_for(named.address) is None
    monkeypatch.delenv("HTTP_PROXY")
    (tmp_path / ".netrc").write_text("machine 127.0.0.1 login me password other\n")
    (tmp_path / ".netrc").chmod(0o600)
    with pytest.raises(LaunchError, match=r"password for 127.0.0.1 in .netrc would be sent in place of the cluster's"):
        connect_jobs(named.address)
    assert named.requests == other.requests == []


def test_a_record_cannot_have_credentials_sent_to_a_server_of_its_own_choice(
    named: Listener, other: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_TOKEN", SECRET)
    with pytest.raises(TrackingError, match=f"Set MLFLOW_TRACKING_URI={named.address} if it is that server's"):
        read_metric(named.address, "a" * 32, "train/loss")
    assert named.requests == []
    monkeypatch.setenv("MLFLOW_TRACKING_URI", named.address)
    assert read_metric(named.address, "a" * 32, "train/loss") == []
    assert {words for _, words in named.requests} == {f"Bearer {SECRET}"}


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (502, "502 Bad Gateway. That is the word of a proxy in front of it"),
        (503, "503 Service Unavailable. That is"),
        (401, "Authentication required.*RAY_AUTH_TOKEN"),
        (403, "Authentication failed.*RAY_AUTH_TOKEN"),
    ],
)
def test_a_dashboard_that_refuses_is_told_in_one_line(other: Listener, status: int, told: str) -> None:
    other.status = status
    with pytest.raises(LaunchError, match=f"cannot reach a Ray cluster at {other.address}: {told}") as caught:
        connect_jobs(other.address)
    assert "\n" not in str(caught.value)


def test_the_proxy_that_answers_in_place_of_a_dashboard_is_named(
    other: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HTTP_PROXY", other.address)
    monkeypatch.delenv("RAY_AUTH_TOKEN")
    proxy = other.address
    with pytest.raises(LaunchError, match=f"502 Bad Gateway, from the proxy {proxy}. Add head.internal to NO_PROXY"):
        connect_jobs("http://head.internal:8265")


def test_the_machines_own_addresses_are_spared_only_where_there_is_a_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [each for each in os.environ if each.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    spare_loopback()
    assert "NO_PROXY" not in os.environ
    monkeypatch.setenv("no_proxy", "")
    monkeypatch.setenv("NO_PROXY", "corp,localhost")
    monkeypatch.setenv("http_proxy", "http://proxy:3128")
    spare_loopback()
    spare_loopback()
    assert os.environ["NO_PROXY"] == os.environ["no_proxy"] == "corp,localhost,127.0.0.1,127.0.0.2,::1,127.0.0.0/8"
    assert all(proxy_for(f"http://{host}:1") is None for host in ("localhost", "127.0.0.1", "127.0.0.2", "x.corp"))
    assert proxy_for("http://10.0.0.1:1") == "http://proxy:3128"


def test_what_names_another_cluster_is_no_part_of_one_that_is_started_here(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "environ", dict.fromkeys(CLUSTER_VARIABLES, "http://other") | {"RAY_TRAIN_V2_ENABLED": "0"})
    set_ray_environment(starts_cluster=False)
    assert os.environ["RAY_ADDRESS"] == "http://other" and os.environ["RAY_TRAIN_V2_ENABLED"] == "1"
    set_ray_environment(starts_cluster=True)
    assert not set(CLUSTER_VARIABLES) & set(os.environ)


def test_mlflow_takes_neither_address_nor_run_from_its_own_variables(
    tmp_path: Path, other: Listener, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_REGISTRY_URI"):
        monkeypatch.setenv(name, other.address)
    for name, value in {"RUN_ID": "x" * 32, "EXPERIMENT_ID": "7", "EXPERIMENT_NAME": "theirs"}.items():
        monkeypatch.setenv(f"MLFLOW_{name}", value)
    monkeypatch.setenv("MLFLOW_ENABLE_ASYNC_LOGGING", "true")
    with mlflow_client(f"sqlite:///{tmp_path}/m.db", timeout_seconds=5) as client:
        run = client.create_run(client.create_experiment("ours"))
        assert client.get_experiment(run.info.experiment_id).name == "ours" and run.info.run_id != "x" * 32
    assert other.requests == []
