"""Contract of `trainer.list_scoring` and `reward.list_ranker`: without a service nothing is asked and unseen gains are
0; a list-wise ranker that scores the NDCG of fixed gains, asked for every swap, gives the credit of the closed form;
lists that were cut, failures and requests are counted; a class that is no list-wise ranker is refused by name.

Not checked: gains and estimates (test_list_rewards.py), the loop (test_list_loop.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from data.errors import RequestError
from data.records import Finish, IntArray, RewardFailure
from reward.list_ranker import load_list_ranker
from reward.scoring import RewardScorer
from reward.settings import RewardSettings
from reward.swap_client import SwapClient
from reward.swap_credit import SwapForm
from reward.swap_evaluation import SwapSampling
from tests.reward.rankers import local_swaps
from tests.trainer.test_list_rewards import groups_of, prompt
from trainer.list_scoring import ListScorer

GAINS = {1: 3.0, 2: 0.0, 3: 1.0, 4: 2.0}
LISTS = [[[1, 2, 3, 4], [4, 3, 2, 1], [2, 1, 4, 3]], [[3, 1, 2, 4], [1, 4, 3, 2], [1, 4, 3]]]


class FixedGains:
    """NDCG of fixed gains."""

    version = "fixed"

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def score_list(self, histories: Sequence[IntArray], lists: Sequence[IntArray]) -> np.ndarray:
        def dcg(values: Sequence[float]) -> float:
            return sum(value / math.log2(place + 2) for place, value in enumerate(values))

        ideal = dcg(sorted(GAINS.values(), reverse=True))
        return np.array([self.scale * dcg([GAINS[int(item)] for item in row]) / ideal for row in lists])


class Unversioned(FixedGains):
    version = None  # type: ignore[assignment]


class Broken(FixedGains):
    """Fails on lists that begin with item 4, which swaps of the first prompt's lists do."""

    def score_list(self, histories: Sequence[IntArray], lists: Sequence[IntArray]) -> np.ndarray:
        scores = super().score_list(histories, lists)
        return np.where(
            [len(history) == 0 and row[0] == 4 for history, row in zip(histories, lists, strict=True)], np.nan, scores
        )


def scorer(form: SwapForm = SwapForm.CAUSAL, **arguments: Any) -> ListScorer:
    rules = RewardScorer(RewardSettings(item_match=0.0, rank_penalty=0.0), None)
    return ListScorer(rules, form, **arguments)


def asks(name: str, swaps: int = 8) -> SwapClient | None:
    """A client of a list-wise ranker of this file."""
    listed = f"tests.trainer.test_list_scoring:{name}"
    return local_swaps(RewardSettings(list_ranker=listed, swaps=SwapSampling(swaps=swaps), retries=0))


def prompts() -> list[Any]:
    listed = list(GAINS)
    own = [prompt(listed, [GAINS[item] for item in listed]), prompt(listed, [GAINS[item] for item in listed])]
    return [own[0], dataclasses.replace(own[1], prompt_id=1, history=np.array([7], np.int32))]


@pytest.mark.parametrize("form", [SwapForm.CAUSAL, SwapForm.ALL_PAIRS])
def test_every_swap_of_a_ranker_of_fixed_gains_is_the_closed_form(form: SwapForm) -> None:
    closed = scorer(form).score(prompts(), groups_of(LISTS))
    asked = scorer(form, swaps=asks("FixedGains", 4)).score(prompts(), groups_of(LISTS))
    assert asked.signals.credit_PGK.numpy() == pytest.approx(closed.signals.credit_PGK.numpy(), abs=1e-7)
    assert asked.signals.permutation_PG.tolist() == closed.signals.permutation_PG.tolist()
    assert not asked.signals.permutation_PG[1, 2]
    assert asked.scored.usable_P.all()
    assert asked.metrics["swaps/lists"] == 5 * (1 + {SwapForm.CAUSAL: 6, SwapForm.ALL_PAIRS: 12}[form])
    assert closed.metrics["lists/ndcg"] == pytest.approx(float(closed.signals.ndcg_PG.mean()))
    assert not closed.scored.reward_PG.any()


def test_what_was_scored_is_remembered() -> None:
    own = scorer(swaps=asks("FixedGains"))
    first = own.score(prompts(), groups_of(LISTS))
    again = own.score(prompts(), groups_of(LISTS))
    assert again.metrics["swaps/scored"] == 0 < first.metrics["swaps/scored"]
    assert again.signals.credit_PGK.tolist() == first.signals.credit_PGK.tolist()


def test_prompts_whose_lists_were_not_scored_fail_alone() -> None:
    found = scorer(swaps=asks("Broken")).score(prompts(), groups_of(LISTS))
    assert found.scored.failure_P.tolist() == [RewardFailure.NON_FINITE.value, ""]
    assert found.metrics["reward_fail/non_finite"] == 1
    assert found.metrics["reward/failed_share"] == 0.5


def test_lists_whose_text_was_cut_are_counted() -> None:
    groups = groups_of(LISTS)
    finish_PG = groups.finish_PG.astype("U16")
    finish_PG[0, :2] = Finish.LIST_TEXT_CUT.value
    found = scorer().score(prompts(), dataclasses.replace(groups, finish_PG=finish_PG))
    assert found.metrics["lists/text_cut"] == 2
    assert "system/reward_requests" not in found.metrics
    assert scorer(swaps=asks("FixedGains")).score(prompts(), groups).metrics["system/reward_requests"] == 1


def test_a_list_wise_ranker_is_loaded_with_its_options() -> None:
    ranker = load_list_ranker("tests.trainer.test_list_scoring:FixedGains", {"scale": 2.0})
    best = np.array([1, 4, 3, 2], np.int32)
    assert ranker.score_list([best], [best]).tolist() == pytest.approx([2.0])


@pytest.mark.parametrize(
    ("name", "options", "where", "why"),
    [
        ("nowhere:Ranker", {}, "reward.list_ranker", "package.module:Class"),
        ("tests.trainer.test_list_scoring:GAINS", {}, "reward.list_ranker", "a class with `version` and score_list"),
        ("tests.trainer.test_list_scoring:Unversioned", {}, "reward.list_ranker", "without a version"),
        ("tests.trainer.test_list_scoring:FixedGains", {"size": 1}, "reward.list_ranker_options", "keyword arguments"),
    ],
)
def test_what_is_no_list_wise_ranker_is_refused(name: str, options: dict[str, Any], where: str, why: str) -> None:
    with pytest.raises(RequestError) as error:
        load_list_ranker(name, options)
    assert error.value.where == where
    assert why in str(error.value)
