"""TCP ports for a generation's ranks, taken on the node where they will listen."""

import socket

from raynium.accelerators.neuron import COLLECTIVES_PORTS, collectives_port
from raynium.errors import LaunchError

TRIES = 200


def free_port(host: str) -> int:
    """A port that was free a moment ago on this host."""
    with socket.socket(_family(host)) as probe:
        probe.bind((host, 0))
        return probe.getsockname()[1]


def rendezvous_socket(host: str) -> socket.socket:
    """Bound to this address and a port of it for rank 0, which listens: until then nobody else can take the port.

    The port that follows from it is free here too, for the Neuron runtime's root communicator: all ranks are told the
    first, so all come to the same second, and a taken one is avoided by another rendezvous. Raises LaunchError.
    """
    for _ in range(TRIES):
        found = socket.socket(_family(host))
        found.bind((host, 0))
        if is_free(host, collectives_port(found.getsockname()[1])):
            return found
        found.close()
    raise LaunchError(
        f"none of {TRIES} ports tried on {host} between {COLLECTIVES_PORTS.start} and {COLLECTIVES_PORTS.stop - 1} is "
        "free, and the Neuron runtime's root communicator needs one: see what listens there (`ss -ltn`)"
    )


def is_free(host: str, port: int) -> bool:
    with socket.socket(_family(host)) as probe:
        # What an ended generation left in TIME_WAIT counts as free
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def _family(host: str) -> socket.AddressFamily:
    return socket.AF_INET6 if ":" in host else socket.AF_INET
