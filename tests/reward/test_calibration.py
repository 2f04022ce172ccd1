"""Calibration: zero where the variances are the true ones, and by hand on small numbers.

Checked: Gaussian errors of known deviation, over- and underconfidence, the bins by hand, a reference for the levels
from scipy's normal distribution, refused variances. Not checked: a trained critic (test_critic_training.py).
"""

from __future__ import annotations

import json

import numpy as np
import pytest
from scipy.stats import norm

from data.errors import RequestError
from reward.calibration import LEVEL_Q, calibration


def gaussian(count: int = 20_000) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    random = np.random.default_rng(0)
    mean, deviation = random.normal(size=count), random.uniform(0.2, 2.0, count)
    return mean + deviation * random.normal(size=count), mean, deviation**2


def test_true_variances_are_calibrated() -> None:
    found = calibration(*gaussian())
    assert found.expected_error < 0.01
    assert found.normalised_error < 0.05
    np.testing.assert_allclose(found.observed_J, found.predicted_J, rtol=0.08)
    assert found.count_J.tolist() == [2000] * 10


@pytest.mark.parametrize("factor", [0.05, 20.0])
def test_wrong_variances_are_not(factor: float) -> None:
    gain, mean, variance = gaussian()
    found = calibration(gain, mean, factor * variance)
    assert found.expected_error > 0.1
    assert found.normalised_error > 0.5
    assert found.loss > calibration(gain, mean, variance).loss


def test_by_hand() -> None:
    gain, mean, variance = np.array([1.0, 2.0, 5.0]), np.array([1.0, 0.0, 2.0]), np.array([1.0, 9.0, 4.0])
    found = calibration(gain, mean, variance, bins=2)
    assert found.count_J.tolist() == [2, 1]
    np.testing.assert_allclose(found.predicted_J, [np.sqrt(2.5), 3.0])
    np.testing.assert_allclose(found.observed_J, [np.sqrt(4.5), 2.0])
    share = [np.mean(norm.cdf(gain, mean, np.sqrt(variance)) <= level) for level in LEVEL_Q]
    np.testing.assert_allclose(found.below_Q, share)
    assert found.expected_error == pytest.approx(np.abs(np.array(share) - LEVEL_Q).mean())
    assert found.loss == pytest.approx(-norm.logpdf(gain, mean, np.sqrt(variance)).mean() - 0.5 * np.log(2 * np.pi))
    report = json.loads(json.dumps(found.report()))
    assert report["bins"]["count"] == [2, 1]
    assert calibration(gain, mean, variance).count_J.tolist() == [1, 1, 1]


@pytest.mark.parametrize("value", [0.0, -1.0, np.inf, np.nan])
def test_variances_that_no_step_can_be_scaled_by_are_refused(value: float) -> None:
    with pytest.raises(RequestError, match="finite variances above 0"):
        calibration(np.zeros(2), np.zeros(2), np.array([1.0, value]))


def test_nothing_to_measure_is_refused() -> None:
    with pytest.raises(RequestError, match="no observed gain"):
        calibration(np.zeros(0), np.zeros(0), np.zeros(0))
