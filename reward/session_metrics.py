"""Metrics of recommendations along sessions: reward, repetition, intra-list diversity, and slices by the target.

Recall, NDCG, coverage (CV) and novelty (NCV) are those of `reward.metrics`. Source: methods.md section 7.
Suffixes: `_N` row, `_K` slot of a ranked list, `_I` item, `_D` dimension of an item's vector.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from data.records import BoolArray, FloatArray, IntArray
from reward.metrics import evaluate, tail_items, target_ranks, without_duplicates
from reward.names import PER_ROW, SessionMetric, Slice, at

DoubleArray = npt.NDArray[np.float64]


def reward_at(item_NK: IntArray, target_N: IntArray, reward_N: FloatArray, k: int) -> DoubleArray:
    """[N] the reward of the target where it is among the first k, else 0."""
    rank_N = target_ranks(item_NK[:, :k], target_N)
    return np.where(rank_N > 0, reward_N, 0.0).astype(np.float64)


def repetition_at(item_NK: IntArray, session_N: IntArray, k: int) -> DoubleArray:
    """Slots of each session's lists (k per step) that show an item which another of its slots shows, one per session.

    `k * steps - distinct items` where every list is full; slots without an item repeat nothing.
    """
    shown_NK = item_NK[:, :k]
    values = []
    for session in np.unique(session_N):
        shown = shown_NK[session_N == session].ravel()
        shown = shown[shown >= 0]
        values.append(len(shown) - len(np.unique(shown)))
    return np.asarray(values, np.float64)


def diversity_at(item_NK: IntArray, vector_ID: FloatArray, k: int) -> DoubleArray:
    """[N] mean of 1 - cosine over the pairs of the first k items; NaN where a list has fewer than two.

    An item without a vector (zero) is at distance 1 from all others.
    """
    length_I = np.linalg.norm(vector_ID.astype(np.float64), axis=1)
    unit_ID = vector_ID / np.where(length_I > 0, length_I, 1.0)[:, None]
    shown_NK = without_duplicates(item_NK)[:, :k]
    found_N = np.full(len(shown_NK), np.nan)
    for row, shown in enumerate(shown_NK):
        items = shown[shown >= 0]
        if len(items) > 1:
            one_KD = unit_ID[items]
            # The sum over ordered pairs is the square of the sum less the squares.
            pairs = np.square(one_KD.sum(0)).sum() - np.square(one_KD).sum()
            found_N[row] = 1.0 - pairs / (len(items) * (len(items) - 1))
    return found_N


def session_report(
    item_NK: IntArray,
    target_N: IntArray,
    reward_N: FloatArray,
    session_N: IntArray,
    ks: Sequence[int],
    *,
    n_items: int,
    train_count_I: npt.NDArray[np.int64],
    vector_ID: FloatArray,
    generated_NK: BoolArray | None = None,
) -> dict[str, float]:
    """All metrics of lists along sessions, by name.

    Args:
        item_NK: ranked items, negative where a slot holds none.
        reward_N: reward of each target, in [0, 1].
        session_N: which session each row belongs to.
        train_count_I: training events of each item, for the tail.
        vector_ID: vectors of the items, for the diversity.
        generated_NK: as in `reward.metrics.evaluate`.

    Raises:
        RequestError: no rows, or an item beyond the catalogue.
    """
    tail_I = tail_items(train_count_I)
    report = evaluate(item_NK, target_N, ks, n_items=n_items, tail_I=tail_I, generated_NK=generated_NK)
    values = dict(report.values)
    for k in ks:
        values[at(SessionMetric.REWARD, k)] = float(reward_at(item_NK, target_N, reward_N, k).mean())
        values[at(SessionMetric.REPETITION, k)] = float(repetition_at(item_NK, session_N, k).mean())
        diversity_N = diversity_at(item_NK, vector_ID, k)
        if np.isfinite(diversity_N).any():
            values[at(SessionMetric.DIVERSITY, k)] = float(np.nanmean(diversity_N))
    for part, chosen_N in ((Slice.TAIL, tail_I[target_N]), (Slice.HEAD, ~tail_I[target_N])):
        values[f"{part.value}_rows"] = float(chosen_N.sum())
        if chosen_N.any():
            values |= {
                f"{part.value}_{at(m, k)}": float(report.rows[at(m, k)][chosen_N].mean()) for m in PER_ROW for k in ks
            }
    return values
