"""Ports of a generation: the rendezvous', and the one that Neuron's root communicator makes of it."""

import socket

import pytest

from raynium.accelerators.neuron import collectives_port
from raynium.errors import LaunchError
from raynium.rank import ports
from raynium.rank.ports import free_port, rendezvous_socket

pytestmark = pytest.mark.quick

HOST = "127.0.0.1"


def bound(port: int) -> socket.socket:
    """Somebody else who listens there."""
    other = socket.socket()
    other.bind((HOST, port))
    other.listen()
    return other


def test_a_rendezvous_whose_collectives_port_is_taken_is_passed_over(monkeypatch: pytest.MonkeyPatch) -> None:
    taken, free, asked = free_port(HOST), free_port(HOST), list[int]()

    def second(port: int) -> int:
        asked.append(port)
        return taken if len(asked) == 1 else free

    monkeypatch.setattr(ports, "collectives_port", second)
    with bound(taken), rendezvous_socket(HOST) as rendezvous:
        assert len(asked) == 2 and rendezvous.getsockname() == (HOST, asked[1])


def test_a_rendezvous_port_is_held_until_rank_0_listens_and_the_collectives_port_is_free() -> None:
    with rendezvous_socket(HOST) as rendezvous:
        port = rendezvous.getsockname()[1]
        bound(collectives_port(port)).close()
        for host in (HOST, "0.0.0.0"):
            with socket.socket() as other, pytest.raises(OSError, match="in use"):
                other.bind((host, port))
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection((HOST, port))


def test_without_any_free_port_the_range_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    taken = free_port(HOST)
    monkeypatch.setattr(ports, "collectives_port", lambda port: taken)
    with bound(taken), pytest.raises(LaunchError, match=r"tried on 127\.0\.0\.1 between 20000 and 29999"):
        rendezvous_socket(HOST)


def test_an_ipv6_host_is_looked_at_too() -> None:
    if not socket.has_ipv6:
        pytest.skip("this Python has no IPv6")
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        pytest.skip("this machine has no IPv6 loopback")
    with rendezvous_socket("::1") as rendezvous:
        assert rendezvous.getsockname()[1] > 0
