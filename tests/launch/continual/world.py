"""A feedback log with everything that happens to logs, and an updater that writes a file, for tests of the cycle.

The updated "weights" are the parent's with the request ids that were trained on, one line per update: a row that is
lost, trained on twice or by the wrong parent changes them.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import date, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from data.feedback import FORMAT, METADATA, SCHEMA, SUCCESS, day_start
from data.feedback_reading import FeedbackChecks, read_feedback
from launch.continual.cycle import Cycle, begin_registry
from launch.continual.files import Files
from launch.continual.guard import Condition, Evidence, GuardSettings, Range
from launch.continual.log_folder import LogFolder
from launch.continual.registry import Registry
from launch.continual.settings import ServiceSettings
from launch.continual.updating import Update

ITEMS = 8
CHECKS = FeedbackChecks(n_items=ITEMS, catalogues=frozenset({"catalogue"}))
NOW = float(day_start("2026-02-01"))
SETTINGS = ServiceSettings(guard=GuardSettings(conditions=(Condition(metric="response", limit=0.3, tolerance=0.1),)))
WEIGHTS = "model.safetensors"


def rows(day: str, numbers: Sequence[int], policy: str, **changes: Any) -> list[dict[str, Any]]:
    """Sound rows of a day, one second apart; half of them have a response."""
    first = {
        "user_id": 1,
        "history": [0],
        "need": None,
        "candidates": None,
        "exposed": [2],
        "logp0": [float(-np.log(ITEMS))],
        "propensity_kind": "sample",
        "policy_version": policy,
        "decode": "sample",
        "temperature": 1.0,
        "catalogue_digest": "catalogue",
    }
    return [
        first
        | {"request_id": f"{day}-{number}", "timestamp": day_start(day) + number, "response": [float(number % 2)]}
        | changes
        for number in numbers
    ]


def write_file(log: Path, day: str, name: str, content: list[dict[str, Any]]) -> None:
    """One Parquet file of a day."""
    folder = log / f"day={day}"
    folder.mkdir(parents=True, exist_ok=True)
    marked = SCHEMA.with_metadata({METADATA: json.dumps({"format": FORMAT})})
    pq.write_table(pa.Table.from_pylist(content, schema=marked), folder / name)


def finish_day(log: Path, day: str, promised: Mapping[str, int] | None = None) -> None:
    """Write `_SUCCESS`, with rows by file or as others do, empty."""
    folder = log / f"day={day}"
    folder.mkdir(parents=True, exist_ok=True)
    told = "" if promised is None else json.dumps({"format": FORMAT, "rows": dict(promised)})
    (folder / SUCCESS).write_text(told)


def days(count: int) -> list[str]:
    """Days from 2026-01-01 on."""
    return [(date(2026, 1, 1) + timedelta(days=number)).isoformat() for number in range(count)]


def write_log(log: Path, policy: str) -> None:
    """Five days: sound with a late file, inverted, with repeated requests, empty, and sound again after a gap."""
    one, two, three, four, _, six = days(6)
    write_file(log, one, "a.parquet", rows(one, range(40), policy))
    finish_day(log, one, {"a.parquet": 40})
    write_file(log, one, "late.parquet", rows(one, range(30, 60), policy))
    write_file(log, two, "a.parquet", rows(two, range(40), policy, response=[0.0]))
    finish_day(log, two)
    again = rows(one, range(2), policy, timestamp=day_start(three) + 3)
    write_file(log, three, "a.parquet", rows(three, range(20), policy))
    write_file(log, three, "b.parquet", rows(three, range(20, 59), policy) + rows(three, [5], policy) + again)
    finish_day(log, three)
    finish_day(log, four)
    write_file(log, six, "a.parquet", rows(six, range(40), policy))
    finish_day(log, six)


class StubUpdater:
    """Writes a file in place of training, in two steps."""

    def lacks(self, rows: int, responses: int) -> str:
        return "" if rows >= 20 else f"{rows} rows of 20"

    def checks(self, model: Path, versions: Sequence[Path]) -> FeedbackChecks:
        assert model in versions
        assert (model / WEIGHTS).is_file()
        return CHECKS

    def update(self, task: Update) -> Path:
        log = read_feedback(task.feedback, CHECKS)
        assert not any(log.counts.values()), log.counts
        ids = " ".join(sorted(log.table["request_id"].to_pylist()))
        model = task.work / "model"
        model.mkdir(parents=True, exist_ok=True)
        (model / "config.json").write_text("{}")
        (model / WEIGHTS).write_text((task.parent / WEIGHTS).read_text() + ids + "\n")
        return model

    def measure(
        self, candidate: Path, parent: Path, held_out: Path, trained: Path, wanted: Sequence[tuple[str, float]]
    ) -> Mapping[tuple[str, float], Evidence]:
        log = read_feedback(held_out, CHECKS)
        trained = (candidate / WEIGHTS).read_text().split()
        assert not set(log.table["request_id"].to_pylist()) & set(trained)
        mean = float(log.anchors().response_N.mean())
        exact = Range(value=mean, low=mean, high=mean)
        return {
            (metric, confidence): Evidence(
                candidate=exact,
                parent=exact,
                difference=Range(value=0, low=0, high=0),
                confidence=confidence,
                n=len(log),
            )
            for metric, confidence in wanted
        }

    def describe(self) -> dict[str, Any]:
        return {"updater": "stub"}


def first_model(folder: Path) -> Path:
    """The model that is served first."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / WEIGHTS).write_text("first\n")
    return folder


def first_name(folder: Path) -> str:
    """What rows call the first version: it depends on its files alone."""
    registry = Registry(folder / "naming", create=True)
    begin_registry(registry, first_model(folder / "model"), at=0.0)
    return registry.version(1).name


def cycle(
    log: Path,
    root: Path,
    model: Path,
    *,
    files: Files | None = None,
    settings: ServiceSettings = SETTINGS,
    now: float = NOW,
) -> Cycle:
    """A cycle over a log with a registry that serves the first model, as a new process would make it."""
    files = files or Files()
    registry = Registry(root, files, create=True)
    begin_registry(registry, model, at=0.0)
    return Cycle(LogFolder(str(log)), registry, StubUpdater(), settings, clock=lambda: now, files=files)


def content(root: Path) -> dict[str, Any]:
    """Every file and link below a folder."""
    found: dict[str, Any] = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"-> {path.readlink()}"
        elif path.is_file():
            found[name] = path.read_bytes()
        else:
            found[name] = "folder"
    return found
