"""Whether two ways found the same beams."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np

from rollout.settings import EngineDtype

Beams = list[list[tuple[list[int], float]]]
"""Per prompt the token paths of its beams with their scores, best first."""
SCORE_TOLERANCE: Final = {EngineDtype.FLOAT32: 1e-4, EngineDtype.BFLOAT16: 0.1}
"""Largest difference of the scores (sums of log-probabilities) of a beam that both found."""
LEAST_SHARED: Final = {EngineDtype.FLOAT32: 1.0, EngineDtype.BFLOAT16: 0.85}
"""Least share of beams that both must have found. In bfloat16 beams that lie closer than its rounding change places
with their neighbours, at the edge of the width out of the set."""


@dataclass(frozen=True, kw_only=True)
class Agreement:
    """How far two sets of beams agree."""

    shared: float
    """Share of the beams that both ways found."""
    gap_max: float
    """Largest difference of the scores of a beam that both found."""
    gap_mean: float
    cut_gap_max: float
    """Largest difference, over prompts, of the mean scores of the two sets: what the beams that differ are worth."""
    same_numbers: bool
    """Whether every prompt has as many beams in both."""
    tolerance: float
    least_shared: float

    @property
    def passed(self) -> bool:
        """Whether the beams count as equal."""
        near = self.gap_max <= self.tolerance and self.cut_gap_max <= self.tolerance
        return self.same_numbers and near and self.shared >= self.least_shared

    def record(self) -> dict[str, Any]:
        """For the answer."""
        return {
            "shared_beams": self.shared,
            "score_gap_max": self.gap_max,
            "score_gap_mean": self.gap_mean,
            "set_gap_max": self.cut_gap_max,
            "tolerance": self.tolerance,
            "least_shared": self.least_shared,
        }


def agreement(found: Beams, reference: Beams, dtype: EngineDtype) -> Agreement:
    """Compare the beams of the same prompts by their token paths and scores."""
    shared, total, gaps, cuts = 0, 0, [0.0], [0.0]
    for ours, theirs in zip(found, reference, strict=True):
        score = {tuple(tokens): value for tokens, value in theirs}
        mine = {tuple(tokens): value for tokens, value in ours}
        both = score.keys() & mine.keys()
        shared += len(both)
        total += max(len(score), len(ours))
        gaps += [abs(mine[path] - score[path]) for path in both]
        if score and mine:
            cuts.append(abs(float(np.mean(list(mine.values())) - np.mean(list(score.values())))))
    return Agreement(
        shared=shared / max(total, 1),
        gap_max=float(np.max(gaps)),
        gap_mean=float(np.mean(gaps)),
        cut_gap_max=float(np.max(cuts)),
        same_numbers=all(len(a) == len(b) for a, b in zip(found, reference, strict=True)),
        tolerance=SCORE_TOLERANCE[dtype],
        least_shared=LEAST_SHARED[dtype],
    )
