"""Rankers as recommenders: ranked lists over the catalogue, and their metrics, for the baseline rows of a table.

The candidates are the same as for every other method of the table: the permitted items without those of the whole
history when `exclude_seen` is on. Equal scores rank the lower item id first.

Suffixes: `_N` row, `_K` rank, `_I` item.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.dataset import Dataset, Samples
from data.errors import RunError
from data.records import BoolArray, FloatArray, IntArray
from reward.metrics import RankingReport, evaluate, tail_items
from reward.ranker import CatalogueRanker, Ranker

ABSENT = -2
"""Slot for which no candidate was left: no output, so nothing invalid."""


def rank_catalogue(
    ranker: Ranker,
    samples: Samples,
    k: int,
    *,
    n_items: int,
    history: int,
    exclude_seen: bool,
    permitted_I: BoolArray | None = None,
    chunk: int = 64,
) -> IntArray:
    """The best k items of every row, `[N, k]`, best first; `ABSENT` where fewer candidates are left.

    Args:
        ranker: scores; one that knows its catalogue is asked for all of it at once.
        samples: rows of a split.
        k: length of the lists.
        n_items: size of the catalogue.
        history: latest items of the history the ranker sees.
        exclude_seen: leave out the items of the whole history, also of the part the ranker does not see.
        permitted_I: items that may be recommended; by default all.
        chunk: rows scored at once.

    Raises:
        RunError: the ranker returned a score that is not finite.
    """
    item_NK = np.full((len(samples), k), ABSENT, np.int32)
    everything = np.arange(n_items, dtype=np.int32)
    for first in range(0, len(samples), chunk):
        rows = range(first, min(first + chunk, len(samples)))
        histories = [samples.history(i, history) for i in rows]
        if isinstance(ranker, CatalogueRanker):
            score_NI = ranker.score_catalogue(histories)
        else:
            score_NI = np.stack(ranker.score(histories, [everything] * len(histories)))
        if not np.isfinite(score_NI).all():
            raise RunError(f"the ranker {type(ranker).__name__} returned scores that are not finite")
        for row, score_I in zip(rows, score_NI, strict=True):
            candidate_I = np.ones(n_items, np.bool_) if permitted_I is None else permitted_I.copy()
            if exclude_seen:
                candidate_I[samples.values[samples.start_N[row] : samples.end_N[row]]] = False
            best = top_items(score_I, candidate_I, k)
            item_NK[row, : len(best)] = best
    return item_NK


def top_items(score_I: FloatArray, candidate_I: BoolArray, k: int) -> IntArray:
    """The k best candidates, best first, equal scores by item id; all of them where there are fewer."""
    items = np.flatnonzero(candidate_I)
    scores = score_I[items]
    if len(items) > k:
        threshold = np.partition(scores, len(items) - k)[len(items) - k]
        kept = scores >= threshold
        items, scores = items[kept], scores[kept]
    order = np.argsort(-scores, kind="stable")[:k]
    return items[order].astype(np.int32)


def evaluate_ranker(
    ranker: Ranker,
    dataset: Dataset,
    samples: Samples,
    ks: Sequence[int],
    *,
    history: int,
    exclude_seen: bool,
    permitted_I: BoolArray | None = None,
) -> RankingReport:
    """Ranking metrics of a ranker on rows of a split, with the same definitions as those of the policy."""
    item_NK = rank_catalogue(
        ranker,
        samples,
        max(ks),
        n_items=dataset.n_items,
        history=history,
        exclude_seen=exclude_seen,
        permitted_I=permitted_I,
    )
    return evaluate(
        item_NK,
        samples.target_N,
        ks,
        n_items=dataset.n_items,
        tail_I=tail_items(dataset.train_counts()),
        generated_NK=item_NK != ABSENT,
    )
