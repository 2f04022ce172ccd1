"""What every node of a cluster must share with the driver before a run starts: folders, libraries, the time.

A task on each node looks for a marker that the driver has just written into each folder, tries to write beside it, and
reports its libraries and its clock. All answers are awaited together, within one deadline.
"""

from __future__ import annotations

import os
import secrets
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from data.errors import RequestError, RunError
from launch.provenance import library_versions

DEADLINE_S = 120.0
LARGEST_SKEW_S = 60.0
"""Clocks that differ by more make file times, tokens and logs of several nodes contradict each other."""
_CHECKED: set[tuple[str, tuple[Path, ...]]] = set()
"""Nodes, by Ray's id, with the folders that this process has checked them for."""


@dataclass(frozen=True, kw_only=True)
class NodeFacts:
    """What a node says of itself."""

    host: str
    time: float
    """Seconds since the epoch."""
    libraries: dict[str, str]
    """Versions by name."""
    folders: dict[str, str]
    """By folder: empty, or what is wrong with it."""


def look(markers: Mapping[str, str]) -> NodeFacts:
    """Runs on a node. `markers`: path of a marker file → its content."""
    return NodeFacts(
        host=os.uname().nodename,
        time=time.time(),
        libraries=library_versions(),
        folders={str(Path(path).parent): _trouble(Path(path), content) for path, content in markers.items()},
    )


def _trouble(marker: Path, content: str) -> str:
    if not marker.parent.is_dir():
        return "does not exist"
    if not marker.is_file() or marker.read_text() != content:
        return "is another folder than the driver's"
    try:
        mine = marker.with_name(f"{marker.name}-{os.uname().nodename}-{os.getpid()}")
        mine.touch()
        mine.unlink()
    except OSError as error:
        return f"cannot be written ({error.strerror})"
    return ""


def judge(nodes: Mapping[str, NodeFacts], *, here: NodeFacts, asked_at: float) -> None:
    """Refuse nodes that do not fit together; `nodes` by address. They answered between `asked_at` and `here.time`.

    Raises:
        RequestError: a folder is not shared.
        RunError: libraries or clocks differ.
    """
    for address, facts in nodes.items():
        where = f"node {address} ({facts.host})"
        for folder, trouble in facts.folders.items():
            if trouble:
                raise RequestError(folder, f"{trouble} on {where}", "a folder that every node shares and may write")
        for name in sorted({*here.libraries, *facts.libraries}):
            ours, theirs = here.libraries.get(name), facts.libraries.get(name)
            if ours != theirs:
                raise RunError(f"{where} has {name} {theirs or 'not installed'}, the driver has {ours or 'none'}")
        skew = min(facts.time - asked_at, 0.0) + max(facts.time - here.time, 0.0)
        if abs(skew) > LARGEST_SKEW_S:
            raise RunError(f"the clock of {where} is {skew:+.0f} s off the driver's; at most {LARGEST_SKEW_S:.0f} s")


def _answer(call: Any, address: str) -> NodeFacts:
    import ray

    try:
        return cast(NodeFacts, ray.get(call))
    except ray.exceptions.RayError as error:
        told = " ".join(str(getattr(error, "cause", None) or error).split())
        raise RunError(
            f"node {address} cannot run the windlass of the driver: {told[:400]}; install the same version, with its "
            "dependencies, on every node"
        ) from error


def check_nodes(folders: Sequence[Path], *, deadline_s: float = DEADLINE_S) -> None:
    """Check every node of the connected Ray cluster that was not checked for these folders before.

    Raises:
        RequestError: a node does not share a folder.
        RunError: a node does not answer in time, cannot run our packages, or has other libraries or another time.
    """
    import ray
    from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

    new = [node for node in ray.nodes() if node["Alive"] and (node["NodeID"], tuple(folders)) not in _CHECKED]
    if not new:
        return
    markers: dict[str, str] = {}
    asked_at = time.time()
    try:
        for folder in folders:
            marker = folder / f".node-check-{secrets.token_hex(8)}"
            markers[str(marker)] = secrets.token_hex(8)
            marker.write_text(markers[str(marker)])
        remote = ray.remote(num_cpus=0, max_retries=1)(look)
        calls = {
            remote.options(scheduling_strategy=NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)).remote(
                markers
            ): node["NodeManagerAddress"]
            for node in new
        }
        ready, late = ray.wait(list(calls), num_returns=len(calls), timeout=deadline_s)
        if late:
            raise RunError(f"node {calls[late[0]]} did not answer within {deadline_s:.0f} s")
        judge({calls[call]: _answer(call, calls[call]) for call in ready}, here=look({}), asked_at=asked_at)
        _CHECKED.update((node["NodeID"], tuple(folders)) for node in new)
    finally:
        for path in markers:
            Path(path).unlink(missing_ok=True)
