"""Contract: every call of the ranker has the same number of rows, made of this call's samples; a bad sample fails alone
with its reason, a raising ranker fails its chunk, and nothing raises.

Not checked here: transport (test_client, test_service).
"""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from reward.batch_scoring import score_batch
from reward.popularity import PopularityRanker
from reward.wire import ScoreCall, ScoreReply
from tests.reward.rankers import FaultyRanker, PlainRanker, plain_scores


def arrays(rows: list[list[int]]) -> list[np.ndarray]:
    return [np.array(row, np.int32) for row in rows]


def test_every_ranker_call_has_the_fixed_number_of_rows() -> None:
    ranker = PlainRanker()
    histories, candidates = arrays([[i] for i in range(10)]), arrays([[i, i + 1] for i in range(10)])
    result = score_batch(ranker, histories, candidates, chunk=4)
    assert ranker.rows == [4, 4, 4]
    assert [row.tolist() for row in result.scores] == [row.tolist() for row in plain_scores(histories, candidates)]
    assert set(result.failure_N.tolist()) == {""}


def test_bad_samples_fail_alone_with_their_reason() -> None:
    histories = arrays([[1], [9001], [-3], [2], [9005]])
    candidates = arrays([[5], [5], [5], [-1], [5, 6]])
    result = score_batch(FaultyRanker(), histories, candidates, chunk=2)
    assert result.failure_N.tolist() == ["", "non_finite", "bad_request", "bad_request", "non_finite"]
    assert [len(row) for row in result.scores] == [1, 0, 0, 0, 0]
    beyond = score_batch(PopularityRanker(np.arange(6)), arrays([[1], [6], [1]]), arrays([[5], [5], [6]]), chunk=2)
    assert beyond.failure_N.tolist() == ["", "bad_request", "bad_request"]


def test_a_raising_or_short_ranker_fails_its_chunk_only() -> None:
    histories = arrays([[1], [2], [9002], [3], [4], [9003]])
    result = score_batch(FaultyRanker(), histories, arrays([[5, 6]] * 6), chunk=2)
    assert result.failure_N.tolist() == ["", "", "error", "error", "error", "error"]


def test_no_samples_and_no_candidates() -> None:
    assert score_batch(PlainRanker(), [], [], chunk=4).scores == []
    result = score_batch(PlainRanker(), arrays([[1]]), arrays([[]]), chunk=4)
    assert result.failure_N.tolist() == [""]
    assert len(result.scores[0]) == 0


ROWS = st.lists(st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5), max_size=6)


@settings(max_examples=100, deadline=None)
@given(ROWS, st.data())
def test_wire_format_keeps_ragged_lists(histories: list[list[int]], data: st.DataObject) -> None:
    lists = st.lists(st.integers(-(2**31), 2**31 - 1), max_size=5)
    candidates = [data.draw(lists) for _ in histories]
    call = ScoreCall.pack(arrays(histories), arrays(candidates))
    assert len(call) == len(histories)
    assert [row.tolist() for row in call.histories()] == histories
    assert [row.tolist() for row in call.candidates()] == candidates
    result = score_batch(PlainRanker(), call.histories(), call.candidates(), chunk=3)
    again = ScoreReply.pack(result).unpack()
    assert again.failure_N.tolist() == result.failure_N.tolist()
    assert [row.tobytes() for row in again.scores] == [row.tobytes() for row in result.scores]
