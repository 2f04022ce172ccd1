"""The split: chronological parts are divided by a moment and never cut a tie; leave one out takes the last two events.

Oracles are written out in plain Python. Not checked here: reading and writing (test_importing), MovieLens' figures.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import RequestError
from data.kcore import alive_events, core_items
from data.split import (
    Chronological,
    LeaveOneOut,
    chronological,
    is_target,
    part_of_events,
    user_ends,
    user_starts,
)


@given(st.lists(st.integers(0, 40), min_size=3, max_size=200))
@settings(max_examples=80, deadline=None)
def test_chronological_boundaries_never_cut_a_tie(times: list[int]) -> None:
    times_N = np.sort(np.asarray(times))
    try:
        split = chronological(times_N, (8, 1, 1))
    except RequestError:
        # Only when a part would be empty: the boundary values are the times at the 80 % and 90 % rows.
        first = min(max(round(len(times) * 0.8), 1), len(times) - 2)
        second = min(max(round(len(times) * 0.9), first + 1), len(times) - 1)
        assert times_N[first] == times_N[0] or times_N[first] == times_N[second]
        return
    part_N = part_of_events(np.zeros(len(times), np.int32), times_N, split)
    assert set(part_N.tolist()) == {0, 1, 2}
    for part in (0, 1):
        assert times_N[part_N == part].max() < times_N[part_N == part + 1].min()


def test_chronological_shares_are_8_1_1_without_ties() -> None:
    split = chronological(np.arange(1000)[::-1], (8, 1, 1))
    assert (split.valid_from, split.test_from) == (800, 900)


def test_starts_ends_and_targets() -> None:
    user_E = np.asarray([3, 3, 3, 5, 7, 7])
    assert user_starts(user_E).tolist() == [0, 0, 0, 3, 4, 4]
    assert user_ends(user_E).tolist() == [3, 3, 3, 4, 6, 6]
    assert is_target(user_E).tolist() == [False, True, True, False, False, True]
    assert user_starts(user_E[:0]).tolist() == []


def test_leave_one_out_needs_three_events() -> None:
    user_E = np.asarray([0, 0, 0, 0, 1, 1, 2, 2, 2])
    part_E = part_of_events(user_E, np.zeros(9, np.int64), LeaveOneOut())
    assert part_E.tolist() == [0, 0, 1, 2, 0, 0, 0, 1, 2]


def test_no_split_of_one_moment() -> None:
    with pytest.raises(RequestError, match="share one time"):
        chronological(np.full(50, 7), (8, 1, 1))
    assert Chronological(valid_from=1, test_from=2).kind == "chronological"


@given(
    st.lists(st.tuples(st.integers(0, 8), st.integers(0, 8)), max_size=80),
    st.integers(1, 4),
    st.integers(1, 4),
    st.integers(1, 3),
)
@settings(max_examples=100, deadline=None)
def test_core_equals_removing_one_by_one(
    pairs: list[tuple[int, int]], user_core: int, item_core: int, n_buckets: int
) -> None:
    left = list(pairs)
    while True:
        users, items = [u for u, _ in left], [i for _, i in left]
        kept = [(u, i) for u, i in left if users.count(u) >= user_core and items.count(i) >= item_core]
        if kept == left:
            break
        left = kept
    parts = [[p for p in pairs if p[0] % n_buckets == b] for b in range(n_buckets)]
    buckets = [(np.asarray([u for u, _ in p], np.int32), np.asarray([i for _, i in p], np.int32)) for p in parts]
    alive = core_items(lambda: buckets, 9, user_core, item_core)
    found = [
        pair
        for part, arrays in zip(parts, buckets, strict=True)
        for pair, kept in zip(part, alive_events(arrays, alive, user_core), strict=True)
        if kept
    ]
    assert sorted(found) == sorted(left)
