"""Two small files by which a running job and those who watch it speak: both may be on other machines.

status.json   written by the job after every step: where it is, its engines, its queues, its times
scale.json    written by `windlass scale`: how many engines somebody wants; read before every push

A new start of the job begins with its own `rollout.engines`: a wish that was made before is removed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import RequestError
from rollout.fleet import RolloutFleet
from trainer.durable import write_text

FORMAT = 1
STATUS = "status.json"
SCALE = "scale.json"
SHOWN = ("time/", "perf/", "queue/", "staleness/", "policy_gap/", "system/", "loss", "reward/mean")
"""Metrics of the last step that the status repeats."""


@dataclass(frozen=True, kw_only=True)
class StatusFile:
    """The job's side of both files."""

    run_dir: Path

    def begin(self) -> None:
        """Forget what an earlier start was asked for."""
        (self.run_dir / SCALE).unlink(missing_ok=True)

    def wanted_engines(self) -> int | None:
        """Engines that somebody asked this run for; None while nobody did."""
        if not (self.run_dir / SCALE).is_file():
            return None
        return read_wish(self.run_dir)

    def write(self, *, step: int, version: int | None, fleet: RolloutFleet | None, metrics: Mapping[str, Any]) -> None:
        """Say where the job is."""
        content = {
            "format": FORMAT,
            "time": time.time(),
            "host": os.uname().nodename,
            "pid": os.getpid(),
            "step": step,
            "weight_version": version,
            "engines_wanted": self.wanted_engines(),
            "engines": [] if fleet is None else engine_rows(fleet),
            "metrics": {name: value for name, value in metrics.items() if name.startswith(SHOWN)},
        }
        write_text(self.run_dir / STATUS, json.dumps(content, indent=1, default=str) + "\n")


def engine_rows(fleet: RolloutFleet) -> list[dict[str, Any]]:
    """One row for each engine."""
    now = time.monotonic()
    return [
        {
            "name": name,
            "state": engine.state.value,
            "incarnation": engine.incarnation,
            "weight_version": engine.version,
            "seconds": round(now - engine.since, 1),
            "reason": None if engine.reason is None else engine.reason.value,
            "shards": fleet.shards[name],
        }
        for name, engine in fleet.health.engines.items()
    ]


def write_wish(run_dir: Path, engines: int) -> None:
    """Ask the job of a run for so many engines."""
    write_text(run_dir / SCALE, json.dumps({"format": FORMAT, "engines": engines}) + "\n")


def read_wish(run_dir: Path) -> int:
    """What was asked for last.

    Raises:
        RequestError: the file is not one of `write_wish`.
    """
    content = read_file(run_dir / SCALE)
    engines = content.get("engines")
    if not isinstance(engines, int) or engines < 1:
        raise RequestError(f"{run_dir / SCALE}: engines", repr(engines), "an integer from 1")
    return engines


def read_file(path: Path) -> dict[str, Any]:
    """One of the two files.

    Raises:
        RequestError: absent, no JSON object, or of another format.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise RequestError(str(path), error.strerror or str(error), "the folder of a run that has begun") from error
    except ValueError as error:
        raise RequestError(str(path), f"is not JSON ({error})", "the file as windlass writes it") from error
    if not isinstance(content, dict) or content.get("format") != FORMAT:
        found = content.get("format") if isinstance(content, dict) else type(content).__name__
        raise RequestError(str(path), f"format {found!r}", f"format {FORMAT}")
    return content
