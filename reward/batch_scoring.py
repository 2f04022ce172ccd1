"""Scoring one call: validated, in padded chunks of a fixed size, with a reason for every sample that has no score.

The chunks are made of this call's samples alone, in their order, and the last one is filled up with its last sample.
So every call of the ranker has the same number of rows, and the result is a function of the call alone.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.records import FloatArray, IntArray, RewardFailure
from reward.ranker import CatalogueRanker, NeedRanker, Ranker, UncertainRanker

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, kw_only=True)
class BatchScores:
    """Scores of a call, sample by sample."""

    scores: list[FloatArray]
    """One array per sample, as long as its candidates; empty where the sample failed."""
    failure_N: npt.NDArray[np.str_]
    """A `RewardFailure` per sample; the empty string when it was scored."""
    variances: list[FloatArray] | None = None
    """Variances of the scores, in their shapes; None where the ranker has none."""

    @staticmethod
    def failed(count: int, reason: RewardFailure) -> BatchScores:
        """All of `count` samples failed for one reason."""
        empty = [np.zeros(0, np.float32) for _ in range(count)]
        return BatchScores(scores=empty, failure_N=np.full(count, reason.value, dtype="U16"))


def score_batch(
    ranker: Ranker,
    histories: Sequence[IntArray],
    candidates: Sequence[IntArray],
    *,
    chunk: int,
    needs: Sequence[str] | None = None,
) -> BatchScores:
    """Score every sample that is sound; a bad sample fails alone, a raising ranker fails its chunk.

    Item ids must be at least 0 and, where the ranker knows its catalogue, below its size, and a need must be one that
    the ranker knows (`bad_request`); a ranker that knows no needs gives every need the same scores. Scores that
    are not finite, and variances that are not or are zero, fail their sample (`non_finite`); an exception or scores of
    a wrong length fail the chunk (`error`).
    """
    limit = ranker.n_items if isinstance(ranker, CatalogueRanker) else None
    count = len(histories)
    result = BatchScores.failed(count, RewardFailure.BAD_REQUEST)
    if isinstance(ranker, UncertainRanker):
        result = dataclasses.replace(result, variances=[np.zeros(0, np.float32) for _ in range(count)])
    sound = [i for i in range(count) if _known(histories[i], limit) and _known(candidates[i], limit)]
    if needs is not None and isinstance(ranker, NeedRanker):
        sound = [i for i in sound if needs[i] in ranker.needs]
    for first in range(0, len(sound), chunk):
        rows = sound[first : first + chunk]
        padded = rows + [rows[-1]] * (chunk - len(rows))
        wanted = [candidates[i] for i in padded]
        try:
            asked = None if needs is None else [needs[i] for i in padded]
            found, variances = _ask(ranker, [histories[i] for i in padded], wanted, asked)
        except Exception:  # a ranker is foreign code: whatever it raises becomes the reason `error` of its samples
            LOG.exception("the ranker failed on %d samples", len(rows))
            found, variances = [], []
        shapes = [(len(row),) for row in wanted]
        if [row.shape for row in found] != shapes or [row.shape for row in variances] != shapes:
            if found:
                LOG.error("the ranker returned scores that do not match the candidates of %d samples", len(rows))
            result.failure_N[rows] = RewardFailure.ERROR.value
            continue
        for i, scores, variance in zip(rows, found, variances, strict=False):
            if not np.isfinite(scores).all() or not usable_variances(variance):
                result.failure_N[i] = RewardFailure.NON_FINITE.value
                continue
            result.scores[i] = scores
            result.failure_N[i] = RewardFailure.NONE.value
            if result.variances is not None:
                result.variances[i] = variance
    return result


def usable_variances(variance: FloatArray) -> bool:
    """True where all are finite and above 0."""
    return bool((np.isfinite(variance) & (variance > 0)).all())


def _ask(
    ranker: Ranker, histories: list[IntArray], candidates: list[IntArray], needs: list[str] | None
) -> tuple[list[FloatArray], list[FloatArray]]:
    """Scores and their variances, 1 each where the ranker has none."""
    if isinstance(ranker, UncertainRanker):
        if needs is not None and isinstance(ranker, NeedRanker):
            raw, spread = ranker.score_for_needs(histories, candidates, needs)
        else:
            raw, spread = ranker.score_with_variance(histories, candidates)
        return [np.asarray(row, np.float32) for row in raw], [np.asarray(row, np.float32) for row in spread]
    found = [np.asarray(row, np.float32) for row in ranker.score(histories, candidates)]
    return found, [np.ones(row.shape, np.float32) for row in found]


def _known(items: IntArray, limit: int | None) -> bool:
    if len(items) == 0:
        return True
    return bool(items.min() >= 0 and (limit is None or items.max() < limit))
