"""EC2's metadata service, played by a server of this process on loopback."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from raynium.health.host import ThisHost
from raynium.health.metadata_service import MetadataService, ask

pytestmark = pytest.mark.quick

TOKEN = "token-of-a-minute"


@contextmanager
def service(*, version_1: bool, version_2: bool, role: str | None) -> Iterator[str]:
    """The address of one that answers as EC2 does with these settings."""

    class Handler(BaseHTTPRequestHandler):
        def do_PUT(self) -> None:
            asked = self.path == "/latest/api/token" and self.headers["X-aws-ec2-metadata-token-ttl-seconds"]
            self.answer(200 if version_2 and asked else 403, TOKEN)

        def do_GET(self) -> None:
            if not (version_1 or self.headers["X-aws-ec2-metadata-token"] == TOKEN):
                return self.answer(401, "")
            pages = {"/latest/meta-data/instance-type": "trn2.48xlarge"}
            if role is not None:
                pages["/latest/meta-data/iam/security-credentials/"] = role
            return self.answer(200 if self.path in pages else 404, pages.get(self.path, "not found"))

        def answer(self, code: int, text: str) -> None:
            self.send_response(code)
            self.end_headers()
            self.wfile.write(text.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"version_1": False, "version_2": True, "role": "worker"}, (True, False, "trn2.48xlarge", "worker")),
        ({"version_1": True, "version_2": True, "role": "worker"}, (True, True, "trn2.48xlarge", "worker")),
        ({"version_1": True, "version_2": False, "role": "worker"}, (False, True, "trn2.48xlarge", "worker")),
        ({"version_1": False, "version_2": True, "role": None}, (True, False, "trn2.48xlarge", None)),
    ],
)
def test_what_it_answers(settings: dict[str, Any], found: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9")  # a proxy knows nothing of this machine
    with service(**settings) as address:
        assert ask(address) == MetadataService(*found)


def test_nobody_answers() -> None:
    with service(version_1=True, version_2=True, role=None) as address:
        pass
    assert ask(address) == MetadataService(gives_token=False, answers_without_token=False)


def test_only_ec2_instances_are_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = MetadataService(True, False)
    monkeypatch.setattr("raynium.health.host.ask", lambda: asked)
    vendor = "QEMU\n"
    monkeypatch.setattr(ThisHost, "read", lambda self, path: vendor)
    assert ThisHost().metadata_service() is None
    vendor = "Amazon EC2\n"
    assert ThisHost().metadata_service() is asked
