"""Contract: HR, NDCG, Recall, MRR row by row as ranx computes them; duplicates removed keeping the first; unknown items
keep their slot as misses; coverage, novelty and invalid rate by their definitions (methods.md section 7).

Not checked here: intervals (test_bootstrap), how lists are made.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import RequestError
from reward.metrics import evaluate, tail_items, target_ranks, without_duplicates
from reward.names import RankingMetric, at

KS = [1, 2, 3, 5, 10, 20]


def test_equals_ranx_on_random_lists_with_one_and_with_several_targets() -> None:
    random = np.random.default_rng(3)
    lists = np.stack([random.permutation(40)[:12] for _ in range(300)])
    positives = [random.permutation(40)[: 1 if row % 2 else random.integers(1, 20)] for row in range(300)]
    question = {"lists": lists.tolist(), "positives": [row.tolist() for row in positives], "ks": KS}
    answer = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "ranx_values.py")],
        input=json.dumps(question),
        capture_output=True,
        text=True,
        check=True,
    )
    theirs = json.loads(answer.stdout)
    ours = evaluate(lists.astype(np.int32), positives, KS, n_items=40).rows
    assert ours.keys() == theirs.keys()
    for name, values in theirs.items():
        np.testing.assert_allclose(ours[name], values, atol=1e-12, err_msg=name)


def test_one_target_by_hand() -> None:
    lists = np.array([[4, 2, 7], [1, 1, 3], [-1, 5, 6], [8, 9, -2]], np.int32)
    targets = np.array([2, 3, 5, 0], np.int32)
    report = evaluate(lists, targets, [1, 2, 3], n_items=10)
    assert report.rows["hr@1"].tolist() == [0, 0, 0, 0]
    # Row 1: the repeated item goes, so 3 moves up to rank 2. Row 2: the unknown item keeps rank 1.
    assert report.rows["hr@2"].tolist() == [1, 1, 1, 0]
    assert report.rows["mrr@2"].tolist() == [0.5, 0.5, 0.5, 0]
    assert report.rows["ndcg@2"] == pytest.approx([1 / np.log2(3)] * 3 + [0])
    assert report.values["hr@3"] == 0.75
    assert report.n == 4


def test_coverage_novelty_and_invalid_rate_by_hand() -> None:
    lists = np.array([[0, 1, -1], [1, -1, -2]], np.int32)
    tail = np.array([False, True, True, False])
    report = evaluate(lists, np.array([0, 0]), [1, 3], n_items=4, tail_I=tail, generated_NK=lists != -2)
    assert report.values["coverage@1"] == 0.5
    assert report.values["novelty@1"] == 0.5
    assert report.values["invalid@1"] == 0
    assert report.values["invalid@3"] == pytest.approx(2 / 5)
    assert evaluate(np.zeros((2, 0), np.int32), np.array([0, 0]), [1], n_items=4).values["hr@1"] == 0


def test_tail_is_at_or_below_the_quantile() -> None:
    assert tail_items(np.arange(11)).tolist() == [True] * 10 + [False]
    assert tail_items(np.full(5, 3)).all()


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(-2, 6), min_size=7, max_size=7), min_size=1, max_size=6), st.integers(0, 6))
def test_duplicates_and_ranks_equal_the_plain_loop(rows: list[list[int]], target: int) -> None:
    lists = np.array(rows, np.int32)
    expected, ranks = [], []
    for row in rows:
        kept = [item for i, item in enumerate(row) if item < 0 or item not in row[:i]]
        kept = [max(item, -1) for item in kept] + [-1] * (len(row) - len(kept))
        expected.append(kept)
        ranks.append(kept.index(target) + 1 if target in kept else 0)
    assert without_duplicates(lists).tolist() == expected
    assert target_ranks(lists, np.full(len(rows), target)).tolist() == ranks


def test_metrics_are_monotone_in_k_and_bounded() -> None:
    random = np.random.default_rng(0)
    report = evaluate(random.integers(-1, 30, (50, 20)).astype(np.int32), random.integers(0, 30, 50), KS, n_items=30)
    for metric in (RankingMetric.HR, RankingMetric.NDCG, RankingMetric.MRR, RankingMetric.COVERAGE):
        values = [report.values[at(metric, k)] for k in KS]
        assert values == sorted(values)
        assert values[0] >= 0
        assert values[-1] <= 1


@pytest.mark.parametrize(
    ("lists", "positives", "words"),
    [
        (np.zeros((0, 3), np.int32), np.zeros(0, np.int32), "at least 1"),
        (np.zeros((2, 3), np.int32), np.zeros(3, np.int32), "as many"),
        (np.full((1, 3), 9, np.int32), np.zeros(1, np.int32), "ids below 4"),
        (np.zeros((1, 3), np.int32), [np.zeros(0, np.int32)], "without positives"),
    ],
)
def test_bad_input_is_refused(lists: np.ndarray, positives: np.ndarray, words: str) -> None:
    with pytest.raises(RequestError, match=words):
        evaluate(lists, positives, [1], n_items=4)
