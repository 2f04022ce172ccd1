"""Bootstrap intervals of means, of ratios of sums, and of paired differences of means.

Percentile bootstrap. With `cluster_N` (a user id per row) whole users are resampled with all their rows, because the
rows of one user are not independent. Random numbers depend on the seed, the number of clusters and of resamples only,
so the interval of a difference uses the same resamples for both sides.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.errors import RequestError

DoubleArray = npt.NDArray[np.float64]
BLOCK = 4_000_000
"""Resampled clusters that are held at once."""


@dataclass(frozen=True, kw_only=True)
class Interval:
    """An estimate with its percentile interval."""

    mean: float
    low: float
    high: float
    share_above_zero: float
    """Share of the resamples in which the estimate is above zero."""
    n: int
    clusters: int

    def record(self) -> dict[str, float]:
        """Plain values for JSON."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "share_above_zero": self.share_above_zero}


def bootstrap_mean(
    value_N: npt.NDArray[np.floating],
    *,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
    cluster_N: npt.NDArray[np.integer] | None = None,
) -> Interval:
    """Interval of the mean over rows.

    Raises:
        RequestError: no rows, or values that are not finite.
    """
    return bootstrap_ratio(
        value_N, np.ones(len(value_N)), seed=seed, resamples=resamples, level=level, cluster_N=cluster_N
    )


def bootstrap_ratio(
    numerator_N: npt.NDArray[np.floating],
    denominator_N: npt.NDArray[np.floating],
    *,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
    cluster_N: npt.NDArray[np.integer] | None = None,
) -> Interval:
    """Interval of sum(numerator) / sum(denominator) over rows; `mean` is that ratio.

    Raises:
        RequestError: no rows, values that are not finite, or a denominator without a positive sum.
    """
    sum_C, size_C = _by_cluster(numerator_N, denominator_N, cluster_N)
    ratio_R = _resampled_ratios(sum_C, size_C, seed, resamples)
    return _interval(float(sum_C.sum() / size_C.sum()), ratio_R, level, n=len(numerator_N), clusters=len(sum_C))


def paired_bootstrap_ratio(
    ratio_N: tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]],
    other_N: tuple[npt.NDArray[np.floating], npt.NDArray[np.floating]],
    *,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
    cluster_N: npt.NDArray[np.integer] | None = None,
) -> Interval:
    """Interval of the difference of two ratios of sums, (numerators, denominators) each, rows paired.

    Raises:
        RequestError: different numbers of rows, or as `bootstrap_ratio`.
    """
    if len({np.shape(part) for part in (*ratio_N, *other_N)}) > 1:
        found = f"{np.shape(ratio_N[0])} and {np.shape(other_N[0])} rows"
        raise RequestError("paired bootstrap", found, "the same rows")
    ours, theirs = _by_cluster(*ratio_N, cluster_N), _by_cluster(*other_N, cluster_N)
    difference_R = _resampled_ratios(*ours, seed, resamples) - _resampled_ratios(*theirs, seed, resamples)
    value = float(ours[0].sum() / ours[1].sum() - theirs[0].sum() / theirs[1].sum())
    return _interval(value, difference_R, level, n=len(ratio_N[0]), clusters=len(ours[0]))


def _by_cluster(
    numerator_N: npt.NDArray[np.floating],
    denominator_N: npt.NDArray[np.floating],
    cluster_N: npt.NDArray[np.integer] | None,
) -> tuple[DoubleArray, DoubleArray]:
    """Sums of numerators and of denominators over each cluster."""
    numerators, denominators = np.asarray(numerator_N, np.float64), np.asarray(denominator_N, np.float64)
    finite = bool(np.isfinite(numerators).all() and np.isfinite(denominators).all())
    if len(numerators) == 0 or not finite:
        raise RequestError("bootstrap", f"{len(numerators)} values, finite: {finite}", "finite, 1 or more")
    if denominators.min() < 0 or denominators.sum() <= 0:
        raise RequestError("bootstrap", f"denominators of sum {denominators.sum():g}", "none below 0, sum above 0")
    codes = np.arange(len(numerators)) if cluster_N is None else np.unique(cluster_N, return_inverse=True)[1]
    clusters = int(codes.max()) + 1
    sum_C = np.bincount(codes, weights=numerators, minlength=clusters).astype(np.float64)
    return sum_C, np.bincount(codes, weights=denominators, minlength=clusters).astype(np.float64)


def _interval(value: float, value_R: DoubleArray, level: float, *, n: int, clusters: int) -> Interval:
    low, high = np.quantile(value_R, [(1 - level) / 2, (1 + level) / 2])
    above = float((value_R > 0).mean())
    return Interval(mean=value, low=float(low), high=float(high), share_above_zero=above, n=n, clusters=clusters)


def paired_bootstrap(
    value_N: npt.NDArray[np.floating],
    other_N: npt.NDArray[np.floating],
    *,
    seed: int = 0,
    resamples: int = 2000,
    level: float = 0.95,
    cluster_N: npt.NDArray[np.integer] | None = None,
) -> Interval:
    """Interval of mean(value - other), rows paired.

    Raises:
        RequestError: different numbers of rows, or as `bootstrap_mean`.
    """
    if np.shape(value_N) != np.shape(other_N):
        raise RequestError("paired bootstrap", f"{np.shape(value_N)} and {np.shape(other_N)} rows", "the same rows")
    difference = np.asarray(value_N, np.float64) - np.asarray(other_N, np.float64)
    return bootstrap_mean(difference, seed=seed, resamples=resamples, level=level, cluster_N=cluster_N)


def _resampled_ratios(sum_C: DoubleArray, size_C: DoubleArray, seed: int, resamples: int) -> DoubleArray:
    random = np.random.default_rng([seed, len(sum_C)])
    block = max(1, BLOCK // len(sum_C))
    ratios = []
    for first in range(0, resamples, block):
        drawn_RC = random.integers(0, len(sum_C), size=(min(block, resamples - first), len(sum_C)))
        size_R = size_C[drawn_RC].sum(1)
        # A resample may draw only clusters of weight zero: such a ratio is nothing, and counts as 0.
        ratios.append(np.where(size_R > 0, sum_C[drawn_RC].sum(1) / np.where(size_R > 0, size_R, 1.0), 0.0))
    return np.concatenate(ratios)
