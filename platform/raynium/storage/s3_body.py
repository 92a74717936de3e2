"""The bodies of S3's requests and answers, sent from and received into memory of ours. No torch."""

import asyncio
import os
import socket
from collections.abc import Callable, Iterator, Sequence

from aiohttp import ClientResponse
from aiohttp.abc import AbstractStreamWriter
from aiohttp.http import StreamWriter
from aiohttp.payload import Payload

# So much is encrypted at once.
_SLICE_BYTES = 2**20
# Without TLS. Each slice begins with a turn of the event loop.
_DIRECT_SLICE_BYTES = 8 * 2**20
# Bodies of so much are worth a connection of their own.
_DIRECT_BYTES = 4 * 2**20


class MemoryBody(Payload):
    """A request's body that is sent from where it lies; it must not change before the request has ended.

    botocore takes bytes, which aiohttp and asyncio then copy, or a file; it sees a file here, and asks for its length.
    """

    def __init__(self, view: memoryview, *, moved: Callable[[], None]):
        """moved: called whenever the network has taken some more of it."""
        super().__init__(view)
        self._view, self._position, self._moved = view, 0, moved
        self._size = len(view)

    def __len__(self) -> int:
        return len(self._view)

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: len(self._view)}[whence]
        self._position = start + offset
        return self._position

    def read(self, count: int = -1) -> bytes:
        """For a botocore told to hash what it sends; sending itself does not pass here."""
        begin, end = self._position, len(self._view)
        self._position = end if count < 0 else min(end, begin + count)
        return bytes(self._view[begin : self._position])

    def decode(self, encoding: str = "utf-8", errors: str = "strict") -> str:
        return bytes(self._view).decode(encoding, errors)

    async def write(self, writer: AbstractStreamWriter) -> None:
        await self.write_with_length(writer, None)

    async def write_with_length(self, writer: AbstractStreamWriter, content_length: int | None) -> None:
        assert isinstance(writer, StreamWriter)
        view, transport = self._view[:content_length], writer.transport
        if transport is None or not view or transport.get_extra_info("ssl_object") is not None:
            for piece in _slices(view, _SLICE_BYTES):
                # Waits while the socket is behind.
                await writer.write(piece)
                self._moved()
            return
        # Without TLS: from our memory into the socket. asyncio's transport would copy what the socket does not take at
        # once, and it keeps its socket to itself, so this sends on a duplicate while the transport has nothing to send
        # Else `drain` would not wait until the headers are gone.
        transport.set_write_buffer_limits(0)
        writer.send_headers()
        await writer.drain()
        with socket.socket(fileno=os.dup(transport.get_extra_info("socket").fileno())) as raw:
            raw.setblocking(False)
            for piece in _slices(view, _DIRECT_SLICE_BYTES):
                await asyncio.get_running_loop().sock_sendall(raw, piece)
                self._moved()


class Destination:
    """Memory to be filled from front to back: `buffers` (flat bytes), one after the other."""

    def __init__(self, buffers: Sequence[memoryview]):
        # The next one is last.
        self._waiting = [buffer for buffer in reversed(buffers) if len(buffer)]
        self.received_bytes = 0
        self.missing_bytes = sum(map(len, buffers))

    def front(self) -> memoryview:
        """The next bytes to fill: what is left of one buffer. Only while bytes are missing."""
        return self._waiting[-1]

    def advance(self, count: int) -> None:
        """The first `count` bytes of `front` are filled."""
        buffer = self._waiting.pop()
        if count < len(buffer):
            self._waiting.append(buffer[count:])
        self.received_bytes += count
        self.missing_bytes -= count

    def put(self, piece: bytes) -> None:
        """Copy `piece` to the front of what is missing; what is more than that is dropped."""
        view = memoryview(piece)[: self.missing_bytes]
        while view:
            buffer = self.front()
            count = min(len(view), len(buffer))
            buffer[:count] = view[:count]
            view = view[count:]
            self.advance(count)


async def receive(response: ClientResponse, destination: Destination, *, silence_seconds: float) -> None:
    """Fill `destination` until it is full or the answer's body ends.

    Raises aiohttp's errors, OSError, and TimeoutError if nothing arrives for so long. Closes the connection of a large
    body.
    """
    content, connection = response.content, response.connection
    left_bytes = int(response.headers.get("Content-Length", "0")) - content.total_bytes
    if connection is not None and connection.transport is not None and left_bytes >= _DIRECT_BYTES:
        destination.put(content.read_nowait())
        await _receive_directly(connection.transport, destination, left_bytes, silence_seconds)
        return
    while destination.missing_bytes and (piece := await content.readany()):
        destination.put(piece)


async def _receive_directly(
    transport: asyncio.Transport, destination: Destination, left_bytes: int, silence_seconds: float
) -> None:
    """From the socket into our memory. Through aiohttp each byte is copied three times more, under Python's lock.

    aiohttp never sees the end of this body, so the connection cannot serve another request: `response.close()` ends it.
    """
    aiohttp_protocol = transport.get_protocol()
    filler = _Filler(transport, destination, min(left_bytes, destination.missing_bytes))
    transport.set_protocol(filler)
    try:
        # aiohttp stops the socket when it has much that nobody took.
        transport.resume_reading()
        while not filler.done.done():
            before = destination.received_bytes
            await asyncio.wait((filler.done,), timeout=silence_seconds)
            if not filler.done.done() and destination.received_bytes == before:
                raise TimeoutError(f"nothing arrived for {silence_seconds:g} s")
        filler.done.result()
    finally:
        transport.set_protocol(aiohttp_protocol)


class _Filler(asyncio.BufferedProtocol):
    """Lets a transport write the next `count` bytes that it receives into `destination`."""

    def __init__(self, transport: asyncio.Transport, destination: Destination, count: int):
        self._transport, self._destination, self._count = transport, destination, count
        self.done: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def get_buffer(self, sizehint: int) -> memoryview:
        return self._destination.front()[: self._count]

    def buffer_updated(self, nbytes: int) -> None:
        self._destination.advance(nbytes)
        self._count -= nbytes
        if self._count == 0:
            self._transport.pause_reading()
            self.done.set_result(None)

    def eof_received(self) -> None:
        self.connection_lost(None)

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.done.done():
            self.done.set_exception(exc or ConnectionResetError("the server closed the connection"))


def _slices(view: memoryview, size: int) -> Iterator[memoryview]:
    return (view[begin : begin + size] for begin in range(0, len(view), size))
