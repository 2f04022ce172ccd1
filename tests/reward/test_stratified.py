"""Contract: strata partition the prompts, equal ranks share a bin, and means equal the plain loop's.

Not checked here: how ranks and discriminability are found (the gate stage has its own tests).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import RequestError
from reward.stratified import stratified_report

ROW = st.tuples(st.integers(1, 9), st.integers(1, 9), st.booleans())


@settings(max_examples=200, deadline=None)
@given(st.lists(ROW, min_size=1, max_size=40), st.integers(1, 6))
def test_strata_partition_the_prompts_and_hold_their_means(rows: list[tuple[int, int, bool]], bins: int) -> None:
    policy, ranker, discriminable = (np.array(column) for column in zip(*rows, strict=True))
    report = stratified_report(policy, ranker, discriminable, bins=bins, values={"twice": 2.0 * policy})
    assert sum(stratum.prompts for stratum in report) == len(rows)
    assert len(report) <= 2 * bins
    assert [(s.difficulty, s.discriminable) for s in report] == [(i // 2, bool(i % 2)) for i in range(len(report))]
    highs = [s.policy_rank_high for s in report[::2]]
    lows = [s.policy_rank_low for s in report[::2]]
    assert all(high < low for high, low in zip(highs, lows[1:], strict=False))
    for s in report:
        mine = [(p, r) for p, r, d in rows if s.policy_rank_low <= p <= s.policy_rank_high and d == s.discriminable]
        assert s.prompts == len(mine)
        if mine:
            assert s.policy_rank == pytest.approx(sum(p for p, _ in mine) / len(mine))
            assert s.ranker_rank == pytest.approx(sum(r for _, r in mine) / len(mine))
            assert s.correction == pytest.approx(sum(p - r for p, r in mine) / len(mine))
            assert s.as_json()["twice"] == pytest.approx(2 * s.policy_rank)
        else:
            assert math.isnan(s.correction)
            assert s.as_json()["correction"] is None


def test_quarters_of_distinct_ranks() -> None:
    ranks = np.arange(1, 9)
    report = stratified_report(ranks, np.ones(8, np.int64), np.ones(8, bool))
    assert [s.prompts for s in report] == [0, 2] * 4
    assert [s.correction for s in report[1::2]] == [0.5, 2.5, 4.5, 6.5]


def test_bad_input_is_refused() -> None:
    one = np.ones(1, np.int64)
    with pytest.raises(RequestError, match="at least 1"):
        stratified_report(one[:0], one[:0], np.ones(0, bool))
    with pytest.raises(RequestError, match="1, 1 and 2 rows"):
        stratified_report(one, one, np.ones(2, bool))
    with pytest.raises(RequestError, match="below 1"):
        stratified_report(0 * one, one, np.ones(1, bool))
