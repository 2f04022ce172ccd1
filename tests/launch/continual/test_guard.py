"""The guard: every condition by hand-made intervals, against a plain reading of the rule, and what never passes.

Not checked: how intervals are made (tests.reward.test_bootstrap).
"""

from __future__ import annotations

import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import RequestError
from launch.continual.guard import (
    Condition,
    Direction,
    Evidence,
    GuardSettings,
    Outcome,
    Proof,
    Range,
    check,
    passes,
    wanted,
)


def evidence(low: float, high: float, *, candidate: float = 0.5, confidence: float = 0.95) -> Evidence:
    """A difference between low and high, of a metric that is exactly `candidate`."""
    exact = Range(value=candidate, low=candidate, high=candidate)
    middle = Range(value=(low + high) / 2, low=low, high=high)
    return Evidence(candidate=exact, parent=exact, difference=middle, confidence=confidence, n=9)


def outcome(condition: Condition, found: Evidence) -> Outcome:
    (one,) = check([condition], {(condition.metric, found.confidence): found})
    return one.outcome


@pytest.mark.parametrize(
    ("low", "high", "harm", "safety"),
    [
        (-0.05, -0.03, Outcome.LOSS, Outcome.LOSS),
        (-0.05, 0.03, Outcome.HOLDS, Outcome.LOSS),
        (-0.02, 0.01, Outcome.HOLDS, Outcome.HOLDS),
        (0.01, 0.02, Outcome.HOLDS, Outcome.HOLDS),
    ],
)
def test_a_difference_with_tolerance(low: float, high: float, harm: Outcome, safety: Outcome) -> None:
    higher = Condition(metric="hr", tolerance=0.02)
    assert outcome(higher, evidence(low, high)) is harm
    assert outcome(higher.model_copy(update={"prove": Proof.SAFETY}), evidence(low, high)) is safety
    lower = higher.model_copy(update={"direction": Direction.LOWER})
    assert outcome(lower, evidence(-high, -low)) is harm


@given(st.floats(-1, 1), st.floats(0, 1), st.floats(0, 1), st.sampled_from(Direction), st.sampled_from(Proof))
def test_the_rule_by_its_words(low: float, width: float, tolerance: float, direction: Direction, prove: Proof) -> None:
    high = low + width
    condition = Condition(metric="m", direction=direction, tolerance=tolerance, prove=prove)
    worse = (lambda x: x < -tolerance) if direction is Direction.HIGHER else (lambda x: x > tolerance)
    ends = [worse(low), worse(high)]
    fails = all(ends) if prove is Proof.HARM else any(ends)
    assert outcome(condition, evidence(low, high)) is (Outcome.LOSS if fails else Outcome.HOLDS)


def test_a_limit_looks_at_the_candidate_alone() -> None:
    condition = Condition(metric="invalid", direction=Direction.LOWER, limit=0.01)
    assert outcome(condition, evidence(-9, 9, candidate=0.01)) is Outcome.HOLDS
    assert outcome(condition, evidence(0, 0, candidate=0.02)) is Outcome.LOSS


def test_what_was_not_measured_never_passes() -> None:
    condition = Condition(metric="hr")
    assert [one.outcome for one in check([condition], {})] == [Outcome.NOT_MEASURED]
    assert outcome(condition, evidence(0, 0, confidence=0.9)) is Outcome.NOT_MEASURED
    for wrong in (math.nan, math.inf):
        found = evidence(wrong, wrong)
        assert outcome(condition, found) is Outcome.NOT_FINITE
        (one,) = check([condition], {("hr", 0.95): found})
        assert not passes([one])
        json.dumps(one.record(), allow_nan=False)


def test_every_condition_must_hold() -> None:
    conditions = [Condition(metric="hr"), Condition(metric="ndcg"), Condition(metric="hr", tolerance=1.0)]
    found = {("hr", 0.95): evidence(-0.2, -0.1), ("ndcg", 0.95): evidence(0.0, 0.1)}
    checked = check(conditions, found)
    assert [one.outcome for one in checked] == [Outcome.LOSS, Outcome.HOLDS, Outcome.HOLDS]
    assert not passes(checked)
    assert passes(checked[1:])
    assert passes([])
    assert wanted(conditions) == [("hr", 0.95), ("ndcg", 0.95)]
    assert "loss 0.1 to 0.2" in str(checked[0])


def test_a_condition_given_twice_is_refused() -> None:
    with pytest.raises(RequestError, match="given twice"):
        GuardSettings(conditions=(Condition(metric="hr"), Condition(metric="hr")))
