"""Contract: a log comes back as it was written, day by day; every bad row is left out with the first reason that a
plain loop over the rows finds as well; incomplete, damaged and foreign days are refused by name.

Not checked here: who writes such logs (tests/launch/test_simulation.py), and what is learned from them.
"""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.catalogue import Catalogue
from data.errors import RequestError
from data.feedback import (
    DAY_SECONDS,
    FIRST_SECOND,
    LAST_SECOND,
    SCHEMA,
    SUCCESS,
    FeedbackLog,
    PropensityKind,
    day_of,
    single_item_log,
    write_feedback,
)
from data.feedback_reading import EXPECTED, FeedbackChecks, FeedbackFault, complete_days, find_faults, read_feedback
from data.prompts import PromptBuilder
from data.records import Decode

ITEMS = 6
ACTIVE = np.array([True, True, True, True, True, False])
CHECKS = FeedbackChecks(
    n_items=ITEMS, active_I=ACTIVE, catalogues=frozenset({"c", "d"}), policies=frozenset({"v", "v1"})
)
GOOD: dict[str, Any] = {
    "request_id": "r",
    "user_id": 3,
    "timestamp": 100_000,
    "history": [0, 1],
    "need": None,
    "candidates": None,
    "exposed": [2],
    "response": [1.0],
    "logp0": [-0.5],
    "propensity_kind": "sample",
    "policy_version": "v1",
    "decode": "sample",
    "temperature": 1.0,
    "catalogue_digest": "c",
}


def table(*rows: dict[str, Any]) -> pa.Table:
    """Rows that differ from a good one as told; request ids are made distinct unless given."""
    return pa.Table.from_pylist([GOOD | {"request_id": f"r{i}"} | row for i, row in enumerate(rows)], schema=SCHEMA)


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({}, ""),
        ({"history": []}, ""),
        ({"candidates": [5, 2]}, ""),
        ({"propensity_kind": "mixture", "decode": "beam"}, ""),
        ({"logp0": [0.0]}, ""),
        ({"response": [0.25]}, ""),
        ({"request_id": None}, FeedbackFault.MISSING_REQUEST_ID),
        ({"request_id": "r0"}, FeedbackFault.DUPLICATE_REQUEST),
        ({"user_id": None}, FeedbackFault.MISSING_USER),
        ({"timestamp": None}, FeedbackFault.WRONG_DAY),
        ({"exposed": []}, FeedbackFault.UNEVEN_LISTS),
        ({"exposed": None}, FeedbackFault.UNEVEN_LISTS),
        ({"response": [1.0, 0.0]}, FeedbackFault.UNEVEN_LISTS),
        ({"history": None}, FeedbackFault.BAD_HISTORY),
        ({"history": [1, None]}, FeedbackFault.BAD_HISTORY),
        ({"policy_version": None}, FeedbackFault.MISSING_POLICY_VERSION),
        ({"policy_version": ""}, FeedbackFault.MISSING_POLICY_VERSION),
        ({"policy_version": "v2"}, FeedbackFault.UNKNOWN_POLICY),
        ({"catalogue_digest": None}, FeedbackFault.MISSING_CATALOGUE),
        ({"catalogue_digest": "e"}, FeedbackFault.FOREIGN_CATALOGUE),
        ({"decode": "greedy"}, FeedbackFault.UNKNOWN_DECODE),
        ({"propensity_kind": None}, FeedbackFault.UNKNOWN_PROPENSITY_KIND),
        ({"temperature": 0.0}, FeedbackFault.BAD_TEMPERATURE),
        ({"temperature": None}, FeedbackFault.BAD_TEMPERATURE),
        ({"logp0": [None]}, FeedbackFault.MISSING_PROPENSITY),
        ({"logp0": [math.nan]}, FeedbackFault.MISSING_PROPENSITY),
        ({"logp0": [-math.inf]}, FeedbackFault.ZERO_PROPENSITY),
        ({"logp0": [1e-3]}, FeedbackFault.POSITIVE_LOG_PROPENSITY),
        ({"logp0": [math.inf]}, FeedbackFault.POSITIVE_LOG_PROPENSITY),
        ({"response": [1.5]}, FeedbackFault.BAD_RESPONSE),
        ({"response": [-1.0]}, FeedbackFault.BAD_RESPONSE),
        ({"response": [math.nan]}, FeedbackFault.BAD_RESPONSE),
        ({"exposed": [6]}, FeedbackFault.UNKNOWN_ITEM),
        ({"exposed": [-1]}, FeedbackFault.UNKNOWN_ITEM),
        ({"candidates": []}, FeedbackFault.NOT_A_CANDIDATE),
        ({"candidates": [1, 3]}, FeedbackFault.NOT_A_CANDIDATE),
        ({"exposed": [5]}, FeedbackFault.RETIRED_ITEM),
        ({"propensity_kind": "none", "decode": "beam"}, FeedbackFault.BEAM_EXPOSURE),
        ({"propensity_kind": "sample", "decode": "beam"}, FeedbackFault.BEAM_EXPOSURE),
    ],
)
def test_each_fault_has_its_reason_and_spares_its_neighbours(change: dict[str, Any], fault: str) -> None:
    assert find_faults(table({}, change, {}), CHECKS).tolist() == ["", fault, ""]


def test_beams_are_of_use_where_no_propensity_is_asked_for() -> None:
    rows = table({"propensity_kind": "none", "decode": "beam"})
    assert find_faults(rows, FeedbackChecks(n_items=ITEMS, propensities=False)).tolist() == [""]


def plain_fault(row: dict[str, Any], seen: set[str], day_start: int) -> str:
    """The same checks, a row at a time."""
    exposed, response, logp0 = (row[name] or [] for name in ("exposed", "response", "logp0"))
    deterministic = row["propensity_kind"] == "none" or (row["decode"], row["propensity_kind"]) == ("beam", "sample")
    deterministic |= (row["decode"], row["propensity_kind"]) == ("beam", "given")
    wrong = [
        not row["request_id"],
        row["request_id"] in seen,
        row["user_id"] is None,
        row["timestamp"] is None or not day_start <= row["timestamp"] < day_start + 86_400,
        not (0 < len(exposed) == len(response) == len(logp0)),
        row["history"] is None or None in row["history"],
        not row["policy_version"],
        row["policy_version"] not in ("v", "v1"),
        not row["catalogue_digest"],
        row["catalogue_digest"] not in ("c", "d"),
        row["decode"] not in list(Decode),
        row["propensity_kind"] not in list(PropensityKind),
        row["temperature"] is None or not 0 < row["temperature"] < math.inf,
        any(p is None or math.isnan(p) for p in logp0),
        any(p == -math.inf for p in logp0),
        any(p > 0 for p in logp0 if p is not None),
        any(r is None or not 0 <= r <= 1 for r in response),
        any(item is None or not 0 <= item < ITEMS for item in exposed),
        row["candidates"] is not None and any(item not in row["candidates"] for item in exposed),
        any(item == 5 for item in exposed),
        deterministic,
    ]
    # A null item is no item, so it is in no list of candidates either.
    reasons = [fault.value for fault, found in zip(FeedbackFault, wrong, strict=True) if found]
    return reasons[0] if reasons else ""


def mostly(good: st.SearchStrategy[Any], bad: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    return st.integers(0, 9).flatmap(lambda draw: bad if draw == 0 else good)


NUMBER = st.sampled_from([0.0, 1.0, 0.5, -0.5, -3.0, 1.5, math.nan, math.inf, -math.inf, None])
ITEM = mostly(st.integers(0, 4), st.sampled_from([-1, 5, 6, 7, None]))


@st.composite
def rows(draw: st.DrawFn) -> dict[str, Any]:
    width = draw(mostly(st.just(1), st.integers(0, 3)))
    return {
        "request_id": draw(mostly(st.integers(0, 10**6).map(str), st.sampled_from(["0", "", None]))),
        "user_id": draw(mostly(st.integers(0, 9), st.none())),
        "timestamp": draw(mostly(st.integers(86_400, 2 * 86_400 - 1), st.sampled_from([0, 2 * 86_400, None]))),
        "history": draw(mostly(st.lists(st.integers(0, 5)), st.sampled_from([None, [None], [9]]))),
        "need": draw(st.sampled_from([None, "", "a need"])),
        "candidates": draw(mostly(st.none(), st.lists(st.integers(-1, 6), max_size=5))),
        "exposed": draw(mostly(st.lists(ITEM, min_size=width, max_size=width), st.sampled_from([None, []]))),
        "response": draw(st.lists(mostly(st.sampled_from([0.0, 1.0]), NUMBER), min_size=width, max_size=width)),
        "logp0": draw(st.lists(mostly(st.sampled_from([-0.5, -3.0]), NUMBER), min_size=width, max_size=width)),
        "propensity_kind": draw(
            mostly(st.sampled_from(["sample", "mixture", "given"]), st.sampled_from(["none", "", None]))
        ),
        "policy_version": draw(mostly(st.just("v"), st.sampled_from(["", "w", None]))),
        "decode": draw(mostly(st.just("sample"), st.sampled_from(["beam", "other", None]))),
        "temperature": draw(mostly(st.just(0.5), NUMBER)),
        "catalogue_digest": draw(mostly(st.sampled_from("cd"), st.sampled_from(["", "e", None]))),
    }


@settings(max_examples=150, deadline=None)
@given(st.lists(rows(), max_size=8), st.integers(0, 2))
def test_random_tables_get_the_reasons_of_a_plain_loop(content: list[dict[str, Any]], offset: int) -> None:
    made = pa.Table.from_pylist(content, schema=SCHEMA)
    # A table that begins elsewhere in its buffers, as slices do.
    longer = pa.concat_tables([pa.Table.from_pylist([GOOD] * offset, schema=SCHEMA), made])
    found = find_faults(longer.slice(offset), CHECKS, day_start_N=np.full(len(content), 86_400))
    seen: set[str] = set()
    expected = []
    for row in made.to_pylist():
        expected.append(plain_fault(row, seen, 86_400))
        seen.add(row["request_id"] or "")
    assert found.tolist() == expected


@settings(max_examples=30, deadline=None)
@given(content=st.lists(rows(), min_size=1, max_size=8), size=st.integers(1, 4))
def test_what_is_read_is_what_was_written_without_the_faulty_rows(
    tmp_path_factory: pytest.TempPathFactory, content: list[dict[str, Any]], size: int
) -> None:
    folder = tmp_path_factory.mktemp("log")
    content = [row | {"timestamp": row["timestamp"] or 0, "temperature": row["temperature"] or 1.0} for row in content]
    written = pa.Table.from_pylist(content, schema=SCHEMA)
    days = write_feedback(folder, written, rows_per_file=size)
    assert sum(days.values()) == len(content)
    checks = FeedbackChecks(n_items=ITEMS, active_I=ACTIVE, max_bad_share=1.0)
    # The log has its days in order; within a day rows stand as they were written.
    by_day = written.take(pa.array(np.argsort(written["timestamp"].to_numpy() // DAY_SECONDS, kind="stable")))
    fault = find_faults(by_day, checks)
    if (fault != "").all():
        with pytest.raises(RequestError, match="can be used"):
            read_feedback(folder, checks)
        return
    log = read_feedback(folder, checks)
    sound = by_day.filter(pa.array(fault == ""))
    by_time = sound.take(pa.array(np.argsort(sound["timestamp"].to_numpy(), kind="stable")))
    assert str(log.table.to_pylist()) == str(by_time.to_pylist())
    assert log.counts == {reason.value: int((fault == reason.value).sum()) for reason in FeedbackFault}
    assert len(log) + sum(log.counts.values()) == len(content)


def test_too_many_bad_rows_stop_and_expected_ones_do_not(tmp_path: Path) -> None:
    write_feedback(tmp_path / "bad", table({}, {"logp0": [0.5]}))
    with pytest.raises(RequestError, match=r"1 of 2 rows are bad \(1 positive_log_propensity\).*at most 5%"):
        read_feedback(tmp_path / "bad", CHECKS)
    write_feedback(tmp_path / "retired", table({}, {"exposed": [5]}))
    log = read_feedback(tmp_path / "retired", CHECKS)
    assert (len(log), log.counts["retired_item"], log.kept) == (1, 1, {"retired_item_kept": 0})
    write_feedback(tmp_path / "beams", table({"propensity_kind": "none", "decode": "beam"}))
    with pytest.raises(RequestError, match=r"none of 1 rows can be used \(1 beam_exposure\)"):
        read_feedback(tmp_path / "beams", CHECKS)
    assert FeedbackFault.BEAM_EXPOSURE in EXPECTED


def test_rows_of_retired_items_can_be_kept_and_are_counted(tmp_path: Path) -> None:
    content = [{}, {"exposed": [5]}, {"exposed": [2, 5], "response": [0.0, 1.0], "logp0": [-1.0, -1.0]}]
    written = table(*content, {"exposed": [5], "policy_version": "v2"}, *[{}] * 30)
    write_feedback(tmp_path, written)
    log = read_feedback(tmp_path, dataclasses.replace(CHECKS, keep_retired=True))
    assert log.kept == {"retired_item_kept": 2}
    assert {name: count for name, count in log.counts.items() if count} == {"unknown_policy": 1}
    assert log.anchors().item_N.tolist() == [2, 5, 2, *[2] * 30]
    dropped = read_feedback(tmp_path, CHECKS)
    assert dropped.kept == {"retired_item_kept": 0}
    assert dropped.counts["retired_item"] == 2


def test_days_are_utc_and_can_be_chosen(tmp_path: Path) -> None:
    write_feedback(tmp_path, table({"timestamp": 86_399}, {"timestamp": 86_400}, {"timestamp": -1}))
    assert complete_days(tmp_path) == ["1969-12-31", "1970-01-01", "1970-01-02"]
    log = read_feedback(tmp_path, CHECKS, first_day="1970-01-01", last_day="1970-01-01")
    assert log.table["request_id"].to_pylist() == ["r0"]
    with pytest.raises(RequestError, match="days 1969-12-31 to 1970-01-02"):
        read_feedback(tmp_path, CHECKS, first_day="1971-01-01")
    with pytest.raises(RequestError, match="YYYY-MM-DD"):
        read_feedback(tmp_path, CHECKS, first_day="yesterday")
    for found in ("", "NaT", "1970-1-1", "19700101", "1970-02-30"):
        (tmp_path / f"day={found}").mkdir()
        with pytest.raises(RequestError, match="not a day"):
            complete_days(tmp_path)
        (tmp_path / f"day={found}").rmdir()
    assert day_of(86_400) == "1970-01-02"


def test_a_file_is_no_place_for_a_log(tmp_path: Path) -> None:
    (tmp_path / "log").write_text("")
    with pytest.raises(RequestError, match="is no folder"):
        write_feedback(tmp_path / "log", table({"timestamp": 0}))


@pytest.mark.parametrize("time", [1_600_000_000_000, 2**62, -(2**62)])
def test_times_that_are_no_seconds_are_refused(time: int, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="seconds since 1970"):
        write_feedback(tmp_path, table({"timestamp": 0}, {"timestamp": time}))
    assert not list(tmp_path.iterdir())
    assert (day_of(FIRST_SECOND), day_of(LAST_SECOND)) == ("0001-01-01", "9999-12-31")


def test_a_day_is_written_once_and_refused_before_anything_is_written(tmp_path: Path) -> None:
    write_feedback(tmp_path, table({"timestamp": 0}))
    with pytest.raises(RequestError, match="is there already"):
        write_feedback(tmp_path, table({"timestamp": 0}, {"timestamp": 86_400}))
    assert complete_days(tmp_path) == ["1970-01-01"]
    with pytest.raises(RequestError, match="1 rows without"):
        write_feedback(tmp_path, table({"timestamp": None}))
    with pytest.raises(RequestError, match="columns of"):
        write_feedback(tmp_path, table({}).drop_columns(["need"]))


def test_damaged_days_are_refused_by_name(tmp_path: Path) -> None:
    write_feedback(tmp_path, table({}, {}), rows_per_file=1)
    day = next(tmp_path.glob("day=*"))
    part, done = day / "part-00001.parquet", day / SUCCESS
    marked, sound = done.read_text(), part.read_bytes()

    def refused(words: str) -> None:
        with pytest.raises(RequestError, match=words):
            read_feedback(tmp_path, CHECKS)

    part.unlink()
    refused("as _SUCCESS says")
    part.write_bytes(sound[:50])
    refused("not readable as Parquet")
    pq.write_table(table({}), part)
    refused("format None")
    pq.write_table(pq.ParquetFile(day / "part-00000.parquet").read().slice(0, 0), part)
    refused("0 rows")
    part.write_bytes(sound)
    done.write_text(json.dumps({"format": 99}))
    refused("format 99")
    done.write_text("{")
    refused("cannot be read")
    done.unlink()
    refused("no _SUCCESS")
    done.write_text(marked)
    assert len(read_feedback(tmp_path, CHECKS)) == 2
    (tmp_path / "day=1970-02-30").mkdir()
    refused("not a day")


def test_rows_filed_under_another_day_are_left_out(tmp_path: Path) -> None:
    write_feedback(tmp_path, table({"timestamp": 5}, {"timestamp": 6}))
    (tmp_path / "day=1970-01-01").rename(tmp_path / "day=1970-01-09")
    with pytest.raises(RequestError, match="2 wrong_day"):
        read_feedback(tmp_path, CHECKS)


def test_a_log_gives_anchors_and_the_prompts_that_were_served() -> None:
    catalogue = Catalogue.from_codes([[0, item] for item in range(ITEMS)])
    log = single_item_log(
        request_id=["b", "a"],
        user_id_N=np.array([1, 2], np.int32),
        timestamp_N=np.array([9, 4]),
        history=[np.array([3, 0, 1], np.int32), np.zeros(0, np.int32)],
        exposed_N=np.array([2, 4], np.int32),
        response_N=np.array([1, 0], np.float32),
        logp0_N=np.array([-1, -2], np.float32),
        propensity_kind=PropensityKind.SAMPLE,
        policy_version="v",
        decode=["sample", "sample"],
        temperature=1.0,
        catalogue_digest="c",
    )
    assert find_faults(log.table, CHECKS).tolist() == ["", ""]
    anchors = log.anchors()
    assert anchors.item_N.tolist() == [4, 2]
    assert anchors.response_N.tolist() == [0, 1]
    assert anchors.logp0_N.tolist() == [-2, -1]
    prompts = PromptBuilder(catalogue, history=2, exclude_seen=True, max_prompt_tokens=9).build(log.samples()).prompts
    assert [prompt.history.tolist() for prompt in prompts] == [[], [0, 1]]
    assert prompts[1].exclusions.tolist() == [0, 1, 3]
    assert [prompt.target for prompt in prompts] == [4, 2]


def test_the_first_of_several_items_is_the_anchor() -> None:
    rows = table({}, {"exposed": [1, 2], "response": [0.0, 1.0], "logp0": [-1.0, -2.0]})
    assert find_faults(rows, CHECKS).tolist() == ["", ""]
    log = FeedbackLog(table=rows, counts={})
    first, anchors = rows.slice(0, 1), log.anchors()
    assert anchors.item_N.tolist() == [first["exposed"].to_pylist()[0][0], 1]
    assert anchors.response_N.tolist()[1] == 0.0
    assert anchors.logp0_N.tolist()[1] == -1.0
    assert log.later_items == 1
    nothing = table({"exposed": [], "response": [], "logp0": []})
    with pytest.raises(RequestError, match="1 of 1 requests"):
        FeedbackLog(table=nothing, counts={}).anchors()
