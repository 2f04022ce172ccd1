"""Calibration of predicted means and variances: do gains fall where the predictions say?

Two views. Reliability bins: predictions sorted by their variance and cut into bins of equal size, the predicted
deviation of a bin against the error it made. Levels: the share of gains below the p-quantile of their predicted
Gaussian, which should be p; the expected calibration error is the mean distance.

Sources: Levi et al., "Evaluating and Calibrating Uncertainty Prediction in Regression Tasks" (bins); Kuleshov et al.,
"Accurate Uncertainties for Deep Learning Using Calibrated Regression", ICML 2018 (levels).
Suffixes: `_N` prediction, `_J` bin, `_Q` level.
"""

from __future__ import annotations

from typing import Any, Final, NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.special import ndtri

from data.errors import RequestError

Floats = npt.NDArray[np.float64]
LEVEL_Q: Final[Floats] = np.arange(1, 10) / 10


class Calibration(NamedTuple):
    """How well predicted variances fit the errors."""

    count_J: npt.NDArray[np.int64]
    predicted_J: Floats
    """Root of the mean predicted variance of each bin."""
    observed_J: Floats
    """Root of the mean squared error of each bin."""
    below_Q: Floats
    """Share of the gains below the predicted quantile of each of `LEVEL_Q`."""
    expected_error: float
    """Mean of |share below - level|: 0 is calibrated."""
    normalised_error: float
    """Mean over the bins of |predicted - observed| / predicted."""
    loss: float
    """Mean Gaussian negative log-likelihood, without its constant."""

    def report(self) -> dict[str, Any]:
        """Plain values, for an artefact's provenance and a reliability plot."""
        return {
            "bins": {
                "count": self.count_J.tolist(),
                "predicted_deviation": self.predicted_J.tolist(),
                "observed_error": self.observed_J.tolist(),
            },
            "levels": {"level": LEVEL_Q.tolist(), "share_below": self.below_Q.tolist()},
            "expected_calibration_error": self.expected_error,
            "normalised_calibration_error": self.normalised_error,
            "loss": self.loss,
        }


def check_variances(where: str, variance_N: Floats) -> None:
    """Refuse variances that no step can be scaled by.

    Raises:
        RequestError: zero, negative, infinite or NaN.
    """
    bad_N = ~(np.isfinite(variance_N) & (variance_N > 0))
    if bad_N.any():
        found = f"variance {variance_N[bad_N][0]:g} ({int(bad_N.sum())} of {variance_N.size})"
        raise RequestError(where, found, "finite variances above 0")


def calibration(gain_N: Floats, mean_N: Floats, variance_N: Floats, bins: int = 10) -> Calibration:
    """Compare predictions with what happened.

    Args:
        bins: at most; fewer where there are fewer predictions.

    Raises:
        RequestError: no predictions, or a variance that is not finite and above 0.
    """
    if not len(gain_N):
        raise RequestError("calibration", "no observed gain", "at least one")
    check_variances("calibration", variance_N)
    error_N = gain_N - mean_N
    order_N = np.argsort(variance_N, kind="stable")
    parts = np.array_split(order_N, min(bins, len(gain_N)))
    predicted_J = np.array([np.sqrt(variance_N[part].mean()) for part in parts])
    observed_J = np.array([np.sqrt(np.square(error_N[part]).mean()) for part in parts])
    standard_N = error_N / np.sqrt(variance_N)
    below_Q = (standard_N[:, None] <= ndtri(LEVEL_Q)).mean(0)
    return Calibration(
        count_J=np.array([len(part) for part in parts], dtype=np.int64),
        predicted_J=predicted_J,
        observed_J=observed_J,
        below_Q=below_Q,
        expected_error=float(np.abs(below_Q - LEVEL_Q).mean()),
        normalised_error=float((np.abs(predicted_J - observed_J) / predicted_J).mean()),
        loss=float(0.5 * (np.square(standard_N) + np.log(variance_N)).mean()),
    )
