"""The schedule of batches collected ahead: which weights each batch sees, order, restart, errors.

A model-based test drives `Lookahead` with a counter in place of the fleet's weights and compares with the rule: the
batch of step k sees the weights of step max(k-1-S, 0). Not checked here: the loop around it (test_loop.py), speed.
"""

from __future__ import annotations

import threading
from dataclasses import dataclass, field

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.lookahead import Lookahead


@dataclass
class CountingFleet:
    """Stands in for the fleet: says which weight version answered."""

    version: int = 0
    collected: list[int] = field(default_factory=list)
    busy: threading.Lock = field(default_factory=threading.Lock)

    def collect(self, step: int) -> tuple[int, int]:
        assert self.busy.acquire(blocking=False), "two collections at a time"
        try:
            self.collected.append(step)
            return step, self.version
        finally:
            self.busy.release()


def train(fleet: CountingFleet, ahead: Lookahead[tuple[int, int]], steps: range) -> list[tuple[int, int]]:
    """What the loop does: take, update, settle, push."""
    taken = []
    for step in steps:
        taken.append(ahead.take(step))
        ahead.settle()
        fleet.version = step
    return taken


@given(staleness=st.integers(0, 4), steps=st.integers(1, 12), data=st.data())
def test_versions_follow_the_rule_with_a_restart_anywhere(staleness: int, steps: int, data: st.DataObject) -> None:
    cut = data.draw(st.integers(0, steps))
    fleet = CountingFleet()
    first = Lookahead(fleet.collect, staleness, steps)
    taken = train(fleet, first, range(1, cut + 1))
    waiting = first.waiting()
    first.close()
    second = Lookahead(fleet.collect, staleness, steps)
    second.restore(waiting)
    taken += train(fleet, second, range(cut + 1, steps + 1))
    second.close()
    assert taken == [(step, max(step - 1 - staleness, 0)) for step in range(1, steps + 1)]
    assert fleet.collected == list(range(1, steps + 1))
    assert not second.waiting()


def test_the_fleet_works_while_the_learners_do() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def collect(step: int) -> int:
        if step == 2:
            begun.set()
            assert go_on.wait(10)
        return step

    ahead = Lookahead(collect, 1)
    assert ahead.take(1) == 1
    assert begun.wait(10), "step 2 is not collected while step 1 trains"
    go_on.set()
    assert ahead.waiting() == {2: 2}
    ahead.close()


@pytest.mark.parametrize("staleness", [0, 2])
def test_an_error_reaches_the_loop(staleness: int) -> None:
    def collect(step: int) -> int:
        if step == 2:
            raise RuntimeError("engine died")
        return step

    ahead = Lookahead(collect, staleness)
    assert ahead.take(1) == 1
    with pytest.raises(RuntimeError, match="engine died"):
        ahead.take(2)
    ahead.close()


def test_an_error_ahead_stops_the_push() -> None:
    def collect(step: int) -> int:
        if step == 3:
            raise RuntimeError("engine died")
        return step

    ahead = Lookahead(collect, 2)
    ahead.take(1)
    with pytest.raises(RuntimeError, match="engine died"):
        ahead.settle()
    ahead.close()


def test_negative_staleness() -> None:
    with pytest.raises(ValueError, match="legal"):
        Lookahead(lambda step: step, -1)
