"""Contract of `reward.list_metrics`: every value equals a plain loop; a sorted list has an NDCG of 1; a row without a
gain is refused.

Not checked: who makes the lists.
"""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from reward.list_metrics import list_metrics

gains = st.lists(st.integers(0, 4), min_size=2, max_size=8).filter(any)


def plain(gain: list[float], every: list[float], k: int) -> dict[str, float]:
    def dcg(values: list[float]) -> float:
        return sum(value / math.log2(place + 2) for place, value in enumerate(values[:k]))

    ranks = [place + 1 for place, value in enumerate(gain[:k]) if value > 0]
    return {
        f"ndcg@{k}": dcg(gain) / dcg(sorted(every, reverse=True)),
        f"recall@{k}": len(ranks) / sum(value > 0 for value in every),
        f"mrr@{k}": 1 / ranks[0] if ranks else 0.0,
        f"hr@{k}": float(bool(ranks)),
    }


@given(every=gains, seed=st.integers(0, 1000), length=st.integers(1, 8), k=st.integers(1, 9))
def test_values_are_those_of_a_plain_loop(every: list[float], seed: int, length: int, k: int) -> None:
    listed = np.random.default_rng(seed).permutation(every)[:length].tolist()
    wide = np.zeros((1, 8))
    wide[0, : len(listed)] = listed
    candidates = np.zeros((1, 9))
    candidates[0, : len(every)] = every
    found = list_metrics(wide, candidates, [k])
    assert {name: value.item() for name, value in found.items()} == pytest.approx(plain(listed, every, k))


@given(every=gains)
def test_the_ideal_list_has_an_ndcg_of_one(every: list[float]) -> None:
    row = np.array([sorted(every, reverse=True)], np.float64)
    assert list_metrics(row, row, [1, 3, 8])["ndcg@3"].item() == pytest.approx(1)


def test_rows_without_a_gain_are_refused() -> None:
    with pytest.raises(ValueError, match="row 1 has no candidate with a gain"):
        list_metrics(np.ones((2, 3)), np.array([[1.0, 0, 0], [0, 0, 0]]), [1])
