"""Groups of lists into rewards: gains of the candidates, observed or asked of the reward service, and credit from them.

The credit is the closed form of `reward.swap_credit`, or the reward service has a list-wise ranker score the lists and
their swaps (`reward.swap_evaluation`). A prompt whose unobserved gains could not be had, or whose lists could not be
scored, has no reward: its group is masked and counted, as that of single items is.

Suffixes: `_P` prompt, `_G` group member, `_K` place in the list, `_N` list.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from data.records import NO_ITEM, Finish, Groups, Prompt, RewardFailure, ScoredGroups
from reward.names import StepMetric, count_by_reason
from reward.scoring import RewardScorer
from reward.swap_client import SwapClient
from reward.swap_credit import SwapForm
from trainer.list_rewards import list_rewards, unobserved
from trainer.list_signals import ListSignals

NDCG_PART = "ndcg"
"""Name of the NDCG in `ScoredGroups.parts_PG`."""


class ScoredLists(NamedTuple):
    """What the reward side made of groups of lists."""

    scored: ScoredGroups
    """With rewards of 0: the credit stage makes those of whole lists."""
    signals: ListSignals
    metrics: dict[str, float]


class ListScorer:
    """Scores the groups of a step."""

    def __init__(
        self,
        rewards: RewardScorer,
        form: SwapForm,
        *,
        swaps: SwapClient | None = None,
        seed: int = 0,
    ) -> None:
        """
        Args:
            rewards: asks the reward service for the gains that nobody observed, where it has one.
            form: which counterfactuals.
            swaps: asks the reward service's list-wise ranker for credit, in place of the closed form.
            seed: of the swaps.
        """
        self._rewards = rewards
        self._form = form
        self._swaps = swaps
        self._seed = seed

    def score(self, prompts: Sequence[Prompt], groups: Groups) -> ScoredLists:
        """Rewards of the groups, of the same prompts in the same order.

        Raises:
            RequestError: gains below 0 or not finite, or a service without variances.
            ValueError: groups of single items.
        """
        estimates = None
        if self._rewards.client is not None:
            estimates = self._rewards.raw_scores(prompts, unobserved(prompts))
        rewards = list_rewards(prompts, groups, self._form, estimates)
        signals, failure_P, metrics = rewards.signals, rewards.failure_P, rewards.metrics
        if self._swaps is not None:
            signals, swap_failure_P, told = self._evaluated(self._swaps, prompts, groups, signals)
            failure_P = np.where(failure_P == RewardFailure.NONE.value, swap_failure_P, failure_P)
            metrics |= told
        scored = ScoredGroups(
            groups=groups,
            reward_PG=np.zeros(groups.valid_PG.shape, np.float32),
            failure_P=failure_P,
            parts_PG={NDCG_PART: signals.ndcg_PG.numpy().astype(np.float32)},
        )
        return ScoredLists(scored, signals, metrics | self._metrics(scored))

    def _evaluated(
        self, swaps: SwapClient, prompts: Sequence[Prompt], groups: Groups, signals: ListSignals
    ) -> tuple[ListSignals, npt.NDArray[np.str_], dict[str, float]]:
        """The signals with the credit of a list-wise ranker, and why prompts have none."""
        assert groups.item_PGK is not None
        row_N, member_N = np.nonzero(signals.permutation_PG.numpy())
        ranked_NK = groups.item_PGK[row_N, member_N]
        found = swaps.credit(
            [prompts[row].history for row in row_N],
            [ranked_K[ranked_K != NO_ITEM] for ranked_K in ranked_NK],
            self._form,
            seed=self._seed,
        )
        credit_PGK = torch.zeros_like(signals.credit_PGK)
        for row, member, credit_K in zip(row_N, member_N, found.credits, strict=True):
            credit_PGK[row, member, : len(credit_K)] = torch.from_numpy(credit_K)
        failure_P = np.full(len(prompts), RewardFailure.NONE.value, dtype="U16")
        failed_N = found.failure_N != RewardFailure.NONE.value
        failure_P[row_N[failed_N]] = found.failure_N[failed_N]
        # What the ranker prefers is a signal whatever was observed of the candidates.
        signal_PG = signals.permutation_PG.clone()
        return dataclasses.replace(signals, credit_PGK=credit_PGK, signal_PG=signal_PG), failure_P, dict(found.counts)

    def _metrics(self, scored: ScoredGroups) -> dict[str, float]:
        groups, usable_P = scored.groups, scored.usable_P
        listed_PG = groups.valid_PG & usable_P[:, None]
        metrics = {
            StepMetric.REWARD_FAILED.value: float(1 - usable_P.mean()),
            **count_by_reason(StepMetric.REWARD_FAIL, RewardFailure, scored.failure_P),
            "lists/text_cut": float((groups.finish_PG == Finish.LIST_TEXT_CUT.value).sum()),
        }
        if listed_PG.any():
            metrics["lists/ndcg"] = float(scored.parts_PG[NDCG_PART][listed_PG].mean(dtype=np.float64))
        asked = [client.requests for client in (self._rewards.client, self._swaps) if client is not None]
        if asked:
            metrics[StepMetric.REWARD_REQUESTS.value] = float(sum(asked))
        return metrics
