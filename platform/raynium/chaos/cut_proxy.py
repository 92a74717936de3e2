"""A proxy before an HTTP server that can be cut: then every connection breaks, and none is taken, until it is mended.

with CutProxy("http://127.0.0.1:5000") as proxy:
    ...  # somebody uses proxy.uri
    proxy.cut()
    proxy.mend()

It passes bytes on as they are, on a thread of its own, on loopback.
"""

import asyncio
import contextlib
import threading
from urllib.parse import urlsplit

CHUNK_BYTES = 2**16


class CutProxy:
    """`cut` and `mend` may be called from any thread."""

    def __init__(self, server_uri: str):
        """server_uri: http://, with a port or without."""
        self._server = urlsplit(server_uri)
        assert self._server.scheme == "http" and self._server.hostname is not None, server_uri
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cut-proxy", daemon=True)
        self._is_cut = False
        self._open: set[asyncio.StreamWriter] = set()
        self.uri = ""

    def __enter__(self) -> "CutProxy":
        self._thread.start()
        listening = asyncio.run_coroutine_threadsafe(asyncio.start_server(self._serve, "127.0.0.1", 0), self._loop)
        self._listener = listening.result()
        port = self._listener.sockets[0].getsockname()[1]
        self.uri = self._server._replace(netloc=f"127.0.0.1:{port}").geturl()
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self) -> None:
        self._is_cut = True
        self._loop.call_soon_threadsafe(self._break_off)

    def mend(self) -> None:
        self._is_cut = False

    def _break_off(self) -> None:
        for each in self._open:
            each.transport.abort()

    async def _close(self) -> None:
        self._listener.close()
        self._break_off()
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)

    async def _serve(self, client: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        if self._is_cut:
            answers.transport.abort()
            return
        self._open.add(answers)
        # A server that is itself away looks to the client as if we were.
        with contextlib.suppress(OSError):
            replies, requests = await asyncio.open_connection(self._server.hostname, self._server.port or 80)
            try:
                await asyncio.gather(_pass_on(client, requests), _pass_on(replies, answers))
            finally:
                requests.transport.abort()
        self._open.discard(answers)
        answers.transport.abort()


async def _pass_on(source: asyncio.StreamReader, target: asyncio.StreamWriter) -> None:
    while data := await source.read(CHUNK_BYTES):
        target.write(data)
        await target.drain()
    if target.can_write_eof():
        target.write_eof()
