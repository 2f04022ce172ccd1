"""Contract of the metrics along sessions: their definitions (methods.md section 7) on hand-made lists, and that a
report has every name at every cut-off, long-tail slices included.

Not checked: recall, NDCG, coverage and novelty, which are those of `reward.metrics`.
"""

from __future__ import annotations

import numpy as np
import pytest

from reward.metrics import tail_items
from reward.session_metrics import diversity_at, repetition_at, reward_at, session_report

LISTS = np.array([[0, 1, 2], [1, 3, -2], [4, 4, 0]], np.int32)
TARGETS = np.array([2, 0, 0], np.int32)
REWARDS = np.array([0.75, 0.5, 0.25], np.float32)
SESSIONS = np.array([7, 7, 9], np.int32)


def test_reward_counts_the_rating_of_a_hit_only() -> None:
    assert reward_at(LISTS, TARGETS, REWARDS, 2).tolist() == [0.0, 0.0, 0.0]
    # The duplicate of the last list moves its third slot up, but the cut-off counts slots.
    assert reward_at(LISTS, TARGETS, REWARDS, 3).tolist() == [0.75, 0.0, 0.25]


def test_repetition_is_slots_less_distinct_items_per_session() -> None:
    full = np.array([[0, 1], [1, 2], [0, 1], [5, 6]], np.int32)
    assert repetition_at(full, np.array([1, 1, 1, 2]), 2).tolist() == [2 * 3 - 3, 0]
    assert repetition_at(LISTS, SESSIONS, 3).tolist() == [5 - 4, 1]


def test_diversity_is_the_mean_distance_of_pairs() -> None:
    vectors = np.array([[1, 0], [0, 2], [-3, 0], [0, 0], [1, 1]], np.float32)
    found = diversity_at(LISTS, vectors, 3)
    root = 1 / np.sqrt(2)
    assert found == pytest.approx([(1 + 2 + 1) / 3, 1.0, 1 - root])
    assert np.isnan(diversity_at(LISTS, vectors, 1)).all()


def test_a_report_slices_by_the_popularity_of_the_target() -> None:
    counts = np.array([100, 1, 1, 1, 1], np.int64)
    assert tail_items(counts).tolist() == [False, True, True, True, True]
    found = session_report(
        LISTS,
        TARGETS,
        REWARDS,
        SESSIONS,
        (1, 3),
        n_items=5,
        train_count_I=counts,
        vector_ID=np.eye(5, dtype=np.float32),
        generated_NK=LISTS != -2,
    )
    assert (found["tail_rows"], found["head_rows"]) == (1.0, 2.0)
    assert (found["tail_recall@3"], found["head_recall@3"], found["recall@3"]) == (1.0, 0.5, pytest.approx(2 / 3))
    assert found["reward@3"] == pytest.approx(1 / 3)
    assert (found["coverage@3"], found["novelty@3"], found["invalid@3"]) == (1.0, 1.0, 0.0)
    assert found["ild@3"] == pytest.approx(1.0)
    assert "ild@1" not in found
    assert found["repetition@3"] == 1.0
