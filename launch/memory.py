"""Peak memory of a run: the sum of PSS over this process and everything it started, sampled every second.

PSS counts a shared page once, split among its users, so that Ray's object store and shared libraries are not counted
per process.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from types import TracebackType
from typing import Self

import psutil

GIB = 2**30


def pss_bytes(pid: int) -> int:
    """PSS of one process in bytes; 0 when it has ended or may not be read."""
    try:
        for line in Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines():
            if line.startswith("Pss:"):
                return int(line.split()[1]) * 1024
    except (FileNotFoundError, ProcessLookupError, PermissionError):
        # The process ended between listing and reading: it holds nothing any more.
        return 0
    return 0


def tree_pss_bytes(root: psutil.Process) -> int:
    """PSS of a process and all its descendants in bytes."""
    return pss_bytes(root.pid) + sum(pss_bytes(child.pid) for child in root.children(recursive=True))


class MemorySampler:
    """Samples in a thread while the context is open."""

    def __init__(self, period_s: float = 1.0) -> None:
        self._period_s = period_s
        self._peak_bytes = 0
        self._samples = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample, name="memory-sampler", daemon=True)

    @property
    def peak_pss_gib(self) -> float:
        """Largest sum of PSS seen so far, in GiB."""
        return self._peak_bytes / GIB

    @property
    def samples(self) -> int:
        """How often was looked."""
        return self._samples

    def _sample(self) -> None:
        root = psutil.Process()
        while True:
            started = time.monotonic()
            self._peak_bytes = max(self._peak_bytes, tree_pss_bytes(root))
            self._samples += 1
            spent = time.monotonic() - started
            if self._stop.wait(max(self._period_s - spent, 0.0)):
                return

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        self._thread.join()
