"""From groups of lists to credit: gains by candidate, lists that are none, estimates and their failures, segments.

Checked: against a plain loop on random lists of random candidates; lists cut short, with repeats, foreign items or
items behind the end; lists of the first positions; observed and estimated gains; failed estimates; the segments of
members. Not checked: how lists are generated (tests/rollout), advantages (test_list_credit.py).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest
import torch

from data.errors import RequestError
from data.records import NO_ITEM, Decode, DecodeSpec, Finish, Groups, ListSpec, Prompt, RewardFailure, ScoredGroups
from reward.batch_scoring import BatchScores
from reward.swap_credit import SwapForm, swap_credit
from trainer.list_rewards import candidate_gains, list_rewards, unobserved
from trainer.members import PADDING, batch_members
from trainer.trees import Completions

NONE = np.zeros(0, np.int32)


def prompt(items: list[int], gains: list[float], observed: list[bool] | None = None, **changes: Any) -> Prompt:
    given: dict[str, Any] = {
        "prompt_id": 0,
        "token_ids": np.array([1, 2], np.int32),
        "user_id": 0,
        "history": NONE,
        "exclusions": NONE,
        "need": "interest",
        "candidates": np.array(items, np.int32),
        "gain_C": np.array(gains, np.float32),
        "observed_C": None if observed is None else np.array(observed),
    }
    return Prompt(**(given | changes))


def groups_of(lists: list[list[list[int]]], *, length: int = 0) -> Groups:
    """Groups of the lists; every item has two tokens, and one format token begins the list."""
    shape = (len(lists), len(lists[0]))
    width = max(len(row) for group in lists for row in group)
    item_PGK = np.full((*shape, width), NO_ITEM, np.int32)
    token_PGT = np.full((*shape, 1 + 2 * width), -1, np.int32)
    segment_PGT = np.full(token_PGT.shape, PADDING, np.int32)
    length_PG = np.zeros(shape, np.int32)
    for p, group in enumerate(lists):
        for g, row in enumerate(group):
            item_PGK[p, g, : len(row)] = row
            length_PG[p, g] = 1 + 2 * len(row)
            token_PGT[p, g, : length_PG[p, g]] = 5
            segment_PGT[p, g, : length_PG[p, g]] = [-1, *np.repeat(np.arange(len(row)), 2)]
    return Groups(
        prompt_id_P=np.arange(shape[0], dtype=np.int64),
        valid_PG=np.ones(shape, np.bool_),
        token_PGT=token_PGT,
        length_PG=length_PG,
        item_PG=item_PGK[..., 0],
        logp_PGT=np.zeros(token_PGT.shape, np.float32),
        finish_PG=np.full(shape, Finish.LIST.value),
        weight_version_P=np.zeros(shape[0], np.int64),
        engine_id_P=np.full(shape[0], "test"),
        spec=DecodeSpec(decode=Decode.SAMPLE, width=shape[1], lists=ListSpec(candidates=width, length=length)),
        constraint="list",
        catalogue_digest="c",
        item_PGK=item_PGK,
        segment_PGT=segment_PGT,
    )


@pytest.mark.parametrize("form", list(SwapForm))
def test_credit_is_that_of_the_gains_in_list_order(form: SwapForm) -> None:
    random = np.random.default_rng(0)
    prompts, lists = [], []
    for size in (5, 3, 4):
        items = random.choice(50, size, replace=False).tolist()
        prompts.append(prompt(items, random.integers(0, 5, size).tolist()))
        lists.append([random.permutation(items).tolist() for _ in range(6)])
    found = list_rewards(prompts, groups_of(lists), form)
    for p, (one, group) in enumerate(zip(prompts, lists, strict=True)):
        assert one.candidates is not None
        assert one.gain_C is not None
        worth = dict(zip(one.candidates.tolist(), one.gain_C.tolist(), strict=True))
        for g, row in enumerate(group):
            exact = swap_credit(torch.tensor([[worth[item] for item in row]]), form).credit_NK[0]
            torch.testing.assert_close(found.signals.credit_PGK[p, g, : len(row)], exact)
            assert not found.signals.credit_PGK[p, g, len(row) :].any()
    assert found.signals.permutation_PG.all()
    assert found.signals.ranks_P.tolist() == [5, 3, 4]
    assert found.signals.variance_PGK is None
    assert found.metrics == {"lists/observed_share": 1.0, "lists/no_gain_prompts": 0.0, "lists/estimates_failed": 0.0}


def test_what_is_no_permutation_has_no_credit() -> None:
    one = prompt([10, 20, 30], [1.0, 2.0, 3.0])
    rows = [[10, 20, 30], [10, 20], [10, 10, 30], [10, 20, 40], [10, 20, 30, 40], []]
    found = list_rewards([one], groups_of([rows]), SwapForm.CAUSAL).signals
    assert found.permutation_PG.tolist() == [[True, False, False, False, False, False]]
    assert not found.credit_PGK[0, 1:].any()
    absent = groups_of([[[10, 20, 30]]])
    absent.valid_PG[:] = False
    assert not list_rewards([one], absent, SwapForm.CAUSAL).signals.permutation_PG.any()


def test_a_list_of_the_first_positions_is_measured_against_the_best_of_all_candidates() -> None:
    one = prompt([10, 20, 30, 40], [1.0, 0.0, 3.0, 2.0])
    found = list_rewards([one], groups_of([[[10, 20], [30, 40]]], length=2), SwapForm.CAUSAL).signals
    assert found.ranks_P.tolist() == [2]
    assert found.permutation_PG.all()
    exact = swap_credit(torch.tensor([[1.0, 0.0]]), SwapForm.CAUSAL, candidate_gain_NC=torch.tensor([[3.0, 2, 1, 0]]))
    torch.testing.assert_close(found.credit_PGK[0, :1], exact.credit_NK)
    assert float(found.ndcg_PG[0, 1]) == pytest.approx(1.0)


def test_what_nobody_observed_is_estimated_with_its_variance() -> None:
    prompts = [
        prompt([10, 20, 30], [4.0, 0.0, 0.0], [True, False, False]),
        prompt([5, 6, 7], [0.0, 1.0, 0.0]),
        prompt([1, 2], [3.0, 0.0], [True, False]),
    ]
    assert [row.tolist() for row in unobserved(prompts)] == [[20, 30], [], [2]]
    plain = candidate_gains(prompts)
    assert plain.gain_PC.tolist() == [[4, 0, 0], [0, 1, 0], [3, 0, 0]]
    assert plain.variance_PC is None
    assert plain.observed_share == 5 / 8
    estimates = BatchScores(
        scores=[np.array([2.0, 1.0], np.float32), np.zeros(0, np.float32), np.zeros(0, np.float32)],
        failure_N=np.array(["", "", "timeout"]),
        variances=[np.array([0.5, 0.25], np.float32), np.zeros(0, np.float32), np.zeros(0, np.float32)],
    )
    lists = [[[30, 10, 20]], [[7, 6, 5]], [[2, 1]]]
    found = list_rewards(prompts, groups_of(lists), SwapForm.CAUSAL, estimates)
    exact = swap_credit(torch.tensor([[1.0, 4.0, 2.0]]), SwapForm.CAUSAL).credit_NK
    torch.testing.assert_close(found.signals.credit_PGK[0], exact)
    assert found.signals.variance_PGK is not None
    assert found.signals.variance_PGK[:2, 0].tolist() == [[0.25, 0.0, 0.5], [0.0, 0.0, 0.0]]
    assert found.signals.propagated_PGK is not None
    assert found.failure_P.tolist() == ["", "", RewardFailure.TIMEOUT.value]
    assert found.metrics["lists/estimates_failed"] == 1
    with pytest.raises(RequestError, match="a ranker without variances"):
        list_rewards(prompts, groups_of(lists), SwapForm.CAUSAL, dataclasses.replace(estimates, variances=None))


def test_prompts_without_a_gain_are_counted() -> None:
    prompts = [prompt([1, 2], [0.0, 0.0]), prompt([1, 2], [0.0, 1.0])]
    found = list_rewards(prompts, groups_of([[[1, 2]], [[1, 2]]]), SwapForm.CAUSAL)
    assert found.metrics["lists/no_gain_prompts"] == 1
    assert found.signals.signal_PG.tolist() == [[False], [True]]


@pytest.mark.parametrize("gain", [-1.0, float("nan"), float("inf")])
def test_impossible_gains_are_refused(gain: float) -> None:
    with pytest.raises(RequestError, match="a finite number from 0"):
        list_rewards([prompt([1, 2], [1.0, gain])], groups_of([[[1, 2]]]), SwapForm.CAUSAL)


def test_single_items_are_a_mistake_and_told() -> None:
    groups = groups_of([[[1, 2]]])
    with pytest.raises(ValueError, match="have no lists"):
        list_rewards([prompt([1, 2], [1.0, 0.0])], dataclasses.replace(groups, item_PGK=None), SwapForm.CAUSAL)
    for broken in ({"candidates": None}, {"gain_C": None}):
        with pytest.raises(ValueError, match="prompt 0"):
            list_rewards([prompt([1, 2], [1.0, 0.0], **broken)], groups, SwapForm.CAUSAL)


def test_members_have_the_segments_of_their_lists() -> None:
    groups = groups_of([[[1, 2], [2]]])
    scored = ScoredGroups(groups=groups, reward_PG=np.zeros((1, 2), np.float32), failure_P=np.array([""]), parts_PG={})
    completions = Completions(
        prompt_tokens=[np.array([1], np.int32)],
        token_PGT=groups.token_PGT,
        length_PG=groups.length_PG,
        valid_PG=groups.valid_PG,
        exclusions=[NONE],
    )
    members, _ = batch_members(scored, completions)
    assert members.segment_PGT.tolist() == [[[-1, 0, 0, 1, 1], [-1, 0, 0, PADDING, PADDING]]]
    single, _ = batch_members(
        dataclasses.replace(scored, groups=dataclasses.replace(groups, segment_PGT=None)), completions
    )
    assert single.segment_PGT.tolist() == [[[0, 0, 0, 0, 0], [0, 0, 0, PADDING, PADDING]]]
