"""Scoring one call: validated, in padded chunks of a fixed size, with a reason for every sample that has no score.

The chunks are made of this call's samples alone, in their order, and the last one is filled up with its last sample.
So every call of the ranker has the same number of rows, and the result is a function of the call alone.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.records import FloatArray, IntArray, RewardFailure
from reward.ranker import CatalogueRanker, Ranker

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BatchScores:
    """Scores of a call, sample by sample."""

    scores: list[FloatArray]
    """One array per sample, as long as its candidates; empty where the sample failed."""
    failure_N: npt.NDArray[np.str_]
    """A `RewardFailure` per sample; the empty string when it was scored."""

    @staticmethod
    def failed(count: int, reason: RewardFailure) -> BatchScores:
        """All of `count` samples failed for one reason."""
        empty = [np.zeros(0, np.float32) for _ in range(count)]
        return BatchScores(scores=empty, failure_N=np.full(count, reason.value, dtype="U16"))


def score_batch(
    ranker: Ranker, histories: Sequence[IntArray], candidates: Sequence[IntArray], *, chunk: int
) -> BatchScores:
    """Score every sample that is sound; a bad sample fails alone, a raising ranker fails its chunk.

    Item ids must be at least 0 and, where the ranker knows its catalogue, below its size (`bad_request`). Scores that
    are not finite fail their sample (`non_finite`); an exception or scores of a wrong length fail the chunk (`error`).
    """
    limit = ranker.n_items if isinstance(ranker, CatalogueRanker) else None
    count = len(histories)
    result = BatchScores.failed(count, RewardFailure.BAD_REQUEST)
    sound = [i for i in range(count) if _known(histories[i], limit) and _known(candidates[i], limit)]
    for first in range(0, len(sound), chunk):
        rows = sound[first : first + chunk]
        padded = rows + [rows[-1]] * (chunk - len(rows))
        wanted = [candidates[i] for i in padded]
        try:
            raw = ranker.score([histories[i] for i in padded], wanted)
            found = [np.asarray(row, np.float32) for row in raw]
        except Exception:  # a ranker is foreign code: whatever it raises becomes the reason `error` of its samples
            LOG.exception("the ranker failed on %d samples", len(rows))
            found = []
        if [row.shape for row in found] != [(len(row),) for row in wanted]:
            if found:
                LOG.error("the ranker returned scores that do not match the candidates of %d samples", len(rows))
            result.failure_N[rows] = RewardFailure.ERROR.value
            continue
        for i, scores in zip(rows, found, strict=False):
            if np.isfinite(scores).all():
                result.scores[i] = scores
                result.failure_N[i] = RewardFailure.NONE.value
            else:
                result.failure_N[i] = RewardFailure.NON_FINITE.value
    return result


def _known(items: IntArray, limit: int | None) -> bool:
    if len(items) == 0:
        return True
    return bool(items.min() >= 0 and (limit is None or items.max() < limit))
