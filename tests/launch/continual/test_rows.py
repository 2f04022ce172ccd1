"""Rows of a partition: which are used, held out and quarantined, against a plain loop; repeated requests against sets;
the lock; schemas and formats that are not ours.

Not checked: single faults (tests/data/test_feedback.py), the decisions that follow (test_cycle.py), speed.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import RequestError
from data.feedback import SCHEMA, day_start
from data.feedback_reading import find_faults
from data.responses import request_digests
from launch.continual.lock import writing
from launch.continual.log_folder import LogFolder, UnusableFile
from launch.continual.requests import RequestSorter
from launch.continual.rows import (
    HELD_OUT,
    QUARANTINE,
    REQUESTS,
    TRAIN,
    Before,
    RowReport,
    RowSettings,
    read_rows,
    split_second,
)
from launch.provenance import ROOT
from tests.launch.continual.world import CHECKS, days, finish_day, rows, write_file

(DAY,) = days(1)


def read(tmp_path: Path, name: str = "out", earlier: tuple[Path, ...] = ()) -> tuple[RowReport, Path]:
    log = LogFolder(str(tmp_path / "log"))
    out = tmp_path / name
    out.mkdir()
    listing = log.listing(DAY)
    report = read_rows(
        log, listing, listing.exposures, out, checks=CHECKS, settings=RowSettings(), before=Before(requests=earlier)
    )
    assert RowReport.read(out) == report
    return report, out


def ids(folder: Path) -> list[str]:
    found: list[str] = []
    for path in sorted(folder.glob("*.parquet")):
        found += pq.read_table(path)["request_id"].to_pylist()
    return found


def test_rows_are_used_held_out_or_quarantined(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    content = rows(DAY, random.permutation(400).tolist(), "v")
    for number in random.choice(400, 60, replace=False).tolist():
        change: dict[str, Any] = [
            {"logp0": [0.5]},
            {"exposed": [99]},
            {"request_id": content[0]["request_id"]},
            {"timestamp": 0},
        ][number % 4]
        content[number] |= change
    for number, part in enumerate((content[:150], content[150:150], content[150:])):
        write_file(tmp_path / "log", DAY, f"{number}.parquet", part)
    finish_day(tmp_path / "log", DAY)
    report, out = read(tmp_path)
    table = pa.Table.from_pylist(content, schema=SCHEMA)
    fault = find_faults(table, CHECKS, day_start_N=np.full(400, day_start(DAY)))
    usable = [one for one, found in zip(content, fault, strict=True) if not found]
    train, held = ids(out / TRAIN), ids(out / HELD_OUT)
    assert sorted(train + held) == sorted(one["request_id"] for one in usable)
    time = {one["request_id"]: one["timestamp"] for one in usable}
    assert max(time[name] for name in train) < min(time[name] for name in held)
    assert 0.05 * 400 < len(held) <= 0.1 * 400
    bad = pq.read_table(out / QUARANTINE)
    assert bad["fault"].to_pylist() == fault[fault != ""].tolist()
    assert {name: report.counts[name] for name in set(fault) - {""}} == {
        name: int((fault == name).sum()) for name in set(fault) - {""}
    }
    assert report.counts["rows"] == 400
    assert sum(report.files.values()) == len(usable)
    again, _ = read(tmp_path, "again", (out / REQUESTS,))
    assert again.counts["request_of_earlier_pass"] == again.counts["duplicate_request"]
    assert set(again.counts) == {"rows", "duplicate_request", "request_of_earlier_pass"}


@pytest.mark.parametrize("keep", [True, False])
def test_rows_of_retired_items_are_kept_for_anchors_and_weigh_nothing(tmp_path: Path, keep: bool) -> None:
    """Two active items shown as often as the retired one: their weights are 3/2, and 1 in the mean over all rows."""
    content = rows(DAY, range(300), "v", logp0=[float(np.log(1 / 3))])
    for number, one in enumerate(content):
        one["exposed"] = [number % 3]
    write_file(tmp_path / "log", DAY, "0.parquet", content)
    finish_day(tmp_path / "log", DAY)
    active_I = np.isin(np.arange(CHECKS.n_items), [0, 1])
    checks = dataclasses.replace(CHECKS, active_I=active_I, keep_retired=keep)
    log, out = LogFolder(str(tmp_path / "log")), tmp_path / "out"
    out.mkdir()
    listing = log.listing(DAY)
    report = read_rows(log, listing, listing.exposures, out, checks=checks, settings=RowSettings())
    used = 300 if keep else 200
    name = "retired_item_kept" if keep else "retired_item"
    assert report.counts["train"] + report.counts["held_out"] == used
    assert {count: n for count, n in report.counts.items() if "retired" in count} == {name: 100}
    assert report.mean_weight == pytest.approx(1.0 if keep else 1.5)


@settings(max_examples=60, deadline=None)
@given(
    st.lists(st.integers(0, 30), max_size=60),
    st.lists(st.lists(st.integers(0, 40), max_size=20), max_size=3),
    st.integers(1, 9),
)
def test_repeated_requests_are_those_of_a_set(
    tmp_path_factory: pytest.TempPathFactory, names: list[int], earlier: list[list[int]], bucket: int
) -> None:
    folder = tmp_path_factory.mktemp("requests")
    paths = []
    for number, before in enumerate(earlier):
        paths.append(folder / f"{number}.u64")
        with RequestSorter(folder, len(before), rows_per_bucket=2) as sorter:
            sorter.add(request_digests(pa.array(map(str, before), pa.string())))
            sorter.finish(paths[-1], [])
    with RequestSorter(folder, len(names), rows_per_bucket=bucket) as sorter:
        for first in range(0, len(names), 7):
            sorter.add(request_digests(pa.array(map(str, names[first : first + 7]), pa.string())))
        found = sorter.finish(folder / "own.u64", paths)
    known = {name for before in earlier for name in before}
    assert found.within_N.tolist() == [name in names[:at] for at, name in enumerate(names)]
    assert found.across_N.tolist() == [name in known for name in names]
    assert np.fromfile(folder / "own.u64", np.uint64).tolist() == sorted(
        request_digests(pa.array(map(str, names), pa.string())).tolist()
    )
    assert {path.suffix for path in folder.iterdir()} <= {".u64"}


@given(st.lists(st.integers(0, 5), min_size=1, max_size=12), st.floats(0.01, 0.9))
def test_the_last_seconds_are_held_out(count: list[int], share: float) -> None:
    second_S = np.array(count)
    first = split_second(second_S, share)
    if not sum(count):
        return
    held = sum(count[first:])
    last = max(second for second, rows in enumerate(count) if rows)
    assert held > 0
    assert held <= share * sum(count) or first == last
    larger = [sum(count[second:]) for second in range(first) if sum(count[second:]) > held]
    assert all(rows > share * sum(count) for rows in larger)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda table: table.drop_columns(["logp0"]), "column logp0 is absent"),
        (lambda table: table.set_column(2, "timestamp", table["timestamp"].cast(pa.int32())), "timestamp is int32"),
        (lambda table: table.replace_schema_metadata({}), "format None"),
        (lambda table: table.replace_schema_metadata({"windlass.feedback": '{"format": 9}'}), "format 9"),
    ],
)
def test_other_schemas_are_named(tmp_path: Path, change: Any, told: str) -> None:
    write_file(tmp_path / "log", DAY, "a.parquet", rows(DAY, range(3), "v"))
    path = tmp_path / "log" / f"day={DAY}" / "a.parquet"
    pq.write_table(change(pq.read_table(path)), path)
    with pytest.raises(UnusableFile, match=told):
        LogFolder(str(tmp_path / "log")).parquet(DAY, "a.parquet")


def test_a_log_by_uri(tmp_path: Path) -> None:
    write_file(tmp_path / "log", DAY, "a.parquet", rows(DAY, range(3), "v"))
    by_uri, by_path = LogFolder(f"file://{tmp_path}/log"), LogFolder(str(tmp_path / "log"))
    assert by_uri.days() == by_path.days() == [DAY]
    assert by_uri.facts(by_uri.listing(DAY), {}) == by_path.facts(by_path.listing(DAY), {})
    for wrong in (str(tmp_path / "none"), "nothing://x/y"):
        with pytest.raises(RequestError, match="--log"):
            LogFolder(wrong)


def test_one_process_writes_and_the_other_says_so(tmp_path: Path) -> None:
    lines = ("from pathlib import Path", "from launch.continual.lock import writing", "with writing(Path({!r})): pass")
    other = "\n".join(lines).format(str(tmp_path))
    with writing(tmp_path):
        refused = subprocess.run([sys.executable, "-c", other], cwd=ROOT, capture_output=True, text=True, check=False)
    assert "is being changed by process" in refused.stderr
    assert refused.returncode == 1
    assert subprocess.run([sys.executable, "-c", other], cwd=ROOT, check=False).returncode == 0
