"""Contract: a request's calls are all answered, each engine has at most one call ahead of the one it works on, whoever
is lost takes down one call and no other, and a call's seconds begin when its engine comes to it.

The engines are scripted, with a clock of their own, because real ones cannot be made to fail at every point. Not here:
the same over real engines in Ray actors (test_fleet.py), a run that loses them (launch/test_kill.py).
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import rollout.dispatch
from rollout.dispatch import Dispatch
from rollout.engine_calls import EngineFailure
from rollout.fleet_health import FleetHealth, LossReason

DEADLINE_S = 7.0
LATER = "later"


def healthy(names: list[str]) -> FleetHealth:
    health = FleetHealth(start_deadline_s=1.0)
    for name in names:
        health.launched(name, 0.0)
        health.answered(name, 0, 0.0)
    health.pushed(dict.fromkeys(names, 0), 1, 0.0)
    return health


class ScriptedEngine:
    """Keeps the calls that it was sent, in order."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.sent: deque[tuple[str, int]] = deque()
        self.since = 0.0
        self.generate = SimpleNamespace(remote=self._take)

    def _take(self, index: int) -> tuple[str, int]:
        call = (self.name, index)
        if not self.sent:
            self.since = clock.now
        self.sent.append(call)
        return call


class ScriptedDispatch(Dispatch):
    """`decide` says for every call that an engine works on: answered (None), how it fails, or LATER."""

    def _answered(self) -> list[Any]:
        clock.now += 1.0
        self._look_at_the_engines()
        said = {call: decide(*call) for call in self._running}
        ready = [call for call, outcome in said.items() if outcome not in (LATER, LossReason.SILENT)]
        if not ready and not self._unchecked:
            # Nothing else is to do, so the wait is as long as it takes, or all are silent.
            ready = [call for call, outcome in said.items() if outcome == LATER]
        for call in ready:
            outcomes[call] = None if said[call] == LATER else said[call]
            engine = self.engines[call[0]]
            engine.sent.popleft()
            engine.since = clock.now
        return ready

    def _look_at_the_engines(self) -> None:
        """What `run` believes of the engines is so, and nobody stands idle while a call waits."""
        for call, (index, name, begun, overdue) in self._running.items():
            engine = self.engines[name]
            assert call == engine.sent[0] == (name, index), "it works on the first one it was sent"
            assert len(engine.sent) == 1 + (name in self._ahead)
            assert (begun, overdue) == (engine.since, engine.since + DEADLINE_S)
        assert not self._alone & {index for _, index in self._ahead.values()}
        idle = [name for name, engine in self.engines.items() if not engine.sent and name not in self._failed]
        assert not (idle and self._waiting)

    def _lost(self, failure: EngineFailure, index: int) -> None:
        self.engines[failure.engine_id].sent.clear()
        super()._lost(failure, index)

    def _take_overdue(self) -> None:
        clock.now += DEADLINE_S
        super()._take_overdue()


clock = SimpleNamespace(now=0.0)
outcomes: dict[tuple[str, int], LossReason | None] = {}
decide: Callable[[str, int], Any]


def scripted_result(engine_id: str, call: tuple[str, int], timeout_s: float, doing: str) -> int:
    reason = outcomes[call]
    if reason is not None:
        raise EngineFailure(engine_id, doing, reason)
    return 10 * call[1]


@pytest.fixture(autouse=True, scope="module")
def _script() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(rollout.dispatch, "engine_result", scripted_result)
        patch.setattr(rollout.dispatch, "time", SimpleNamespace(monotonic=lambda: clock.now))
        yield


def request(n_engines: int, n_calls: int, script: Callable[[str, int], Any], **more: Any) -> ScriptedDispatch:
    global decide
    clock.now, decide = 0.0, script
    outcomes.clear()
    names = [f"e{row}" for row in range(n_engines)]
    health = healthy(names)

    def blame(failure: EngineFailure) -> None:
        health.suspected(failure.engine_id, 0, failure.reason, clock.now)

    return ScriptedDispatch(
        **{
            "calls": [("generate", (index,), {}) for index in range(n_calls)],
            "engines": {name: ScriptedEngine(name) for name in names},
            "health": health,
            "deadline_s": DEADLINE_S,
            "shards": Counter(),
            "seconds": dict.fromkeys(names, 1.0),
            "blame": blame,
            "bring_back": None,
            **more,
        }
    )


@given(data=st.data(), n_engines=st.integers(1, 6), n_calls=st.integers(1, 30))
def test_every_call_is_answered_whoever_is_lost(data: st.DataObject, n_engines: int, n_calls: int) -> None:
    """Two of the engines may be lost; what takes down three would be the call's own fault."""
    mortal = {f"e{row}" for row in range(min(2, n_engines - 1))}
    lost: dict[str, tuple[int, LossReason]] = {}

    def script(name: str, index: int) -> Any:
        if name in lost:
            return lost[name][1]
        chance = data.draw(st.integers(0, 9))
        if name not in mortal or chance > 2:
            return LATER if chance > 6 else None
        reason = data.draw(st.sampled_from(list(LossReason)[:3]))
        lost[name] = index, reason
        return reason

    checked: list[int] = []
    dispatch = request(n_engines, n_calls, script, check=lambda index, result: checked.append(index))
    try:
        results = dispatch.run()
    except EngineFailure:
        (index, _), (other, last) = lost.values()
        assert (index, last) == (other, LossReason.RAISED), "what one raises on after another was lost is at fault"
        return
    assert results == [10 * index for index in range(n_calls)]
    assert sorted(checked) == list(range(n_calls))
    assert dispatch.shards.total() == n_calls
    assert dispatch._tries == Counter(index for index, _ in lost.values()), "each takes down one call and no other"


def test_an_engine_has_one_call_ahead_while_there_are_plenty() -> None:
    sent: list[list[int]] = []

    def script(name: str, index: int) -> None:
        if name == "e0":
            sent.append([len(engine.sent) for engine in dispatch.engines.values()])

    dispatch = request(2, 8, script)
    assert dispatch.run() == [10 * index for index in range(8)]
    # With two left for two engines each takes its last one when it is free.
    assert sent == [[2, 2], [2, 2], [1, 1], [1, 1]]


def test_few_calls_are_for_whoever_is_through_first() -> None:
    """One of two engines is slow: it has no call but the one it works on while another could take it."""
    order: list[tuple[str, int]] = []

    def script(name: str, index: int) -> Any:
        if name == "e0" and index == 0 and len(order) < 3:
            return LATER
        order.append((name, index))
        return None

    dispatch = request(2, 3, script)
    assert dispatch.run() == [0, 10, 20]
    assert ("e1", 2) in order


def handed_out(dispatch: ScriptedDispatch) -> dict[str, tuple[str, int]]:
    """The first calls are with the engines, and those ahead; returns what each engine works on."""
    dispatch._waiting = deque(range(len(dispatch.calls)))
    dispatch._results = [None] * len(dispatch.calls)
    dispatch._hand_out()
    dispatch._hand_out_ahead()
    return {call[0]: call for call in dispatch._running}


def test_a_slow_engine_and_one_not_known_have_none_ahead() -> None:
    dispatch = request(4, 16, lambda *_: None, seconds={"e0": 2.1, "e1": 1.0, "e2": 1.0})
    handed_out(dispatch)
    assert set(dispatch._ahead) == {"e1", "e2"}
    known = request(2, 4, lambda *_: None, seconds={})
    known.run()
    assert known.seconds == {"e0": 1.0, "e1": 1.0}


def test_what_is_still_before_a_call_has_a_deadline_of_its_own() -> None:
    """An engine that raised goes on to the call that it had ahead, and may be asked again when nobody else is left."""
    dispatch = request(2, 8, lambda *_: None)
    first = handed_out(dispatch)
    assert set(dispatch._ahead) == {"e0", "e1"}
    outcomes[first["e0"]] = LossReason.RAISED
    dispatch._take_answer(first["e0"])
    assert list(dispatch._waiting)[:2] == [0, 2], "both are for others"
    dispatch._failed.clear()
    for deadlines in (2, 1):
        dispatch._give("e0")
        (call,) = [call for call, work in dispatch._running.items() if work.engine_id == "e0"]
        assert dispatch._running[call].overdue == clock.now + deadlines * DEADLINE_S
        outcomes[call] = None
        dispatch._waiting.clear()
        dispatch._take_answer(call)
        dispatch._waiting.extend([6, 7])


def test_what_an_engine_died_of_is_not_given_ahead_again() -> None:
    dispatch = request(3, 12, lambda *_: None)
    first = handed_out(dispatch)
    outcomes[first["e0"]] = LossReason.DIED
    dispatch._take_answer(first["e0"])
    assert list(dispatch._waiting)[:2] == [0, 3]
    outcomes[first["e1"]] = None
    dispatch._take_answer(first["e1"])
    dispatch._hand_out_ahead()
    assert "e1" not in dispatch._ahead
    assert list(dispatch._waiting)[:2] == [0, 3]


def test_nobody_is_accused_of_what_the_process_before_it_raised() -> None:
    """Engine a raised, b died; a is launched again, or leaves, while both are brought back."""
    health = FleetHealth(start_deadline_s=1.0)
    failures = {name: EngineFailure(name, "raised", LossReason.RAISED) for name in ("a", "b")}

    def bring_back(_: EngineFailure) -> None:
        health.launched("b", 0.0)
        health.answered("b", 0, 0.0)
        health.pushed({"b": 0}, 1, 0.0)

    request = Dispatch(
        calls=[("generate", (), {})],
        engines={},
        health=health,
        deadline_s=1.0,
        shards=Counter(),
        seconds={},
        blame=lambda failure: pytest.fail(f"{failure} is blamed"),
        bring_back=bring_back,
    )
    request._failed.update(failures)
    request._accused[0] = failures["a"]
    request._wait_for_somebody()
    assert (request._failed, request._accused) == ({}, {})
