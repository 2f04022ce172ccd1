"""Contract: the measures of exposure bias equal their definitions by plain loops, and are exact on hand-made cases.

Not checked here: logs on disk (tests/data/test_feedback.py).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import RequestError
from reward.exposure import (
    Exposures,
    evaluate_exposure,
    exposure_divergence,
    exposure_gap,
    popularity_decile,
    repeats,
)


def test_gap_by_hand() -> None:
    hit = np.array([True, True, False, True, False])
    found = exposure_gap(hit, np.array([0, 1, 0, 2, 3], np.int32), np.array([0, 1], np.int32))
    assert found.gap == pytest.approx(2 / 3 - 1 / 2)
    assert (found.exposed_rows, found.never_rows) == (3, 2)
    alone = exposure_gap(hit, np.zeros(5, np.int32), np.array([0], np.int32))
    assert math.isnan(alone.gap)
    assert (alone.exposed_rows, alone.never_rows) == (5, 0)


def test_deciles_are_tenths_and_equal_counts_share_one() -> None:
    assert popularity_decile(np.arange(100)).tolist() == [rank // 10 for rank in range(100)]
    assert set(popularity_decile(np.full(20, 7)).tolist()) == {0}
    shuffled = np.random.default_rng(0).permutation(np.repeat(np.arange(30), 3))
    decile = popularity_decile(shuffled)
    for count in range(30):
        assert len(set(decile[shuffled == count].tolist())) == 1
    assert (np.diff(decile[np.argsort(shuffled, kind="stable")]) >= 0).all()


ITEMS = st.lists(st.integers(0, 19), min_size=1, max_size=30)


@settings(max_examples=100, deadline=None)
@given(ITEMS, ITEMS)
def test_divergence_is_that_of_the_definition_symmetric_and_between_0_and_1(left: list[int], right: list[int]) -> None:
    counts = np.arange(20)
    found = exposure_divergence(np.array(left), np.array(right), counts)
    p = [sum(item // 2 == d for item in left) / len(left) for d in range(10)]
    q = [sum(item // 2 == d for item in right) / len(right) for d in range(10)]
    entropy = lambda x: -sum(v * math.log2(v) for v in x if v)  # noqa: E731
    middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
    assert found == pytest.approx(entropy(middle) - entropy(p) / 2 - entropy(q) / 2, abs=1e-12)
    assert found == pytest.approx(exposure_divergence(np.array(right), np.array(left), counts), abs=1e-12)
    assert -1e-12 <= found <= 1 + 1e-12


def test_divergence_at_its_ends() -> None:
    counts = np.arange(20)
    assert exposure_divergence(np.array([[0, -1], [1, -2]]), np.array([0, 1]), counts) == 0
    assert exposure_divergence(np.array([0]), np.array([19]), counts) == 1
    assert math.isnan(exposure_divergence(np.array([-1]), np.array([19]), counts))


EVENT = st.tuples(st.integers(0, 2), st.integers(0, 2), st.integers(0, 4), st.sampled_from([0.0, 1.0]))


@settings(max_examples=200, deadline=None)
@given(
    st.lists(EVENT, max_size=12),
    st.lists(st.tuples(st.integers(0, 2), st.integers(-1, 3), st.integers(0, 5)), max_size=8),
)
def test_repeats_equal_the_plain_loop(
    events: list[tuple[int, int, int, float]], rows: list[tuple[int, int, int]]
) -> None:
    user, item, time, response = (list(column) for column in zip(*events, strict=True)) if events else ([], [], [], [])
    log = Exposures(
        user_E=np.array(user, np.int32),
        item_E=np.array(item, np.int32),
        timestamp_E=np.array(time, np.int64),
        response_E=np.array(response, np.float32),
    )
    table = np.array(rows, np.int64).reshape(-1, 3)
    found = repeats(table[:, 1].astype(np.int32), table[:, 0].astype(np.int32), table[:, 2], log)
    expected = [
        any(u == user and i == top and t < when and r == 0 for u, i, t, r in events) for user, top, when in rows
    ]
    assert found.tolist() == expected


def test_all_measures_by_name() -> None:
    log = Exposures(
        user_E=np.array([7, 7]), item_E=np.array([0, 1]), timestamp_E=np.array([5, 5]), response_E=np.array([0.0, 1.0])
    )
    lists = np.array([[0, 2], [1, 1]], np.int32)
    values = evaluate_exposure(
        lists,
        np.array([0, 3]),
        np.array([7, 7]),
        np.array([9, 9]),
        log=log,
        train_count_I=np.arange(4),
        ks=(1, 2),
    )
    assert values["exposure_gap@1"] == 1
    assert values["repeat_exposure"] == 0.5
    assert values["exposure_divergence@1"] == 0
    assert 0 < values["exposure_divergence@2"] < 1
    everywhere = Exposures(
        user_E=np.zeros(4, np.int32), item_E=np.arange(4), timestamp_E=np.zeros(4), response_E=np.zeros(4)
    )
    rest = {"user_N": np.array([7, 7]), "timestamp_N": np.array([9, 9]), "train_count_I": np.arange(4), "ks": (1,)}
    values = evaluate_exposure(lists, np.array([0, 3]), log=everywhere, **rest)  # type: ignore[arg-type]
    assert "exposure_gap@1" not in values
    with pytest.raises(RequestError, match="2 lists, 1 targets"):
        evaluate_exposure(lists, np.array([0]), log=log, **rest)  # type: ignore[arg-type]
