"""One request to a fleet: calls that go to whichever engine is free or soon will be, and on to another one when an
engine is lost.

| waits                     | for              | unblocked by                                        |
|---------------------------|------------------|-----------------------------------------------------|
| `run`, engines at work    | the first answer | an engine, its death, or `deadline_s`               |
| `run`, nobody left to ask | `bring_back`     | its own deadlines; without one, the last failure    |
| a call given ahead        | the one before   | its answer; or its engine is lost, and another one  |
|                           |                  | takes both                                          |

While there are plenty of calls an engine has one ahead of the one it works on, and does not stand still while its
answer travels and `run` is with other engines. The seconds of a call begin where the one before it is answered. An
engine that is slower than the others has none ahead: the whole request would wait for it at the end.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from data.errors import RunError
from rollout.engine_calls import EngineFailure, engine_result
from rollout.fleet_health import EngineState, FleetHealth, LossReason

MOST_TRIES = 3
"""Engines a shard may take down before it is the shard that is at fault."""

MOST_USUAL = 2.0
"""An engine has a call ahead when its last one took at most this many times the median of the engines."""

Call = tuple[str, tuple[Any, ...], dict[str, Any]]
"""Method, positional and named arguments."""


class Work(NamedTuple):
    """A call that an engine works on."""

    call: int
    """Index."""
    engine_id: str
    begun: float
    overdue: float


@dataclass(kw_only=True)
class Dispatch:
    """The calls of one request."""

    calls: Sequence[Call]
    engines: Mapping[str, Any]
    """Actor handles by engine id; whoever `blame` or `bring_back` launches again takes its old place."""
    health: FleetHealth
    """Only HEALTHY engines are given calls."""
    deadline_s: float
    """Seconds a call may take."""
    shards: Counter[str]
    """Calls answered, by engine; counted on."""
    seconds: dict[str, float]
    """What its last call took, by engine; kept up."""
    blame: Callable[[EngineFailure], None]
    """Told of every engine that is lost."""
    bring_back: Callable[[EngineFailure], None] | None
    """Brings lost engines back, verified, when nobody is left to ask; raises when it will not."""
    meanwhile: Callable[[], None] | None = None
    """Called once, when every engine that may be asked has its first call."""
    check: Callable[[int, Any], None] | None = None
    """Looks at each result, given its index, while other engines still work."""
    _waiting: deque[int] = field(default_factory=deque)
    """Indices of calls that nobody works on."""
    _results: list[Any] = field(default_factory=list)
    _unchecked: deque[int] = field(default_factory=deque)
    """Indices of results that nobody has looked at."""
    _running: dict[Any, Work] = field(default_factory=dict)
    """Calls that engines work on."""
    _ahead: dict[str, tuple[Any, int]] = field(default_factory=dict)
    """Engine → the call it has for when it is through with the one it works on, and that call's index."""
    _failed: dict[str, EngineFailure] = field(default_factory=dict)
    """Engines that are asked no more in this request."""
    _accused: dict[int, EngineFailure] = field(default_factory=dict)
    """Call → the engine that raised on it, while no other engine has answered it."""
    _tries: Counter[int] = field(default_factory=Counter)
    """Failures by call."""
    _alone: set[int] = field(default_factory=set)
    """Calls that an engine died of or beside, which are not given ahead: the next loss shall tell which."""
    _left: set[str] = field(default_factory=set)
    """Engines that raised and still have a call before them that others were given."""

    def run(self) -> list[Any]:
        """Results of the calls, in their order.

        Raises:
            EngineFailure: a call failed on several engines, or nobody is left and nobody comes back.
            RunError: nobody may be asked.
        """
        self._waiting = deque(range(len(self.calls)))
        self._results = [None] * len(self.calls)
        # After a failure the calls still under way run out by themselves: a cancelled one leaves a gap in the actor's
        # sequence of calls, for which Ray then waits 30 s.
        self._hand_out()
        if self.meanwhile is not None:
            self.meanwhile()
        self._hand_out_ahead()
        while self._waiting or self._running:
            self._hand_out()
            if not self._running:
                self._wait_for_somebody()
            elif ready := self._answered():
                for reference in ready:
                    self._take_answer(reference)
                self._hand_out_ahead()
            elif self._unchecked:
                self._look()
            else:
                self._take_overdue()
        while self._unchecked:
            self._look()
        return self._results

    def _hand_out(self) -> None:
        """Give every free engine a call."""
        if not self._waiting:
            return
        busy = {work.engine_id for work in self._running.values()}
        for engine_id in self.health.named(EngineState.HEALTHY):
            if engine_id not in busy:
                self._give(engine_id)

    def _give(self, engine_id: str) -> None:
        """Give an engine a call, where one waits and the engine may be asked."""
        if not self._waiting or engine_id in self._failed:
            return
        self._works_on(engine_id, *self._send(engine_id))

    def _hand_out_ahead(self) -> None:
        """Give engines at work another call, while there is more than one left for each.

        Fewer are for whoever is through first, and behind the call of a slow engine they would wait the longest.
        """
        able = sum(name not in self._failed for name in self.health.named(EngineState.HEALTHY))
        if len(self._waiting) <= able or not self.seconds:
            return
        most = MOST_USUAL * statistics.median(self.seconds.values())
        for engine_id in [work.engine_id for work in self._running.values()]:
            if len(self._waiting) <= able or self._waiting[0] in self._alone:
                return
            if engine_id not in self._ahead and self.seconds.get(engine_id, most + 1) <= most:
                self._ahead[engine_id] = self._send(engine_id)

    def _send(self, engine_id: str) -> tuple[Any, int]:
        """Send an engine the next call; returns it with its index."""
        index = self._waiting.popleft()
        method, arguments, named = self.calls[index]
        return getattr(self.engines[engine_id], method).remote(*arguments, **named), index

    def _works_on(self, engine_id: str, reference: Any, index: int) -> None:
        """From now on the engine works on this call; one more may still be before it."""
        now = time.monotonic()
        self._running[reference] = Work(index, engine_id, now, now + self.deadline_s * (1 + (engine_id in self._left)))
        self._left.discard(engine_id)

    def _look(self) -> None:
        """Check one result; one at a time, because an engine that answers meanwhile waits for its next call."""
        index = self._unchecked.popleft()
        if self.check is not None:
            self.check(index, self._results[index])

    def _answered(self) -> list[Any]:
        """Calls that are answered; waits for one, up to the next deadline, where nothing else is to do."""
        import ray

        soonest = min(work.overdue for work in self._running.values())
        patience = 0.0 if self._unchecked else max(0.0, soonest - time.monotonic())
        calls = list(self._running)
        found = ray.wait(calls, num_returns=len(calls), timeout=0)[0]
        return list(found or ray.wait(calls, timeout=patience)[0])

    def _take_answer(self, reference: Any) -> None:
        """Take an answer, and give its engine the next call."""
        index, engine_id, begun, _ = self._running.pop(reference)
        try:
            self._results[index] = engine_result(engine_id, reference, self.deadline_s, f"shard {index}")
        except EngineFailure as failure:
            self._lost(failure, index)
            return
        self.seconds[engine_id] = time.monotonic() - begun
        if engine_id in self._ahead:
            self._works_on(engine_id, *self._ahead.pop(engine_id))
        elif self.health.engines[engine_id].state is EngineState.HEALTHY:
            self._give(engine_id)
        self._unchecked.append(index)
        self.shards[engine_id] += 1
        if index in self._accused:
            self.blame(self._accused.pop(index))

    def _take_overdue(self) -> None:
        """The call that is overdue first failed."""
        reference = min(self._running, key=lambda one: self._running[one].overdue)
        index, engine_id, *_ = self._running.pop(reference)
        what = f"no answer within rollout.deadline_s, {self.deadline_s} s"
        self._lost(EngineFailure(engine_id, what, LossReason.SILENT), index)

    def _lost(self, failure: EngineFailure, index: int) -> None:
        """Put the call back in front and see who is to blame: the engine, or the call itself.

        An engine that raised is to blame once another one answers the same call. What it has ahead it did not fail at.
        """
        if failure.engine_id in self._ahead:
            _, behind = self._ahead.pop(failure.engine_id)
            self._waiting.appendleft(behind)
            if failure.reason is LossReason.RAISED:
                self._left.add(failure.engine_id)
            elif failure.reason is LossReason.DIED:
                self._alone |= {index, behind}
        self._waiting.appendleft(index)
        self._failed[failure.engine_id] = failure
        self._tries[index] += 1
        others = [name for name in self.health.named(EngineState.HEALTHY) if name not in self._failed]
        raised = failure.reason is LossReason.RAISED
        # What raises on two engines, or on the only one, would raise on every one; what kills several is no accident.
        if (raised and (self._tries[index] > 1 or not others)) or self._tries[index] >= MOST_TRIES:
            raise failure
        if raised:
            self._accused[index] = failure
        else:
            self.blame(failure)

    def _wait_for_somebody(self) -> None:
        """Nobody is left to ask: have the lost engines brought back, or raise what took the last one.

        Raises:
            EngineFailure: there is no `bring_back`, or nobody came back.
            RunError: nobody could be asked from the beginning.
        """
        if not self._failed:
            states = {name: engine.state.value for name, engine in self.health.engines.items()}
            raise RunError(f"no engine holds verified weights: {states}")
        last = list(self._failed.values())[-1]
        if self.bring_back is None:
            raise last
        self.bring_back(last)
        self._failed.clear()
        # Who raised before may be another process by now, or gone for good.
        self._accused.clear()
        if not self.health.named(EngineState.HEALTHY):
            raise last
