"""The direct model of a doubly robust estimate: from a ranker's scores to probabilities of a response.

A logistic curve in the score, fitted to the exposures of a log. Users are divided in two halves, and the curve of one
half predicts for the other, so that no prediction knows its own response and the estimate stays unbiased. A scale that
responses do not go with gives a flat curve, the mean response. Source of the division: Chernozhukov et al. 2018
("cross-fitting"); of the curve: Platt 1999.

Suffixes: `_N` exposure, `_M` draw.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from reward.off_policy import DoubleArray

ROUNDS = 50
RIDGE = 1e-2
"""Pull of the slope towards 0, in units of exposures: a half with few responses gets a flat curve, not a steep one."""


@dataclass(frozen=True, kw_only=True)
class ResponseCurve:
    """Probability of a response as a function of a score."""

    centre: float
    scale: float
    intercept: float
    slope: float
    """Per standard deviation of the scores it was fitted to."""

    def __call__(self, score: npt.NDArray[np.floating]) -> DoubleArray:
        """Probabilities, of the shape of the scores."""
        logit = self.intercept + self.slope * (np.asarray(score, np.float64) - self.centre) / self.scale
        probability: DoubleArray = 1 / (1 + np.exp(-np.clip(logit, -40, 40)))
        return probability


def fit_curve(score_N: npt.NDArray[np.floating], response_N: npt.NDArray[np.floating]) -> ResponseCurve:
    """The curve of largest likelihood; responses above 0 count as one.

    A log with responses everywhere or nowhere is met by half a response and half a silence that are added at the mean
    score.
    """
    score_N = np.asarray(score_N, np.float64)
    centre, scale = float(score_N.mean()), float(score_N.std()) or 1.0
    x_N = np.append((score_N - centre) / scale, [0.0, 0.0])
    y_N = np.append((np.asarray(response_N) > 0).astype(np.float64), [0.0, 1.0])
    weight_N = np.append(np.ones(len(score_N)), [0.5, 0.5])
    design_N2 = np.stack([np.ones_like(x_N), x_N], axis=1)
    rate = float((weight_N * y_N).sum() / weight_N.sum())
    beta = np.array([np.log(rate / (1 - rate)), 0.0])
    ridge = np.diag([0.0, RIDGE * len(x_N)])
    for _ in range(ROUNDS):
        p_N = 1 / (1 + np.exp(-np.clip(design_N2 @ beta, -40, 40)))
        gradient = design_N2.T @ (weight_N * (y_N - p_N)) - ridge @ beta
        curvature = (design_N2 * (weight_N * p_N * (1 - p_N))[:, None]).T @ design_N2 + ridge
        step = np.linalg.solve(curvature + 1e-9 * np.eye(2), gradient)
        # Newton's steps overshoot where the curve saturates.
        beta = beta + np.clip(step, -2.0, 2.0)
        if float(np.abs(step).max()) < 1e-10:
            break
    return ResponseCurve(centre=centre, scale=scale, intercept=float(beta[0]), slope=float(beta[1]))


def user_halves(user_N: npt.NDArray[np.integer]) -> npt.NDArray[np.bool_]:
    """[N] which half a row's user is in: every second user by number."""
    half_N: npt.NDArray[np.bool_] = np.unique(user_N, return_inverse=True)[1].reshape(-1) % 2 == 0
    return half_N


def cross_fitted(
    shown_N: npt.NDArray[np.floating],
    response_N: npt.NDArray[np.floating],
    user_N: npt.NDArray[np.integer],
    drawn_NM: npt.NDArray[np.floating],
) -> tuple[DoubleArray, DoubleArray]:
    """Predicted responses of the shown items, and means over the drawn ones, from the other half of the users.

    Args:
        shown_N: scores of what was shown.
        response_N: responses to it.
        user_N: users; with a single one there is one half, which predicts for itself.
        drawn_NM: scores of items that the evaluated policy draws in the same contexts.

    Returns:
        `[N]` each, as `LoggedExposures.model_shown_N` and `model_policy_N`.
    """
    half_N = user_halves(user_N)
    shown, policy = np.empty(len(shown_N)), np.empty(len(shown_N))
    for mine_N in (half_N, ~half_N):
        if not mine_N.any():
            continue
        fitted_on_N = ~mine_N if (~mine_N).any() else mine_N
        curve = fit_curve(shown_N[fitted_on_N], response_N[fitted_on_N])
        shown[mine_N] = curve(shown_N[mine_N])
        policy[mine_N] = curve(drawn_NM[mine_N]).mean(1)
    return shown, policy
