"""The schedule of batches collected ahead: which weights each batch sees, order, restart, errors.

Model-based tests drive `Lookahead` with a counter in place of the fleet's weights and compare with the rule: the batch
of step k sees the weights of step max(k-1-S, 0). One of them (hypothesis stateful) also lets collections hang and fail,
and kills and restarts the loop, in any order. Not checked here: the loop around it (test_loop.py), speed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from trainer.lookahead import Batch, Lookahead


def whole(collect: Callable[[int], Batch]) -> Callable[[int], Callable[[], Batch]]:
    """Everything needs the fleet, nothing is left for the rest."""

    def roll(step: int) -> Callable[[], Batch]:
        batch = collect(step)
        return lambda: batch

    return roll


def waiting(ahead: Lookahead[Batch]) -> dict[int, Batch]:
    return {step: batch.result() for step, batch in ahead.begun().items()}


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
    first = Lookahead(whole(fleet.collect), staleness, steps)
    taken = train(fleet, first, range(1, cut + 1))
    kept = waiting(first)
    first.close()
    second = Lookahead(whole(fleet.collect), staleness, steps)
    second.restore(kept)
    taken += train(fleet, second, range(cut + 1, steps + 1))
    second.close()
    assert taken == [(step, max(step - 1 - staleness, 0)) for step in range(1, steps + 1)]
    assert fleet.collected == list(range(1, steps + 1))
    assert not waiting(second)


def test_the_fleet_works_while_the_learners_do() -> None:
    begun, go_on = threading.Event(), threading.Event()

    def collect(step: int) -> int:
        if step == 2:
            begun.set()
            assert go_on.wait(10)
        return step

    ahead = Lookahead(whole(collect), 1)
    assert ahead.take(1) == 1
    assert begun.wait(10), "step 2 is not collected while step 1 trains"
    go_on.set()
    assert waiting(ahead) == {2: 2}
    ahead.close()


@pytest.mark.parametrize("staleness", [0, 2])
def test_an_error_reaches_the_loop(staleness: int) -> None:
    def collect(step: int) -> int:
        if step == 2:
            raise RuntimeError("engine died")
        return step

    ahead = Lookahead(whole(collect), staleness)
    assert ahead.take(1) == 1
    with pytest.raises(RuntimeError, match="engine died"):
        ahead.take(2)
    ahead.close()


def test_an_error_ahead_stops_the_push() -> None:
    def collect(step: int) -> int:
        if step == 3:
            raise RuntimeError("engine died")
        return step

    ahead = Lookahead(whole(collect), 2)
    ahead.take(1)
    with pytest.raises(RuntimeError, match="engine died"):
        ahead.settle()
    ahead.close()


def test_the_fleet_need_not_wait_for_the_rest() -> None:
    rolled, go_on = threading.Event(), threading.Event()
    rests: list[int] = []

    def roll(step: int) -> Callable[[], int]:
        if step == 3:
            rolled.set()

        def rest() -> int:
            if step == 2:
                assert go_on.wait(10)
            rests.append(step)
            return step

        return rest

    ahead = Lookahead(roll, 2)
    assert ahead.take(1) == 1
    assert rolled.wait(10), "step 3 is not rolled out while step 2 has no rewards yet"
    ahead.settle()
    assert not ahead.rolling()
    assert not ahead.begun()[2].done()
    go_on.set()
    assert waiting(ahead) == {2: 2, 3: 3}
    assert rests == [1, 2, 3]
    ahead.close()


def test_an_error_of_the_rest_comes_up_where_its_batch_is_taken() -> None:
    def roll(step: int) -> Callable[[], int]:
        return lambda: 1 // (step - 2)

    ahead = Lookahead(roll, 1)
    assert ahead.take(1) == -1
    ahead.settle()
    with pytest.raises(ZeroDivisionError):
        ahead.take(2)
    ahead.close()


def test_negative_staleness() -> None:
    with pytest.raises(ValueError, match="legal"):
        Lookahead(whole(lambda step: step), -1)


@dataclass
class GatedFleet:
    """Stands in for the fleet: a collection waits until it is let go, and fails where it was told to."""

    version: int = 0
    begun: list[int] = field(default_factory=list)
    let_go: set[int] = field(default_factory=set)
    failing: set[int] = field(default_factory=set)
    changed: threading.Condition = field(default_factory=threading.Condition)

    def collect(self, step: int) -> tuple[int, int]:
        with self.changed:
            # The version is that of the beginning: the table's push waits for what was begun.
            version = self.version
            self.begun.append(step)
            self.changed.notify_all()
            assert self.changed.wait_for(lambda: step in self.let_go or step in self.failing, timeout=5)
            assert self.version == version, "a push passed a collection by"
        if step in self.failing:
            raise RuntimeError(f"step {step}")
        return step, version

    def allow(self, step: int) -> None:
        with self.changed:
            self.let_go.add(step)
            self.changed.notify_all()

    def spoil(self, step: int) -> None:
        with self.changed:
            self.failing.add(step)
            self.changed.notify_all()


class ScheduleMachine(RuleBasedStateMachine):
    """The loop's side of the schedule, one call at a time; the model knows each step's state of the table."""

    LAST = 9

    def __init__(self) -> None:
        super().__init__()
        self.fleet = GatedFleet()
        self.ahead: Lookahead[tuple[int, int]] | None = None
        self.staleness = 0
        self.step = 0
        """Steps that are done: taken, trained, pushed."""
        self.saved: tuple[int, dict[int, tuple[int, int]]] = (0, {})
        self.broken = False

    @initialize(staleness=st.integers(1, 3))
    def begin(self, staleness: int) -> None:
        self.staleness = staleness
        self.ahead = Lookahead(whole(self.fleet.collect), staleness, self.LAST)

    @property
    def reach(self) -> int:
        """The last step that is begun at the next `take`."""
        return min(self.step + 1 + self.staleness, self.LAST)

    def take_and_settle(self, step: int) -> tuple[int, int]:
        assert self.ahead is not None
        taken = self.ahead.take(step)
        self.ahead.settle()
        return taken

    @precondition(lambda self: not self.broken and self.step < self.LAST)
    @rule(fails_at=st.none() | st.integers(1, 3))
    def a_step(self, fails_at: int | None) -> None:
        assert self.ahead is not None
        now, doomed = self.step + 1, None if fails_at is None else self.step + fails_at
        fresh = [step for step in range(now, self.reach + 1) if step not in self.fleet.begun]
        if doomed in fresh:
            self.fleet.spoil(doomed)
        for step in range(now, self.reach + 1):
            if step != doomed:
                self.fleet.allow(step)
        if doomed in fresh:
            # The error is that of the step that failed, at `take` or before the push, and the push does not happen.
            with pytest.raises(RuntimeError, match=f"step {doomed}"):
                self.take_and_settle(now)
            self.broken = True
            return
        taken = self.take_and_settle(now)
        assert taken == (now, max(now - 1 - self.staleness, 0))
        assert sorted(waiting(self.ahead)) == list(range(now + 1, self.reach + 1))
        with self.fleet.changed:
            self.fleet.version = now
        self.step = now
        self.saved = now, waiting(self.ahead)

    @precondition(lambda self: self.ahead is not None)
    @rule()
    def a_death_and_a_restart(self) -> None:
        assert self.ahead is not None
        with self.fleet.changed:
            self.fleet.let_go |= set(range(self.LAST + 1))
            self.fleet.changed.notify_all()
        self.ahead.close()
        step, waiting = self.saved
        self.fleet = GatedFleet(version=step, begun=sorted({*range(1, step + 1), *waiting}))
        self.ahead = Lookahead(whole(self.fleet.collect), self.staleness, self.LAST)
        self.ahead.restore(waiting)
        self.step, self.broken = step, False

    @invariant()
    def begun_in_order_and_once(self) -> None:
        begun = self.fleet.begun
        assert begun == sorted(set(begun))
        assert not begun or begun[-1] <= self.step + 1 + self.staleness

    def teardown(self) -> None:
        if self.ahead is not None:
            with self.fleet.changed:
                self.fleet.let_go |= set(range(self.LAST + 1))
                self.fleet.changed.notify_all()
            self.ahead.close()


TestSchedule = ScheduleMachine.TestCase
TestSchedule.settings = settings(max_examples=60, stateful_step_count=20, deadline=None)
