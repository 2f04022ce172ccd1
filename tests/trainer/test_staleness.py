"""Contract: groups within the bound are left as they are, those beyond it are masked and counted by reason, and a batch
with none within it stops the run. Not checked here: the schedule (test_lookahead.py), the loop (test_loop.py)."""

from __future__ import annotations

import dataclasses
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import RunError
from data.records import RewardFailure, ScoredGroups
from tests.trainer.groups_of_items import groups_of, prompts_for
from trainer.staleness import within_bound


def scored(versions: list[int], failed: frozenset[int] = frozenset()) -> ScoredGroups:
    groups = groups_of(prompts_for([0] * len(versions)), [[0, 1]] * len(versions))
    groups = dataclasses.replace(groups, weight_version_P=np.array(versions, np.int32))
    failure_P = np.array([RewardFailure.TIMEOUT.value if row in failed else "" for row in range(len(versions))])
    return ScoredGroups(groups=groups, reward_PG=np.zeros(groups.shape[:2]), failure_P=failure_P, parts_PG={})


@given(
    versions=st.lists(st.integers(0, 12), min_size=1, max_size=8),
    bound=st.integers(1, 4),
    failed=st.frozensets(st.integers(0, 7)),
)
def test_groups_beyond_the_bound_are_masked_and_counted(
    versions: list[int], bound: int, failed: frozenset[int]
) -> None:
    step = 9
    lags = [step - 1 - version for version in versions]
    good = [0 <= lag <= bound for lag in lags]
    if not any(good):
        with pytest.raises(RunError, match=f"not within max_staleness = {bound} of version 8"):
            within_bound(scored(versions, failed), step, bound)
        return
    found, metrics = within_bound(scored(versions, failed), step, bound)
    assert found.usable_P.tolist() == [ok and row not in failed for row, ok in enumerate(good)]
    assert metrics["staleness/dropped/stale"] == sum(lag > bound for lag in lags)
    assert metrics["staleness/dropped/future"] == sum(lag < 0 for lag in lags)
    counted = Counter(lag for lag in lags if 0 <= lag <= bound)
    assert {lag: metrics[f"staleness/groups_{lag}"] for lag in range(bound + 1)} == {
        lag: counted[lag] for lag in range(bound + 1)
    }
    for row in failed & set(range(len(versions))):
        assert found.failure_P[row] == RewardFailure.TIMEOUT.value, "an earlier reason stays"


def test_without_a_bound_nothing_is_masked() -> None:
    before = scored([3, 0])
    found, metrics = within_bound(before, 4, 0)
    assert found is before
    assert metrics == {"staleness/mean": 1.5, "staleness/max": 3.0}
