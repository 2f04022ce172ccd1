"""Contract: no sequence of events brings an engine to HEALTHY but a verified push of the fleet's version to this very
incarnation, or what that push left behind, verified; who is silent or does not come up is dead within its deadline; a
replaced incarnation changes nothing.

Model-based (hypothesis stateful) with a clock that also jumps back. Not checked here: engines (test_fleet.py).
"""

from __future__ import annotations

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from rollout.fleet_health import EngineHealth, EngineState, FleetHealth, LossReason

NAMES = ("a", "b", "c")
START_S = 10.0
REASONS = st.sampled_from(LossReason)


class FleetMachine(RuleBasedStateMachine):
    """Drives the health of three engines; the model remembers, per process, what it holds and whether it lives."""

    def __init__(self) -> None:
        super().__init__()
        self.health = FleetHealth(start_deadline_s=START_S)
        self.now = 0.0
        self.version = -1
        self.verified: dict[tuple[str, int], int] = {}
        """(engine, incarnation) → version of its last verified push, until something happened to it."""
        self.launches: dict[str, int] = {}
        self.waiting_since: dict[str, float] = {}

    def current(self, name: str) -> tuple[str, int]:
        return name, self.launches.get(name, 0) - 1

    def forget(self, name: str, incarnation: int) -> None:
        self.verified.pop((name, incarnation), None)

    @rule(seconds=st.floats(0.0, 12.0))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(seconds=st.floats(0.1, 100.0))
    def the_clock_jumps_back(self, seconds: float) -> None:
        self.now -= seconds

    @rule(name=st.sampled_from(NAMES))
    def launch(self, name: str) -> None:
        before = self.health.engines.get(name)
        if before is not None and before.state is not EngineState.DEAD:
            with pytest.raises(ValueError, match="only a dead engine"):
                self.health.launched(name, self.now)
            return
        incarnation = self.health.launched(name, self.now)
        self.launches[name] = self.launches.get(name, 0) + 1
        assert incarnation == self.launches[name] - 1

    @rule(name=st.sampled_from(NAMES), back=st.integers(0, 2))
    def answer(self, name: str, back: int) -> None:
        name, newest = self.current(name)
        self.health.answered(name, newest - back, self.now)

    @rule(name=st.sampled_from(NAMES), back=st.integers(0, 2), reason=REASONS)
    def suspect(self, name: str, back: int, reason: LossReason) -> None:
        name, newest = self.current(name)
        self.health.suspected(name, newest - back, reason, self.now)
        self.forget(name, newest - back)

    @rule(name=st.sampled_from(NAMES), back=st.integers(0, 2), reason=REASONS)
    def die(self, name: str, back: int, reason: LossReason) -> None:
        name, newest = self.current(name)
        self.health.died(name, newest - back, reason, self.now)
        self.forget(name, newest - back)

    @rule(names=st.sets(st.sampled_from(NAMES)), back=st.integers(0, 1))
    def push(self, names: set[str], back: int) -> None:
        self.version += 1
        up = {n for n in names if n in self.health.named(EngineState.STALE, EngineState.HEALTHY)}
        self.health.pushed({n: self.current(n)[1] - back for n in names}, self.version, self.now)
        self.verified = {self.current(n): self.version for n in up} if back == 0 else {}

    @rule(name=st.sampled_from(NAMES), back=st.integers(0, 1), older=st.integers(0, 1))
    def join(self, name: str, back: int, older: int) -> None:
        up = name in self.health.named(EngineState.STALE)
        name, newest = self.current(name)
        self.health.joined(name, newest - back, self.version - older, self.now)
        if up and back == older == 0 and self.version >= 0:
            self.verified[(name, newest)] = self.version

    @rule()
    def sleep(self) -> None:
        self.health.slept(self.now)
        self.verified = {}

    @rule()
    def tick(self) -> None:
        for name in self.health.tick(self.now):
            self.forget(*self.current(name))
        for engine in self.health.engines.values():
            if engine.state is EngineState.STARTING:
                assert 0 <= self.now - engine.since < START_S

    @invariant()
    def healthy_means_verified(self) -> None:
        for name, engine in self.health.engines.items():
            healthy = engine.state is EngineState.HEALTHY
            assert healthy == (self.current(name) in self.verified)
            assert self.health.may_serve(name, self.version) == healthy
            assert engine.version == (self.health.version if healthy else None)

    @invariant()
    def losses_have_reasons(self) -> None:
        for engine in self.health.engines.values():
            lost = engine.state in (EngineState.SUSPECT, EngineState.DEAD)
            assert (engine.reason is not None) == lost


TestFleetMachine = FleetMachine.TestCase
TestFleetMachine.settings = settings(max_examples=120, stateful_step_count=30, deadline=None)


def test_the_way_of_an_engine() -> None:
    health = FleetHealth(start_deadline_s=START_S)
    health.launched("a", 0.0)
    health.answered("a", 0, 1.0)
    assert health.named(EngineState.STALE) == ["a"]
    health.pushed({"a": 0}, 5, 2.0)
    assert health.may_serve("a", 5)
    assert not health.may_serve("a", 4)
    health.suspected("a", 0, LossReason.SILENT, 3.0)
    health.answered("a", 0, 4.0)
    assert not health.may_serve("a", 5), "an answer alone proves nothing of its weights"
    health.suspected("a", 0, LossReason.RAISED, 5.0)
    assert health.tick(900.0) == [], "who is suspect is asked, not timed"
    health.died("a", 0, LossReason.RAISED, 9.0)
    assert health.engines["a"] == EngineHealth(
        state=EngineState.DEAD, incarnation=0, since=9.0, reason=LossReason.RAISED
    )
    assert health.launched("a", 10.0) == 1
    health.answered("a", 0, 11.0)
    assert health.counts()[EngineState.STARTING] == 1, "an answer of the first incarnation came late"
    assert health.tick(20.0) == ["a"]
    health.removed("a")
    assert health.engines == {}


def test_who_comes_later_joins_by_the_fleets_version_alone() -> None:
    health = FleetHealth(start_deadline_s=START_S)
    for name in ("a", "b"):
        health.launched(name, 0.0)
        health.joined(name, 0, 5, 0.0)
        health.answered(name, 0, 1.0)
    health.pushed({"a": 0}, 5, 2.0)
    for incarnation, version in ((0, 4), (0, 6), (1, 5)):
        health.joined("b", incarnation, version, 3.0)
        assert health.named(EngineState.HEALTHY) == ["a"]
    health.joined("b", 0, 5, 3.0)
    assert health.may_serve("b", 5)
    health.suspected("b", 0, LossReason.SILENT, 4.0)
    health.joined("b", 0, 5, 4.0)
    assert health.named(EngineState.HEALTHY) == ["a"], "who is silent joins nobody"
    health.slept(5.0)
    assert health.named(EngineState.STALE) == ["a"]
