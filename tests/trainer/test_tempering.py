"""Tempering stage: self-certainty (methods.md section 8 item 7), confidence, and every mode and target of q.

Also checks that tempering the row's advantages equals tempering its rewards where nothing divides by a deviation.
That the learner computes the certainty of its legal sets is checked in tests/trainer/test_composition.py.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data.errors import RequestError
from trainer.advantage import group_advantages
from trainer.members import PADDING, Members
from trainer.objective_settings import StdMode
from trainer.tempering import (
    Tempering,
    TemperingMode,
    TemperOn,
    confidence,
    row_factors,
    self_certainty,
    tempered_rewards,
    tempering_multipliers,
    token_certainty,
)

LOGITS = st.lists(st.floats(-8, 8), min_size=2, max_size=9)


def members(valid_PG: Tensor, segment_PGT: Tensor) -> Members:
    return Members(valid_PG=valid_PG, kind_PG=torch.zeros(valid_PG.shape, dtype=torch.int64), segment_PGT=segment_PGT)


def certainty_of(logits: list[float]) -> float:
    row = torch.tensor([logits], dtype=torch.float64)
    return float(token_certainty(row, torch.ones_like(row, dtype=torch.bool)))


@given(logits=LOGITS, shift=st.floats(-5, 5), factor=st.floats(1.01, 3.0))
@settings(max_examples=150, deadline=None)
def test_certainty_is_the_divergence_from_uniform(logits: list[float], shift: float, factor: float) -> None:
    found = certainty_of(logits)
    log_p = torch.log_softmax(torch.tensor(logits, dtype=torch.float64), 0)
    expected = float((-math.log(len(logits)) - log_p).mean())
    assert found == pytest.approx(expected, abs=1e-12)
    assert found >= 0
    assert certainty_of([v + shift for v in logits]) == pytest.approx(found, abs=1e-12)
    if max(logits) - min(logits) > 1e-3:
        assert certainty_of([v * factor for v in logits]) > found


def test_uniform_is_zero_and_illegal_entries_take_no_part() -> None:
    assert certainty_of([3.0] * 7) == pytest.approx(0.0, abs=1e-12)
    logits = torch.tensor([[1.0, 50.0, -1.0], [1.0, 50.0, 7.0]])
    legal = torch.tensor([[True, False, True], [False, True, False]])
    found = token_certainty(logits, legal)
    assert float(found[0]) == pytest.approx(certainty_of([1.0, -1.0]), abs=1e-6)
    assert float(found[1]) == 0.0


def test_mean_over_the_tokens_with_a_choice() -> None:
    segment = torch.tensor([[[0, 0, 0, PADDING], [0, 0, PADDING, PADDING]]])
    certainty = torch.tensor([[[1.0, 9.0, 3.0, 99.0], [5.0, 7.0, 99.0, 99.0]]])
    choices = torch.tensor([[[4.0, 1.0, 2.0, 8.0], [1.0, 1.0, 8.0, 8.0]]])
    whole = members(torch.tensor([[True, True]]), segment)
    assert self_certainty(whole, certainty, choices)[0].tolist() == [2.0, 0.0]
    assert self_certainty(members(torch.tensor([[False, True]]), segment), certainty, choices)[0].tolist() == [0, 0]


@given(values=st.lists(st.floats(0.001, 20), min_size=1, max_size=9))
@settings(max_examples=60, deadline=None)
def test_the_median_confidence_is_a_half_and_all_are_below_one(values: list[float]) -> None:
    certainty = torch.tensor([*values, 5.0], dtype=torch.float64)
    rows = torch.tensor([True] * len(values) + [False])
    found = confidence(certainty, rows, None)
    assert found[-1] == 0
    assert (found[:-1] >= 0).all()
    assert (found[:-1] <= 1).all()
    if len(values) % 2:
        assert float(found[:-1].median()) == pytest.approx(0.5, abs=1e-9)
    fixed = confidence(certainty, rows, 2.0)
    assert fixed[0].item() == pytest.approx(1 - math.exp(-values[0] / 2))


def test_confidence_without_certainty_or_rows() -> None:
    assert confidence(torch.zeros(3), torch.ones(3, dtype=torch.bool), None).tolist() == [0, 0, 0]
    assert confidence(torch.ones(3), torch.zeros(3, dtype=torch.bool), None).tolist() == [0, 0, 0]


@pytest.mark.parametrize(
    ("mode", "expected"),
    [
        (TemperingMode.NONE, [1.0, 1.0]),
        (TemperingMode.SOFTEN_CONFIDENT, [0.75, 1.0]),
        (TemperingMode.TRUST_CONFIDENT, [0.25, 1.0]),
        (TemperingMode.ADDITIVE, [1.0, 1.0]),
    ],
)
def test_row_factors(mode: TemperingMode, expected: list[float]) -> None:
    assert row_factors(torch.tensor([0.25, 0.5]), torch.tensor([True, False]), mode).tolist() == expected


def test_targets_of_the_factor() -> None:
    matched = torch.tensor([[True, False], [True, False]])
    rows = torch.tensor([True, False])
    certain = torch.tensor([0.25, 0.9])
    mode = TemperingMode.SOFTEN_CONFIDENT
    row = tempering_multipliers(matched, certain, rows, Tempering(mode=mode))
    assert row.tolist() == [[0.75, 0.75], [1, 1]]
    one = tempering_multipliers(matched, certain, rows, Tempering(mode=mode, target=TemperOn.MATCHED))
    assert one.tolist() == [[0.75, 1], [1, 1]]
    reward = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])
    tempering = Tempering(mode=mode, target=TemperOn.REWARD)
    assert tempering_multipliers(matched, certain, rows, tempering).tolist() == [[1, 1], [1, 1]]
    assert tempered_rewards(reward, matched, certain, rows, tempering).tolist() == [[-0.75, 0.0], [1.0, 0.0]]
    additive = Tempering(mode=TemperingMode.ADDITIVE, target=TemperOn.REWARD)
    assert tempered_rewards(reward, matched, certain, rows, additive).tolist() == [[-0.75, 0.0], [1.0, 0.0]]
    assert torch.equal(tempered_rewards(reward, matched, certain, rows, Tempering(mode=mode)), reward)


def test_additive_belongs_to_the_reward() -> None:
    with pytest.raises(RequestError, match=r"objective.tempering.target: row; legal: reward, because"):
        Tempering(mode=TemperingMode.ADDITIVE)


@given(c=st.floats(0, 1), matches=st.lists(st.booleans(), min_size=1, max_size=7))
@settings(max_examples=60, deadline=None)
def test_scaling_the_row_equals_scaling_the_reward_without_a_deviation(c: float, matches: list[bool]) -> None:
    matched = torch.tensor([[*matches, True]])
    reward = torch.where(matched, -1.0, 0.0).double()
    rows, certain = torch.tensor([True]), torch.tensor([c], dtype=torch.float64)
    everyone = members(torch.ones_like(matched), torch.zeros(1, len(matches) + 1, 1, dtype=torch.int64))
    mode = TemperingMode.SOFTEN_CONFIDENT
    plain, _ = group_advantages(everyone, reward, StdMode.NONE, 1e-4)
    by_row = plain * tempering_multipliers(matched, certain, rows, Tempering(mode=mode))
    scaled = tempered_rewards(reward, matched, certain, rows, Tempering(mode=mode, target=TemperOn.REWARD))
    by_reward, _ = group_advantages(everyone, scaled, StdMode.NONE, 1e-4)
    torch.testing.assert_close(by_row, by_reward, rtol=0, atol=1e-12)
