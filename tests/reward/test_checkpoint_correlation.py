"""Contract: WPAUC at K's window goes with Recall@K exactly when both speak of the same candidates; AUC need not; ranks
are compared, not values; what cannot be ranked is refused or not a number.

Not checked here: where the scores come from (tests/trainer/test_row_scores.py).
"""

from __future__ import annotations

import math

import numpy as np
import pytest

from data.errors import RequestError
from reward.checkpoint_correlation import CheckpointScores, correlate, rank_correlation


def checkpoint(ranks: list[int], k: int, width: int = 20) -> CheckpointScores:
    """A checkpoint that ranks the only positive of each row at the given place."""
    score, positive = np.zeros((len(ranks), width)), np.zeros((len(ranks), width), bool)
    for row, rank in enumerate(ranks):
        score[row] = -np.arange(width)
        positive[row, rank - 1] = True
    return CheckpointScores(score_NM=score, positive_NM=positive, recall={k: sum(r <= k for r in ranks) / len(ranks)})


def test_the_window_follows_recall_where_auc_does_not() -> None:
    # Recall@3 rises from checkpoint to checkpoint while the ranks of the misses fall so far that AUC falls as well.
    runs = [checkpoint(ranks, 3) for ranks in ([4, 4, 4, 4], [3, 9, 9, 9], [3, 3, 15, 15], [3, 3, 3, 20])]
    found = correlate(runs, 3)
    assert found["wpauc@3"].spearman == pytest.approx(1)
    assert found["wpauc@3"].kendall == pytest.approx(1)
    assert found["auc"].spearman < 0
    assert found["auc"].checkpoints == 4


def test_ranks_are_compared_and_constants_have_none() -> None:
    found = rank_correlation(np.array([1.0, 2.0, 100.0]), np.array([0.1, 0.2, 0.3]))
    assert (found.spearman, found.kendall) == (pytest.approx(1), pytest.approx(1))
    assert math.isnan(rank_correlation(np.ones(3), np.arange(3.0)).spearman)


def test_what_cannot_be_ranked_is_refused() -> None:
    runs = [checkpoint([1, 2], 3)] * 3
    with pytest.raises(RequestError, match="at least 3"):
        correlate(runs[:2], 3)
    with pytest.raises(RequestError, match="recall was stored"):
        correlate(runs, 5)
    with pytest.raises(RequestError, match="no row defines it"):
        correlate([checkpoint([1, 2], 3, width=3)] * 3, 3)
    several = CheckpointScores(score_NM=np.zeros((1, 4)), positive_NM=np.ones((1, 4), bool), recall={3: 1.0})
    with pytest.raises(RequestError, match="one per row"):
        correlate([several] * 3, 3)
