"""Exposure bias: does a policy repeat what the log has shown?

Source of the definitions: methods.md section 7, "Exposure bias".

Suffixes: `_N` evaluated row, `_K` rank, `_I` item, `_E` exposure of the log, `_D` popularity decile.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.errors import RequestError
from data.feedback import FeedbackLog
from data.records import BoolArray, FloatArray, IntArray, LongArray
from reward.metrics import target_ranks, without_duplicates
from reward.names import ExposureMetric, at

DoubleArray = npt.NDArray[np.float64]
DECILES = 10


@dataclass(frozen=True, kw_only=True)
class Exposures:
    """What a log showed, one entry per exposed item."""

    user_E: IntArray
    item_E: IntArray
    timestamp_E: LongArray
    """Seconds."""
    response_E: FloatArray
    """0 is no response."""

    @classmethod
    def of(cls, log: FeedbackLog) -> Exposures:
        """The exposures of a log; a request that showed several items gives one each."""
        item = log.table["exposed"].combine_chunks()
        shown_N = item.value_lengths().to_numpy(zero_copy_only=False)
        response = log.table["response"].combine_chunks().flatten()
        return cls(
            user_E=np.repeat(log.table["user_id"].to_numpy(), shown_N).astype(np.int32),
            item_E=item.flatten().to_numpy(zero_copy_only=False).astype(np.int32),
            timestamp_E=np.repeat(log.table["timestamp"].to_numpy(), shown_N).astype(np.int64),
            response_E=response.to_numpy(zero_copy_only=False).astype(np.float32),
        )


@dataclass(frozen=True, kw_only=True)
class ExposureGap:
    """HR on exposed targets minus HR on never-exposed ones."""

    gap: float
    """NaN where one of the two groups has no row."""
    exposed_rows: int
    """Rows whose target the log ever exposed, to whomever."""
    never_rows: int


def exposure_gap(hit_N: BoolArray, target_N: IntArray, exposed_items: IntArray) -> ExposureGap:
    """Whether targets are found better for having been exposed."""
    exposed_N = np.isin(target_N, exposed_items)
    both = exposed_N.any() and not exposed_N.all()
    return ExposureGap(
        gap=float(hit_N[exposed_N].mean() - hit_N[~exposed_N].mean()) if both else math.nan,
        exposed_rows=int(exposed_N.sum()),
        never_rows=int((~exposed_N).sum()),
    )


def popularity_decile(train_count_I: LongArray) -> IntArray:
    """[I] decile of each item by training count, 0 the least popular; equal counts share a decile."""
    inner = np.quantile(train_count_I, np.arange(1, DECILES) / DECILES)
    return np.searchsorted(inner, train_count_I, side="left").astype(np.int32)


def exposure_divergence(recommended: IntArray, exposed: IntArray, train_count_I: LongArray) -> float:
    """Jensen-Shannon divergence in bits (0 equal, 1 disjoint) of two sets of items over popularity deciles.

    Args:
        recommended: item ids of any shape; negative ids are no items and are left out.
        exposed: item ids.
        train_count_I: `Dataset.train_counts`.

    Returns:
        NaN where one of the two holds no item.
    """
    decile_I = popularity_decile(train_count_I)
    counts = [np.bincount(decile_I[items[items >= 0]], minlength=DECILES) for items in (recommended, exposed)]
    if not all(count.sum() for count in counts):
        return math.nan
    p_D, q_D = (count / count.sum() for count in counts)
    middle_D = (p_D + q_D) / 2
    return 0.5 * (_divergence(p_D, middle_D) + _divergence(q_D, middle_D))


def _divergence(p_D: DoubleArray, q_D: DoubleArray) -> float:
    there = p_D > 0
    return float((p_D[there] * np.log2(p_D[there] / q_D[there])).sum())


def repeats(top_N: IntArray, user_N: IntArray, timestamp_N: LongArray, log: Exposures) -> BoolArray:
    """[N] whether the first recommendation was shown to the user before, without a response.

    Args:
        top_N: first recommended item, negative where there is none.
        user_N: user of the row.
        timestamp_N: time of the row; exposures at or after it do not count.
        log: what was shown.
    """
    ignored = log.response_E == 0
    key_E = _key(log.user_E[ignored], log.item_E[ignored])
    time_E = log.timestamp_E[ignored]
    order = np.lexsort((time_E, key_E))
    key_E, time_E = key_E[order], time_E[order]
    key_N = _key(user_N, top_N)
    earliest = np.searchsorted(key_E, key_N)
    found_N = (earliest < len(key_E)) & (top_N >= 0)
    at_N = earliest[found_N]
    result = np.zeros(len(top_N), np.bool_)
    result[found_N] = (key_E[at_N] == key_N[found_N]) & (time_E[at_N] < timestamp_N[found_N])
    return result


def _key(user: IntArray, item: IntArray) -> LongArray:
    """One number per (user, item)."""
    return user.astype(np.int64) * 2**32 + item.astype(np.int64)


def evaluate_exposure(
    item_NK: IntArray,
    target_N: IntArray,
    user_N: IntArray,
    timestamp_N: LongArray,
    *,
    log: Exposures,
    train_count_I: LongArray,
    ks: tuple[int, ...],
) -> dict[str, float]:
    """All measures of exposure bias of ranked lists against a log; those that are not defined are left out.

    Raises:
        RequestError: no rows, or rows of different numbers.
    """
    rows = len(item_NK)
    if not rows or not rows == len(target_N) == len(user_N) == len(timestamp_N):
        found = f"{rows} lists, {len(target_N)} targets, {len(user_N)} users, {len(timestamp_N)} times"
        raise RequestError("evaluate_exposure", found, "as many of each, at least 1")
    rank_N = target_ranks(item_NK, target_N)
    list_NK = without_duplicates(item_NK)
    shown = np.unique(log.item_E)
    values = {}
    for k in ks:
        hit_N = (rank_N > 0) & (rank_N <= k)
        values[at(ExposureMetric.GAP, k)] = exposure_gap(hit_N, target_N, shown).gap
        values[at(ExposureMetric.DIVERGENCE, k)] = exposure_divergence(list_NK[:, :k], log.item_E, train_count_I)
    if item_NK.shape[1]:
        values[ExposureMetric.REPEAT.value] = float(repeats(list_NK[:, 0], user_N, timestamp_N, log).mean())
    return {name: value for name, value in values.items() if not math.isnan(value)}
