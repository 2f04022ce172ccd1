"""Where a reward helps: the ranker's rank correction by how hard a prompt is and whether the reward discriminates.

Suffixes: `_N` prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from data.errors import RequestError
from data.records import BoolArray, LongArray

DoubleArray = npt.NDArray[np.float64]


@dataclass(frozen=True, kw_only=True)
class Stratum:
    """Prompts of one difficulty and one discriminability."""

    difficulty: int
    """Bin of the policy's rank of the ground truth, 0 the easiest."""
    policy_rank_low: int
    policy_rank_high: int
    """Smallest and largest policy rank of the bin, both included."""
    discriminable: bool
    """Whether the reward passed both discriminability conditions (head and tail)."""
    prompts: int
    policy_rank: float
    """Mean rank of the ground truth under the policy; NaN without prompts, as the following."""
    ranker_rank: float
    """Mean rank of the ground truth under the reward model."""
    correction: float
    """Mean of policy rank minus ranker rank: positive where the reward moves the ground truth up."""

    means: Mapping[str, float]
    """Mean of every further value per prompt, by name."""

    def as_json(self) -> dict[str, Any]:
        """The fields, those of `means` beside the others; what is not defined as None."""
        fields = asdict(self)
        fields |= fields.pop("means")
        return {k: None if isinstance(v, float) and math.isnan(v) else v for k, v in fields.items()}


def difficulty_bins(policy_rank_N: LongArray, bins: int) -> LongArray:
    """[N] bin of each prompt, a quantile of the policy's rank, from 0 for the easiest; equal ranks share one."""
    edges = np.quantile(policy_rank_N, np.arange(1, bins) / bins)
    return np.unique(np.searchsorted(edges, policy_rank_N, side="left"), return_inverse=True)[1].astype(np.int64)


def stratified_report(
    policy_rank_N: LongArray,
    ranker_rank_N: LongArray,
    discriminable_N: BoolArray,
    *,
    bins: int = 4,
    values: Mapping[str, DoubleArray] | None = None,
) -> list[Stratum]:
    """Mean rank correction per (quantile of the policy's rank) x (discriminability).

    Equal policy ranks fall into one bin, so there are fewer bins than asked for where many prompts have one rank.

    Args:
        policy_rank_N: 1-based rank of the ground truth by the policy.
        ranker_rank_N: the same by the reward model.
        discriminable_N: whether the reward discriminates there (head and tail).
        bins: quantiles of the policy's rank.
        values: further values per prompt, of which each stratum tells the mean.

    Returns:
        Two strata per bin, not discriminable first; the easiest bin first. Their prompts add up to N.

    Raises:
        RequestError: no prompts, arrays of different lengths, or a rank below 1.

    Source: methods.md section 2, "Stratified analysis".
    """
    n, values = len(policy_rank_N), values or {}
    lengths = {len(policy_rank_N), len(ranker_rank_N), len(discriminable_N), *map(len, values.values())}
    if not n or len(lengths) > 1:
        found = f"{n}, {len(ranker_rank_N)} and {len(discriminable_N)} rows"
        raise RequestError("stratified report", found, "as many of each, at least 1")
    if min(int(policy_rank_N.min()), int(ranker_rank_N.min())) < 1 or bins < 1:
        raise RequestError("stratified report", "a rank or a number of bins below 1", "1 or more")
    bin_N = difficulty_bins(policy_rank_N, bins)
    report = []
    for difficulty in range(int(bin_N.max()) + 1):
        in_bin_N = bin_N == difficulty
        for discriminable in (False, True):
            chosen_N = in_bin_N & (discriminable_N == discriminable)
            policy, ranker = (_mean(ranks[chosen_N]) for ranks in (policy_rank_N, ranker_rank_N))
            report.append(
                Stratum(
                    difficulty=difficulty,
                    policy_rank_low=int(policy_rank_N[in_bin_N].min()),
                    policy_rank_high=int(policy_rank_N[in_bin_N].max()),
                    discriminable=discriminable,
                    prompts=int(chosen_N.sum()),
                    policy_rank=policy,
                    ranker_rank=ranker,
                    correction=policy - ranker,
                    means={name: _mean(value_N[chosen_N]) for name, value_N in values.items()},
                )
            )
    return report


def _mean(values: LongArray | DoubleArray) -> float:
    return float(values.mean()) if len(values) else math.nan
