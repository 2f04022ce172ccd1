"""Wall time per phase of a step, as `time/` metrics."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class PhaseTimer:
    """Adds up the seconds of named phases; `take` hands them out and starts anew."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._seconds: dict[str, float] = {}
        self._since = clock()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Time what happens inside."""
        begun = self._clock()
        try:
            yield
        finally:
            self._seconds[name] = self._seconds.get(name, 0.0) + self._clock() - begun

    def take(self) -> dict[str, float]:
        """Seconds by `time/PHASE`, and `time/step`, the wall time since the last call."""
        now = self._clock()
        taken = {f"time/{name}": seconds for name, seconds in self._seconds.items()} | {"time/step": now - self._since}
        self._seconds, self._since = {}, now
        return taken
