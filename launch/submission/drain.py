"""Ends the windlass commands of this container at their next step boundary: the preStop hook of a pod.

Kubernetes sends SIGTERM to the container's first process alone, which is Ray; it would take the job's driver down with
it. The hook runs before that, within the pod's grace period.
"""

from __future__ import annotations

import os

import psutil

MODULE = "launch.cli"


def commands() -> list[psutil.Process]:
    """The `python -m launch.cli` of this container."""
    return [process for process in psutil.process_iter(["pid", "cmdline"]) if _is_command(process)]


def end(found: list[psutil.Process]) -> None:
    """Send SIGTERM to them and wait until they have ended."""
    for process in found:
        try:
            process.terminate()
        except psutil.NoSuchProcess:
            # It ended by itself.
            continue
    psutil.wait_procs(found)


def _is_command(process: psutil.Process) -> bool:
    words = process.info["cmdline"] or []
    return process.pid != os.getpid() and "-m" in words and words[words.index("-m") + 1 :][:1] == [MODULE]


if __name__ == "__main__":
    end(commands())
