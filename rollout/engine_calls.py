"""The outcome of a call to an engine's actor: its value, the engine's own words, or that the engine is lost."""

from __future__ import annotations

from typing import Any

from data.errors import RunError, WindlassError
from rollout.fleet_health import LossReason


class EngineFailure(RunError):
    """An engine died, raised an error, or did not answer in time; the message names it and repeats its error."""

    def __init__(self, engine_id: str, what: str, reason: LossReason) -> None:
        super().__init__(engine_id, what, reason)
        self.engine_id = engine_id
        self.what = what
        self.reason = reason

    def __str__(self) -> str:
        return f"{self.engine_id}: {self.what}"


def engine_result(engine_id: str, reference: Any, timeout_s: float, doing: str) -> Any:
    """The value of a call.

    Args:
        engine_id: whom it went to.
        reference: of Ray.
        timeout_s: seconds it may still take.
        doing: what it does, for the message.

    Raises:
        WindlassError: the engine's own, about a wrong request or its weights.
        EngineFailure: it died, raised something else, or the time is over.
    """
    import ray
    from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

    try:
        return ray.get(reference, timeout=timeout_s)
    except GetTimeoutError as error:
        what = f"no answer within {timeout_s:.0f} s, {doing}"
        raise EngineFailure(engine_id, what, LossReason.SILENT) from error
    except RayTaskError as error:
        # A wrong request is the caller's to mend; anything else is the engine's failure, in its own words.
        if isinstance(error.cause, WindlassError):
            raise error.cause from error
        what = f"{doing}: {type(error.cause).__name__}: {error.cause}"
        raise EngineFailure(engine_id, what, LossReason.RAISED) from error
    except RayActorError as error:
        raise EngineFailure(engine_id, f"died, {doing}: {cause_of_death(error)}", LossReason.DIED) from error


def cause_of_death(error: BaseException) -> str:
    """One line: the error of the constructor, or why the process ended."""
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1] if "creation task" in lines[0] else lines[0]
