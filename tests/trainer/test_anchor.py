"""Anchor stage: self-normalised weights (methods.md section 8 item 5), what an anchor does to a group (item 6),
feedback rewards, and the moving normaliser.

Does not check that a log's propensities are right: tests/data/test_feedback.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.advantage import group_advantages, masked_moments
from trainer.anchor import Anchor, anchor_weights, feedback_rewards
from trainer.members import Members
from trainer.objective_settings import StdMode

PROBABILITIES = st.lists(st.tuples(st.floats(-12, -0.01), st.floats(-12, -0.01)), min_size=1, max_size=12)
WIDE = Anchor(clip=1e6, moving_below=0)


def everyone(prompts: int, group: int) -> Members:
    return Members(
        valid_PG=torch.ones(prompts, group, dtype=torch.bool),
        kind_PG=torch.zeros(prompts, group, dtype=torch.int64),
        segment_PGT=torch.zeros(prompts, group, 1, dtype=torch.int64),
    )


def weights_of(pairs: list[tuple[float, float]], anchor: Anchor = WIDE, shift: float = 0.0) -> torch.Tensor:
    logp, logp0 = (torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True))
    return anchor_weights(logp, logp0 + shift, torch.ones(len(pairs), dtype=torch.bool), anchor).weight_P


@given(pairs=PROBABILITIES, c=st.floats(-3, 3), shift=st.floats(-2, 2), data=st.data())
@settings(max_examples=150, deadline=None)
def test_self_normalised_values(pairs: list[tuple[float, float]], c: float, shift: float, data: st.DataObject) -> None:
    weight = weights_of(pairs)
    assert float(weight.mean()) == pytest.approx(1.0, rel=1e-9)
    reward = torch.tensor(
        data.draw(st.lists(st.floats(-2, 2), min_size=len(pairs), max_size=len(pairs))), dtype=torch.float64
    )
    value = float((weight * reward).mean())
    assert float((weight * torch.full_like(reward, c)).mean()) == pytest.approx(c, abs=1e-9)
    assert float((weight * (reward + c)).mean()) == pytest.approx(value + c, abs=1e-9)
    assert float(reward.min()) - 1e-9 <= value <= float(reward.max()) + 1e-9
    if max(a - b for a, b in pairs) + abs(shift) < math.log(1e6):  # before clipping
        torch.testing.assert_close(weights_of(pairs, shift=shift), weight, rtol=1e-9, atol=1e-12)


@given(logp0=st.lists(st.floats(-9, -0.01), min_size=1, max_size=9), gap=st.floats(-20, 20))
@settings(max_examples=60, deadline=None)
def test_equal_ratios_give_the_plain_mean(logp0: list[float], gap: float) -> None:
    """Also when all of them are clipped."""
    weight = weights_of([(value + gap, value) for value in logp0], Anchor(clip=10.0, moving_below=0))
    torch.testing.assert_close(weight, torch.ones(len(logp0), dtype=torch.float64), rtol=1e-9, atol=0)


def test_the_serving_policy_itself_gives_ones() -> None:
    assert torch.equal(weights_of([(-1.5, -1.5), (-3.25, -3.25)]), torch.ones(2, dtype=torch.float64))


def test_clipping_comes_before_the_normaliser() -> None:
    weight = weights_of([(0.0, -math.log(4.0)), (0.0, -math.log(1.0))], Anchor(clip=3.0, moving_below=0))
    torch.testing.assert_close(weight, torch.tensor([1.5, 0.5], dtype=torch.float64))
    found = anchor_weights(
        torch.zeros(2), -torch.log(torch.tensor([4.0, 1.0])), torch.ones(2, dtype=torch.bool), Anchor(clip=3.0)
    )
    assert found.metrics["anchor/clipped_share"] == 0.5
    assert found.metrics["anchor/weight_mean"] == pytest.approx(2.0)
    assert found.metrics["anchor/weight_max"] == pytest.approx(3.0)
    assert found.metrics["anchor/effective_size"] == pytest.approx(16 / 10)


def test_weights_that_underflow_keep_their_mean() -> None:
    weight = weights_of([(-900.0, 0.0), (-900.0 + math.log(3), 0.0)])
    torch.testing.assert_close(weight, torch.tensor([0.5, 1.5], dtype=torch.float64))


def test_rows_without_an_anchor_take_no_part() -> None:
    has = torch.tensor([True, False, True])
    logp, logp0 = torch.tensor([-1.0, 50.0, -2.0]), torch.tensor([-2.0, -9.0, -2.0])
    whole = anchor_weights(logp, logp0, has, WIDE).weight_P
    alone = anchor_weights(logp[has], logp0[has], torch.ones(2, dtype=torch.bool), WIDE).weight_P
    assert torch.equal(whole[has], alone)
    assert whole[1] == 1
    none = anchor_weights(logp, logp0, torch.zeros(3, dtype=torch.bool), WIDE, moving_log_mean=0.25)
    assert none.weight_P.tolist() == [1, 1, 1]
    assert none.moving_log_mean == 0.25


def test_small_batches_use_the_moving_mean() -> None:
    anchor = Anchor(moving_below=32, decay=0.75, clip=100.0)
    one = torch.ones(1, dtype=torch.bool)
    first = anchor_weights(torch.tensor([math.log(2.0)]), torch.zeros(1), one, anchor)
    assert float(first.weight_P) == pytest.approx(1.0)
    second = anchor_weights(torch.tensor([math.log(6.0)]), torch.zeros(1), one, anchor, first.moving_log_mean)
    assert second.moving_log_mean == pytest.approx(math.log(0.75 * 2 + 0.25 * 6))
    assert float(second.weight_P) == pytest.approx(6.0 / 3.0)
    many = anchor_weights(
        torch.full((32,), math.log(6.0)), torch.zeros(32), torch.ones(32, dtype=torch.bool), anchor, 0.0
    )
    torch.testing.assert_close(many.weight_P, torch.ones(32))
    memoryless = Anchor(moving_below=32, decay=0.0)
    fresh = anchor_weights(torch.tensor([math.log(6.0)]), torch.zeros(1), one, memoryless, 0.0)
    assert float(fresh.weight_P) == pytest.approx(1.0)


@given(rewards=st.lists(st.floats(-2, 2), min_size=2, max_size=9), own=st.floats(-2, 2))
@settings(max_examples=80, deadline=None)
def test_an_appended_member_shifts_mean_and_variance(rewards: list[float], own: float) -> None:
    group = len(rewards)
    before = torch.tensor([rewards], dtype=torch.float64)
    after = torch.tensor([[*rewards, own]], dtype=torch.float64)
    mean, std = masked_moments(before, torch.ones(1, group, dtype=torch.bool), ddof=0)
    mean_after, std_after = masked_moments(after, torch.ones(1, group + 1, dtype=torch.bool), ddof=0)
    gap = own - float(mean)
    assert float(mean_after - mean) == pytest.approx(gap / (group + 1), abs=1e-9)
    expected = group / (group + 1) * (float(std) ** 2 + gap**2 / (group + 1))
    assert float(std_after) ** 2 == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize("group", [2, 8, 15])
@pytest.mark.parametrize("penalty", [0.01, 1.0, 30.0])
def test_an_anchor_alone_against_its_misses(group: int, penalty: float) -> None:
    matched = torch.tensor([[False] * group + [True]] * 2)
    positive = torch.tensor([True, False])
    item, _ = feedback_rewards(matched, torch.ones_like(matched), positive, Anchor(penalty=penalty))
    advantage, _ = group_advantages(everyone(2, group + 1), item.double(), StdMode.POPULATION, 0.0)
    root = math.sqrt(group)
    assert advantage[0].tolist() == pytest.approx([-1 / root] * group + [root])
    assert advantage[1].tolist() == pytest.approx([1 / root] * group + [-root])


def test_feedback_rewards_are_written_out() -> None:
    matched = torch.tensor([[True, False, False], [True, False, False]])
    formatted = torch.tensor([[True, True, False], [True, False, True]])
    item, form = feedback_rewards(
        matched, formatted, torch.tensor([True, False]), Anchor(penalty=0.5, format_weight=0.25)
    )
    assert item.tolist() == [[1, 0, 0], [-0.5, 0, 0]]
    assert form.tolist() == [[0.25, 0.25, 0], [0.25, 0, 0.25]]
