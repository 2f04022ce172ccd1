"""Which engines of a fleet may be asked: a state machine per engine, pure, told the time and what happened.

    STARTING  launched, has not answered yet            → STALE when it is up; DEAD at the start deadline
    STALE     is up, but its weights are not verified   → HEALTHY by a verified push, or by what the last one left
    HEALTHY   holds the fleet's version, verified       → STALE when a push passes it by or it sleeps; SUSPECT; DEAD
    SUSPECT   fell silent, or raised an error           → STALE when it answers; DEAD when it does not
    DEAD      its process is gone, or counts as gone    → STARTING by a launch, as another incarnation

Only HEALTHY engines are given work. An answer, or news, of an incarnation that was replaced changes nothing.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field, replace
from enum import StrEnum


class EngineState(StrEnum):
    """What is known of an engine."""

    STARTING = "starting"
    STALE = "stale"
    HEALTHY = "healthy"
    SUSPECT = "suspect"
    DEAD = "dead"


class LossReason(StrEnum):
    """Why an engine is no longer asked; a metric each."""

    DIED = "died"
    """Its process is gone."""
    SILENT = "silent"
    """No answer within the deadline."""
    RAISED = "raised"
    """It raised an error that was not the request's."""
    NOT_UP = "not_up"
    """It did not come up in time."""
    PUSH = "push"
    """A push to it failed: it may hold a mixture of two versions."""


@dataclass(frozen=True, kw_only=True)
class EngineHealth:
    """One engine."""

    state: EngineState
    incarnation: int
    """How often it was launched before."""
    since: float
    """When the state began, by the clock that the events bring along."""
    version: int | None = None
    """The version that a push verified; none before."""
    reason: LossReason | None = None
    """Why it is SUSPECT or DEAD."""


@dataclass
class FleetHealth:
    """The engines of a fleet. Every event brings the time, so that tests own the clock."""

    start_deadline_s: float
    """Seconds an engine may take from launch to its first answer."""
    engines: dict[str, EngineHealth] = field(default_factory=dict)
    version: int | None = None
    """The fleet's version: that of the last verified push."""

    def launched(self, name: str, now: float) -> int:
        """A process was started for `name`, new or in the place of one that is DEAD; returns its incarnation.

        Raises:
            ValueError: the engine is not dead.
        """
        before = self.engines.get(name)
        if before is not None and before.state is not EngineState.DEAD:
            raise ValueError(f"{name} is {before.state.value}; only a dead engine is launched again")
        incarnation = 0 if before is None else before.incarnation + 1
        self.engines[name] = EngineHealth(state=EngineState.STARTING, incarnation=incarnation, since=now)
        return incarnation

    def answered(self, name: str, incarnation: int, now: float) -> None:
        """It answered: one that was starting, or under suspicion, is up; what it holds is not known."""
        engine = self._current(name, incarnation)
        if engine is not None and engine.state in (EngineState.STARTING, EngineState.SUSPECT):
            self.engines[name] = replace(engine, state=EngineState.STALE, since=now, version=None, reason=None)

    def suspected(self, name: str, incarnation: int, reason: LossReason, now: float) -> None:
        """It fell silent, raised an error, or took part in a push that failed."""
        engine = self._current(name, incarnation)
        if engine is not None and engine.state in (EngineState.HEALTHY, EngineState.STALE):
            self.engines[name] = replace(engine, state=EngineState.SUSPECT, since=now, version=None, reason=reason)

    def died(self, name: str, incarnation: int, reason: LossReason, now: float) -> None:
        """Its process is gone, or is given up."""
        engine = self._current(name, incarnation)
        if engine is not None and engine.state is not EngineState.DEAD:
            self.engines[name] = replace(engine, state=EngineState.DEAD, since=now, version=None, reason=reason)

    def pushed(self, incarnations: dict[str, int], version: int, now: float) -> None:
        """A push was verified on these engines, by name and incarnation, and no others: they hold `version`.

        Every engine that a push passes by holds another version, so it may not be asked until the next push.
        """
        self.version = version
        for name, engine in self.engines.items():
            took_part = incarnations.get(name) == engine.incarnation
            if took_part and engine.state in (EngineState.STALE, EngineState.HEALTHY):
                self.engines[name] = replace(engine, state=EngineState.HEALTHY, since=now, version=version)
            elif engine.state is EngineState.HEALTHY:
                self.engines[name] = replace(engine, state=EngineState.STALE, since=now, version=None)

    def joined(self, name: str, incarnation: int, version: int, now: float) -> None:
        """What the push of `version` left behind was verified on this engine: it joins the others that hold it."""
        engine = self._current(name, incarnation)
        if engine is not None and engine.state is EngineState.STALE and version == self.version:
            self.engines[name] = replace(engine, state=EngineState.HEALTHY, since=now, version=version)

    def slept(self, now: float) -> None:
        """The engines gave their memory back: nobody holds weights that may be used before the next push."""
        for name in self.named(EngineState.HEALTHY):
            self.engines[name] = replace(self.engines[name], state=EngineState.STALE, since=now, version=None)

    def tick(self, now: float) -> list[str]:
        """Give up who has been starting for too long; returns their names."""
        late = []
        for name in self.named(EngineState.STARTING):
            engine = self.engines[name]
            # A clock that jumps back must not keep an engine in suspense: the wait begins again.
            if now < engine.since:
                self.engines[name] = replace(engine, since=now)
            elif now - engine.since >= self.start_deadline_s:
                late.append(name)
        for name in late:
            self.died(name, self.engines[name].incarnation, LossReason.NOT_UP, now)
        return late

    def removed(self, name: str) -> None:
        """The engine leaves the fleet."""
        self.engines.pop(name, None)

    def named(self, *states: EngineState) -> list[str]:
        """Engines in these states, in the order of their first launch."""
        return [name for name, engine in self.engines.items() if engine.state in states]

    def may_serve(self, name: str, version: int | None) -> bool:
        """Whether an engine may be asked for completions of a version."""
        engine = self.engines.get(name)
        return engine is not None and engine.state is EngineState.HEALTHY and engine.version == version

    def counts(self, states: Collection[EngineState] = tuple(EngineState)) -> dict[EngineState, int]:
        """Engines by state."""
        return {state: len(self.named(state)) for state in states}

    def _current(self, name: str, incarnation: int) -> EngineHealth | None:
        engine = self.engines.get(name)
        return engine if engine is not None and engine.incarnation == incarnation else None
