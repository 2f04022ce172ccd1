"""SIGTERM as a request: finish the step, write a checkpoint, leave with exit code 0."""

from __future__ import annotations

import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self


class Interruption:
    """While the context is open, SIGTERM (and the first SIGINT) set a flag that the loop reads between steps.

    A second SIGINT raises KeyboardInterrupt, for a person who does not want to wait. Outside the main thread signals
    cannot be taken over; the flag then stays false unless `request` is called.
    """

    def __init__(self) -> None:
        self._flag = threading.Event()
        self._before: dict[int, Any] = {}

    @property
    def requested(self) -> bool:
        """True once somebody asked the run to end."""
        return self._flag.is_set()

    def request(self) -> None:
        """Ask the run to end at the next step boundary."""
        self._flag.set()

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._before[number] = signal.signal(number, self._on_signal)
        return self

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self._flag.is_set():
            raise KeyboardInterrupt
        self._flag.set()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
