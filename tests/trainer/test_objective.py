"""Objective stages: group advantages, aggregation weights, and their composition into plain GRPO.

Checks values against a reference written with Python loops, the linear-AUC identity of methods.md section 8 item 1,
and that padding, invalid members, failed groups and the order of a group change nothing. Does not check the
learner's side (ratio, clip, gradients): tests/trainer/test_losses.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.advantage import group_advantages, masked_moments
from trainer.aggregation import token_weights
from trainer.members import KIND_CODE, PADDING, Kind, Members
from trainer.objective import objective_coefficients
from trainer.objective_settings import Aggregation, ObjectiveSettings, StdMode


def members_of(valid: list[list[bool]], lengths: list[list[int]], tokens: int) -> Members:
    length_PG = torch.tensor(lengths)
    segment = torch.where(torch.arange(tokens) < length_PG.unsqueeze(-1), 0, PADDING)
    valid_PG = torch.tensor(valid)
    return Members(valid_PG=valid_PG, kind_PG=torch.zeros_like(length_PG), segment_PGT=segment)


def full_members(prompts: int, group: int, tokens: int = 3) -> Members:
    return members_of([[True] * group] * prompts, [[tokens] * group] * prompts, tokens)


def reference_advantages(rewards: list[float], mode: StdMode, eps: float) -> list[float]:
    if max(rewards) == min(rewards):
        return [0.0] * len(rewards)
    mean = sum(rewards) / len(rewards)
    ddof = 1 if mode is StdMode.SAMPLE else 0
    std = math.sqrt(sum((r - mean) ** 2 for r in rewards) / (len(rewards) - ddof))
    return [(r - mean) / (1.0 if mode is StdMode.NONE else std + eps) for r in rewards]


@given(rewards=st.lists(st.floats(-3, 3, width=32), min_size=2, max_size=9), mode=st.sampled_from(StdMode))
@settings(max_examples=150, deadline=None)
def test_advantages_equal_the_formula(rewards: list[float], mode: StdMode) -> None:
    reward = torch.tensor([rewards], dtype=torch.float64)
    advantage, live = group_advantages(full_members(1, len(rewards)), reward, mode, 1e-4)
    expected = reference_advantages(rewards, mode, 1e-4)
    torch.testing.assert_close(advantage[0], torch.tensor(expected, dtype=torch.float64), rtol=1e-6, atol=1e-9)
    assert bool(live[0]) == (max(rewards) > min(rewards))


@given(hits=st.lists(st.booleans(), min_size=2, max_size=16), eps=st.sampled_from([0.0, 1e-4, 0.3]), data=st.data())
@settings(max_examples=100, deadline=None)
def test_binary_rewards_give_the_linear_auc(hits: list[bool], eps: float, data: st.DataObject) -> None:
    score = torch.tensor(
        data.draw(st.lists(st.floats(-2, 2), min_size=len(hits), max_size=len(hits))), dtype=torch.float64
    )
    reward = torch.tensor([hits], dtype=torch.float64)
    positive = reward[0] == 1
    share = float(positive.double().mean())
    deviation = math.sqrt(share * (1 - share))
    for mode, divisor in (
        (StdMode.POPULATION, deviation + eps),
        (StdMode.NONE, 1.0),
        (StdMode.SAMPLE, deviation * math.sqrt(len(hits) / (len(hits) - 1)) + eps),
    ):
        advantage, _ = group_advantages(full_members(1, len(hits)), reward, mode, eps)
        if share in (0.0, 1.0):
            assert not advantage.any()
            continue
        gaps = score[positive][:, None] - score[~positive][None]
        assert float((advantage[0] * score).mean()) == pytest.approx(
            share * (1 - share) / divisor * float(gaps.mean()), abs=1e-9
        )


def test_equal_rewards_that_do_not_cancel_in_rounding_give_exactly_zero() -> None:
    reward = torch.full((1, 7), 0.1)
    advantage, live = group_advantages(full_members(1, 7), reward, StdMode.POPULATION, 1e-4)
    assert not advantage.any()
    assert not live.any()


@pytest.mark.parametrize("rewards", [[1e20, 0.0, 0.0, 0.0], [1e8 + 8, 1e8, 1e8, 1e8], [1e-20, 0.0, 0.0, 0.0]])
def test_large_rewards_and_offsets_keep_their_advantages(rewards: list[float]) -> None:
    members, reward = full_members(1, 4), torch.tensor([rewards], dtype=torch.float32)
    advantage, live = group_advantages(members, reward, StdMode.SAMPLE, 1e-30)
    assert live.all()
    torch.testing.assert_close(advantage, torch.tensor([[1.5, -0.5, -0.5, -0.5]]), rtol=1e-6, atol=0)


def test_invalid_members_change_nothing() -> None:
    reward = torch.tensor([[0.0, 1.0, 0.5]])
    wide = torch.tensor([[0.0, 1.0, 0.5, 99.0]])
    narrow, _ = group_advantages(full_members(1, 3), reward, StdMode.SAMPLE, 1e-4)
    masked, _ = group_advantages(members_of([[True, True, True, False]], [[3] * 4], 3), wide, StdMode.SAMPLE, 1e-4)
    assert torch.equal(masked[:, :3], narrow)
    assert masked[0, 3] == 0
    equal = torch.tensor([[0.1, 0.1, 0.1, 99.0], [0.1, 0.1, 0.1, -99.0]])
    none, live = group_advantages(members_of([[True] * 3 + [False]] * 2, [[3] * 4] * 2, 3), equal, StdMode.SAMPLE, 1e-4)
    assert not none.any()
    assert not live.any()


def test_group_order_changes_nothing() -> None:
    reward = torch.rand(4, 8, dtype=torch.float64)
    order = torch.randperm(8)
    plain, _ = group_advantages(full_members(4, 8), reward, StdMode.SAMPLE, 1e-4)
    permuted, _ = group_advantages(full_members(4, 8), reward[:, order], StdMode.SAMPLE, 1e-4)
    torch.testing.assert_close(permuted, plain[:, order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("aggregation", list(Aggregation))
def test_weights_equal_the_written_out_means(aggregation: Aggregation) -> None:
    lengths = [[3, 2, 1], [1, 3, 3]]
    valid = [[True, True, True], [True, False, True]]
    members = members_of(valid, lengths, 4)
    loss = torch.rand(2, 3, 4, dtype=torch.float64)
    total = float((token_weights(members, aggregation, 4) * loss).sum())
    rows = [[[float(loss[p, g, t]) for t in range(lengths[p][g])] for g in range(3) if valid[p][g]] for p in range(2)]
    if aggregation is Aggregation.TOKEN_MEAN:
        tokens = [value for group in rows for row in group for value in row]
        expected = sum(tokens) / len(tokens)
    else:
        mean = (
            (lambda row: sum(row) / len(row))
            if aggregation is Aggregation.SEQUENCE_MEAN
            else (lambda row: sum(row) / 4)
        )
        expected = sum(sum(mean(row) for row in group) / len(group) for group in rows) / 2
    assert total == pytest.approx(expected, abs=1e-6)


def test_padding_tokens_have_no_weight() -> None:
    members = members_of([[True, True]], [[1, 2]], 5)
    for aggregation in Aggregation:
        weights = token_weights(members, aggregation, 5)
        assert not weights[~members.token_mask_PGT].any()


def test_identity_settings_give_the_reference_grpo_loss() -> None:
    torch.manual_seed(0)
    prompts, group, tokens = 3, 4, 3
    logp = torch.randn(prompts, group, tokens, dtype=torch.float64)
    reward = torch.rand(prompts, group, dtype=torch.float64)
    coefficients, _ = objective_coefficients(
        full_members(prompts, group), reward, ObjectiveSettings(std_mode=StdMode.POPULATION), tokens
    )
    ours = -(coefficients.policy_weight_PGT * coefficients.advantage_PGT * logp).sum()
    reference = 0.0
    for p in range(prompts):
        advantages = reference_advantages(reward[p].tolist(), StdMode.POPULATION, 1e-4)
        for g in range(group):
            reference -= advantages[g] * float(logp[p, g].sum()) / tokens / group / prompts
    assert float(ours) == pytest.approx(reference, abs=1e-7)


def test_a_ground_truth_member_feeds_the_nll_alone() -> None:
    members = full_members(2, 3, 2)
    kind = members.kind_PG.clone()
    kind[:, 2] = KIND_CODE[Kind.GROUND_TRUTH]
    mixed = Members(valid_PG=members.valid_PG, kind_PG=kind, segment_PGT=members.segment_PGT)
    reward = torch.tensor([[0.0, 1.0, 7.0], [1.0, 0.0, 7.0]])
    settings_ = ObjectiveSettings(nll_weight=0.5, beta=0.1)
    coefficients, _ = objective_coefficients(mixed, reward, settings_, 2)
    alone, _ = objective_coefficients(full_members(2, 2, 2), reward[:, :2], settings_, 2)
    assert torch.equal(coefficients.advantage_PGT[:, :2], alone.advantage_PGT)
    assert torch.equal(coefficients.policy_weight_PGT[:, :2], alone.policy_weight_PGT)
    assert not coefficients.policy_weight_PGT[:, 2].any()
    assert float(coefficients.nll_weight_PGT.sum()) == pytest.approx(0.5)
    assert not coefficients.nll_weight_PGT[:, :2].any()


def test_a_failed_group_is_masked_and_counted() -> None:
    members = members_of([[False, False], [True, True]], [[3, 3], [3, 3]], 3)
    reward = torch.tensor([[5.0, 9.0], [0.0, 1.0]])
    coefficients, metrics = objective_coefficients(members, reward, ObjectiveSettings(), 3)
    assert not coefficients.advantage_PGT[0].any()
    assert metrics["groups/scored_share"] == 0.5
    assert metrics["groups/live_share"] == 0.5


def test_moments_match_torch() -> None:
    value = torch.randn(3, 6, dtype=torch.float64)
    mean, std = masked_moments(value, torch.ones(3, 6, dtype=torch.bool), ddof=1)
    torch.testing.assert_close(mean, value.mean(1))
    torch.testing.assert_close(std, value.std(1))
