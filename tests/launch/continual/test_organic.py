"""Organic interactions: what the first one after a request is, against a plain walk over a known course of events, and
the rules for histories that were cut and for what an exposure may have caused.
"""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.feedback import FeedbackLog, PropensityKind, single_item_log
from launch.continual.organic import organic_samples

Row = tuple[int, list[int], int, float]
"""User, history, shown item, response."""


def make_log(rows: list[Row]) -> FeedbackLog:
    user, history, item, response = zip(*rows, strict=True)
    count = len(rows)
    return single_item_log(
        request_id=[str(number) for number in range(count)],
        user_id_N=np.array(user, np.int32),
        timestamp_N=np.arange(count, dtype=np.int64),
        history=[np.array(items, np.int32) for items in history],
        exposed_N=np.array(item, np.int32),
        response_N=np.array(response, np.float32),
        logp0_N=np.full(count, -1.0, np.float32),
        propensity_kind=PropensityKind.SAMPLE,
        policy_version="p",
        decode=["sample"] * count,
        temperature=1.0,
        catalogue_digest="c",
    )


def organic(rows: list[Row]) -> dict[int, int]:
    """Targets by row."""
    samples = organic_samples(make_log(rows))
    return dict(zip(samples.sample_id_N.tolist(), samples.target_N.tolist(), strict=True))


def test_the_next_request_tells_what_came_in_between() -> None:
    rows: list[Row] = [(1, [5], 9, 0.0), (2, [5], 9, 0.0), (1, [5, 6, 7], 9, 0.0), (1, [5, 6, 7, 8], 9, 1.0)]
    assert organic(rows) == {0: 6, 2: 8}


def test_an_item_that_was_shown_with_a_response_is_not_organic() -> None:
    assert organic([(1, [5], 6, 1.0), (1, [5, 6, 7], 9, 0.0)]) == {0: 7}
    assert organic([(1, [5], 6, 1.0), (1, [5, 6], 7, 1.0), (1, [5, 6, 7, 8], 9, 0.0)]) == {0: 8, 1: 8}
    assert organic([(1, [5], 6, 1.0), (1, [5, 6], 9, 0.0)]) == {}
    # Shown without a response: the user came to it alone.
    assert organic([(1, [5], 6, 0.0), (1, [5, 6], 9, 0.0)]) == {0: 6}


def test_histories_that_do_not_go_on_tell_nothing() -> None:
    assert organic([(1, [5, 6], 9, 0.0), (1, [6, 7], 9, 0.0)]) == {}
    assert organic([(1, [5, 6], 9, 0.0), (1, [5], 9, 0.0)]) == {}
    assert organic([(1, [5], 9, 0.0)]) == {}


COURSE = st.lists(st.tuples(st.integers(0, 2), st.integers(0, 4), st.booleans()), min_size=1, max_size=30)


@settings(max_examples=200, deadline=None)
@given(COURSE, st.data())
def test_targets_equal_a_plain_walk(course: list[tuple[int, int, bool]], data: st.DataObject) -> None:
    """Users take items and are asked now and then; nobody responds."""
    past: dict[int, list[int]] = {}
    rows: list[Row] = []
    taken: list[tuple[int, int, int]] = []
    for user, item, asked in course:
        if asked:
            rows.append((user, list(past.get(user, [])), 99, 0.0))
        else:
            taken.append((len(rows), user, item))
            past.setdefault(user, []).append(item)
    if not rows:
        return
    expected = {}
    for row, (user, _, _, _) in enumerate(rows):
        last = max(number for number, other in enumerate(rows) if other[0] == user)
        after = [item for number, who, item in taken if who == user and row < number <= last]
        if after:
            expected[row] = after[0]
    assert organic(rows) == expected
