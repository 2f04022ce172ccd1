"""Contract: each failure gets the decision of the table in trainer/failure_policy.py; restarts in a window are bounded
whatever the clock does; a failed check of weights always ends the run.

Pure. Carrying decisions out is checked with real processes in tests/launch/test_kill.py.
"""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from trainer.failure_policy import Action, Failure, Part, Situation, decide
from trainer.run_settings import ClusterSettings

SETTINGS = ClusterSettings(engine_restarts=2, learner_restarts=1, restart_window_s=100.0)


def fail(part: Part, at: float = 1000.0, *earlier: float, engines: int = 1, manifest: bool = True) -> Action:
    before = [Failure(part=part, at=time, told="") for time in earlier]
    situation = Situation(healthy_engines=engines, has_manifest=manifest)
    return decide(Failure(part=part, at=at, told="x"), before, situation, SETTINGS).action


@pytest.mark.parametrize(
    ("action", "found"),
    [
        (Action.GIVE_UP, fail(Part.WEIGHTS, engines=4)),
        (Action.CARRY_ON, fail(Part.REWARD, 1000.0, *[999.0] * 50, engines=0)),
        (Action.RESTART_ENGINE, fail(Part.ENGINE, engines=0)),
        (Action.RESTART_ENGINE, fail(Part.ENGINE, 1000.0, 990.0, engines=0)),
        (Action.CARRY_ON, fail(Part.ENGINE, 1000.0, 990.0, 995.0, engines=1)),
        (Action.GIVE_UP, fail(Part.ENGINE, 1000.0, 990.0, 995.0, engines=0)),
        (Action.RESTART_ENGINE, fail(Part.ENGINE, 1000.0, 900.0, 995.0, engines=0)),
        (Action.RESTART_LEARNERS, fail(Part.LEARNER)),
        (Action.GIVE_UP, fail(Part.LEARNER, manifest=False)),
        (Action.GIVE_UP, fail(Part.LEARNER, 1000.0, 901.0)),
        (Action.RESTART_LEARNERS, fail(Part.LEARNER, 1000.0, 900.0)),
        (Action.GIVE_UP, fail(Part.LEARNER, 1000.0, 5000.0)),
    ],
)
def test_decisions(action: Action, found: Action) -> None:
    assert found is action


def test_parts_are_counted_apart() -> None:
    engines = [Failure(part=Part.ENGINE, at=999.0, told="")] * 9
    learner = Failure(part=Part.LEARNER, at=1000.0, told="")
    situation = Situation(healthy_engines=1, has_manifest=True)
    assert decide(learner, engines, situation, SETTINGS).action is Action.RESTART_LEARNERS


@given(st.lists(st.floats(0, 1000), max_size=40), st.sampled_from([Part.ENGINE, Part.LEARNER]))
def test_restarts_in_a_window_are_bounded(times: list[float], part: Part) -> None:
    """Whatever the times, also unsorted ones, no window holds more restarts than the setting."""
    restarts: list[Failure] = []
    situation = Situation(healthy_engines=0, has_manifest=True)
    for at in times:
        failure = Failure(part=part, at=at, told="")
        if decide(failure, restarts, situation, SETTINGS).action is not Action.GIVE_UP:
            restarts.append(failure)
    limit = SETTINGS.engine_restarts if part is Part.ENGINE else SETTINGS.learner_restarts
    for one in restarts:
        assert sum(0 <= other.at - one.at < SETTINGS.restart_window_s for other in restarts) <= max(limit, 1) + 1


@pytest.mark.parametrize("restarts", [0])
def test_restarts_can_be_switched_off(restarts: int) -> None:
    off = SETTINGS.model_copy(update={"engine_restarts": restarts, "learner_restarts": restarts})
    situation = Situation(healthy_engines=0, has_manifest=True)
    for part in (Part.ENGINE, Part.LEARNER):
        assert decide(Failure(part=part, at=0.0, told=""), [], situation, off).action is Action.GIVE_UP
