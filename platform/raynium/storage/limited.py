"""A time limit for storage that has none: a file system of a server that is gone keeps whoever asks for ever."""

import threading
from collections.abc import Callable
from concurrent.futures import Future
from functools import partial
from typing import Any, cast

from raynium.errors import StoreError
from raynium.storage.backend import Backend


def limited(backend: Backend, *, url: str, seconds: float) -> Backend:
    """The backend, whose calls fail with StoreError after so long.

    Nobody can take a call to the kernel back: it stays on a thread of its own until the file system answers, and may
    then still do what it was asked.
    """
    return cast(Backend, _Limited(backend, url, seconds))


class _Limited:
    def __init__(self, backend: Backend, url: str, seconds: float):
        self._backend, self._url, self._seconds = backend, url, seconds

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return partial(self._within, getattr(self._backend, name))

    def _within(self, call: Callable[..., Any], *args: Any, **options: Any) -> Any:
        answer: Future[Any] = Future()

        def ask() -> None:
            try:
                answer.set_result(call(*args, **options))
            except BaseException as error:
                answer.set_exception(error)

        # A daemon: a process that ends does not wait for it.
        threading.Thread(target=ask, name="limited-store-call", daemon=True).start()
        try:
            return answer.result(self._seconds)
        except TimeoutError as error:
            if answer.done():
                raise
            raise StoreError(
                f"{self._url}: no answer within {self._seconds:g} s; look whether its file system answers (`df`)"
            ) from error
