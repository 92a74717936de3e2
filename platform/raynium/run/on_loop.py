"""A coordinator without Ray: on an asyncio loop in a thread of this process. The fake of `protocol.Coordinator`."""

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

from raynium.run.coordinator import RunCoordinator
from raynium.run.protocol import AgentEvent, AgentInfo, Commit, GoHome, News, NodeEnded, Order, StandBy, Verdict

Answer = TypeVar("Answer")


class CoordinatorOnLoop:
    """See `protocol.Coordinator`; `close` ends the thread."""

    def __init__(self, coordinator: RunCoordinator):
        self.coordinator = coordinator
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="coordinator", daemon=True)
        self._thread.start()

    def join(self, agent: AgentInfo) -> "Future[Order | StandBy | GoHome]":
        return self.run(lambda each: each.join(agent))

    def watch(self, agent: AgentInfo, order: Order, *, stop_known: bool) -> "Future[Verdict]":
        return self.run(lambda each: each.watch(agent, order, stop_known=stop_known))

    def exited(self, agent: AgentInfo, order: Order, ended: NodeEnded) -> "Future[None]":
        return self.run(lambda each: each.exited(agent, order, ended))

    def commits(self, sent: Commit | None) -> "Future[list[Commit] | None]":
        return self.run(lambda each: each.commits(sent))

    def tell(self, event: AgentEvent) -> "Future[News]":
        return self.run(lambda each: each.tell(event))

    def run(self, call: Callable[[RunCoordinator], Coroutine[Any, Any, Answer]]) -> "Future[Answer]":
        """Any call of the coordinator's, such as those that the driver makes."""
        return asyncio.run_coroutine_threadsafe(call(self.coordinator), self._loop)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()
