"""Off-policy estimates: closed forms, coverage of the intervals on logs of known value, bad input.

Not checked: where the log-probabilities come from.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from data.errors import RequestError
from reward.bootstrap import bootstrap_ratio
from reward.off_policy import DoubleArray, Estimator, LoggedExposures, policy_value, value_difference

ITEMS = 6


class BanditWorld:
    """A contextual bandit whose policies and rewards are known."""

    def __init__(self, seed: int) -> None:
        random = np.random.default_rng(seed)
        self.random = random
        self.reward_XA = random.uniform(0.05, 0.6, (3, ITEMS))
        self.logging_XA = self.softmax(random.normal(0, 0.7, (3, ITEMS)))
        self.target_XA = self.softmax(random.normal(0, 0.7, (3, ITEMS)))

    @staticmethod
    def softmax(logit: DoubleArray) -> DoubleArray:
        value = np.exp(logit)
        probability: DoubleArray = value / value.sum(1, keepdims=True)
        return probability

    def value(self) -> float:
        return float((self.target_XA * self.reward_XA).sum(1).mean())

    def log(self, rows: int) -> LoggedExposures:
        context_N = self.random.integers(0, 3, rows)
        cumulative_NA = self.logging_XA[context_N].cumsum(1)
        action_N = (self.random.random((rows, 1)) > cumulative_NA).sum(1).clip(max=ITEMS - 1)
        model_XA = self.reward_XA + self.random.normal(0, 0.1, self.reward_XA.shape)
        return LoggedExposures(
            response_N=(self.random.random(rows) < self.reward_XA[context_N, action_N]).astype(np.float64),
            logp_N=np.log(self.target_XA[context_N, action_N]),
            logp0_N=np.log(self.logging_XA[context_N, action_N]),
            model_shown_N=model_XA[context_N, action_N],
            model_policy_N=(self.target_XA * model_XA).sum(1)[context_N],
        )


def test_intervals_cover_the_known_value() -> None:
    covered = dict.fromkeys(Estimator, 0)
    world = BanditWorld(0)
    logs = 500
    for number in range(logs):
        for estimator, interval in policy_value(world.log(400), seed=number, resamples=400).estimates.items():
            covered[estimator] += interval.low <= world.value() <= interval.high
    for estimator, count in covered.items():
        assert 0.92 <= count / logs <= 0.98, (estimator, count)


def test_the_same_policy_has_the_mean_response() -> None:
    log = BanditWorld(1).log(300)
    value = policy_value(replace(log, logp_N=log.logp0_N))
    for estimator in (Estimator.IPS, Estimator.SNIPS):
        assert value.estimates[estimator].mean == pytest.approx(log.response_N.mean())
    assert value.effective_sample_size == pytest.approx(300)
    assert value.weight_mean == pytest.approx(1)


def test_a_perfect_model_needs_no_weights() -> None:
    log = BanditWorld(2).log(50)
    assert log.model_policy_N is not None
    exact = replace(log, model_shown_N=log.response_N)
    assert policy_value(exact).estimates[Estimator.DR].mean == pytest.approx(log.model_policy_N.mean())


def test_snips_shifts_with_the_responses_and_stays_among_them() -> None:
    log = BanditWorld(3).log(80)
    before = policy_value(log).estimates[Estimator.SNIPS].mean
    shifted = policy_value(replace(log, response_N=log.response_N + 2)).estimates[Estimator.SNIPS].mean
    assert shifted == pytest.approx(before + 2)
    assert 0 <= before <= 1


def test_clipping_is_counted() -> None:
    log = BanditWorld(4).log(200)
    free, cut = policy_value(log), policy_value(log, weight_clip=1.0)
    assert free.clipped == 0
    assert cut.clipped == int((log.logp_N > log.logp0_N).sum()) > 0
    assert cut.weight_max == 1.0
    assert cut.effective_sample_size > free.effective_sample_size


def test_users_are_resampled_as_a_whole() -> None:
    log = BanditWorld(5).log(200)
    users = np.repeat(np.arange(10), 20)
    doubled = replace(
        log, response_N=np.repeat((np.arange(10) % 2).astype(float), 20), logp_N=log.logp0_N, user_N=users
    )
    alone = policy_value(replace(doubled, user_N=None)).estimates[Estimator.IPS]
    together = policy_value(doubled).estimates[Estimator.IPS]
    assert together.clusters == 10
    assert together.high - together.low > 2 * (alone.high - alone.low)


def test_ratio_of_sums() -> None:
    interval = bootstrap_ratio(np.array([1.0, 2.0, 3.0]), np.array([2.0, 2.0, 8.0]))
    assert interval.mean == pytest.approx(0.5)
    assert 0.375 <= interval.low <= interval.high <= 1.0


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"logp0_N": np.array([0.5, -1.0])}, "logp0, exposure 0"),
        ({"logp0_N": np.array([-1.0, -np.inf])}, "logp0, exposure 1"),
        ({"logp_N": np.array([-1.0, np.nan])}, "logp, exposure 1"),
        ({"response_N": np.array([np.nan, 0.0])}, "response, exposure 0"),
        ({"model_shown_N": np.zeros(2)}, "half a reward model"),
    ],
)
def test_bad_logs_are_named(change: dict[str, DoubleArray], named: str) -> None:
    fine = {"response_N": np.zeros(2), "logp_N": np.full(2, -1.0), "logp0_N": np.full(2, -1.0)}
    with pytest.raises(RequestError, match=named):
        LoggedExposures(**(fine | change))


def test_a_log_that_says_nothing_is_refused() -> None:
    log = LoggedExposures(response_N=np.ones(2), logp_N=np.full(2, -np.inf), logp0_N=np.full(2, -1.0))
    with pytest.raises(RequestError, match="every weight is 0"):
        policy_value(log)
    with pytest.raises(RequestError, match="weight_clip"):
        policy_value(log, weight_clip=0.0)


def test_a_difference_is_that_of_the_estimates_and_covers_the_known_one() -> None:
    world = BanditWorld(6)
    first = world.log(300)
    other = replace(first, logp_N=first.logp0_N)
    differences = value_difference(first, other)
    mine, theirs = policy_value(first).estimates, policy_value(other).estimates
    for estimator, interval in differences.items():
        assert interval.mean == pytest.approx(mine[estimator].mean - theirs[estimator].mean)
        assert interval.low < interval.mean < interval.high
    assert set(differences) == set(Estimator)
    known = world.value() - float((world.logging_XA * world.reward_XA).sum(1).mean())
    covered = 0
    for number in range(200):
        log = world.log(400)
        interval = value_difference(log, replace(log, logp_N=log.logp0_N), seed=number, resamples=300)[Estimator.SNIPS]
        covered += interval.low <= known <= interval.high
    assert 0.9 <= covered / 200 <= 0.99


def test_the_same_policy_differs_by_nothing() -> None:
    log = BanditWorld(7).log(100)
    for interval in value_difference(log, log).values():
        assert (interval.mean, interval.low, interval.high) == (0, 0, 0)
    with pytest.raises(RequestError, match="two logs"):
        value_difference(log, replace(log, response_N=1 - log.response_N))
