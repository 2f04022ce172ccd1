"""Advantages from several rewards (GDPO): the formula by loops, and which groups are alive.

Against TRL: tests/trainer/test_trl_equality.py. In the composition: tests/trainer/test_composition.py.
"""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trainer.members import Members
from trainer.objective_settings import StdMode
from trainer.several_rewards import several_advantages

PROMPTS, GROUP, EPS = 3, 4, 1e-4
REWARDS = st.lists(st.sampled_from([0.0, 0.25, 1.0, 3.0]), min_size=PROMPTS * GROUP, max_size=PROMPTS * GROUP)


def members(valid_PG: torch.Tensor) -> Members:
    return Members(
        valid_PG=valid_PG,
        kind_PG=torch.zeros(valid_PG.shape, dtype=torch.int64),
        segment_PGT=torch.zeros(*valid_PG.shape, 2, dtype=torch.int64),
    )


def by_loops(parts: dict[str, list[list[float]]], weights: dict[str, float], mode: StdMode) -> list[float]:
    deviation = statistics.stdev if mode is StdMode.SAMPLE else statistics.pstdev
    total = [0.0] * (PROMPTS * GROUP)
    for name, rows in parts.items():
        for prompt, row in enumerate(rows):
            divisor = 1.0 if mode is StdMode.NONE else deviation(row) + EPS
            for slot, value in enumerate(row):
                total[prompt * GROUP + slot] += weights[name] * (value - statistics.fmean(row)) / divisor
    return [value / (deviation(total) + EPS) for value in total]


@given(
    left=REWARDS,
    right=REWARDS,
    weight=st.sampled_from([0.5, 2.0]),
    mode=st.sampled_from(StdMode),
)
@settings(max_examples=80, deadline=None)
def test_values_equal_the_formula_and_one_live_reward_keeps_a_group_alive(
    left: list[float], right: list[float], weight: float, mode: StdMode
) -> None:
    parts = {
        name: torch.tensor(value, dtype=torch.float64).reshape(PROMPTS, GROUP)
        for name, value in (("a", left), ("b", right))
    }
    weights = {"a": 1.0, "b": weight}
    found, live_P = several_advantages(members(torch.ones(PROMPTS, GROUP, dtype=torch.bool)), parts, weights, mode, EPS)
    expected = by_loops({name: part.tolist() for name, part in parts.items()}, weights, mode)
    assert found.flatten().tolist() == pytest.approx(expected, rel=1e-6, abs=1e-6)
    varied = [any(len(set(part[prompt].tolist())) > 1 for part in parts.values()) for prompt in range(PROMPTS)]
    assert live_P.tolist() == varied


def test_unweighted_rewards_and_invalid_members_take_no_part() -> None:
    valid_PG = torch.ones(PROMPTS, GROUP, dtype=torch.bool)
    valid_PG[0, 1] = False
    parts = {"a": torch.rand(PROMPTS, GROUP), "b": torch.rand(PROMPTS, GROUP), "off": torch.rand(PROMPTS, GROUP)}
    weights = {"a": 1.0, "b": -0.5, "off": 0.0}
    found, _ = several_advantages(members(valid_PG), parts, weights, StdMode.SAMPLE, EPS)
    without, _ = several_advantages(
        members(valid_PG), {name: parts[name] for name in ("a", "b")}, weights, StdMode.SAMPLE, EPS
    )
    assert torch.equal(found, without)
    assert found[0, 1] == 0
    spoiled = {name: part.masked_fill(~valid_PG, math.nan) for name, part in parts.items()}
    assert torch.equal(several_advantages(members(valid_PG), spoiled, weights, StdMode.SAMPLE, EPS).advantage_PG, found)
