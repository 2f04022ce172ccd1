"""Contract: an engine takes memory back in one order, weights before caches, and works only when it has both.

Pure. Real engines that sleep and wake: test_channel.py; a fleet of them: test_fleet.py; a colocated job:
launch/test_whole_job.py. The GPU's part of it is not covered.
"""

from __future__ import annotations

import pytest

from data.errors import RunError
from rollout.sleeping import Memory, SleepingEngine, Wakefulness, asleep, missing, with_memory


def test_weights_come_back_before_caches() -> None:
    states, taken = [asleep(Wakefulness.AWAKE)], []
    while (memory := missing(states[-1])) is not None:
        taken.append(memory)
        states.append(with_memory(states[-1], memory))
    assert taken == [Memory.WEIGHTS, Memory.CACHES]
    assert states == [Wakefulness.ASLEEP, Wakefulness.RECEIVING, Wakefulness.AWAKE]


@pytest.mark.parametrize(
    ("state", "memory"),
    [(state, memory) for state in Wakefulness for memory in Memory if missing(state) is not memory],
)
def test_nothing_is_taken_twice_or_too_early(state: Wakefulness, memory: Memory) -> None:
    with pytest.raises(ValueError, match=f"{state.value} does not take memory for {memory.value}"):
        with_memory(state, memory)


class Book(SleepingEngine):
    """Notes what is given and taken; taking fails while the card is full."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.full = False

    def _give_memory(self) -> None:
        self.notes.append("give")
        if self.full:
            raise MemoryError("the card is full")

    def _take_memory(self, memory: Memory) -> None:
        self.notes.append(memory.value)
        if self.full:
            raise MemoryError("the card is full")


def test_what_an_engine_gives_and_takes() -> None:
    engine = Book()
    engine.require_awake()
    for memory in Memory:
        assert engine._wake(memory) == 0, "an engine that is awake has it all"
    assert engine.fall_asleep() > 0
    assert engine.fall_asleep() == 0
    assert engine.notes == ["give"]
    with pytest.raises(RunError, match="the engine is asleep"):
        engine.require_awake()
    engine._wake(Memory.CACHES)
    assert engine.notes == ["give"], "caches wait for the weights"
    engine._wake(Memory.WEIGHTS)
    with pytest.raises(RunError, match="the engine is receiving"):
        engine.require_awake()
    # The push fails: it may sleep again, or take another push.
    engine.fall_asleep()
    for memory in (Memory.WEIGHTS, Memory.WEIGHTS, Memory.CACHES):
        engine._wake(memory)
    engine.require_awake()
    assert engine.notes == ["give", "weights", "give", "weights", "kv_cache"]


def test_an_engine_that_fails_on_the_way_is_not_awake() -> None:
    engine = Book()
    engine.full = True
    with pytest.raises(MemoryError):
        engine.fall_asleep()
    with pytest.raises(RunError, match="asleep"):
        engine.require_awake()
    with pytest.raises(MemoryError):
        engine._wake(Memory.WEIGHTS)
    with pytest.raises(RunError, match="asleep"):
        engine.require_awake()
