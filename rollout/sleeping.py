"""Sleep: an engine that shares its card with a learner gives its memory back while the learner works.

    AWAKE      generates, scores, takes pushes               → ASLEEP when the learners begin
    ASLEEP     holds no weights that may be used             → RECEIVING when a push begins
    RECEIVING  has memory for weights again, none for caches → AWAKE when a push is loaded; ASLEEP

Only an AWAKE engine generates and scores, and it has no weight version before the push that woke it was verified. The
states are pure; what gives and takes memory is the engine's (`_give_memory`, `_take_memory`), on CPU and GPU alike.
"""

from __future__ import annotations

import time
from enum import StrEnum

from data.errors import RunError


class Wakefulness(StrEnum):
    """What an engine can do."""

    AWAKE = "awake"
    ASLEEP = "asleep"
    RECEIVING = "receiving"


class Memory(StrEnum):
    """What an engine takes memory for, in this order; the values are vLLM's names."""

    WEIGHTS = "weights"
    CACHES = "kv_cache"


def asleep(state: Wakefulness) -> Wakefulness:
    """All memory was given back; from every state, since a push that failed leaves an engine half awake."""
    return Wakefulness.ASLEEP


def with_memory(state: Wakefulness, memory: Memory) -> Wakefulness:
    """Memory was taken.

    Raises:
        ValueError: it was not what is missing next.
    """
    if missing(state) is not memory:
        raise ValueError(f"an engine that is {state.value} does not take memory for {memory.value}")
    return Wakefulness.RECEIVING if memory is Memory.WEIGHTS else Wakefulness.AWAKE


def missing(state: Wakefulness) -> Memory | None:
    """What an engine has to take memory for next; None when it is awake."""
    return {Wakefulness.ASLEEP: Memory.WEIGHTS, Wakefulness.RECEIVING: Memory.CACHES}.get(state)


class SleepingEngine:
    """Mixin of the engines: the state, and when memory goes and comes."""

    _wakefulness: Wakefulness = Wakefulness.AWAKE

    def _give_memory(self) -> None:
        """Give back what can be given back; by default nothing can."""

    def _take_memory(self, memory: Memory) -> None:
        """Take memory again; by default nothing was given."""

    def fall_asleep(self) -> float:
        """Give memory back until the next push; returns seconds, 0 in an engine that sleeps."""
        if self._wakefulness is Wakefulness.ASLEEP:
            return 0.0
        begun = time.monotonic()
        # First the state: an engine that fails half way must not be asked either.
        self._wakefulness = asleep(self._wakefulness)
        self._give_memory()
        return time.monotonic() - begun

    def _wake(self, memory: Memory) -> float:
        """Take memory where it is what is missing; returns seconds, 0 where it is not."""
        if missing(self._wakefulness) is not memory:
            return 0.0
        begun = time.monotonic()
        self._take_memory(memory)
        self._wakefulness = with_memory(self._wakefulness, memory)
        return time.monotonic() - begun

    def require_awake(self) -> None:
        """Raise RunError while the engine has no memory to work with."""
        if self._wakefulness is not Wakefulness.AWAKE:
            raise RunError(
                f"the engine is {self._wakefulness.value}: its memory belongs to the learners until a push is loaded"
            )
