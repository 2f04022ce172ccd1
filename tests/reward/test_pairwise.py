"""Contract: AUC, partial AUC and windowed partial AUC equal the definition by two loops over pairs; the identities of
methods.md section 8.3 hold exactly: the whole window is AUC, one positive gives Recall@K, the bounds on Recall@K,
disjoint windows average back to AUC, rising score maps change nothing.

Not checked here: which lists and scores are compared.
"""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import RequestError
from reward.pairwise import Window, auc, partial_auc, recall_bounds, recall_window, share_window, window_auc

SCORES = st.lists(st.integers(-4, 4), min_size=1, max_size=12)


def by_loops(scores: list[float], positive: list[bool], window: Window) -> float:
    negatives = sorted((s for s, p in zip(scores, positive, strict=True) if not p), reverse=True)
    chosen = [s for rank, s in enumerate(negatives, start=1) if window.first < rank <= window.last]
    pairs = [(f > g) + (f == g) / 2 for f, p in zip(scores, positive, strict=True) if p for g in chosen]
    return sum(pairs) / len(pairs)


def one_row(scores: list[float], positive: list[bool]) -> tuple[np.ndarray, np.ndarray]:
    return np.array([scores], np.float64), np.array([positive])


@settings(max_examples=200, deadline=None)
@given(st.data(), st.integers(1, 4))
def test_every_window_equals_two_loops(data: st.DataObject, rows: int) -> None:
    width = 8
    score_NM = np.array(
        data.draw(st.lists(st.lists(st.integers(-3, 3), min_size=width, max_size=width), min_size=rows, max_size=rows)),
        np.float64,
    )
    label = data.draw(
        st.lists(st.lists(st.sampled_from("pn-"), min_size=width, max_size=width), min_size=rows, max_size=rows)
    )
    positive_NM, valid_NM = np.array(label) == "p", np.array(label) != "-"
    first = data.draw(st.integers(0, 5))
    window = Window(first, first + data.draw(st.integers(1, 5)))
    found = window_auc(score_NM, positive_NM, window, valid_NM)
    whole = auc(score_NM, positive_NM, valid_NM)
    for row in range(rows):
        scores, positive = score_NM[row][valid_NM[row]].tolist(), positive_NM[row][valid_NM[row]].tolist()
        negatives = len(positive) - sum(positive)
        assert found.defined_N[row] == (any(positive) and negatives >= window.last)
        assert whole.defined_N[row] == (any(positive) and negatives > 0)
        if found.defined_N[row]:
            assert found.value_N[row] == pytest.approx(by_loops(scores, positive, window), abs=1e-12)
        else:
            assert math.isnan(found.value_N[row])
        if whole.defined_N[row]:
            assert whole.value_N[row] == pytest.approx(by_loops(scores, positive, Window(0, negatives)), abs=1e-12)


@st.composite
def separated(draw: st.DrawFn) -> tuple[list[float], list[bool]]:
    """Scores without ties, with at least one positive and no fewer negatives."""
    positives = draw(st.integers(1, 5))
    negatives = draw(st.integers(positives, 12))
    scores = draw(st.permutations(range(positives + negatives)))
    return [float(score) for score in scores], [True] * positives + [False] * negatives


@settings(max_examples=200, deadline=None)
@given(separated(), st.data())
def test_recall_lies_between_its_bounds_and_one_positive_gives_it_exactly(
    drawn: tuple[list[float], list[bool]], data: st.DataObject
) -> None:
    scores, positive = drawn
    positives, negatives = sum(positive), len(positive) - sum(positive)
    k = data.draw(st.integers(positives, negatives))
    score_NM, positive_NM = one_row(scores, positive)
    top = np.argsort(-score_NM[0])[:k]
    recall = positive_NM[0][top].sum() / positives
    value = window_auc(score_NM, positive_NM, recall_window(k, positives)).mean
    low, high = recall_bounds(value, positives)
    assert low <= recall <= high
    if positives == 1:
        assert value == recall == low == high


@pytest.mark.parametrize("positives", [1, 2, 3, 4, 7])
def test_the_bounds_are_reached(positives: int) -> None:
    """By the extreme orders: r positives above all negatives, and what remains as low or as high as it can be."""
    for hits in range(positives + 1):
        # Above the window, below its last negative: the fewest and the most pairs of `hits` recalled positives.
        assert recall_bounds(hits * hits / positives**2, positives)[1] == hits / positives
        most = positives**2 - (positives - hits) ** 2
        assert recall_bounds(most / positives**2, positives)[0] == hits / positives


@settings(max_examples=100, deadline=None)
@given(separated(), st.data())
def test_disjoint_windows_average_back_to_auc_and_partial_auc_is_the_first(
    drawn: tuple[list[float], list[bool]], data: st.DataObject
) -> None:
    score_NM, positive_NM = one_row(*drawn)
    negatives = int((~positive_NM).sum())
    cuts = sorted(data.draw(st.sets(st.integers(1, negatives - 1), max_size=4))) if negatives > 1 else []
    edges = [0, *cuts, negatives]
    parts = [
        (last - first, window_auc(score_NM, positive_NM, Window(first, last)).mean) for first, last in pairwise(edges)
    ]
    whole = auc(score_NM, positive_NM).mean
    assert sum(size * value for size, value in parts) / negatives == pytest.approx(whole, abs=1e-12)
    assert partial_auc(score_NM, positive_NM, edges[1]).mean == parts[0][1]
    assert window_auc(score_NM, positive_NM, share_window(0.0, 1.0, negatives)).mean == whole


@settings(max_examples=100, deadline=None)
@given(SCORES, st.data())
def test_rising_maps_of_the_scores_change_nothing(scores: list[int], data: st.DataObject) -> None:
    positive = data.draw(st.lists(st.booleans(), min_size=len(scores), max_size=len(scores)))
    score_NM, positive_NM = one_row([float(s) for s in scores], positive)
    plain = window_auc(score_NM, positive_NM, Window(0, 2))
    for mapped in (np.exp(score_NM), score_NM**3, 5 * score_NM - 2):
        np.testing.assert_array_equal(window_auc(mapped, positive_NM, Window(0, 2)).value_N, plain.value_N)


def test_windows_from_shares_are_whole_numbers() -> None:
    assert share_window(0.0, 1.0, 7) == (0, 7)
    # 0.2 * 15 is 3.0000000000000004 in floats, which must not become 4.
    assert share_window(0.2, 0.1, 30) == (6, 9)
    assert share_window(0.1 + 0.1, 1 / 15, 15) == (3, 4)
    assert share_window(0.3, 0.3, 5) == (2, 3)
    assert recall_window(5) == (4, 5)
    assert recall_window(5, 3) == (2, 5)
    for k in range(1, 11):
        assert share_window((k - 1) / 10, 1 / 10, 10) == recall_window(k)


def test_bad_input_is_refused() -> None:
    score_NM, positive_NM = one_row([1.0, math.nan], [True, False])
    with pytest.raises(RequestError, match="NaN"):
        auc(score_NM, positive_NM)
    with pytest.raises(RequestError, match="first < last"):
        window_auc(score_NM, positive_NM, Window(2, 2))
    with pytest.raises(RequestError, match="number of positives, 3"):
        recall_window(2, 3)
    with pytest.raises(RequestError, match="0 to 1"):
        recall_bounds(1.1, 2)
    assert math.isnan(auc(np.zeros((1, 2)), np.zeros((1, 2), bool)).mean)
    # A masked candidate may hold anything.
    assert (
        auc(score_NM[:, [0, 1, 0]] - [0, 0, 1], np.array([[True, False, False]]), np.array([[True, False, True]])).mean
        == 1
    )
