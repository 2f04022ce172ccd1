"""Contract: what `append` and `join` returned for is there after any crash, whatever the last write left; responses
join by the largest, in any order and however often; late and unknown ones are told apart; a day is closed once, whole,
as readers and `windlass continual` want it; a disk that refuses loses nothing that was answered.

The disk is real, crashes are files cut at a byte. Killed processes: test_service.py.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import RequestError, RunError
from data.feedback import day_start, write_day
from data.feedback_reading import FeedbackChecks, read_feedback
from launch.continual.log_folder import CompletenessSettings, LogFolder, waits_for
from launch.serving.exposure_log import ExposureLog, Joined, Response, outcomes_by_kind
from launch.serving.request_ids import RequestIds, time_of

DAY = "2026-01-31"
NOON = day_start(DAY) + 43_200
WINDOW = 3600.0
CHECKS = FeedbackChecks(n_items=9, catalogues=frozenset({"c"}))


EVENTS = st.lists(st.tuples(st.integers(0, 2), st.integers(3, 4), st.sampled_from([0.0, 0.25, 1.0])), max_size=12)


class Clock:
    """A clock that a test sets."""

    def __init__(self, now: float = NOON) -> None:
        self.now = now

    def __call__(self) -> float:
        return self.now


def row(request_id: str, items: list[int] | None = None) -> dict[str, Any]:
    exposed = items or [3]
    return {
        "request_id": request_id,
        "user_id": 7,
        "timestamp": time_of(request_id),
        "history": [1, 2],
        "need": None,
        "candidates": None,
        "exposed": exposed,
        "logp0": [-1.5] * len(exposed),
        "propensity_kind": "sample",
        "policy_version": "000001-0123456789abcdef",
        "decode": "sample",
        "temperature": 1.0,
        "catalogue_digest": "c",
    }


def names(count: int, at: int = NOON, seed: int = 1) -> list[str]:
    ids = RequestIds(at * 1000, seed)
    return [ids.take(at)[0] for _ in range(count)]


def opened(root: Path, clock: Clock) -> ExposureLog:
    return ExposureLog(root, window_s=WINDOW, clock=clock)


def closed_responses(root: Path) -> dict[str, list[float]]:
    """Close all days as a new process would, and read the log."""
    assert opened(root, Clock(NOON + 10 * 86_400)).close_days()
    table = read_feedback(root, CHECKS).table
    return dict(zip(table["request_id"].to_pylist(), table["response"].to_pylist(), strict=True))


def test_a_day_is_closed_when_its_window_is_over(tmp_path: Path) -> None:
    clock = Clock()
    log = opened(tmp_path, clock)
    one, two = names(2)
    log.append([row(one), row(two, [4, 5])])
    assert log.join([Response(request_id=two, item=5, value=0.5)]) == [Joined.JOINED]
    clock.now = day_start(DAY) + 86_400 + WINDOW - 1
    assert log.close_days() == {}
    # The next day's requests go on meanwhile.
    other = names(1, at=int(clock.now))
    log.append([row(*other)])
    clock.now += 1
    assert log.close_days() == {DAY: 2}
    assert log.close_days() == {}
    assert log.open_requests == 1
    read = read_feedback(tmp_path, CHECKS)
    assert not any(read.counts.values())
    assert read.table["response"].to_pylist() == [[0.0], [0.0, 0.5]]
    assert json.loads((tmp_path / f"day={DAY}" / "_SUCCESS").read_text())["rows"] == {"part-00000.parquet": 2}
    folder = LogFolder(str(tmp_path))
    assert folder.days() == [DAY]
    rules = CompletenessSettings(response_window_s=WINDOW)
    assert waits_for(folder.listing(DAY), rules, clock.now) is None
    assert not list((tmp_path / ".serving" / "open").glob(f"*{DAY}*"))


@settings(max_examples=20, deadline=None)
@given(EVENTS, st.data())
def test_responses_join_by_the_largest(
    tmp_path_factory: pytest.TempPathFactory, events: list[tuple[int, int, float]], data: st.DataObject
) -> None:
    root = tmp_path_factory.mktemp("log")
    ids = names(3)
    log = opened(root, Clock())
    log.append([row(name, [3, 4]) for name in ids])
    again = events + data.draw(st.permutations(events))
    at = 0
    while at < len(again):
        size = data.draw(st.integers(1, 5))
        log.join([Response(request_id=ids[r], item=i, value=v) for r, i, v in again[at : at + size]])
        at += size
    found = closed_responses(root)
    for number, name in enumerate(ids):
        for slot, item in enumerate((3, 4)):
            values = [v for r, i, v in events if (r, i) == (number, item)]
            assert found[name][slot] == max(values, default=0.0)
    shutil.rmtree(root)


def test_outcomes_of_responses(tmp_path: Path) -> None:
    clock = Clock()
    log = opened(tmp_path, clock)
    one, two, never = names(3)
    log.append([row(one), row(two, [4, 5])])
    said = [
        Response(request_id=one, item=None, value=1.0),
        Response(request_id=one, item=3, value=1.0),
        Response(request_id=one, item=4, value=1.0),
        Response(request_id=two, item=None, value=1.0),
        Response(request_id=never, item=3, value=1.0),
        Response(request_id="17", item=3, value=1.0),
        Response(request_id="zz-1-2", item=3, value=1.0),
    ]
    assert log.join(said) == [
        Joined.JOINED,
        Joined.UNCHANGED,
        Joined.UNKNOWN_ITEM,
        Joined.UNKNOWN_ITEM,
        Joined.UNKNOWN_REQUEST,
        Joined.UNKNOWN_REQUEST,
        Joined.UNKNOWN_REQUEST,
    ]
    # While its day is open a response is in time, and afterwards it is kept beside the day.
    clock.now = NOON + 43_200 + WINDOW - 1
    assert log.join([Response(request_id=two, item=4, value=0.5)]) == [Joined.JOINED]
    clock.now += 1
    log.close_days()
    late = [Response(request_id=two, item=5, value=1.0), said[0], said[4]]
    assert log.join([*late, said[5]]) == [Joined.LATE, Joined.LATE, Joined.LATE, Joined.UNKNOWN_REQUEST]
    assert opened(tmp_path, clock).join(late[:1]) == [Joined.LATE]
    assert len(list((tmp_path / f"day={DAY}" / "responses").glob("*.parquet"))) == 2
    read = read_feedback(tmp_path, CHECKS)
    assert read.table["response"].to_pylist() == [[1.0], [0.5, 1.0]]
    assert read.counts["response_without_request"] == 1
    assert outcomes_by_kind([Joined.LATE])["late"] == 1


def test_a_crash_at_any_byte_loses_nothing_that_was_answered(tmp_path: Path) -> None:
    log = opened(tmp_path / "whole", Clock())
    one, two, three = names(3)
    sizes, path = [], tmp_path / "whole" / ".serving" / "open" / DAY / "00001.jsonl"
    for change in (
        lambda: log.append([row(one)]),
        lambda: log.join([Response(request_id=one, item=3, value=1.0)]),
        lambda: log.append([row(two), row(three)]),
    ):
        change()
        sizes.append(path.stat().st_size)
    content = path.read_bytes()
    for cut in range(sizes[0], len(content) + 1, 41):
        root = tmp_path / "cut"
        shutil.copytree(tmp_path / "whole", root)
        (root / ".serving" / "open" / DAY / "00001.jsonl").write_bytes(content[:cut])
        after = opened(root, Clock())
        # The next process writes on.
        (further,) = names(1, seed=2)
        after.append([row(further)])
        after.close()
        found = closed_responses(root)
        assert {one, further} <= set(found) <= {one, two, three, further}
        assert found[one] == [1.0 if cut >= sizes[1] - 1 else 0.0]
        assert (two in found) >= (cut >= sizes[2])
        shutil.rmtree(root)


def test_a_crash_between_the_day_and_its_lines(tmp_path: Path) -> None:
    log = opened(tmp_path, Clock())
    ids = names(3)
    log.append([row(name) for name in ids])
    lines = tmp_path / ".serving" / "open" / DAY
    shutil.copytree(lines, tmp_path / "kept")
    found = closed_responses(tmp_path)
    shutil.copytree(tmp_path / "kept", lines)
    again = opened(tmp_path, Clock(NOON + 10 * 86_400))
    assert again.open_requests == 0
    assert not lines.exists()
    assert again.close_days() == {}
    # A half-written day and a half-removed one of a crash are nothing.
    (tmp_path / f".day={DAY}.partial").mkdir()
    shutil.copytree(tmp_path / "kept", lines.with_name(f".{DAY}.deleted"))
    assert opened(tmp_path, Clock()).open_requests == 0
    assert set(found) == set(ids)


def test_a_day_that_somebody_else_wrote_is_refused(tmp_path: Path) -> None:
    first = opened(tmp_path, Clock())
    first.append([row(name) for name in names(2)])
    closed_responses(tmp_path)
    with pytest.raises(RunError, match="is closed, or was not written"):
        opened(tmp_path, Clock()).append([row(name) for name in names(1, seed=5)])
    other = opened(tmp_path / "other", Clock())
    other.append([row(name) for name in names(3, seed=9)])
    shutil.copytree(tmp_path / f"day={DAY}", tmp_path / "other" / f"day={DAY}")
    with pytest.raises(RequestError, match="lacks 3 requests"):
        opened(tmp_path / "other", Clock())


@pytest.mark.parametrize("call", ["write", "sync"])
def test_a_disk_that_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    log = opened(tmp_path, Clock())
    one, two, three = names(3)
    log.append([row(one)])

    def refuse(descriptor: int) -> None:
        if call == "write":
            os.pwrite(descriptor, b"half of a li", os.fstat(descriptor).st_size)
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("launch.serving.exposure_log.os.fdatasync", refuse)
        with pytest.raises(RunError, match="No space left"):
            log.append([row(two)])
        with pytest.raises(RunError, match="No space left"):
            log.join([Response(request_id=one, item=3, value=1.0)])
    assert log.open_requests == 1
    # Sent again, it is joined; and the next rows are sound.
    assert log.join([Response(request_id=one, item=3, value=1.0)]) == [Joined.JOINED]
    log.append([row(three)])
    assert closed_responses(tmp_path) == {one: [1.0], three: [0.0]}


def test_a_response_while_its_day_is_closed_is_sent_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the moment, a response that was taken is in the log."""
    clock = Clock()
    log = opened(tmp_path, clock)
    one, two = names(2)
    log.append([row(one), row(two)])
    clock.now = NOON + 2 * 86_400
    said = [Response(request_id=one, item=3, value=1.0)]
    refused = []

    def meanwhile(folder: Path, parts: Any) -> dict[str, int]:
        with pytest.raises(RunError, match="just being closed"):
            log.join(said)
        with pytest.raises(RunError, match="is closed"):
            log.append([row(names(1, seed=4)[0])])
        refused.append(folder.name)
        if len(refused) == 1:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write_day(folder, parts)

    monkeypatch.setattr("launch.serving.exposure_log.write_day", meanwhile)
    with pytest.raises(RunError, match="its requests stay open"):
        log.close_days()
    assert log.join([Response(request_id=two, item=3, value=0.5)]) == [Joined.JOINED]
    assert log.close_days() == {DAY: 2}
    assert log.join(said) == [Joined.LATE]
    assert read_feedback(tmp_path, CHECKS).table["response"].to_pylist() == [[1.0], [0.5]]


def test_damage_and_other_formats_stop_the_start(tmp_path: Path) -> None:
    log = opened(tmp_path, Clock())
    for name in names(3):
        log.append([row(name)])
    path = tmp_path / ".serving" / "open" / DAY / "00001.jsonl"
    content = path.read_bytes()
    path.write_bytes(content.replace(b"exposed", b"exposee", 1))
    with pytest.raises(RequestError, match="line 1"):
        opened(tmp_path, Clock())
    (tmp_path / ".serving" / "format.json").write_text('{"format": 2}')
    with pytest.raises(RequestError, match="format"):
        opened(tmp_path, Clock())


def test_time_never_goes_back(tmp_path: Path) -> None:
    clock = Clock()
    log = opened(tmp_path, clock)
    assert log.now() == NOON
    clock.now = NOON - 86_400
    assert log.now() == NOON
    log.append([row(*names(1))])
    assert opened(tmp_path, clock).now() == NOON
