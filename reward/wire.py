"""What travels between callers and the reward service: ragged lists as two flat arrays."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from data.records import IntArray, LongArray
from reward.batch_scoring import BatchScores


@dataclass(frozen=True, kw_only=True)
class ScoreCall:
    """One call: histories and candidates of N samples. Row i of a list is values[offset[i]:offset[i + 1]]."""

    history_values: IntArray
    history_offsets: LongArray
    candidate_values: IntArray
    candidate_offsets: LongArray
    needs: tuple[str, ...] | None = None
    """Name of the need of each sample, for rankers that know needs; None where none was asked for."""

    @staticmethod
    def pack(
        histories: Sequence[IntArray], candidates: Sequence[IntArray], needs: Sequence[str] | None = None
    ) -> ScoreCall:
        """Flatten the lists of a call.

        Raises:
            ValueError: different numbers of histories, candidate lists and needs.
        """
        if len(histories) != len(candidates) or (needs is not None and len(needs) != len(histories)):
            told = "" if needs is None else f", {len(needs)} needs"
            raise ValueError(f"{len(histories)} histories, {len(candidates)} candidate lists{told}")
        history_values, history_offsets = _flatten(histories)
        candidate_values, candidate_offsets = _flatten(candidates)
        return ScoreCall(
            history_values=history_values,
            history_offsets=history_offsets,
            candidate_values=candidate_values,
            candidate_offsets=candidate_offsets,
            needs=None if needs is None else tuple(needs),
        )

    def __len__(self) -> int:
        return len(self.history_offsets) - 1

    def histories(self) -> list[IntArray]:
        """Item ids per sample, oldest first."""
        return np.split(self.history_values, self.history_offsets[1:-1])[: len(self)]

    def candidates(self) -> list[IntArray]:
        """Items to score per sample."""
        return np.split(self.candidate_values, self.candidate_offsets[1:-1])[: len(self)]


@dataclass(frozen=True, kw_only=True)
class ScoreReply:
    """One reply: `BatchScores` with flat scores."""

    score_values: np.ndarray
    score_offsets: LongArray
    failure_N: np.ndarray
    variance_values: np.ndarray | None = None
    """At the same offsets; None where the ranker has none."""

    @staticmethod
    def pack(result: BatchScores) -> ScoreReply:
        """Flatten a result."""
        lengths = [len(row) for row in result.scores]
        empty = np.zeros(0, np.float32)
        return ScoreReply(
            score_values=np.concatenate([empty, *result.scores]),
            score_offsets=np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64),
            failure_N=result.failure_N,
            variance_values=None if result.variances is None else np.concatenate([empty, *result.variances]),
        )

    def unpack(self) -> BatchScores:
        """The result again."""
        count = len(self.score_offsets) - 1
        cuts = self.score_offsets[1:-1]
        values = self.variance_values
        variances = None if values is None else np.split(values, cuts)[:count]
        scores = np.split(self.score_values, cuts)[:count]
        return BatchScores(scores=scores, failure_N=self.failure_N, variances=variances)


def _flatten(rows: Sequence[IntArray]) -> tuple[IntArray, LongArray]:
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64)
    return np.concatenate([np.zeros(0, np.int32), *rows]).astype(np.int32), offsets
