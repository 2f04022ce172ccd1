"""Metrics of ranked lists whose candidates have gains, row by row.

    ndcg@K    DCG of the first K places over that of the best K candidates, with the gains as they are
    recall@K  share of the candidates with a gain that are among the first K
    mrr@K     1 / rank of the first candidate with a gain, 0 beyond K
    hr@K      1 when one of the first K has a gain

Source: methods.md sections 3 ("Metrics") and 7. Suffixes: `_N` row, `_K` place in the list, `_C` candidate.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from reward.names import RankingMetric, at

Floats = npt.NDArray[np.float64]


def list_metrics(gain_NK: Floats, candidate_gain_NC: Floats, ks: Sequence[int]) -> dict[str, Floats]:
    """Every metric at every cut-off by its name, one value per row.

    Args:
        gain_NK: gains in list order, 0 behind the end.
        candidate_gain_NC: gains of all candidates, 0 behind the last; every row has one above 0.
        ks: cut-offs; one beyond the list counts the missing places as misses.

    Raises:
        ValueError: a row without a gain, for which none of these is defined.
    """
    positives_N = (candidate_gain_NC > 0).sum(1)
    if len(positives_N) and not positives_N.min():
        raise ValueError(f"row {int(positives_N.argmin())} has no candidate with a gain")
    best_NC = -np.sort(-candidate_gain_NC, axis=1)
    hit_NK = gain_NK > 0
    first_N = np.where(hit_NK.any(1), hit_NK.argmax(1) + 1, np.inf)
    found: dict[str, Floats] = {}
    for k in ks:
        found[at(RankingMetric.NDCG, k)] = _dcg(gain_NK[:, :k]) / _dcg(best_NC[:, :k])
        found[at(RankingMetric.RECALL, k)] = hit_NK[:, :k].sum(1) / positives_N
        found[at(RankingMetric.MRR, k)] = np.where(first_N <= k, 1.0 / first_N, 0.0)
        found[at(RankingMetric.HR, k)] = (first_N <= k).astype(np.float64)
    return found


def _dcg(gain_NK: Floats) -> Floats:
    total_N: Floats = (gain_NK / np.log2(np.arange(gain_NK.shape[1]) + 2.0)).sum(1)
    return total_N
