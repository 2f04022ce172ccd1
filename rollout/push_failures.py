"""How a push fails: what each peer is to blame for, and whether the weights themselves are in doubt."""

from __future__ import annotations

from collections.abc import Mapping
from concurrent.futures import FIRST_EXCEPTION, Future
from concurrent.futures import wait as wait_futures
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from data.errors import RunError
from rollout.buckets import BucketError
from rollout.movers import Deadline, MoverTimeout, PeerError
from rollout.peers import PeerDied

_GRACE_S = 3.0
"""How long the others may still report after the first error; the first is often only an echo of the cause."""


class PushFailure(StrEnum):
    """Why an engine, or the learner, is to blame for a failed push."""

    CHECKSUM = "checksum"
    """Check 1: what arrived is not what was sent."""
    PROBE = "probe"
    """Check 2: the engine computes other log-probabilities than the learner."""
    TIMEOUT = "timeout"
    """It fell silent."""
    DIED = "died"
    """Its process is gone."""
    ERROR = "error"
    """It raised an error."""
    HALF_WAY = "half_way"
    """Another one failed, and it was left with part of the weights."""


ALARMS = (PushFailure.CHECKSUM, PushFailure.PROBE)
"""Reasons that stop the run; the others replace the engine."""


@dataclass(frozen=True, kw_only=True)
class Blame:
    """One failed peer."""

    reason: PushFailure
    text: str


class PushError(RunError):
    """A push failed; nothing of it is visible."""

    def __init__(self, version: int, blames: Mapping[str, Blame]) -> None:
        super().__init__(version, blames)
        self.version = version
        self.blames = dict(blames)

    def __str__(self) -> str:
        order = sorted(self.blames.items(), key=lambda item: item[1].reason is PushFailure.HALF_WAY)
        told = "; ".join(f"{name} ({blame.reason.value}): {blame.text}" for name, blame in order)
        return f"push of weight version {self.version} failed: {told}"

    @property
    def alarm(self) -> bool:
        """True when a check failed, so that no replacement helps."""
        return any(blame.reason in ALARMS for blame in self.blames.values())


def gather(version: int, calls: Mapping[str, Future[Any]], deadline: Deadline) -> dict[str, Any]:
    """Results of all calls; the error of any as soon as it is there, with what the others say within a moment."""
    _, waiting = wait_futures(calls.values(), timeout=deadline.left, return_when=FIRST_EXCEPTION)
    if waiting and any(call.exception() is not None for call in calls.values() if call.done()):
        wait_futures(calls.values(), timeout=min(_GRACE_S, deadline.left))
    errors = {n: error for n, call in calls.items() if call.done() and (error := call.exception()) is not None}
    blames = {name: blame(error) for name, error in errors.items()}
    # Who is silent while others fail for their own reasons is a victim; where they fail for the silence, the cause.
    victim = any(blame.reason is not PushFailure.TIMEOUT for blame in blames.values())
    for name, call in calls.items():
        if name not in errors and not call.done():
            reason = PushFailure.HALF_WAY if victim else PushFailure.TIMEOUT
            blames[name] = Blame(reason=reason, text="no answer when the push was given up")
    if blames:
        raise PushError(version, blames)
    return {name: call.result() for name, call in calls.items()}


def blame(error: BaseException) -> Blame:
    """Who is to blame, by the kind of exception a peer raised."""
    reason = PushFailure.ERROR
    for kind, known in (
        (BucketError, PushFailure.CHECKSUM),
        (MoverTimeout, PushFailure.TIMEOUT),
        (PeerError, PushFailure.HALF_WAY),
        (PeerDied, PushFailure.DIED),
    ):
        if isinstance(error, kind):
            reason = known
    return Blame(reason=reason, text=f"{type(error).__name__}: {error}")
