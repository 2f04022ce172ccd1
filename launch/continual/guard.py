"""The guard: conditions that an updated model must meet before it serves, over any metrics with intervals.

A condition compares the candidate with the version it was updated from, by the interval of the paired difference, or
with a constant, by the interval of the metric itself. With `prove: harm` a condition fails where the evidence shows a
loss beyond the tolerance; with `prove: safety` it fails unless the evidence rules such a loss out. A metric that is
absent, not a number, or measured at another confidence never passes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Self

from pydantic import Field, model_validator

from data.errors import RequestError
from data.settings import Settings


class Direction(StrEnum):
    """Which values are better."""

    HIGHER = "higher"
    LOWER = "lower"


class Proof(StrEnum):
    """Who bears the burden of the interval's width."""

    HARM = "harm"
    """Fails when the whole interval lies beyond the tolerance: too little evidence passes."""
    SAFETY = "safety"
    """Fails when any of the interval lies beyond the tolerance: too little evidence fails."""


class Condition(Settings):
    """One condition."""

    metric: str = Field(min_length=1)
    """Name of a metric of the evaluation."""
    direction: Direction = Direction.HIGHER
    """higher or lower: which values are better."""
    tolerance: float = Field(0.0, ge=0)
    """Loss that is accepted, in the metric's unit; with `limit`, how far beyond it."""
    confidence: float = Field(0.95, gt=0, lt=1)
    """Of the interval."""
    prove: Proof = Proof.HARM
    """harm: fails when a loss beyond the tolerance is shown; safety: fails unless such a loss is ruled out."""
    limit: float | None = None
    """Compare the candidate's own value with this constant instead of with the version before."""

    @property
    def name(self) -> str:
        """The condition in words."""
        beyond = "the version before" if self.limit is None else f"{self.limit:g}"
        return f"{self.metric} {self.direction.value} than {beyond}, tolerance {self.tolerance:g}, {self.prove.value}"


class GuardSettings(Settings):
    """What must hold for a promotion."""

    conditions: tuple[Condition, ...] = (
        Condition(metric="ndcg@10", tolerance=0.005),
        Condition(metric="hr@10", tolerance=0.01),
        Condition(metric="invalid@10", direction=Direction.LOWER, limit=0.0),
    )
    """All must hold. None promotes whatever comes."""

    @model_validator(mode="after")
    def _once(self) -> Self:
        names = [condition.name for condition in self.conditions]
        twice = [name for name in names if names.count(name) > 1]
        if twice:
            raise RequestError("guard.conditions", f"{twice[0]} is given twice", "each condition once")
        return self


@dataclass(frozen=True, kw_only=True)
class Range:
    """An estimate with its interval."""

    value: float
    low: float
    high: float

    @property
    def is_finite(self) -> bool:
        """Whether all three are numbers, in order."""
        return all(map(math.isfinite, (self.value, self.low, self.high))) and self.low <= self.high


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """A metric as it was measured on the held-out rows."""

    candidate: Range
    parent: Range
    difference: Range
    """Of candidate minus parent, rows paired."""
    confidence: float
    """Of the intervals."""
    n: int
    """Rows."""
    measured: str = ""
    """What was measured in place of the condition's own metric, such as `exposed_hr@10` for `hr@10`."""


class Outcome(StrEnum):
    """What a condition comes to."""

    HOLDS = "holds"
    LOSS = "loss"
    """A loss beyond the tolerance is shown (harm), or not ruled out (safety)."""
    NOT_MEASURED = "not_measured"
    """The evaluation has no such metric at this confidence."""
    NOT_FINITE = "not_finite"


@dataclass(frozen=True, kw_only=True)
class Checked:
    """A condition with every number behind its outcome."""

    condition: Condition
    outcome: Outcome
    evidence: Evidence | None
    loss_low: float | None = None
    """Smallest loss that the interval allows; negative is a gain."""
    loss_high: float | None = None
    """Largest loss that the interval allows."""

    def __str__(self) -> str:
        measured = f" (measured as {self.evidence.measured})" if self.evidence and self.evidence.measured else ""
        words = f"{self.condition.name}{measured}: {self.outcome.value.replace('_', ' ')}"
        if self.loss_low is None:
            return words
        return f"{words} (loss {self.loss_low:.4g} to {self.loss_high:.4g} at {self.condition.confidence:.0%})"

    def record(self) -> dict[str, Any]:
        """Plain values for JSON; numbers that are none become null."""
        return {
            "condition": self.condition.model_dump(mode="json"),
            "outcome": self.outcome.value,
            "loss_low": self.loss_low,
            "loss_high": self.loss_high,
            "evidence": None if self.evidence is None else plain(asdict(self.evidence)),
        }


def check(conditions: Sequence[Condition], evidence: Mapping[tuple[str, float], Evidence]) -> list[Checked]:
    """Hold every condition against what was measured.

    Args:
        conditions: all of which must hold for a promotion.
        evidence: by metric and confidence.
    """
    return [_check(condition, evidence.get((condition.metric, condition.confidence))) for condition in conditions]


def passes(checked: Sequence[Checked]) -> bool:
    """Whether every condition holds."""
    return all(one.outcome is Outcome.HOLDS for one in checked)


def wanted(conditions: Sequence[Condition]) -> list[tuple[str, float]]:
    """Metrics and confidences that the conditions ask the evaluation for, each once."""
    return sorted({(condition.metric, condition.confidence) for condition in conditions})


def _check(condition: Condition, found: Evidence | None) -> Checked:
    if found is None or found.confidence != condition.confidence:
        return Checked(condition=condition, outcome=Outcome.NOT_MEASURED, evidence=None)
    measured = found.difference if condition.limit is None else found.candidate
    if not measured.is_finite:
        return Checked(condition=condition, outcome=Outcome.NOT_FINITE, evidence=found)
    base = condition.limit or 0.0
    gains = (measured.low - base, measured.high - base)
    losses = sorted(0.0 - gain if condition.direction is Direction.HIGHER else gain for gain in gains)
    decisive = losses[0] if condition.prove is Proof.HARM else losses[1]
    return Checked(
        condition=condition,
        outcome=Outcome.LOSS if decisive > condition.tolerance else Outcome.HOLDS,
        evidence=found,
        loss_low=losses[0],
        loss_high=losses[1],
    )


def plain(value: Any) -> Any:
    """A value as JSON can hold it: numbers that are not finite become null."""
    if isinstance(value, Mapping):
        return {name: plain(inner) for name, inner in value.items()}
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value
