"""A proxy before a real S3 server that fails as told: cut, refuse, swallow, delay, slow, hold.

    with FlakyS3(endpoint) as proxy:
        store = Store(bucket, options={..., "endpoint_url": proxy.endpoint})
        proxy.set(cut(0, 2**20, times=5), refuse(503, "SlowDown", of=["UploadPart"]))
        ...
        proxy.set()

A process finds it by AWS_ENDPOINT_URL. Each request meets the first fault that fits; after `set()` all works again.
`proxy.seen` are the operations that arrived, in order. With `tls`, it speaks TLS to its clients, as AWS's own S3 does.

It runs on a thread of its own, on loopback, one connection per request. What it forwards it does not change, so
signatures stay valid; a client's `Host` is the proxy's, which the server accepts.
"""

import asyncio
import ssl
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from random import Random
from typing import Literal
from urllib.parse import parse_qs, urlsplit

_CHUNK_BYTES = 256 * 1024


@dataclass(frozen=True)
class Fault:
    """What happens to the requests it fits. Made by the functions below."""

    kind: Literal["cut", "refuse", "swallow", "delay", "slow", "hold"]
    # Empty: all.
    operations: frozenset[str]
    # So many requests, then no more; None: always.
    times: int | None
    status: int = 0
    code: str = ""
    seconds: float = 0
    bytes_between: tuple[int, int] = (0, 0)
    # Operations that must have been answered first, in this order.
    after: tuple[str, ...] = ()
    keeps_answer: bool = False

    def fits(self, operation: str) -> bool:
        return not self.after and self.times != 0 and (not self.operations or operation in self.operations)

    def answered(self, operation: str) -> "Fault":
        """The fault from the next request on, once a request has been answered."""
        return replace(self, after=self.after[1:]) if self.after[:1] == (operation,) else self


def cut(least_bytes: int, most_bytes: int, *, of: Sequence[str] = (), times: int | None = None) -> Fault:
    """Break the connection after a random number of bytes, of both directions together, heads included."""
    return Fault("cut", frozenset(of), times, bytes_between=(least_bytes, most_bytes))


def refuse(
    status: int, code: str, *, of: Sequence[str] = (), after: Sequence[str] = (), times: int | None = None
) -> Fault:
    """Answer with S3's own error: 503 SlowDown, 500 InternalError, 403 ExpiredToken... The server sees nothing."""
    return Fault("refuse", frozenset(of), times, status=status, code=code, after=tuple(after))


def swallow(*, of: Sequence[str] = (), times: int | None = 1) -> Fault:
    """Let the server do it, then break the connection instead of passing its answer on."""
    return Fault("swallow", frozenset(of), times, keeps_answer=True)


def delay(seconds: float, *, of: Sequence[str] = (), times: int | None = None) -> Fault:
    """Forward the request only after a while."""
    return Fault("delay", frozenset(of), times, seconds=seconds)


def slow(bytes_per_second: int, *, of: Sequence[str] = (), times: int | None = None) -> Fault:
    """Pass everything on, but not faster than this in either direction."""
    return Fault("slow", frozenset(of), times, seconds=_CHUNK_BYTES / bytes_per_second)


def hold(
    *,
    of: Sequence[str],
    after_bytes: int = 0,
    after: Sequence[str] = (),
    at: Literal["request", "answer"] = "request",
    times: int | None = 1,
) -> Fault:
    """Stop, and set `FlakyS3.held`: the moment to kill the client. `FlakyS3.set` breaks the connection off.

    at: "request" stops after so many bytes, and the server has seen no more than that; "answer" when the server has
    done it and its client has not heard. after: only once these have been answered, in this order.
    """
    keeps_answer = at == "answer"
    return Fault(
        "hold",
        frozenset(of),
        times,
        bytes_between=(after_bytes, after_bytes),
        after=tuple(after),
        keeps_answer=keeps_answer,
    )


class FlakyS3:
    """The proxy. `set` may be called at any time, from any thread."""

    def __init__(self, server_endpoint: str, *, seed: int = 0, tls: ssl.SSLContext | None = None):
        self._tls = tls
        self._server = urlsplit(server_endpoint)
        self._faults: list[Fault] = []
        self._random = Random(seed)
        self._tasks: set[asyncio.Task[None] | None] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="flaky-s3", daemon=True)
        self._released = asyncio.Event()
        self.seen: list[str] = []
        self.held = threading.Event()
        self.endpoint = ""

    def __enter__(self) -> "FlakyS3":
        self._thread.start()
        listening: Future[asyncio.Server] = asyncio.run_coroutine_threadsafe(
            asyncio.start_server(self._serve, "127.0.0.1", 0, limit=2**20, ssl=self._tls), self._loop
        )
        self._listener = listening.result()
        scheme = "https" if self._tls is not None else "http"
        self.endpoint = f"{scheme}://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"
        return self

    def __exit__(self, *_: object) -> None:
        asyncio.run_coroutine_threadsafe(self._close(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def set(self, *faults: Fault) -> None:
        """Only these, from the next request on."""
        self._faults = list(faults)
        self.held.clear()
        released, self._released = self._released, asyncio.Event()
        self._loop.call_soon_threadsafe(released.set)

    def over(self) -> bool:
        """Whether the faults that `set` told have all happened."""
        return all(fault.times == 0 for fault in self._faults)

    def _next_fault(self, operation: str) -> Fault | None:
        for index, fault in enumerate(self._faults):
            if fault.fits(operation):
                self._faults[index] = replace(fault, times=None if fault.times is None else fault.times - 1)
                return fault
        return None

    async def _close(self) -> None:
        self._listener.close()
        # What was just accepted becomes a task, and transports close, in the loop's next turns.
        for _ in range(5):
            others = asyncio.all_tasks() - {asyncio.current_task()}
            for task in others:
                task.cancel()
            await asyncio.gather(*others, return_exceptions=True)
            await asyncio.sleep(0)

    async def _serve(self, client: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        request, task = None, asyncio.current_task()
        # asyncio itself may forget a task whose client was killed, before it has cleaned up.
        self._tasks.add(task)
        try:
            request = await _Request.receive(client)
            self.seen.append(request.operation)
            await self._handle(request, client, answers)
        except (OSError, asyncio.IncompleteReadError):
            # The client or the server went away: so will the other, since both connections end below.
            pass
        finally:
            answers.transport.abort() if request is None else answers.close()
            self._tasks.discard(task)

    async def _handle(self, request: "_Request", client: asyncio.StreamReader, answers: asyncio.StreamWriter) -> None:
        fault = self._next_fault(request.operation)
        if fault is not None and fault.kind == "refuse":
            if not request.waits_for_go_ahead:
                await client.readexactly(request.body_bytes)
            answers.write(_error_answer(fault, with_body=request.method != "HEAD"))
            await answers.drain()
            return
        if fault is not None and fault.kind == "delay":
            await asyncio.sleep(fault.seconds)
        limit = None
        if fault is not None and fault.kind in ("cut", "hold") and not fault.keeps_answer:
            limit = self._random.randint(*fault.bytes_between)
        assert self._server.hostname is not None
        replies, upstream = await asyncio.open_connection(self._server.hostname, self._server.port, limit=2**20)
        meter = _Meter(limit, fault.seconds if fault is not None and fault.kind == "slow" else 0)
        try:
            sending = asyncio.create_task(meter.pump(client, upstream, request.body_bytes, first=request.head))
            keep_back = fault is not None and fault.keeps_answer
            receiving = asyncio.create_task(meter.pump(replies, answers, None, keep_back=keep_back))
            try:
                done, _ = await asyncio.wait((sending, receiving), return_when=asyncio.FIRST_EXCEPTION)
                for task in done:
                    task.result()
            except _LimitReached:
                broken = True
            else:
                broken = keep_back
            finally:
                for task in (sending, receiving):
                    task.cancel()
                await asyncio.gather(sending, receiving, return_exceptions=True)
            if broken:
                if fault is not None and fault.kind == "hold":
                    await self._hold(client)
                answers.transport.abort()
            else:
                self._faults = [each.answered(request.operation) for each in self._faults]
        finally:
            upstream.transport.abort()

    async def _hold(self, client: asyncio.StreamReader) -> None:
        """Until the client is gone, or the test has seen enough."""
        self.held.set()
        gone = asyncio.create_task(client.read())
        released = asyncio.create_task(self._released.wait())
        await asyncio.wait((gone, released), return_when=asyncio.FIRST_COMPLETED)
        for task in (gone, released):
            task.cancel()
        await asyncio.gather(gone, released, return_exceptions=True)


class _LimitReached(Exception):
    pass


@dataclass
class _Meter:
    """Passes bytes on in both directions until `left` are used up, each chunk after a while."""

    left: int | None
    seconds: float

    async def pump(
        self,
        source: asyncio.StreamReader,
        target: asyncio.StreamWriter,
        count: int | None,
        *,
        first: bytes = b"",
        keep_back: bool = False,
    ) -> None:
        """`first`, then `count` bytes (None: until the end). keep_back: pass on only the go-ahead for a body."""
        data, missing = first, count
        while True:
            await asyncio.sleep(self.seconds)
            allowed = data if self.left is None else data[: self.left]
            if not keep_back or data.startswith(b"HTTP/1.1 100"):
                target.write(allowed)
                await target.drain()
            if self.left is not None:
                self.left -= len(allowed)
                if self.left <= 0:
                    raise _LimitReached
            if missing == 0:
                return
            data = await source.read(_CHUNK_BYTES if missing is None else min(missing, _CHUNK_BYTES))
            if not data:
                if missing is not None:
                    raise ConnectionResetError("the client went away")
                return
            missing = None if missing is None else missing - len(data)


@dataclass(frozen=True)
class _Request:
    method: str
    # In S3's words.
    operation: str
    body_bytes: int
    waits_for_go_ahead: bool
    # To forward.
    head: bytes = field(repr=False)

    @staticmethod
    async def receive(client: asyncio.StreamReader) -> "_Request":
        head = await client.readuntil(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        method, target, _ = first.split(" ")
        headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        # One request per connection: the end of the answer is then the end of the connection
        return _Request(
            method=method,
            operation=_operation(method, target),
            body_bytes=int(headers.get("content-length", "0")),
            waits_for_go_ahead="expect" in headers,
            head=head[:-2] + b"Connection: close\r\n\r\n",
        )


def _operation(method: str, target: str) -> str:
    parts = urlsplit(target)
    query = parse_qs(parts.query, keep_blank_values=True)
    # Of the bucket itself.
    if not parts.path.strip("/").partition("/")[2]:
        if "uploads" in query:
            return "ListMultipartUploads"
        return "DeleteObjects" if "delete" in query else "ListObjectsV2"
    if "uploads" in query:
        return "CreateMultipartUpload"
    if "uploadId" in query:
        return {"PUT": "UploadPart", "POST": "CompleteMultipartUpload", "DELETE": "AbortMultipartUpload"}[method]
    return {"PUT": "PutObject", "GET": "GetObject", "HEAD": "HeadObject", "DELETE": "DeleteObject"}[method]


def _error_answer(fault: Fault, *, with_body: bool) -> bytes:
    body = f"<Error><Code>{fault.code}</Code><Message>from the flaky proxy</Message></Error>".encode()
    head = (
        f"HTTP/1.1 {fault.status} Refused\r\nContent-Type: application/xml\r\nContent-Length: {len(body)}\r\n"
        "Connection: close\r\n\r\n"
    )
    return head.encode() + (body if with_body else b"")
