"""Contract: responses that came later are joined to the exposures of their day as a plain loop would do it; of several
the largest counts; what cannot be joined is counted; a file appears whole or not at all; other formats are refused.

Not checked here: what a day that was trained on already does with them (tests/launch/continual/test_late_responses.py).
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import RequestError
from data.feedback import SCHEMA, day_start, write_feedback
from data.feedback_reading import FeedbackChecks, read_feedback
from data.responses import (
    RESPONSES,
    Responses,
    packed,
    read_responses,
    request_digests,
    responses_table,
    write_responses,
)

DAY = "2026-01-31"
START = day_start(DAY)


def exposure(request: str | None, exposed: list[int] | None, response: list[float | None] | None) -> dict[str, Any]:
    return {
        "request_id": request,
        "user_id": 1,
        "timestamp": START + 5,
        "history": [0],
        "exposed": exposed,
        "response": response,
        "logp0": None if exposed is None else [-1.0] * len(exposed),
        "propensity_kind": "sample",
        "policy_version": "v",
        "decode": "sample",
        "temperature": 1.0,
        "catalogue_digest": "c",
    }


Exposure = st.tuples(
    st.sampled_from("abcdef"),
    st.lists(st.integers(0, 3), max_size=3, unique=True),
    st.one_of(st.none(), st.lists(st.sampled_from([0.0, 0.5, 1.0, None]), max_size=3)),
)
Response = st.tuples(st.sampled_from("abcdefgh"), st.integers(0, 4), st.sampled_from([0.0, 0.25, 0.75, 1.0, 2.0]))


@settings(max_examples=300, deadline=None)
@given(st.lists(Exposure, max_size=12), st.lists(Response, max_size=12), st.integers(1, 5))
def test_joining_is_the_plain_loop(
    exposures: list[tuple[str, list[int], list[float | None] | None]],
    answers: list[tuple[str, int, float]],
    batch: int,
) -> None:
    rows = [exposure(*one) for one in exposures]
    table = pa.Table.from_pylist(rows, schema=SCHEMA)
    pair_R, faults = packed(responses_table([(*one, START) for one in answers]), (0.0, 1.0))
    responses = Responses.of(pair_R)
    found: list[Any] = []
    for first in range(0, len(rows), batch):
        part = table.slice(first, batch)
        digests = request_digests(part["request_id"].combine_chunks())
        found += responses.join(part, digests)["response"].to_pylist()
    sound = [one for one in answers if one[2] <= 1]
    assert faults == Counter({"bad_late_response": len(answers) - len(sound)} if len(answers) > len(sound) else {})
    for (request, exposed, own), joined in zip(exposures, found, strict=True):
        if own is None or len(own) != len(exposed):
            assert joined == own
            continue
        for item, before, after in zip(exposed, own, joined, strict=True):
            values = [value for name, shown, value in sound if (name, shown) == (request, item)]
            known = [*values, *([] if before is None else [before])]
            assert after == (max(known) if known else None)
    names = {request for request, _, _ in exposures}
    assert responses.without_request == sum(name not in names for name, _, _ in sound)


def test_readers_of_a_log_see_the_responses(tmp_path: Path) -> None:
    rows = [exposure(f"r{row}", [row], [0.0]) for row in range(4)]
    write_feedback(tmp_path, pa.Table.from_pylist(rows, schema=SCHEMA))
    day = tmp_path / f"day={DAY}"
    checks = FeedbackChecks(n_items=9)
    assert read_feedback(tmp_path, checks).anchors().response_N.tolist() == [0, 0, 0, 0]
    write_responses(day, "part-0", responses_table([("r1", 1, 1.0, START + 9), ("r1", 1, 0.5, START), ("r2", 7, 1, 0)]))
    write_responses(day, "part-1", responses_table([("r3", 3, 0.25, START + 90_000), ("x", 1, 1.0, START)]))
    (day / "responses" / ".part-2.parquet.partial").write_bytes(b"PAR1")
    log = read_feedback(tmp_path, checks)
    assert log.anchors().response_N.tolist() == [0, 1, 0, 0.25]
    _, counts = read_responses(day)
    assert not counts


def test_responses_that_cannot_be_joined_are_counted() -> None:
    table = pa.table(
        [
            pa.array(["a", None, "", "b", "c", "a"]),
            pa.array([1, 1, 1, None, 1, 9], pa.int32()),
            pa.array([1, 1, 1, 1, float("nan"), 1], pa.float32()),
            pa.array([0] * 6, pa.int64()),
        ],
        schema=RESPONSES,
    )
    pair_R, faults = packed(table, (0.0, 1.0))
    assert faults == {"missing_response_field": 3, "bad_late_response": 1}
    responses = Responses.of(pair_R)
    exposures = pa.Table.from_pylist([exposure("a", [1], [0.0])], schema=SCHEMA)
    digests = request_digests(exposures["request_id"].combine_chunks())
    responses.join(exposures, digests)
    responses.join(exposures, digests)
    assert responses.counts() == {"item_not_shown": 1}


def test_other_files_are_refused(tmp_path: Path) -> None:
    table = responses_table([("r", 1, 1.0, 0)])
    path = write_responses(tmp_path, "part-0", table)
    with pytest.raises(RequestError, match="is there already"):
        write_responses(tmp_path, "part-0", table)
    with pytest.raises(RequestError, match="responses: schema"):
        write_responses(tmp_path, "part-1", table.drop_columns(["item_id"]))
    pq.write_table(table, path)
    with pytest.raises(RequestError, match="format None"):
        read_responses(tmp_path)
