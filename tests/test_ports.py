"""Ports of a generation: the rendezvous', and the one that Neuron's root communicator makes of it."""

import socket

import pytest

from raynium.accelerators.neuron import collectives_port
from raynium.errors import LaunchError
from raynium.node import ports
from raynium.node.ports import rendezvous_port

pytestmark = pytest.mark.quick

HOST = "127.0.0.1"


def bound(port: int) -> socket.socket:
    """Somebody else who listens there."""
    other = socket.socket()
    other.bind((HOST, port))
    other.listen()
    return other


@pytest.fixture
def offered(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """What the kernel would give out, in turn: two ports whose followers are free now."""
    found = [rendezvous_port(HOST), rendezvous_port(HOST)]
    left = iter(found)
    monkeypatch.setattr(ports, "free_port", lambda host: next(left))
    return found


def test_a_rendezvous_whose_collectives_port_is_taken_is_passed_over(offered: list[int]) -> None:
    with bound(collectives_port(offered[0])):
        assert rendezvous_port(HOST) == offered[1]


def test_both_are_free(offered: list[int]) -> None:
    port = rendezvous_port(HOST)
    assert port == offered[0]
    for each in (port, collectives_port(port)):
        bound(each).close()


def test_without_any_free_port_the_range_is_named(offered: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ports, "free_port", lambda host: offered[0])
    with (
        bound(collectives_port(offered[0])),
        pytest.raises(LaunchError, match=r"tried on 127\.0\.0\.1 between 20000 and 29999"),
    ):
        rendezvous_port(HOST)


def test_an_ipv6_host_is_looked_at_too() -> None:
    if not socket.has_ipv6:
        pytest.skip("this Python has no IPv6")
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    assert rendezvous_port("::1") > 0
