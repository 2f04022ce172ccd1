"""AUC, one-way partial AUC and windowed partial AUC of scored lists, and the bounds they put on Recall@K.

Windows are integers: the negatives with 1-based rank in (first, last] when a row's negatives are sorted by falling
score. Half-open windows partition the negatives, which makes the identities exact. A tie between a positive and a
negative counts one half.

Suffixes: `_N` row, `_M` scored candidate of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from data.errors import RequestError
from data.records import BoolArray

DoubleArray = npt.NDArray[np.float64]


class Window(NamedTuple):
    """Negatives with 1-based rank in (first, last]."""

    first: int
    last: int


@dataclass(frozen=True, kw_only=True)
class PairwiseRows:
    """A pairwise metric row by row."""

    value_N: DoubleArray
    """NaN where it is not defined."""
    defined_N: BoolArray
    """False for rows without a positive, or with fewer negatives than the window asks for."""

    @property
    def mean(self) -> float:
        """Mean over the rows that define it; NaN when none does."""
        return float(self.value_N[self.defined_N].mean()) if self.defined_N.any() else math.nan


def share_window(start: float, width: float, negatives: int) -> Window:
    """The window W(a, d) of `negatives` negatives: ranks in (ceil(a n), ceil((a + d) n)].

    Products that miss a whole number by rounding are taken for it.

    Source: methods.md section 4, "WPAUC".
    """
    return Window(_ceiling(start * negatives), _ceiling((start + width) * negatives))


def _ceiling(value: float) -> int:
    nearest = round(value)
    return nearest if math.isclose(value, nearest, rel_tol=1e-9, abs_tol=1e-9) else math.ceil(value)


def recall_window(k: int, positives: int = 1) -> Window:
    """The window that speaks of Recall@K: as many negatives as there are positives, the last of them the K-th.

    Source: methods.md section 4, a = (K - n+)/n-, d = n+/n-.

    Raises:
        RequestError: k below the number of positives.
    """
    if not 1 <= positives <= k:
        raise RequestError("k", k, f"at least the number of positives, {positives}")
    return Window(k - positives, k)


def auc(score_NM: DoubleArray, positive_NM: BoolArray, valid_NM: BoolArray | None = None) -> PairwiseRows:
    """Share of (positive, negative) pairs of a row in the right order."""
    return window_auc(score_NM, positive_NM, None, valid_NM)


def partial_auc(
    score_NM: DoubleArray, positive_NM: BoolArray, negatives: int, valid_NM: BoolArray | None = None
) -> PairwiseRows:
    """One-way partial AUC: against the `negatives` highest negatives only."""
    return window_auc(score_NM, positive_NM, Window(0, negatives), valid_NM)


def window_auc(
    score_NM: DoubleArray, positive_NM: BoolArray, window: Window | None, valid_NM: BoolArray | None = None
) -> PairwiseRows:
    """Share of pairs of a positive and a negative of the window that are in the right order, ties one half.

    Args:
        score_NM: scores, larger is better.
        positive_NM: the relevant candidates.
        window: integer window; none takes all negatives of each row (AUC).
        valid_NM: candidates that are there; by default all. The others are neither positive nor negative.

    Raises:
        RequestError: an empty window, or a valid score that is not a number.

    Source: methods.md section 4, "WPAUC".
    """
    valid_NM = np.ones(score_NM.shape, np.bool_) if valid_NM is None else valid_NM
    if window is not None and not 0 <= window.first < window.last:
        raise RequestError("window", tuple(window), "0 <= first < last")
    if np.isnan(score_NM[valid_NM]).any():
        raise RequestError("scores", "NaN", "numbers")
    positive_NM = positive_NM & valid_NM
    negative_NM = ~positive_NM & valid_NM
    rows, width = score_NM.shape
    # Negatives first, by falling score, so that column j is the negative of rank j + 1.
    order_NM = np.lexsort((-np.where(negative_NM, score_NM, 0.0), ~negative_NM), axis=1)
    sorted_NM = np.take_along_axis(score_NM, order_NM, axis=1)
    negatives_N, positives_N = negative_NM.sum(1), positive_NM.sum(1)
    first_N = np.zeros(rows, np.int64) if window is None else np.full(rows, window.first)
    last_N = negatives_N if window is None else np.full(rows, window.last)
    rank_M = np.arange(1, width + 1)
    inside_NM = (rank_M > first_N[:, None]) & (rank_M <= np.minimum(last_N, negatives_N)[:, None])
    won_N = np.zeros(rows)
    # Positive by positive, because all pairs at once would hold [N, M, M]; there are few positives.
    for column in np.flatnonzero(positive_NM.any(0)):
        own_N1 = score_NM[:, column, None]
        pairs_NM = (own_N1 > sorted_NM) + 0.5 * (own_N1 == sorted_NM)
        won_N += np.where(positive_NM[:, column], (pairs_NM * inside_NM).sum(1), 0.0)
    defined_N = (positives_N > 0) & (negatives_N >= np.maximum(last_N, 1))
    pairs_N = np.where(defined_N, positives_N * (last_N - first_N), 1)
    return PairwiseRows(value_N=np.where(defined_N, won_N / pairs_N, np.nan), defined_N=defined_N)


def recall_bounds(value: float, positives: int) -> tuple[float, float]:
    """Smallest and largest Recall@K of a row whose WPAUC at K's window (`recall_window`) is `value`.

    ceil(n+ (1 - sqrt(1 - w))) / n+ <= Recall@K <= floor(n+ sqrt(w)) / n+, computed on the number of ordered pairs, so
    that no root is rounded over a whole number. Holds where no positive ties with a negative of the window.

    Source: methods.md section 4, "WPAUC".
    """
    if not 0 <= value <= 1:
        raise RequestError("wpauc", value, "0 to 1")
    ordered = value * positives**2
    pairs = round(2 * ordered) / 2
    if not math.isclose(ordered, pairs, rel_tol=1e-9, abs_tol=1e-9):
        pairs = ordered
    low = positives - math.isqrt(math.floor(positives**2 - pairs))
    high = math.isqrt(math.floor(pairs))
    return low / positives, high / positives
