"""What another policy would have earned, from a log alone: IPS, SNIPS and the doubly robust estimate.

A row is one exposure with its response r. With w = pi(shown | context) / pi0(shown | context) and a reward model q,

    IPS    mean(w r)
    SNIPS  sum(w r) / sum(w)
    DR     mean(sum_a pi(a) q(a) + w (r - q(shown)))

Each is a ratio of two sums over rows, which is what the bootstrap resamples, whole users at a time. Sources: Horvitz
and Thompson 1952; Swaminathan and Joachims 2015; Dudik, Langford and Li 2011. Suffix `N`: exposure.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from data.errors import RequestError
from reward.bootstrap import Interval, bootstrap_ratio, paired_bootstrap_ratio

DoubleArray = npt.NDArray[np.float64]


class Estimator(StrEnum):
    """Estimators of the value of a policy."""

    IPS = "ips"
    SNIPS = "snips"
    DR = "dr"


@dataclass(frozen=True, kw_only=True)
class LoggedExposures:
    """A log as the estimators see it."""

    response_N: DoubleArray
    logp_N: DoubleArray
    """Log-probability of the shown item under the policy that is evaluated; -inf where it never shows it."""
    logp0_N: DoubleArray
    """Log-propensity of the shown item, as logged; finite."""
    model_shown_N: DoubleArray | None = None
    """The reward model's prediction for the shown item; with `model_policy_N`, for DR."""
    model_policy_N: DoubleArray | None = None
    """Its mean over the items that the evaluated policy would show."""
    user_N: npt.NDArray[np.integer] | None = None
    """Users, resampled as a whole; none: rows are independent."""

    def __post_init__(self) -> None:
        if len(self.response_N) == 0:
            raise RequestError("off-policy evaluation", "no exposures", "1 or more")
        _check("response", self.response_N, np.isfinite(self.response_N), "finite")
        _check("logp0", self.logp0_N, np.isfinite(self.logp0_N) & (self.logp0_N <= 0), "finite, at most 0")
        _check("logp", self.logp_N, ~np.isnan(self.logp_N) & (self.logp_N <= 1e-6), "at most 0")
        if (self.model_shown_N is None) != (self.model_policy_N is None):
            raise RequestError("off-policy evaluation", "half a reward model", "model_shown_N and model_policy_N")


@dataclass(frozen=True, kw_only=True)
class PolicyValue:
    """The estimates of one policy's value per exposure."""

    estimates: dict[Estimator, Interval]
    effective_sample_size: float
    """`(sum w)^2 / sum w^2`, after clipping."""
    weight_mean: float
    """1 in expectation where the log's policy shows everything that the other one does."""
    weight_max: float
    clipped: int
    """Exposures whose weight was cut to the limit."""

    def record(self) -> dict[str, object]:
        """Plain values for JSON."""
        return {
            **{estimator.value: interval.record() for estimator, interval in self.estimates.items()},
            "effective_sample_size": self.effective_sample_size,
            "weight_mean": self.weight_mean,
            "weight_max": self.weight_max,
            "clipped": self.clipped,
        }


def policy_value(
    log: LoggedExposures,
    *,
    weight_clip: float = np.inf,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> PolicyValue:
    """Every estimate that the log allows, with percentile bootstrap intervals.

    Args:
        log: exposures; DR needs the reward model's two columns.
        weight_clip: importance weights above it are cut to it, and counted.
        seed: of the resamples.
        resamples: bootstrap resamples.
        level: coverage that the intervals aim at.

    Raises:
        RequestError: a clip that is not positive, or weights that are all zero: the log says nothing of the policy.
    """
    raw_N, weight_N = _weights(log, weight_clip)
    parts = _parts(log, weight_N)
    return PolicyValue(
        estimates={
            estimator: bootstrap_ratio(
                numerator_N, denominator_N, seed=seed, resamples=resamples, level=level, cluster_N=log.user_N
            )
            for estimator, (numerator_N, denominator_N) in parts.items()
        },
        effective_sample_size=float(weight_N.sum() ** 2 / np.square(weight_N).sum()),
        weight_mean=float(weight_N.mean()),
        weight_max=float(weight_N.max()),
        clipped=int((raw_N > weight_clip).sum()),
    )


def value_difference(
    ours: LoggedExposures,
    theirs: LoggedExposures,
    *,
    weight_clip: float = np.inf,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
) -> dict[Estimator, Interval]:
    """What one policy would have earned more than another, by each estimate that both logs allow.

    Args:
        ours: exposures with the log-probabilities of one policy.
        theirs: the same exposures with those of the other.
        weight_clip: as for `policy_value`.
        seed: of the resamples, which both share.
        resamples: bootstrap resamples.
        level: coverage that the intervals aim at.

    Raises:
        RequestError: other exposures, or as `policy_value`.
    """
    same = np.array_equal(ours.response_N, theirs.response_N) and np.array_equal(ours.logp0_N, theirs.logp0_N)
    if not same:
        raise RequestError("off-policy difference", "two logs", "one log, and the probabilities of two policies")
    mine, other = (_parts(log, _weights(log, weight_clip)[1]) for log in (ours, theirs))
    return {
        estimator: paired_bootstrap_ratio(
            mine[estimator], other[estimator], seed=seed, resamples=resamples, level=level, cluster_N=ours.user_N
        )
        for estimator in mine
        if estimator in other
    }


def _weights(log: LoggedExposures, weight_clip: float) -> tuple[DoubleArray, DoubleArray]:
    """Importance weights, and the same cut to the limit."""
    if not weight_clip > 0:
        raise RequestError("weight_clip", weight_clip, "above 0")
    raw_N = np.exp(log.logp_N - log.logp0_N)
    weight_N = np.minimum(raw_N, weight_clip)
    if not weight_N.any():
        raise RequestError("off-policy evaluation", "every weight is 0", "a log that shows items of the policy")
    return raw_N, weight_N


def _parts(log: LoggedExposures, weight_N: DoubleArray) -> dict[Estimator, tuple[DoubleArray, DoubleArray]]:
    """The numerators and denominators whose sums each estimate is the ratio of."""
    one_N = np.ones_like(weight_N)
    parts = {
        Estimator.IPS: (weight_N * log.response_N, one_N),
        Estimator.SNIPS: (weight_N * log.response_N, weight_N),
    }
    if log.model_shown_N is not None and log.model_policy_N is not None:
        parts[Estimator.DR] = log.model_policy_N + weight_N * (log.response_N - log.model_shown_N), one_N
    return parts


def _check(name: str, value_N: DoubleArray, fine_N: npt.NDArray[np.bool_], legal: str) -> None:
    if not fine_N.all():
        row = int(np.argmin(fine_N))
        raise RequestError(f"off-policy evaluation: {name}, exposure {row}", f"{value_N[row]:g}", legal)
