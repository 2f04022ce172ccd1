"""Ranking metrics with exact definitions, row by row where they are means over rows.

Definitions: methods.md section 7. Duplicates are removed keeping the first, so that later items move up; an item that
is not in the catalogue (any negative id, `NO_ITEM`) keeps its slot as a miss. Cut-offs apply after that.

Suffixes: `_N` row, `_K` slot of a ranked list, `_I` item.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.errors import RequestError
from data.records import BoolArray, IntArray, LongArray
from reward.names import PER_ROW, RankingMetric, at

DoubleArray = npt.NDArray[np.float64]
TAIL_QUANTILE = 0.9
"""Items with at most this quantile of the item frequencies are the tail."""


@dataclass(frozen=True, kw_only=True)
class RankingReport:
    """Metrics of one set of ranked lists."""

    values: dict[str, float]
    """Every metric by name; means over rows for those in `rows`."""
    rows: dict[str, DoubleArray]
    """[N] values of the per-row metrics, for intervals."""
    n: int


def evaluate(
    item_NK: IntArray,
    positives: Sequence[IntArray] | IntArray,
    ks: Sequence[int],
    *,
    n_items: int,
    tail_I: BoolArray | None = None,
    generated_NK: BoolArray | None = None,
) -> RankingReport:
    """All ranking metrics of lists `item_NK` at every cut-off of `ks`.

    Args:
        item_NK: ranked item ids, best first, negative where a slot holds no catalogue item.
        positives: the relevant items of each row; an array `[N]` means one target per row.
        ks: cut-offs; one beyond the width of the lists counts the missing slots as misses.
        n_items: size of the catalogue.
        tail_I: tail items (`tail_items`); novelty is left out without.
        generated_NK: slots that hold an output; by default all. Slots without (fewer legal items than beams) are no
            outputs and do not count in the invalid rate.

    Raises:
        RequestError: no rows, no positives in a row, or an item id beyond the catalogue.
    """
    targets = [np.atleast_1d(row) for row in positives]
    if len(item_NK) == 0 or len(targets) != len(item_NK):
        raise RequestError("evaluate", f"{len(item_NK)} lists, {len(targets)} rows of positives", "as many, at least 1")
    if item_NK.size and int(item_NK.max()) >= n_items:
        raise RequestError("evaluate", f"item {int(item_NK.max())}", f"ids below {n_items}, the size of the catalogue")
    if min(len(row) for row in targets) == 0:
        raise RequestError("evaluate", "a row without positives", "at least one relevant item per row")
    generated = np.ones(item_NK.shape, np.bool_) if generated_NK is None else generated_NK
    list_NK = without_duplicates(item_NK)
    relevant_NK = relevance(list_NK, targets)
    count_N = np.array([len(np.unique(row)) for row in targets])
    rows = {at(metric, k): per_row(metric, relevant_NK, count_N, k) for k in ks for metric in PER_ROW}
    values = {name: float(row.mean()) for name, row in rows.items()}
    for k in ks:
        shown_I = shown_items(list_NK[:, :k], n_items)
        values[at(RankingMetric.COVERAGE, k)] = float(shown_I.mean())
        if tail_I is not None and tail_I.any():
            values[at(RankingMetric.NOVELTY, k)] = float(shown_I[tail_I].mean())
        outputs = generated[:, :k].sum()
        invalid = (generated[:, :k] & (item_NK[:, :k] < 0)).sum()
        values[at(RankingMetric.INVALID, k)] = float(invalid / max(1, outputs))
    return RankingReport(values=values, rows=rows, n=len(item_NK))


def without_duplicates(item_NK: IntArray) -> IntArray:
    """The lists with every repeated item removed; the rest moves up, the freed slots at the end become -1."""
    rows, width = item_NK.shape
    order_NK = np.argsort(item_NK, axis=1, kind="stable")
    sorted_NK = np.take_along_axis(item_NK, order_NK, axis=1)
    repeated_sorted = np.zeros((rows, width), np.bool_)
    repeated_sorted[:, 1:] = (sorted_NK[:, 1:] == sorted_NK[:, :-1]) & (sorted_NK[:, 1:] >= 0)
    repeated_NK = np.zeros((rows, width), np.bool_)
    np.put_along_axis(repeated_NK, order_NK, repeated_sorted, axis=1)
    kept_first = np.argsort(repeated_NK, axis=1, kind="stable")
    moved = np.take_along_axis(np.where(repeated_NK, -1, item_NK), kept_first, axis=1)
    return np.where(moved < 0, -1, moved).astype(item_NK.dtype)


def relevance(list_NK: IntArray, targets: Sequence[IntArray]) -> BoolArray:
    """bool [N, K], true where a list without duplicates holds a relevant item."""
    widest = max(len(row) for row in targets)
    target_NM = np.full((len(targets), widest), -2, np.int64)
    for row, items in enumerate(targets):
        target_NM[row, : len(items)] = items
    relevant = np.zeros(list_NK.shape, np.bool_)
    for column in target_NM.T:
        relevant |= (list_NK == column[:, None]) & (list_NK >= 0)
    return relevant


def per_row(metric: RankingMetric, relevant_NK: BoolArray, count_N: LongArray, k: int) -> DoubleArray:
    """[N] values of a per-row metric at cut-off k, from the relevance of lists and the number of positives per row."""
    top_NK = relevant_NK[:, :k]
    width = top_NK.shape[1]
    rank_K = np.arange(1, width + 1)
    hit_N = top_NK.any(1)
    if metric is RankingMetric.HR:
        return np.asarray(hit_N, np.float64)
    if metric is RankingMetric.RECALL:
        return np.asarray(top_NK.sum(1) / count_N, np.float64)
    if metric is RankingMetric.MRR:
        first_N = top_NK.argmax(1) + 1 if width else np.ones(len(top_NK))
        return np.asarray(np.where(hit_N, 1.0 / first_N, 0.0), np.float64)
    if metric is RankingMetric.NDCG:
        gained_N = np.where(top_NK, 1.0 / np.log2(rank_K + 1.0), 0.0).sum(1)
        ideal_M = np.cumsum(1.0 / np.log2(np.arange(1, k + 1) + 1.0))
        ideal_N = ideal_M[np.minimum(count_N, k) - 1]
        return np.asarray(gained_N / ideal_N, np.float64)
    raise ValueError(f"{metric} is no mean over rows")


def target_ranks(item_NK: IntArray, target_N: IntArray) -> LongArray:
    """[N] 1-based rank of the target in each list (duplicates removed), 0 where it is absent."""
    relevant = relevance(without_duplicates(item_NK), [np.atleast_1d(target) for target in target_N])
    return np.where(relevant.any(1), relevant.argmax(1) + 1, 0).astype(np.int64)


def shown_items(item_NK: IntArray, n_items: int) -> BoolArray:
    """bool [I], true for the items that stand in any list."""
    shown = np.zeros(n_items, np.bool_)
    shown[item_NK[item_NK >= 0]] = True
    return shown


def tail_items(train_count_I: LongArray) -> BoolArray:
    """bool [I], items whose training frequency is at or below the 0.9 quantile of the item frequencies."""
    return np.asarray(train_count_I <= np.quantile(train_count_I, TAIL_QUANTILE))
