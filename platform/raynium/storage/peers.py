"""Files in the memory of other nodes' agents, over TCP. No torch.

Both ends prove to know the run's secret (an HMAC challenge of multiprocessing's). No pickle is read. As the collectives
beside them, the bytes travel in clear.
"""

import contextlib
import json
import os
import socket
import struct
import time
from collections.abc import Iterator, Mapping
from multiprocessing import AuthenticationError
from multiprocessing.connection import Client, Connection, answer_challenge, deliver_challenge
from typing import cast

from raynium.errors import StoreError
from raynium.storage.backend import KeyMissing

# Of one message at most.
CHUNK_BYTES = 4 * 2**20
# A machine that was lost in the middle of a copy closes no connection.
SILENCE_SECONDS = 30

# What a connection, or what comes over it, may be ended by.
BROKEN = (OSError, EOFError, ValueError, AuthenticationError)


class PeerFiles:
    """One agent's files, for whoever may read them. Safe to use from several threads: each call is a connection."""

    def __init__(self, address: tuple[str, int], secret: bytes):
        self._address, self._secret = address, secret

    def uri(self, key: str) -> str:
        """For people."""
        return f"{key} in the memory of {self._address[0]}"

    def size(self, key: str) -> int:
        """Bytes of the file. KeyMissing; StoreError."""
        with self._asked(key, 0, 0) as (_, size):
            return size

    def read_into(self, key: str, start: int, *buffers: memoryview) -> None:
        """Fill `buffers` (flat bytes), one after the other, from byte `start`. KeyMissing; StoreError if it ends before
        or its agent goes.
        """
        length = sum(map(len, buffers))
        with self._asked(key, start, start + length) as (connection, _):
            rest = memoryview(b"")
            for buffer in buffers:
                filled = 0
                while filled < len(buffer):
                    rest = rest or memoryview(connection.recv_bytes(CHUNK_BYTES))
                    piece, rest = rest[: len(buffer) - filled], rest[len(buffer) - filled :]
                    buffer[filled : filled + len(piece)] = piece
                    filled += len(piece)

    @contextlib.contextmanager
    def _asked(self, key: str, begin: int, end: int) -> Iterator[tuple[Connection, int]]:
        """A connection over which these bytes come, and the file's size."""
        try:
            with contextlib.closing(connect(self._address, self._secret)) as connection:
                send(connection, {"do": "read", "key": key, "begin": begin, "end": end})
                answer = receive(connection)
                if "absent" in answer:
                    raise KeyMissing(f"{self.uri(key)} is not there: {answer['absent']}")
                yield connection, int(str(answer["size"]))
        except BROKEN as error:
            raise StoreError(
                f"cannot read {self.uri(key)}: {str(error) or type(error).__name__}. Its agent has gone, or the "
                "network between the nodes is broken: the run goes on from its newest checkpoint"
            ) from error


def connect(address: tuple[str, int], secret: bytes) -> Connection:
    """To an agent, which knows us. OSError, EOFError, AuthenticationError."""
    connection = cast(Connection, Client(address))
    limit(connection)
    answer_challenge(connection, secret)
    deliver_challenge(connection, secret)
    return connection


def admit(connection: Connection, secret: bytes) -> None:
    """The other end of `connect`; raises the same."""
    limit(connection)
    deliver_challenge(connection, secret)
    answer_challenge(connection, secret)


def limit(connection: Connection) -> None:
    """From now on a read or write of it that takes longer fails with an OSError."""
    with socket.socket(fileno=os.dup(connection.fileno())) as same:
        for option in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            same.setsockopt(socket.SOL_SOCKET, option, struct.pack("ll", SILENCE_SECONDS, 0))


def send(connection: Connection, message: Mapping[str, object]) -> None:
    connection.send_bytes(json.dumps(message).encode())


def receive(connection: Connection) -> dict[str, object]:
    """ValueError if it is no JSON object."""
    message = json.loads(connection.recv_bytes())
    if not isinstance(message, dict):
        raise ValueError(f"{message!r:.50} is no message of an agent")
    return message


def paced(chunks: Iterator[bytes], bytes_per_second: float) -> Iterator[bytes]:
    """The same, no faster than that on the whole."""
    began, sent = time.monotonic(), 0
    for data in chunks:
        yield data
        sent += len(data)
        time.sleep(max(0.0, began + sent / bytes_per_second - time.monotonic()))
