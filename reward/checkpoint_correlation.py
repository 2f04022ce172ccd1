"""Over a run's checkpoints: does AUC, or windowed partial AUC at K's window, go with Recall@K?

Suffixes: `_C` checkpoint, `_N` row, `_M` scored candidate.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.stats import kendalltau, spearmanr

from data.errors import RequestError
from data.records import BoolArray
from reward.names import PairwiseMetric, RankingMetric, at
from reward.pairwise import auc, recall_window, window_auc

DoubleArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class CheckpointScores:
    """Scores of the same rows and candidates under one checkpoint."""

    score_NM: DoubleArray
    positive_NM: BoolArray
    recall: Mapping[int, float]
    """Recall@K of the checkpoint's recommendations, by K."""


@dataclass(frozen=True, kw_only=True)
class RankCorrelation:
    """Rank correlation of a metric with Recall@K over checkpoints; NaN where one of the two never changes."""

    spearman: float
    kendall: float
    checkpoints: int


def pairwise_values(scores: CheckpointScores, k: int) -> dict[str, float]:
    """AUC, and WPAUC at K's window (of one positive per row), means over rows that define them."""
    return {
        PairwiseMetric.AUC.value: auc(scores.score_NM, scores.positive_NM).mean,
        at(PairwiseMetric.WPAUC, k): window_auc(scores.score_NM, scores.positive_NM, recall_window(k)).mean,
    }


def correlate(checkpoints: Sequence[CheckpointScores], k: int) -> dict[str, RankCorrelation]:
    """Rank correlation over checkpoints of AUC and of WPAUC at K's window with Recall@K, by the name of the metric.

    Raises:
        RequestError: fewer than three checkpoints, rows with several positives, or a metric no row defines.
    """
    if len(checkpoints) < 3:
        raise RequestError("checkpoints", len(checkpoints), "at least 3 with scores, to rank them")
    for scores in checkpoints:
        if (scores.positive_NM.sum(1) > 1).any():
            raise RequestError("positives", "several in a row", "one per row")
        if k not in scores.recall:
            raise RequestError("k", k, f"a cut-off whose {RankingMetric.RECALL.value} was stored")
    recall_C = np.array([scores.recall[k] for scores in checkpoints])
    values = [pairwise_values(scores, k) for scores in checkpoints]
    found = {}
    for name in values[0]:
        value_C = np.array([value[name] for value in values])
        if np.isnan(value_C).any():
            raise RequestError(name, "no row defines it", f"rows with at least {k} negatives and a positive")
        found[name] = rank_correlation(value_C, recall_C)
    return found


def rank_correlation(first_C: DoubleArray, second_C: DoubleArray) -> RankCorrelation:
    """Spearman's rho and Kendall's tau-b."""
    constant = len(np.unique(first_C)) < 2 or len(np.unique(second_C)) < 2
    return RankCorrelation(
        spearman=math.nan if constant else float(spearmanr(first_C, second_C).statistic),
        kendall=math.nan if constant else float(kendalltau(first_C, second_C).statistic),
        checkpoints=len(first_C),
    )
