"""Swap credit by evaluation: the closed form for a ranker that is the NDCG of fixed gains, and one batched call.

Checked: equality with the closed form for lists of unequal length and duplicate items; that fewer swaps are a subset,
unbiased, drawn by seed, history and list alone; deduplication, the cache's key, bound and counts; failures by reason.
Not checked: the reward service (test_swap_service.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from data.records import FloatArray, IntArray, RewardFailure
from reward.swap_credit import SwapForm, swap_credit
from reward.swap_evaluation import EvaluatedCredit, ScoreCache, SwapSampling, evaluate_swaps

GAIN_I = np.array([0.0, 1.0, 2.5, 0.25, 5.0, 0.0, 3.0, 1.0])
SWAPPED = [SwapForm.CAUSAL, SwapForm.ALL_PAIRS]
LISTS = st.lists(st.lists(st.integers(0, len(GAIN_I) - 1), max_size=7), min_size=1, max_size=5)
NOBODY = np.zeros(0, np.int32)


class NdcgRanker:
    """NDCG of fixed gains; counts what it is asked."""

    version = "ndcg"

    def __init__(self) -> None:
        self.calls: list[int] = []

    def score_list(self, histories: Sequence[IntArray], lists: Sequence[IntArray]) -> FloatArray:
        assert len(histories) == len(lists)
        assert len({(bytes(h), bytes(row)) for h, row in zip(histories, lists, strict=True)}) == len(lists)
        self.calls.append(len(lists))
        return np.array([self.value(row) for row in lists])

    def value(self, items: IntArray) -> float:
        discount = 1 / np.log2(np.arange(len(items)) + 2)
        gain = GAIN_I[items]
        ideal = np.sort(gain)[::-1] @ discount
        return float(gain @ discount / ideal) if ideal else 0.0


def evaluated(
    ranker: NdcgRanker,
    lists: Sequence[Sequence[int]],
    form: SwapForm = SwapForm.CAUSAL,
    *,
    swaps: int = 99,
    cache: ScoreCache | None = None,
    history: IntArray = NOBODY,
    seed: int = 0,
) -> EvaluatedCredit:
    rows = [np.array(items, np.int32) for items in lists]
    sampling = SwapSampling(swaps=swaps)
    cache = ScoreCache(10**6) if cache is None else cache
    return evaluate_swaps(ranker, [history] * len(rows), rows, form, sampling, cache, seed=seed)


@pytest.mark.parametrize("form", SWAPPED)
@given(lists=LISTS)
def test_equals_the_closed_form_when_every_swap_is_taken(form: SwapForm, lists: list[list[int]]) -> None:
    width = max(len(items) for items in lists)
    gain_NK = torch.zeros(len(lists), width, dtype=torch.float64)
    for row, items in enumerate(lists):
        gain_NK[row, : len(items)] = torch.from_numpy(GAIN_I[items])
    wanted = swap_credit(gain_NK, form, length_N=torch.tensor([len(items) for items in lists]))
    ranker = NdcgRanker()
    found = evaluated(ranker, lists, form)
    torch.testing.assert_close(found.credit.credit_NK, wanted.credit_NK, atol=1e-12, rtol=0)
    assert len(ranker.calls) == (1 if width else 0)
    assert found.credit.ideal_N.tolist() == [float(len(items) > 0) for items in lists]
    assert not found.failure_N.astype(bool).any()


@pytest.mark.parametrize("form", SWAPPED)
def test_fewer_swaps_estimate_the_same_credit(form: SwapForm) -> None:
    items = [[4, 0, 6, 1, 2, 3, 7, 5]]
    exact = evaluated(NdcgRanker(), items, form).credit.credit_NK
    drawn = [evaluated(NdcgRanker(), items, form, swaps=2, seed=seed) for seed in range(400)]
    credits = torch.stack([one.credit.credit_NK for one in drawn])
    assert not torch.equal(credits[0], credits[1])
    error = credits.std(0) / 400**0.5
    assert bool(((credits.mean(0) - exact).abs() <= 5 * error + 1e-12).all())
    # The last positions have no more than two later ones: theirs is exact.
    if form is SwapForm.CAUSAL:
        torch.testing.assert_close(credits[0, 0, -3:], exact[0, -3:])
    per_position = 2 * 8 if form is SwapForm.ALL_PAIRS else 2 * 6 + 1
    assert drawn[0].metrics["swaps/lists"] == 1 + per_position


def test_the_draw_depends_on_seed_history_and_list_alone() -> None:
    lists = [[0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [7, 6, 1, 2, 3, 4]]
    whole = evaluated(NdcgRanker(), lists, swaps=1).credit.credit_NK
    alone = torch.cat([evaluated(NdcgRanker(), [one], swaps=1).credit.credit_NK for one in lists])
    assert torch.equal(whole, alone)
    again = evaluated(NdcgRanker(), lists[::-1], swaps=1).credit.credit_NK
    assert torch.equal(whole, again.flip(0))
    other = evaluated(NdcgRanker(), lists, swaps=1, history=np.array([3], np.int32)).credit.credit_NK
    assert not torch.equal(whole, other)


def test_every_distinct_list_is_scored_once() -> None:
    ranker, cache = NdcgRanker(), ScoreCache(10**6)
    first = evaluated(ranker, [[0, 1, 2], [0, 1, 2], [1, 0, 2]], cache=cache)
    # Of 3 x (1 + 3) lists: those in reach of [0, 1, 2] by one swap, and those of [1, 0, 2].
    assert ranker.calls == [6]
    assert first.metrics == {
        "swaps/lists": 12.0,
        "swaps/duplicates": 6.0,
        "swaps/cached": 0.0,
        "swaps/scored": 6.0,
        "swaps/evicted": 0.0,
    }
    second = evaluated(ranker, [[1, 0, 2]], cache=cache)
    assert ranker.calls == [6]
    assert second.metrics["swaps/cached"] == 4
    torch.testing.assert_close(second.credit.credit_NK[0], first.credit.credit_NK[2])
    evaluated(ranker, [[1, 0, 2]], cache=cache, history=np.array([0], np.int32))
    ranker.version = "next"
    evaluated(ranker, [[1, 0, 2]], cache=cache)
    assert ranker.calls == [6, 4, 4]


def test_the_cache_is_bounded_and_the_credit_does_not_depend_on_it() -> None:
    lists = [[0, 1, 2, 3], [4, 5, 6, 7]]
    exact = evaluated(NdcgRanker(), lists).credit.credit_NK
    for capacity in (0, 3):
        cache = ScoreCache(capacity)
        found = evaluated(NdcgRanker(), lists, cache=cache)
        assert torch.equal(found.credit.credit_NK, exact)
        assert len(cache) == capacity
        assert found.metrics["swaps/evicted"] == cache.evicted == 14 - capacity


def test_the_least_recently_used_score_goes_first() -> None:
    cache = ScoreCache(2)
    cache.put(b"a", 1.0)
    cache.put(b"b", 2.0)
    assert cache.get(b"a") == 1.0
    cache.put(b"c", 3.0)
    assert (cache.get(b"a"), cache.get(b"b"), cache.get(b"c")) == (1.0, None, 3.0)


class Sick(NdcgRanker):
    """Not finite for one list, or broken altogether."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how

    def score_list(self, histories: Sequence[IntArray], lists: Sequence[IntArray]) -> FloatArray:
        score = super().score_list(histories, lists)
        if self.how == "raises":
            raise OSError("gone")
        if self.how == "short":
            return score[:-1]
        return np.where([row[0] == 4 for row in lists], float(self.how), score)


@pytest.mark.parametrize("how", ["nan", "inf"])
def test_scores_that_are_not_finite_fail_their_lists_and_are_not_remembered(how: str) -> None:
    cache = ScoreCache(100)
    found = evaluated(Sick(how), [[0, 1, 2], [3, 1, 4], [4], []], cache=cache)
    assert found.failure_N.tolist() == ["", RewardFailure.NON_FINITE.value, RewardFailure.NON_FINITE.value, ""]
    assert found.credit.ideal_N.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert not found.credit.credit_NK[1:].any()
    assert len(cache) == 4 + 4 - 1
    well = evaluated(NdcgRanker(), [[3, 1, 4]], cache=cache)
    assert well.metrics["swaps/scored"] == 1


@pytest.mark.parametrize("how", ["raises", "short"])
def test_a_broken_ranker_fails_what_is_not_in_the_cache(how: str) -> None:
    cache = ScoreCache(100)
    evaluated(NdcgRanker(), [[0, 1, 2]], cache=cache)
    found = evaluated(Sick(how), [[0, 1, 2], [3, 1, 4]], cache=cache)
    assert found.failure_N.tolist() == ["", RewardFailure.ERROR.value]


@pytest.mark.parametrize("form", [SwapForm.INDEPENDENT, SwapForm.SUFFIX_DCG])
def test_forms_without_swaps_are_refused(form: SwapForm) -> None:
    with pytest.raises(ValueError, match="nothing to evaluate"):
        evaluated(NdcgRanker(), [[0, 1]], form)
