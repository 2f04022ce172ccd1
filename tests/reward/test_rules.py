"""Contract: item match and ReRe's rank penalty as the formula of methods.md section 4, and the percentile transform,
each against a plain loop; nothing is rewarded in invalid slots.

Not checked here: weights and failures (test_scoring).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from reward.rules import below_lowest, item_match, percentile, rank_penalty

GROUP = st.lists(st.tuples(st.integers(-1, 4), st.booleans()), min_size=1, max_size=8)


def test_rank_penalty_by_hand() -> None:
    item_PG = np.array([[7, 3, 9], [7, 3, 9]])
    got = rank_penalty(item_PG, np.array([3, 5]), np.ones((2, 3), bool))
    total = 1 / math.log2(2) + 1 / math.log2(3) + 1 / math.log2(4)
    assert got[0] == pytest.approx([-1 / total, 0, -0.5 / total])
    assert got[1].tolist() == [0, 0, 0]


@settings(max_examples=200, deadline=None)
@given(GROUP, st.integers(-1, 4))
def test_rules_equal_the_plain_loop(group: list[tuple[int, bool]], target: int) -> None:
    item_PG = np.array([[item for item, _ in group]])
    valid_PG = np.array([[valid for _, valid in group]])
    hits = [valid and item == target and target >= 0 for item, valid in group]
    total = sum(1 / math.log2(i + 2) for i, (_, valid) in enumerate(group) if valid)
    penalties = [
        -1 / math.log2(i + 2) / total if any(hits) and valid and not hits[i] else 0.0
        for i, (_, valid) in enumerate(group)
    ]
    assert item_match(item_PG, np.array([target]), valid_PG)[0].tolist() == [float(hit) for hit in hits]
    assert rank_penalty(item_PG, np.array([target]), valid_PG)[0] == pytest.approx(penalties, abs=1e-6)


@settings(max_examples=100, deadline=None)
@given(GROUP)
def test_percentile_equals_the_plain_loop(group: list[tuple[int, bool]]) -> None:
    scores = [score for score, valid in group if valid]
    expected = []
    for score, valid in group:
        if not valid:
            expected.append(0.0)
        elif len(scores) == 1:
            expected.append(0.5)
        else:
            lower = sum(other < score for other in scores) + 0.5 * (scores.count(score) - 1)
            expected.append(lower / (len(scores) - 1))
    got = percentile(np.array([[s for s, _ in group]], np.float32), np.array([[v for _, v in group]]))
    assert got[0] == pytest.approx(expected)


def test_an_invalid_completion_is_a_deviation_below_the_lowest() -> None:
    score_PG = np.array([[1.0, 3.0, 0.0, 9.0], [0.0, 0.0, 0.0, 0.0]], np.float32)
    known_PG = np.array([[True, True, False, False], [False] * 4])
    valid_PG = np.array([[True, True, True, False], [True, False, False, False]])
    found = below_lowest(score_PG, known_PG, valid_PG)
    assert found.tolist() == [[1, 3, 0, 9], [0, 0, 0, 0]]  # 1 - the deviation of (1, 3), which is 1
    shifted = below_lowest(score_PG + 5, known_PG, valid_PG)
    assert shifted[0, 2] == 5
