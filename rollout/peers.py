"""Peers of the weight channel: engines and the learner, called with futures so that every call has a deadline."""

from __future__ import annotations

import queue
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from typing import Any, Protocol

from data.errors import RunError


class PeerDied(RunError):
    """The process of an engine or learner is gone."""


class Peer(Protocol):
    """Something in another process, or another thread, with methods."""

    name: str

    def submit(self, method: str, *arguments: Any) -> Future[Any]:
        """Start a call; its exception comes up in the future as the peer raised it."""
        ...


class LocalPeer:
    """An object of this process; its calls run one after the other in a daemon thread."""

    def __init__(self, name: str, target: Any) -> None:
        self.name = name
        self.target = target
        self._calls: queue.SimpleQueue[tuple[Future[Any], str, tuple[Any, ...]] | None] = queue.SimpleQueue()
        # A call that hangs must keep neither the caller nor the end of the interpreter waiting.
        threading.Thread(target=self._serve, name=f"peer-{name}", daemon=True).start()

    def submit(self, method: str, *arguments: Any) -> Future[Any]:
        """See `Peer`."""
        future: Future[Any] = Future()
        self._calls.put((future, method, arguments))
        return future

    def _serve(self) -> None:
        while (call := self._calls.get()) is not None:
            future, method, arguments = call
            try:
                future.set_result(getattr(self.target, method)(*arguments))
            except BaseException as error:  # noqa: BLE001 -- raised again by the future, in the caller's thread
                future.set_exception(error)

    def close(self) -> None:
        """End the thread after the calls under way."""
        self._calls.put(None)


class RayPeer:
    """An actor, or the actors of one group (the ranks of a learner), which all get the call; the first one answers."""

    def __init__(self, name: str, actors: Sequence[Any]) -> None:
        self.name = name
        self.actors = tuple(actors)

    def submit(self, method: str, *arguments: Any) -> Future[Any]:
        """See `Peer`."""
        parts = [getattr(actor, method).remote(*arguments).future() for actor in self.actors]
        joined: Future[Any] = Future()
        lock = threading.Lock()
        open_parts = len(parts)

        def done(part: Future[Any]) -> None:
            nonlocal open_parts
            error = part.exception()
            with lock:
                open_parts -= 1
                if joined.done():
                    return
                if error is not None:
                    joined.set_exception(_plain(error, self.name))
                elif not open_parts:
                    joined.set_result(parts[0].result())

        for part in parts:
            part.add_done_callback(done)
        return joined


def _plain(error: BaseException, name: str) -> BaseException:
    """The peer's own exception instead of Ray's wrapper around it."""
    from ray.exceptions import RayActorError, RayTaskError

    if isinstance(error, RayTaskError) and isinstance(error.cause, BaseException):
        return error.cause
    if isinstance(error, RayActorError):
        return PeerDied(f"{name}: {str(error).splitlines()[0]}")
    return error
