"""The direct model of doubly robust estimates: the curve finds what made the responses, stays sound where responses do
not vary, and no prediction knows its own response. How the estimate uses it is in test_off_policy.py.
"""

from __future__ import annotations

import numpy as np
import pytest

from reward.direct_model import cross_fitted, fit_curve, user_halves


def test_the_curve_that_made_the_responses_is_found() -> None:
    random = np.random.default_rng(0)
    score_N = random.normal(3.0, 2.0, 40_000)
    made_N = 1 / (1 + np.exp(-(-1.0 + 0.8 * (score_N - 3.0) / 2.0)))
    curve = fit_curve(score_N, (random.random(40_000) < made_N).astype(np.float64))
    asked = np.array([-1.0, 1.0, 3.0, 5.0, 7.0])
    np.testing.assert_allclose(curve(asked), 1 / (1 + np.exp(1.0 - 0.4 * (asked - 3.0))), atol=0.02)


def test_a_shift_or_a_scale_of_the_scores_changes_nothing() -> None:
    random = np.random.default_rng(1)
    score_N = random.normal(size=500)
    response_N = (random.random(500) < 0.3 + 0.3 * (score_N > 0)).astype(np.float64)
    np.testing.assert_allclose(
        fit_curve(score_N, response_N)(score_N), fit_curve(10 * score_N - 4, response_N)(10 * score_N - 4), atol=1e-8
    )


@pytest.mark.parametrize("response", [0.0, 1.0])
def test_responses_that_do_not_vary_give_finite_predictions_near_them(response: float) -> None:
    curve = fit_curve(np.arange(50.0), np.full(50, response))
    assert np.abs(curve(np.arange(-10.0, 60.0)) - response).max() < 0.1


def test_equal_scores_give_the_mean_response() -> None:
    curve = fit_curve(np.full(1000, 2.0), (np.arange(1000) % 4 == 0).astype(np.float64))
    np.testing.assert_allclose(curve(np.array([2.0])), [0.25], atol=1e-3)


def test_no_prediction_knows_the_responses_of_its_user() -> None:
    random = np.random.default_rng(2)
    shown_N, user_N = random.normal(size=60), np.repeat(np.arange(6), 10)
    drawn_NM = random.normal(size=(60, 4))
    response_N = (random.random(60) < 0.4).astype(np.float64)
    half_N = user_halves(user_N)
    other = np.where(half_N, 1 - response_N, response_N)
    before, after = (cross_fitted(shown_N, given, user_N, drawn_NM) for given in (response_N, other))
    for one, two in zip(before, after, strict=True):
        np.testing.assert_array_equal(one[half_N], two[half_N])
        assert (one[~half_N] != two[~half_N]).all()


def test_means_over_draws_of_the_shown_item_are_its_prediction() -> None:
    random = np.random.default_rng(3)
    shown_N = random.normal(size=30)
    shown, policy = cross_fitted(
        shown_N, (random.random(30) < 0.5).astype(np.float64), np.arange(30), np.repeat(shown_N[:, None], 3, axis=1)
    )
    np.testing.assert_allclose(shown, policy)
