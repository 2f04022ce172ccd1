"""What to do when a part of a run fails: a decision, pure; others carry it out (`trainer.policy_run`, `launch`).

| what failed                          | decision                                                                     |
|--------------------------------------|------------------------------------------------------------------------------|
| a check of pushed weights            | give up: the weights themselves are wrong, and a restart would hide it       |
| a reward replica                     | carry on: Serve replaces it, failed groups are masked and counted            |
| an engine                            | restart it, at most `cluster.engine_restarts` times in `restart_window_s`;   |
|                                      | above that carry on with the others; give up when there are none             |
| a learner                            | restart the learners from the last manifest, at most `learner_restarts`      |
|                                      | times in the window; give up above that, or where there is no manifest       |

The driver's own death is nobody's to decide here: the same command, or the job's restart policy, starts it again.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

from trainer.run_settings import ClusterSettings


class Part(StrEnum):
    """What can fail."""

    WEIGHTS = "weights"
    REWARD = "reward"
    ENGINE = "engine"
    LEARNER = "learner"


class Action(StrEnum):
    """What is done about it."""

    CARRY_ON = "carry_on"
    RESTART_ENGINE = "restart_engine"
    RESTART_LEARNERS = "restart_learners"
    GIVE_UP = "give_up"


@dataclass(frozen=True, kw_only=True)
class Failure:
    """Something failed."""

    part: Part
    at: float
    """Seconds of a clock that never goes back (`time.monotonic`)."""
    told: str
    """One line: who, and its own words."""


@dataclass(frozen=True, kw_only=True)
class Situation:
    """What is left when something has failed."""

    healthy_engines: int
    """Engines that may still be asked."""
    has_manifest: bool
    """Whether there is a checkpoint to begin from again."""


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What to do, and why, in words for the log."""

    action: Action
    reason: str


def decide(failure: Failure, earlier: Sequence[Failure], situation: Situation, settings: ClusterSettings) -> Decision:
    """Decide about a failure, given those before it in this run; see the table above."""
    window = settings.restart_window_s
    # A time after the failure's own can only come from a clock that jumped: it counts, so that restarts stay bounded.
    recent = sum(one.part is failure.part and failure.at - one.at < window for one in earlier)
    within = f"{recent} restarts in {window:g} s"
    if failure.part is Part.WEIGHTS:
        return Decision(action=Action.GIVE_UP, reason="a check of pushed weights failed")
    if failure.part is Part.REWARD:
        return Decision(action=Action.CARRY_ON, reason="Serve replaces the replica")
    if failure.part is Part.ENGINE:
        if recent < settings.engine_restarts:
            return Decision(action=Action.RESTART_ENGINE, reason=f"{within}, up to {settings.engine_restarts}")
        if situation.healthy_engines:
            return Decision(
                action=Action.CARRY_ON, reason=f"{within} are enough; {situation.healthy_engines} engines are left"
            )
        return Decision(action=Action.GIVE_UP, reason=f"{within} are enough, and no engine is left")
    if not situation.has_manifest:
        return Decision(action=Action.GIVE_UP, reason="no checkpoint to begin from again")
    if recent < settings.learner_restarts:
        return Decision(action=Action.RESTART_LEARNERS, reason=f"{within}, up to {settings.learner_restarts}")
    return Decision(action=Action.GIVE_UP, reason=f"{within} are enough")
