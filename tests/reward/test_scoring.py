"""Contract: the reward is the weighted sum of its sources; a group whose ranker score failed is masked with its reason
and has no reward at all; the ranker is asked for each distinct valid item once, with the whole batch in one call; an
invalid completion never gets more than the items of its group; metrics count what failed.

Not checked here: the formulas of the rules (test_rules), the service.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from data.errors import RequestError
from data.records import NO_ITEM, Decode, DecodeSpec, Groups, Prompt, RewardFailure
from reward.batch_scoring import BatchScores
from reward.bearer import is_loopback
from reward.client import RewardClient
from reward.rules import rank_penalty
from reward.scoring import RewardScorer
from reward.settings import RewardSettings
from reward.wire import ScoreCall
from tests.reward.rankers import plain_scores

ITEMS = np.array([[3, 5, 5, NO_ITEM], [6, 7, 8, 9], [1, 2, 0, 0]])
VALID = np.array([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 0]], bool)
TARGETS = (5, 4, NO_ITEM)


def prompts() -> list[Prompt]:
    none = np.zeros(0, np.int32)
    return [
        Prompt(prompt_id=i, token_ids=none, user_id=i, history=np.array([i], np.int32), exclusions=none, target=target)
        for i, target in enumerate(TARGETS)
    ]


def groups() -> Groups:
    shape = (*ITEMS.shape, 2)
    return Groups(
        prompt_id_P=np.arange(3),
        valid_PG=VALID,
        token_PGT=np.zeros(shape, np.int32),
        length_PG=np.full(ITEMS.shape, 2, np.int32),
        item_PG=ITEMS.astype(np.int32),
        logp_PGT=np.zeros(shape, np.float32),
        finish_PG=np.full(ITEMS.shape, "item"),
        weight_version_P=np.zeros(3, np.int64),
        engine_id_P=np.full(3, "e"),
        spec=DecodeSpec(decode=Decode.BEAM, width=4),
        constraint="item_trie",
        catalogue_digest="",
    )


class Recorder:
    """An attempt that remembers calls and fails the given samples."""

    def __init__(self, failures: dict[int, RewardFailure] | None = None) -> None:
        self.failures = failures or {}
        self.calls: list[ScoreCall] = []

    def __call__(self, call: ScoreCall, deadline_s: float) -> BatchScores:
        self.calls.append(call)
        failure_N = np.full(len(call), "", "U16")
        scores = plain_scores(call.histories(), call.candidates())
        for sample, reason in self.failures.items():
            failure_N[sample] = reason.value
            scores[sample] = np.zeros(0, np.float32)
        return BatchScores(scores=scores, failure_N=failure_N)


def scorer(attempt: Recorder, **settings: Any) -> RewardScorer:
    given = RewardSettings(ranker="x", retries=0, **settings)
    return RewardScorer(given, RewardClient(attempt, given))


def test_a_completion_matches_a_ground_truth_that_shares_its_path() -> None:
    path_id_I = np.array([0, 1, 2, 3, 4, 3, 4, 7, 8, 9], np.int32)
    scored, metrics = RewardScorer(RewardSettings(), None, path_id_I=path_id_I).score(prompts(), groups())
    assert scored.parts_PG["item_match"].tolist() == [[1, 1, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0]]
    assert (scored.parts_PG["rank_penalty"] < 0).tolist()[1] == [False, True, True, True]
    assert metrics["reward/hit"] == pytest.approx(2 / 3)


def test_a_sibling_of_an_excluded_ground_truth_is_no_match() -> None:
    path_id_I = np.array([0, 1, 2, 3, 4, 3, 4, 7, 8, 9], np.int32)
    seen = [dataclasses.replace(prompt, exclusions=np.array([4], np.int32)) for prompt in prompts()]
    scored, _ = RewardScorer(RewardSettings(), None, path_id_I=path_id_I).score(seen, groups())
    assert not scored.parts_PG["item_match"][1].any()


def test_reward_is_the_weighted_sum_of_the_sources() -> None:
    attempt = Recorder()
    scored, metrics = scorer(attempt, item_match=2.0, rank_penalty=0.5, ranker_score=0.001).score(prompts(), groups())
    ranker = np.array([[3, 5, 5, 3], [1006, 1007, 1008, 1009], [2001, 2002, 0, 0]])
    match = np.array([[0, 1, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]])
    penalty = rank_penalty(ITEMS, np.array(TARGETS), VALID)
    np.testing.assert_allclose(scored.reward_PG, 2 * match + 0.5 * penalty + 0.001 * ranker, rtol=1e-6)
    assert scored.usable_P.all()
    assert len(attempt.calls) == 1
    assert [row.tolist() for row in attempt.calls[0].candidates()] == [[3, 5], [6, 7, 8, 9], [1, 2]]
    assert [row.tolist() for row in attempt.calls[0].histories()] == [[0], [1], [2]]
    assert metrics["reward/hit"] == pytest.approx(1 / 3)
    assert metrics["reward/part/item_match"] == pytest.approx(2 / 10)
    assert metrics["system/reward_requests"] == 1
    assert metrics["reward/failed_share"] == 0
    assert metrics["reward/live_groups"] == 1


def test_a_failed_group_is_masked_with_its_reason_and_has_no_reward() -> None:
    attempt = Recorder({0: RewardFailure.TIMEOUT})
    scored, metrics = scorer(attempt, ranker_score=1.0).score(prompts(), groups())
    assert scored.failure_P.tolist() == ["timeout", "", ""]
    assert scored.usable_P.tolist() == [False, True, True]
    assert not scored.reward_PG[0].any()
    assert not any(part[0].any() for part in scored.parts_PG.values())
    assert metrics["reward_fail/timeout"] == 1
    assert metrics["reward_fail/non_finite"] == 0
    assert metrics["reward/failed_share"] == pytest.approx(1 / 3)
    assert metrics["reward/mean"] == pytest.approx(scored.reward_PG[1:][VALID[1:]].mean())


@pytest.mark.parametrize("settings", [{"ranker_score": 1000.0}, {"ranker_score": 1.0, "invalid_score": "below_lowest"}])
def test_a_reward_that_float32_cannot_hold_fails_its_group(settings: dict[str, Any]) -> None:
    """The ranker's scores are finite, their weighted sum or the score below the lowest of them is not."""

    def attempt(call: ScoreCall, deadline_s: float) -> BatchScores:
        scores = plain_scores(call.histories(), call.candidates())
        scores[0] = np.array([-3.4e38, 3.4e38], np.float32)
        return BatchScores(scores=scores, failure_N=np.full(len(call), "", "U16"))

    given = RewardSettings(ranker="x", retries=0, **settings)
    scored, metrics = RewardScorer(given, RewardClient(attempt, given)).score(prompts(), groups())
    assert scored.failure_P.tolist() == ["non_finite", "", ""]
    assert not scored.reward_PG[0].any()
    assert np.isfinite(scored.reward_PG).all()
    assert metrics["reward_fail/non_finite"] == 1
    assert np.isfinite(metrics["reward/mean"])


def test_all_groups_failed_gives_no_reward_metrics() -> None:
    attempt = Recorder(dict.fromkeys(range(3), RewardFailure.UNAVAILABLE))
    _, metrics = scorer(attempt, ranker_score=1.0).score(prompts(), groups())
    assert metrics["reward/failed_share"] == 1
    assert "reward/mean" not in metrics


@pytest.mark.parametrize("transform", ["sigmoid", "percentile"])
def test_transforms_are_bounded_and_keep_the_order(transform: str) -> None:
    scored, _ = scorer(
        Recorder(), item_match=0.0, rank_penalty=0.0, ranker_score=1.0, ranker_transform=transform
    ).score(prompts(), groups())
    assert scored.reward_PG.min() >= 0
    assert scored.reward_PG.max() <= 1
    assert not scored.reward_PG[~VALID].any()
    first = scored.reward_PG[0]
    assert first[1] == first[2] > first[0] == first[3]


def test_rules_alone_need_no_service_and_a_ranker_needs_one() -> None:
    scored, metrics = RewardScorer(RewardSettings(), None).score(prompts(), groups())
    assert set(scored.parts_PG) == {"item_match", "rank_penalty"}
    assert "system/reward_requests" not in metrics
    with pytest.raises(ValueError, match="no client"):
        RewardScorer(RewardSettings(ranker="x"), None)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"ranker_score": 1.0}, "a ranker or reward.url"),
        ({"ranker": "x", "url": "http://y"}, "none with reward.ranker set"),
    ],
)
def test_impossible_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(RequestError, match=words):
        RewardSettings(**settings)


def test_loopback_addresses() -> None:
    assert all(is_loopback(host) for host in ("127.0.0.1", "127.8.9.1", "::1", "localhost"))
    assert not any(is_loopback(host) for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""))
