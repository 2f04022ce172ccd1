"""Contract: intervals cover what they should (normal approximation for means, exactness for constants), pairing removes
shared noise, clusters are resampled whole, and the result depends on seed and data only.
"""

from __future__ import annotations

import numpy as np
import pytest

from data.errors import RequestError
from reward.bootstrap import bootstrap_mean, paired_bootstrap


def test_interval_of_a_mean_is_near_the_normal_one() -> None:
    values = np.random.default_rng(0).normal(size=2000)
    got = bootstrap_mean(values, resamples=4000)
    half = 1.96 * values.std() / np.sqrt(len(values))
    assert got.mean == pytest.approx(values.mean())
    assert (got.high - got.low) / 2 == pytest.approx(half, rel=0.06)
    assert got == bootstrap_mean(values, resamples=4000)
    assert got != bootstrap_mean(values, resamples=4000, seed=1)


def test_pairing_removes_shared_noise_and_a_constant_difference_is_exact() -> None:
    noise = np.random.default_rng(1).normal(size=500)
    got = paired_bootstrap(noise + 0.25, noise)
    assert (got.low, got.high) == pytest.approx((0.25, 0.25))
    assert got.share_above_zero == 1


def test_clusters_are_resampled_whole() -> None:
    users = np.repeat(np.arange(40), 50)
    values = np.random.default_rng(2).normal(size=40)[users]
    rows, clustered = bootstrap_mean(values), bootstrap_mean(values, cluster_N=users)
    assert clustered.clusters == 40
    assert (clustered.high - clustered.low) / (rows.high - rows.low) == pytest.approx(np.sqrt(50), rel=0.15)


def test_coverage_of_the_interval() -> None:
    random = np.random.default_rng(5)
    inside = 0
    for seed in range(200):
        values = random.binomial(1, 0.3, 200)
        got = bootstrap_mean(values, resamples=400, seed=seed)
        inside += got.low <= 0.3 <= got.high
    assert 180 <= inside <= 199


@pytest.mark.parametrize("values", [np.zeros(0), np.array([1.0, np.nan])])
def test_bad_values_are_refused(values: np.ndarray) -> None:
    with pytest.raises(RequestError, match="finite, 1 or more"):
        bootstrap_mean(values)
    with pytest.raises(RequestError, match="the same rows"):
        paired_bootstrap(values, np.zeros(7))
