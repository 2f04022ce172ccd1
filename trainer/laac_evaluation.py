"""Evaluation along sessions: a policy's lists (or the reference's answers) on the validation or test rows.

Source: methods.md sections 5 ("Metrics") and 7. Suffixes: `_N` row, `_K` slot, `_I` item, `_D` dimension.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.embeddings import cooccurrence_vectors
from data.records import FloatArray, IntArray, LongArray
from data.transitions import SessionRows, Sessions
from reward.bootstrap import bootstrap_mean
from reward.metrics import evaluate
from reward.names import RankingMetric, at
from reward.ranker import Ranker
from reward.ranking import ABSENT, rank_catalogue
from reward.session_metrics import session_report
from trainer.reference_answers import ReferenceAnswers

VECTOR_DIMS = 32
VECTOR_WINDOW = 10
"""Events; items further apart do not count as together."""
_ROW_STREAM = 61


class SessionEvaluation:
    """What all evaluations of a job share: the tail and the vectors of items, from the training parts."""

    def __init__(self, sessions: Sessions) -> None:
        self.sessions = sessions
        self.n_items = sessions.dataset.n_items
        self.train_count_I: LongArray = sessions.train_counts()
        dims = min(VECTOR_DIMS, self.n_items - 1)
        self.vector_ID: FloatArray = cooccurrence_vectors(sessions.train_sequences(), self.n_items, dims, VECTOR_WINDOW)

    def lists(self, ranker: Ranker, rows: SessionRows, k: int) -> IntArray:
        """The best k items of each row, seen ones left out where the settings say so."""
        return rank_catalogue(
            ranker,
            rows.samples,
            k,
            n_items=self.n_items,
            history=self.sessions.settings.history,
            exclude_seen=self.sessions.settings.exclude_seen,
            chunk=256,
        )

    def metrics(self, item_NK: IntArray, rows: SessionRows, ks: Sequence[int]) -> dict[str, float]:
        """All metrics of lists; where training was skewed, those of users it saw and did not see as well."""
        values = self._report(item_NK, rows, ks, np.ones(len(rows.event_N), np.bool_))
        if not rows.trained_N.all():
            for name, chosen_N in (("trained", rows.trained_N), ("other", ~rows.trained_N)):
                part = self._report(item_NK, rows, ks, chosen_N)
                values |= {f"{name}_{metric}": value for metric, value in part.items()}
        return values

    def _report(
        self, item_NK: IntArray, rows: SessionRows, ks: Sequence[int], chosen_N: np.ndarray
    ) -> dict[str, float]:
        return session_report(
            item_NK[chosen_N],
            rows.samples.target_N[chosen_N],
            rows.reward_N[chosen_N],
            rows.samples.user_id_N[chosen_N],
            ks,
            n_items=self.n_items,
            train_count_I=self.train_count_I,
            vector_ID=self.vector_ID,
            generated_NK=item_NK[chosen_N] != ABSENT,
        )

    def intervals(self, item_NK: IntArray, rows: SessionRows, ks: Sequence[int], seed: int) -> dict[str, list[float]]:
        """95 % bootstrap interval of the per-row metrics, users resampled whole."""
        report = evaluate(item_NK, rows.samples.target_N, ks, n_items=self.n_items)
        found = {}
        for name, values_N in report.rows.items():
            interval = bootstrap_mean(values_N, seed=seed, cluster_N=rows.samples.user_id_N)
            found[name] = [interval.low, interval.high]
        return found


def sampled(rows: SessionRows, count: int, seed: int) -> SessionRows:
    """A seeded sample of rows, or all of them where there are no more."""
    if count >= len(rows.event_N):
        return rows
    random = np.random.default_rng([seed, _ROW_STREAM])
    chosen = np.sort(random.choice(len(rows.event_N), size=count, replace=False))
    return SessionRows(
        samples=rows.samples.take(chosen),
        reward_N=rows.reward_N[chosen],
        event_N=rows.event_N[chosen],
        trained_N=rows.trained_N[chosen],
    )


def answer_lists(answers: ReferenceAnswers, rows: SessionRows, k: int) -> IntArray:
    """The reference's answers as lists of k slots, `ABSENT` behind the last."""
    item_NR, _ = answers.of(rows.event_N)
    item_NK = np.full((len(item_NR), k), ABSENT, np.int32)
    width = min(k, item_NR.shape[1])
    item_NK[:, :width] = np.where(item_NR[:, :width] >= 0, item_NR[:, :width], ABSENT)
    return item_NK


def without_invalid(values: dict[str, float]) -> dict[str, float]:
    """The metrics without the invalid rates, which are told apart."""
    return {name: value for name, value in values.items() if f"{RankingMetric.INVALID.value}@" not in name}


def invalid_rate(values: dict[str, float], ks: Sequence[int]) -> float:
    """The invalid rate at the largest cut-off."""
    return values[at(RankingMetric.INVALID, max(ks))]
