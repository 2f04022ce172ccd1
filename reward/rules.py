"""Rewards that need no ranker: item match, and ReRe's penalty for the misses of a group that has the hit.

Pure NumPy on whole batches. Suffixes: `_P` prompt, `_G` group member in the order the engine returned (beam rank).
"""

from __future__ import annotations

import numpy as np

from data.records import NO_ITEM, BoolArray, FloatArray, IntArray


def item_match(item_PG: IntArray, target_P: IntArray, valid_PG: BoolArray) -> FloatArray:
    """1 where a valid completion is the ground truth item, else 0; all 0 without a ground truth.

    Source: methods.md section 1, z_i.
    """
    target_P1 = np.asarray(target_P)[:, None]
    match: FloatArray = ((item_PG == target_P1) & (target_P1 != NO_ITEM) & valid_PG).astype(np.float32)
    return match


def rank_penalty(item_PG: IntArray, target_P: IntArray, valid_PG: BoolArray) -> FloatArray:
    """ReRe's rank-aware penalty: a miss at position i of a group with the hit gets -(1/log2(i+2)) / sum_q 1/log2(q+2).

    The hits get 0, and so does every member of a group without a hit. Positions are 0-based over all slots of the
    group; the sum runs over its valid ones, so that a full group has exactly ReRe's denominator.

    Source: methods.md section 4, "Groups without the target".
    """
    hit_PG = item_match(item_PG, target_P, valid_PG) > 0
    discount_G = 1.0 / np.log2(np.arange(valid_PG.shape[1]) + 2.0)
    total_P1 = np.where(valid_PG, discount_G, 0.0).sum(1, keepdims=True)
    penalised_PG = valid_PG & ~hit_PG & hit_PG.any(1, keepdims=True)
    return np.where(penalised_PG, -discount_G / np.maximum(total_P1, 1e-12), 0.0).astype(np.float32)


def percentile(score_PG: FloatArray, valid_PG: BoolArray) -> FloatArray:
    """Share of the other valid members of the group that score lower, ties counting half; 0.5 for a lone member."""
    score = score_PG.astype(np.float64)
    lower_PG = ((score[:, None, :] < score[:, :, None]) & valid_PG[:, None, :]).sum(2)
    equal_PG = ((score[:, None, :] == score[:, :, None]) & valid_PG[:, None, :]).sum(2) - 1
    others_P1 = valid_PG.sum(1, keepdims=True) - 1
    share_PG = np.where(others_P1 > 0, (lower_PG + 0.5 * equal_PG) / np.maximum(others_P1, 1), 0.5)
    return np.where(valid_PG, share_PG, 0.0).astype(np.float32)


def below_lowest(score_PG: FloatArray, known_PG: BoolArray, valid_PG: BoolArray) -> FloatArray:
    """Scores in which a valid completion that is no item gets the lowest of its group minus one deviation of it.

    The deviation is the population's over the members with a score; a group without one gets 0. Infinite where float32
    cannot hold it.

    Source: methods.md section 2, "Invalid IDs".
    """
    count_P1 = np.maximum(known_PG.sum(1, keepdims=True), 1)
    score = np.where(known_PG, score_PG, 0).astype(np.float64)
    mean_P1 = score.sum(1, keepdims=True) / count_P1
    deviation_P1 = np.sqrt((np.where(known_PG, score - mean_P1, 0) ** 2).sum(1, keepdims=True) / count_P1)
    lowest_P1 = np.where(known_PG, score_PG, np.inf).min(1, keepdims=True)
    below_P1 = np.where(known_PG.any(1, keepdims=True), lowest_P1 - deviation_P1, 0.0)
    with np.errstate(over="ignore"):
        return np.where(valid_PG & ~known_PG, below_P1, score_PG).astype(np.float32)
