"""`windlass status` and `windlass scale`: look at a run and change its number of engines.

Both work from any machine that sees the run's folder. A job that runs holds the folder's lock; what it says of itself
lies in status.json (`trainer.run_status`).
"""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import Annotated, Any

import tyro

from data.errors import RequestError, RunError
from launch.run_directory import SUMMARY, read_json
from rollout.fleet_health import EngineState
from trainer.checkpoints import latest_checkpoint
from trainer.run_status import STATUS, read_file, write_wish

POLL_S = 0.5


def status_command(run: Annotated[Path, tyro.conf.Positional]) -> dict[str, Any]:
    """Where a run is: its step, its engines and their states, its queues, and the times of its last step.

    Args:
        run: the run's folder.
    """
    told = status(run)
    print("\n".join(words(told)))
    return told


def scale_command(run: Annotated[Path, tyro.conf.Positional], /, engines: int, wait_s: float = 0.0) -> dict[str, Any]:
    """Change the number of engines of a running job.

    Newcomers come up beside the work and are asked after the first push to them was verified; who leaves is ended
    before the next push.

    Args:
        run: the run's folder.
        engines: how many there are to be.
        wait_s: seconds to wait until so many are healthy; 0 only asks.
    """
    if engines < 1:
        raise RequestError("--engines", engines, "1 or more")
    if wait_s < 0:
        raise RequestError("--wait-s", wait_s, "0 or more")
    before = status(run)
    if not before["running"]:
        raise RequestError("run", f"{run} is not running", "a run under way; a new start takes --rollout.engines")
    if not before["engines"]:
        raise RequestError("run", f"{run} has no engines", "a job with a fleet")
    write_wish(run, engines)
    deadline = time.monotonic() + wait_s
    now = before
    while time.monotonic() < deadline and not _reached(now, engines):
        time.sleep(POLL_S)
        now = status(run)
        if not now["running"]:
            raise RunError(f"{run}: the run ended before it had {engines} engines")
    if wait_s and not _reached(now, engines):
        states = ", ".join(f"{one['name']} {one['state']}" for one in now["engines"])
        raise RunError(f"{run}: not {engines} healthy engines within {wait_s:g} s: {states}")
    print(f"{run}: {len(before['engines'])} engines, {engines} are wanted")
    return {"run": str(run), "engines": engines, "before": len(before["engines"]), "reached": _reached(now, engines)}


def _reached(told: dict[str, Any], engines: int) -> bool:
    return [one["state"] for one in told["engines"]] == [EngineState.HEALTHY.value] * engines


def status(run: Path) -> dict[str, Any]:
    """What is known of a run.

    Raises:
        RequestError: no folder of a run.
    """
    if not (run / "config.yaml").is_file():
        raise RequestError("run", f"{run} holds no config.yaml", "the folder of a run")
    running = is_held(run / ".lock")
    ended = read_json(run / SUMMARY) if (run / SUMMARY).is_file() and not running else {}
    told = read_file(run / STATUS) if (run / STATUS).is_file() else {}
    checkpoint = latest_checkpoint(run / "checkpoints")
    return {
        "run": str(run),
        "running": running,
        "ended_by": ended.get("ended_by"),
        "step": told.get("step"),
        "weight_version": told.get("weight_version"),
        "seconds_ago": None if not told else max(0.0, round(time.time() - float(told["time"]), 1)),
        "host": told.get("host"),
        "pid": told.get("pid"),
        "checkpoint": None if checkpoint is None else checkpoint.name,
        "engines_wanted": told.get("engines_wanted"),
        "engines": told.get("engines", []),
        "metrics": told.get("metrics", {}),
    }


def is_held(lock: Path) -> bool:
    """Whether a process holds the run's folder."""
    try:
        file = lock.open("r", encoding="utf-8")
    except FileNotFoundError:
        return False
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


def words(told: dict[str, Any]) -> list[str]:
    """The status for a person."""
    how = "running" if told["running"] else f"ended by {told['ended_by']}" if told["ended_by"] else "not running"
    where = "no step yet" if told["step"] is None else f"step {told['step']}, weight version {told['weight_version']}"
    ago = "" if told["seconds_ago"] is None else f", {told['seconds_ago']:g} s ago on {told['host']} ({told['pid']})"
    lines = [f"{told['run']}: {how}, {where}{ago}; newest checkpoint {told['checkpoint'] or 'none'}"]
    for one in told["engines"]:
        why = f" ({one['reason']})" if one["reason"] else ""
        lines.append(
            f"  {one['name']:<14} {one['state']:<9}{why} version {one['weight_version']}, {one['shards']} shards, "
            f"launched {one['incarnation'] + 1} times"
        )
    for prefix in ("time/", "queue/", "perf/"):
        shown = {n.removeprefix(prefix): v for n, v in told["metrics"].items() if n.startswith(prefix)}
        if shown:
            lines.append(f"  {prefix:<6} " + ", ".join(f"{name} {value:.4g}" for name, value in sorted(shown.items())))
    return lines
