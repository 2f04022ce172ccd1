"""Groups into scored groups: every source of reward, weighted and summed, and a reason where that was not possible.

The rewards of a group are complete or absent: when the ranker failed for a group, its rule rewards are not used
either, because half a reward is another reward. Pure apart from the call of the service.

Suffixes: `_P` prompt, `_G` group member.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from data.records import (
    NO_ITEM,
    BoolArray,
    FloatArray,
    Groups,
    IntArray,
    Prompt,
    RewardFailure,
    ScoredGroups,
    excluded_pairs,
)
from reward.batch_scoring import BatchScores
from reward.client import RewardClient
from reward.names import StepMetric, count_by_reason
from reward.rules import below_lowest, item_match, percentile, rank_penalty
from reward.settings import InvalidScore, RankerTransform, RewardSettings

ITEM_MATCH = "item_match"
RANK_PENALTY = "rank_penalty"
RANKER_SCORE = "ranker_score"


class RewardScorer:
    """Scores the groups of a step."""

    def __init__(
        self, settings: RewardSettings, client: RewardClient | None, *, path_id_I: IntArray | None = None
    ) -> None:
        """
        Args:
            client: reaches the ranker; None without one.
            path_id_I: [n_items] a number per item that items with the same token path share. A completion is a path:
                it matches a ground truth that shares it. None where no two items share one.

        Raises:
            ValueError: the settings want a ranker and there is no client.
        """
        if settings.asks_ranker and client is None:
            raise ValueError("a ranker is configured but there is no client of the reward service")
        self.settings = settings
        self.client = client if settings.asks_ranker else None
        self._path_id_I = path_id_I

    def score(self, prompts: Sequence[Prompt], groups: Groups) -> tuple[ScoredGroups, dict[str, float]]:
        """Rewards of the groups (of the same prompts, in the same order), and the step's metrics."""
        target_P = np.array([prompt.target for prompt in prompts], dtype=np.int32)
        valid_PG, item_PG = groups.valid_PG, groups.item_PG
        row_E, item_E = excluded_pairs(prompts)
        excluded_P = np.bincount(row_E[item_E == target_P[row_E]], minlength=len(prompts)) > 0
        matched_PG = self.paths(item_PG)
        wanted_P = np.where(excluded_P, NO_ITEM, self.paths(target_P))
        parts = {
            ITEM_MATCH: item_match(matched_PG, wanted_P, valid_PG),
            RANK_PENALTY: rank_penalty(matched_PG, wanted_P, valid_PG),
        }
        weights = {ITEM_MATCH: self.settings.item_match, RANK_PENALTY: self.settings.rank_penalty}
        failure_P = np.full(len(prompts), RewardFailure.NONE.value, dtype="U16")
        if self.client is not None:
            parts[RANKER_SCORE], failure_P = self._ranker_part(self.client, prompts, item_PG, valid_PG)
            weights[RANKER_SCORE] = self.settings.ranker_score
        total_PG = weighted_sum(parts, weights)
        overflow_P = ~np.isfinite([total_PG, *parts.values()]).all((0, 2)) & (failure_P == RewardFailure.NONE.value)
        failure_P = np.where(overflow_P, RewardFailure.NON_FINITE.value, failure_P)
        failed_P1 = (failure_P != RewardFailure.NONE.value)[:, None]
        parts = {name: np.where(failed_P1, 0, part).astype(np.float32) for name, part in parts.items()}
        total_PG = np.where(failed_P1, 0, total_PG).astype(np.float32)
        scored = ScoredGroups(groups=groups, reward_PG=total_PG, failure_P=failure_P, parts_PG=parts)
        metrics = reward_metrics(scored)
        if self.client is not None:
            metrics[StepMetric.REWARD_REQUESTS.value] = float(self.client.requests)
        return scored, metrics

    def raw_scores(self, prompts: Sequence[Prompt], wanted: Sequence[IntArray]) -> BatchScores:
        """The ranker's own scores of the wanted items after each prompt's history, for stages that compare them.

        Where prompts have needs, a ranker that knows needs answers each prompt for its own.

        Raises:
            ValueError: there is no ranker.
        """
        if self.client is None:
            raise ValueError("raw scores were asked for, but no ranker is configured")
        needs = [prompt.need for prompt in prompts]
        return self.client.score([prompt.history for prompt in prompts], wanted, needs if any(needs) else None)

    def paths(self, item: IntArray) -> IntArray:
        """What tells answers apart: the items, or the numbers of their paths; `NO_ITEM` for what is no active item."""
        if self._path_id_I is None:
            return item
        known = (item >= 0) & (item < len(self._path_id_I))
        return np.where(known, self._path_id_I[np.where(known, item, 0)], NO_ITEM)

    def _ranker_part(
        self, client: RewardClient, prompts: Sequence[Prompt], item_PG: IntArray, valid_PG: BoolArray
    ) -> tuple[FloatArray, np.ndarray]:
        """Transformed ranker scores of the valid items, each distinct item of a group asked for once.

        A completion that is no catalogue item has no score of its own; it gets the lowest one of its group, so that
        it is never better than an item (methods.md: a random or zero score would reward it).
        """
        wanted = [np.unique(row[valid & (row != NO_ITEM)]) for row, valid in zip(item_PG, valid_PG, strict=True)]
        result = client.score([prompt.history for prompt in prompts], wanted)
        score_PG = np.zeros(item_PG.shape, np.float32)
        known_PG = np.zeros(item_PG.shape, np.bool_)
        for row, (items, scores) in enumerate(zip(wanted, result.scores, strict=True)):
            if result.failure_N[row] or len(items) == 0:
                continue
            members = item_PG[row]
            found = np.isin(members, items) & valid_PG[row]
            score_PG[row, found] = scores[np.searchsorted(items, members[found])]
            score_PG[row, valid_PG[row] & ~found] = scores.min()
            known_PG[row] = found
        if self.settings.invalid_score is InvalidScore.BELOW_LOWEST:
            score_PG = below_lowest(score_PG, known_PG, valid_PG)
        if self.settings.ranker_transform is RankerTransform.SIGMOID:
            score_PG = np.where(valid_PG, _sigmoid(score_PG), 0).astype(np.float32)
        elif self.settings.ranker_transform is RankerTransform.PERCENTILE:
            score_PG = percentile(score_PG, valid_PG)
        return score_PG, result.failure_N


def weighted_sum(parts: Mapping[str, FloatArray], weights: Mapping[str, float]) -> FloatArray:
    """Sum of the parts times their weights; not finite where float32 cannot hold it."""
    with np.errstate(over="ignore", invalid="ignore"):
        total_PG = sum((weights[name] * part.astype(np.float64) for name, part in parts.items()), start=np.float64(0))
        return np.asarray(total_PG, np.float32)


def reward_metrics(scored: ScoredGroups) -> dict[str, float]:
    """Metrics of a step by the names of `reward.names.StepMetric`, over the groups that have a reward."""
    usable_P, valid_PG = scored.usable_P, scored.groups.valid_PG
    mask_PG = valid_PG & usable_P[:, None]
    count_P = mask_PG.sum(1)
    live_P = count_P > 0
    metrics = {
        StepMetric.REWARD_FAILED.value: float(1 - usable_P.mean()) if len(usable_P) else 0.0,
        **count_by_reason(StepMetric.REWARD_FAIL, RewardFailure, scored.failure_P),
    }
    if not live_P.any():
        return metrics
    reward_PG = np.where(mask_PG, scored.reward_PG.astype(np.float64), 0)
    mean_P = reward_PG.sum(1)[live_P] / count_P[live_P]
    square_P = (reward_PG**2).sum(1)[live_P] / count_P[live_P]
    highest_P = np.where(mask_PG, scored.reward_PG, -np.inf).max(1)[live_P]
    lowest_P = np.where(mask_PG, scored.reward_PG, np.inf).min(1)[live_P]
    metrics |= {
        StepMetric.REWARD_MEAN.value: float(reward_PG.sum() / count_P.sum()),
        StepMetric.REWARD_STD.value: float(np.sqrt(np.maximum(square_P - mean_P**2, 0)).mean()),
        StepMetric.REWARD_HIT.value: float(np.any(scored.parts_PG[ITEM_MATCH][usable_P] > 0, axis=1).mean()),
        StepMetric.REWARD_LIVE.value: float((highest_P > lowest_P).mean()),
    }
    for name, part in scored.parts_PG.items():
        metrics[f"{StepMetric.REWARD_PART.value}/{name}"] = float(part[mask_PG].mean(dtype=np.float64))
    return metrics


def _sigmoid(values: FloatArray) -> FloatArray:
    return (0.5 * (1 + np.tanh(0.5 * values.astype(np.float64)))).astype(np.float32)
