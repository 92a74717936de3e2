"""EC2's metadata service, played by a server of this process on loopback."""

from typing import Any

import pytest
from metadata import metadata_service

from raynium.health.host import ThisHost
from raynium.health.metadata_service import MetadataService, ask

pytestmark = pytest.mark.quick


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
    with metadata_service(**settings) as address:
        assert ask(address) == MetadataService(*found)


def test_nobody_answers() -> None:
    with metadata_service(version_1=True, version_2=True, role=None) as address:
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
