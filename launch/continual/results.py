"""What the service answers about a day."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from launch.continual.journal import Pass
from launch.continual.reasons import Decision, Told


@dataclass(frozen=True, kw_only=True)
class Result:
    """What a cycle says about a day."""

    day: str
    decision: Decision
    reasons: tuple[Told, ...] = ()
    metrics: dict[str, Any] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)
    version: int | None = None
    """Of the updated model; none where there is none."""

    @staticmethod
    def of(done: Pass) -> Result:
        """The result that the journal keeps."""
        assert done.decision is not None
        return Result(
            day=done.day,
            decision=done.decision,
            reasons=done.reasons,
            metrics=dict(done.metrics),
            counts=dict(done.counts),
            version=done.candidate if done.decision in (Decision.PROMOTED, Decision.REJECTED) else None,
        )

    def record(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "day": self.day,
            "decision": self.decision.value,
            "reasons": [{"reason": told.reason.value, "found": told.found} for told in self.reasons],
            "metrics": self.metrics,
            "counts": self.counts,
            "version": self.version,
        }
