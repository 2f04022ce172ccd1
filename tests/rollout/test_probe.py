"""Contract: the gap is the absolute difference per completion token, its limit 1e-4 in float32 and twice the learner's
noise otherwise; anything that is not a number, over the limit, or of no tokens, sounds the alarm.

Not covered: where the log-probabilities come from (test_channel, and the learner's tests).
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from rollout.probe import (
    Gap,
    GapAlarm,
    Probe,
    check_gap,
    gap_limit,
    item_probe,
    policy_gap,
    probe_gap,
    random_probe,
)


def test_policy_gap_is_per_completion_token_and_blind_to_padding() -> None:
    engine = np.zeros((2, 2, 3), np.float32)
    learner = engine.copy()
    mask = np.zeros((2, 2, 3), bool)
    mask[0, 0, :2] = mask[1, 1, :2] = True
    learner[0, 0, 0], learner[1, 1, 1] = 0.25, -0.75
    learner[0, 1, 2] = 100.0
    engine[1, 0, 0] = np.nan
    gap = policy_gap(engine, learner, mask)
    assert (gap.mean, gap.max, gap.tokens) == (0.25, 0.75, 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, 2e-4, -2e-4])
def test_one_bad_token_in_float32_is_an_alarm(bad: float) -> None:
    mask = np.ones((4, 8, 3), bool)
    engine = np.zeros(mask.shape, np.float32)
    learner = engine.copy()
    check_gap(policy_gap(engine, learner, mask), gap_limit("float32", None), "step 1")
    learner[3, 7, 2] = bad
    with pytest.raises(GapAlarm, match="step 1: engine and learner differ"):
        check_gap(policy_gap(engine, learner, mask), gap_limit("float32", None), "step 1")


def test_short_types_are_measured_against_the_learners_noise() -> None:
    limit = gap_limit("bfloat16", Gap(mean=0.003, max=0.02, tokens=10))
    assert (limit.mean, limit.max) == (0.006, 0.04)
    check_gap(Gap(mean=0.006, max=0.04, tokens=10), limit, "probe")
    for gap in (Gap(mean=0.0061, max=0.01, tokens=10), Gap(mean=0.001, max=0.041, tokens=10)):
        with pytest.raises(GapAlarm):
            check_gap(gap, limit, "probe")
    with pytest.raises(ValueError, match="noise"):
        gap_limit("bfloat16", None)


def test_noise_in_float32_only_widens_the_limit() -> None:
    sharp = gap_limit("float32", Gap(mean=1e-5, max=2e-4, tokens=10))
    assert (sharp.mean, sharp.max) == (1e-4, 4e-4)
    check_gap(Gap(mean=1e-4, max=4e-4, tokens=10), sharp, "probe")
    with pytest.raises(GapAlarm):
        check_gap(Gap(mean=1e-5, max=4.1e-4, tokens=10), sharp, "probe")


def test_nothing_compared_is_an_alarm() -> None:
    none = np.zeros((1, 1, 1), np.float32)
    with pytest.raises(GapAlarm, match="over 0 tokens"):
        check_gap(policy_gap(none, none, np.zeros((1, 1, 1), bool)), gap_limit("float32", None), "step")
    with pytest.raises(GapAlarm):
        check_gap(probe_gap([], []), gap_limit("float32", None), "probe")


def test_probe_gap_refuses_other_shapes() -> None:
    assert probe_gap([np.zeros(2)], [np.array([0.0, 0.5])]).max == 0.5
    with pytest.raises(ValueError, match="different lengths"):
        probe_gap([np.zeros(1)], [np.zeros(2)])


def test_probes_are_fixed_and_legal() -> None:
    def same(a: Probe, b: Probe) -> bool:
        pairs = zip((*a.prompts, *a.completions), (*b.prompts, *b.completions), strict=True)
        return all(np.array_equal(x, y) for x, y in pairs)

    assert same(random_probe(50), random_probe(50))
    assert not same(random_probe(50), random_probe(50, seed=1))
    paths = [np.array([4, 9, 11]), np.array([5, 10])]
    probe = item_probe(paths, bos=1, prompts=3, items=2, members=2)
    assert len(probe.prompts) == len(probe.completions) == 6
    assert all(p[0] == 1 for p in probe.prompts)
    assert {tuple(c) for c in probe.completions} <= {(4, 9, 11), (5, 10)}
    assert same(probe, item_probe(paths, bos=1, prompts=3, items=2, members=2))
