"""Contract: the run stops at a step with more failed groups than allowed, or at the third failed step in a row; the
count survives a checkpoint, and starts anew after a stop.
"""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from data.records import RewardFailure
from reward.failures import FailureTracker
from reward.settings import RewardSettings

SETTINGS = RewardSettings(max_failed_share=0.25, max_failed_steps=3)


def step(failed: int, of: int = 8) -> np.ndarray:
    return np.array([RewardFailure.TIMEOUT.value] * failed + [""] * (of - failed))


def test_more_than_the_share_stops_at_once_and_exactly_the_share_does_not() -> None:
    assert not FailureTracker(SETTINGS).observe(step(2)).stop
    verdict = FailureTracker(SETTINGS).observe(step(3))
    assert verdict.stop
    assert verdict.message == ("3 of 8 groups have no reward (3 timeout), more than reward.max_failed_share = 0.25")


def test_three_failed_steps_in_a_row_stop_and_a_good_one_between_resets() -> None:
    tracker = FailureTracker(SETTINGS)
    assert [tracker.observe(step(n)).stop for n in (1, 1, 0, 1, 1)] == [False] * 5
    verdict = tracker.observe(step(1))
    assert verdict.stop
    assert "3 steps in a row" in verdict.message


def test_count_survives_a_checkpoint_and_starts_anew_after_a_stop() -> None:
    first = FailureTracker(SETTINGS)
    first.observe(step(1))
    first.observe(step(1))
    continued = FailureTracker(SETTINGS)
    continued.load_state_dict(first.state_dict())
    assert continued.observe(step(1)).stop
    after_stop = FailureTracker(SETTINGS)
    after_stop.load_state_dict(continued.state_dict())
    assert not after_stop.observe(step(1)).stop


@given(st.lists(st.integers(0, 8), max_size=30), st.integers(0, 30))
def test_a_checkpoint_between_steps_changes_no_verdict_before_the_stop(counts: list[int], cut: int) -> None:
    whole, other = FailureTracker(SETTINGS), FailureTracker(SETTINGS)
    for number, count in enumerate(counts):
        if number == cut:
            state = other.state_dict()
            other = FailureTracker(SETTINGS)
            other.load_state_dict(state)
        verdict = whole.observe(step(count))
        assert other.observe(step(count)) == verdict
        if verdict.stop:
            break
