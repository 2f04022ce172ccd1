"""Swap credit as the reward service answers it: the call, the reply, and what serves one from a list-wise ranker.

A call has a batch of lists. The service draws the swaps, scores every distinct list once, remembers scores
(`reward.swap_evaluation`), and replies with a credit per position, in float32 over either transport.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from data.records import FloatArray, IntArray, RewardFailure
from reward.swap_credit import SwapForm
from reward.swap_evaluation import ListRanker, ScoreCache, SwapSampling, evaluate_swaps
from reward.wire import ScoreCall


@dataclass(frozen=True, kw_only=True)
class SwapCall:
    """Lists whose positions are to be credited, and by which swaps."""

    lists: ScoreCall
    """Histories, and the lists in place of candidates, best first."""
    form: SwapForm
    swaps: int
    """Per position (`SwapSampling.swaps`)."""
    seed: int
    """Of the drawn swaps."""

    @staticmethod
    def pack(
        histories: Sequence[IntArray], lists: Sequence[IntArray], *, form: SwapForm, swaps: int, seed: int
    ) -> SwapCall:
        """Flatten the lists of a call.

        Raises:
            ValueError: different numbers of histories and lists.
        """
        return SwapCall(lists=ScoreCall.pack(histories, lists), form=form, swaps=swaps, seed=seed)

    def __len__(self) -> int:
        return len(self.lists)


@dataclass(frozen=True, kw_only=True)
class SwapReply:
    """Credit of a call, list by list."""

    credits: list[FloatArray]
    """One per position of the list; empty where the list failed."""
    failure_N: npt.NDArray[np.str_]
    """A `RewardFailure` per list; the empty string where it has a credit."""
    counts: Mapping[str, float]
    """What the service did for it, by the names of `reward.swap_evaluation`."""

    @staticmethod
    def failed(count: int, reason: RewardFailure) -> SwapReply:
        """All of `count` lists failed for one reason."""
        empty = [np.zeros(0, np.float32) for _ in range(count)]
        return SwapReply(credits=empty, failure_N=np.full(count, reason.value, dtype="U16"), counts={})


class SwapScorer:
    """Serves calls from a list-wise ranker, with the scores of earlier calls."""

    def __init__(self, ranker: ListRanker, cache_lists: int) -> None:
        """
        Args:
            cache_lists: scores that are remembered (`SwapSampling.cache_lists`).
        """
        self._ranker = ranker
        self._cache = ScoreCache(cache_lists)

    def credit(self, call: SwapCall) -> SwapReply:
        """Credit of every list; a bad list fails alone (`evaluate_swaps`)."""
        lists = call.lists.candidates()
        found = evaluate_swaps(
            self._ranker,
            call.lists.histories(),
            lists,
            call.form,
            SwapSampling(swaps=call.swaps, cache_lists=self._cache.capacity),
            self._cache,
            seed=call.seed,
        )
        credit_NK = found.credit.credit_NK.numpy().astype(np.float32)
        credits = [
            credit_K[: 0 if failure else len(items)]
            for credit_K, failure, items in zip(credit_NK, found.failure_N, lists, strict=True)
        ]
        return SwapReply(credits=credits, failure_N=found.failure_N, counts=found.metrics)


def checked_swaps(reply: SwapReply, call: SwapCall) -> SwapReply:
    """A reply from a service that may be anybody's: a finite credit per position, or a reason."""
    wanted = np.diff(call.lists.candidate_offsets)
    if len(reply.credits) != len(call) or len(reply.failure_N) != len(call):
        return SwapReply.failed(len(call), RewardFailure.ERROR)
    known = {reason.value for reason in RewardFailure}
    failure_N = np.array([str(reason) for reason in reply.failure_N], dtype="U16")
    for row, credit_K in enumerate(reply.credits):
        if failure_N[row] not in known or (not failure_N[row] and len(credit_K) != wanted[row]):
            failure_N[row] = RewardFailure.ERROR.value
        elif not np.isfinite(credit_K).all():
            failure_N[row] = RewardFailure.NON_FINITE.value
    credits = [
        np.zeros(0, np.float32) if failure else credit_K
        for credit_K, failure in zip(reply.credits, failure_N, strict=True)
    ]
    return SwapReply(credits=credits, failure_N=failure_N, counts=reply.counts)
