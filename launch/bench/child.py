"""A competitor in a process of its own, so that its libraries, threads and memory are its own.

The time is taken inside the process. It does nothing between two calls.
"""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import Connection
from typing import Any, Self

from data.errors import RunError, WindlassError
from launch.bench.frame import PeakMemory, stopwatch
from launch.bench.settings import Device

Functions = Mapping[str, Callable[..., Any]]
"""What a process can do, by name; `close` frees everything."""


class Child:
    """Calls functions in another process."""

    def __init__(
        self,
        build: Callable[..., Functions],
        *arguments: Any,
        environment: Mapping[str, str],
        device: Device = Device.CPU,
    ) -> None:
        """Start a process with `environment` added to ours and call `build(*arguments)` in it.

        Does not wait for it, so that several come up side by side; the first call does.
        """
        context = multiprocessing.get_context("spawn")
        self._pipe, other = context.Pipe()
        self._peak_mib: dict[str, float] = {}
        self._process = context.Process(target=_serve, args=(other, build, arguments, device), daemon=True)
        # A process takes the variables of its parent, and some libraries read theirs when they are imported.
        with _environment(environment):
            self._process.start()
        other.close()
        self._ready = False

    def call(self, name: str, *arguments: Any) -> Any:
        """What the function returns; its errors come through."""
        return self._ask("call", name, arguments)

    @contextmanager
    def concurrently(self, name: str, *arguments: Any) -> Iterator[None]:
        """Call the function while the block runs; ends when both have."""
        self.wait()
        self._pipe.send(("call", name, arguments))
        try:
            yield
        finally:
            self._answer()

    def timer(self, name: str, *arguments: Any) -> Callable[[], float]:
        """Seconds of a call, taken in the process; the result stays there."""

        def time_once() -> float:
            seconds, peak_mib = self._ask("time", name, arguments)
            self._peak_mib[name] = max(self._peak_mib.get(name, 0.0), peak_mib)
            return float(seconds)

        return time_once

    def peak_mib(self, name: str) -> float:
        """Peak memory of the process during the timed calls of the function, its weights and caches included."""
        return self._peak_mib[name]

    def wait(self) -> None:
        """Until the process is up.

        Raises:
            WindlassError: it did not come up; what `build` raised.
        """
        if not self._ready:
            self._answer()
            self._ready = True

    def _ask(self, kind: str, name: str, arguments: tuple[Any, ...]) -> Any:
        self.wait()
        self._pipe.send((kind, name, arguments))
        return self._answer()

    def _answer(self) -> Any:
        try:
            error, result = self._pipe.recv()
        except EOFError as end:
            self._process.join(10)
            raise RunError(f"a benchmark process ended with exit code {self._process.exitcode}") from end
        if error is not None:
            raise error
        return result

    def close(self) -> None:
        """End the process."""
        if self._process.is_alive() and self._ready:
            self._pipe.send(("call", "close", ()))
            self._process.join(30)
        if self._process.is_alive():
            self._process.terminate()
            self._process.join()
        self._pipe.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


@contextmanager
def _environment(added: Mapping[str, str]) -> Iterator[None]:
    before = dict(os.environ)
    os.environ.update(added)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def _serve(pipe: Connection, build: Callable[..., Functions], arguments: tuple[Any, ...], device: Device) -> None:
    # Standard output is the parent's answer; what libraries print goes to standard error.
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    try:
        functions = build(*arguments)
    except Exception as error:  # noqa: BLE001 - whatever it is, it is the parent's to raise
        pipe.send((_portable(error), None))
        return
    pipe.send((None, None))
    peak = PeakMemory(device)
    while True:
        try:
            kind, name, given = pipe.recv()
        except EOFError:
            return
        try:
            if kind == "time":
                peak.start()
                seconds = stopwatch(lambda name=name, given=given: functions[name](*given), device)()  # type: ignore[misc]
                result: Any = seconds, peak.mib()
            else:
                result = functions[name](*given)
        except Exception as error:  # noqa: BLE001 - as above
            pipe.send((_portable(error), None))
            continue
        if name == "close":
            return
        pipe.send((None, result))


def _portable(error: Exception) -> Exception:
    """The error itself where it is ours, else one that certainly survives the pipe."""
    return error if isinstance(error, WindlassError) else RunError(f"{type(error).__name__}: {error}")
