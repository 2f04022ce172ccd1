"""How everything is timed: warm-up, interleaved repetitions, medians, peak memory, and the common fields of the answer.

The ways that are compared take turns, each round in the opposite order of the last, so that a machine that slows down
slows all of them. A ratio in an answer is one of medians of the same run.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from launch.bench.ceiling import synchronize
from launch.bench.machine import describe_machine
from launch.bench.settings import BenchSettings, Device

MIB = 2**20


@dataclass(frozen=True, kw_only=True)
class Way:
    """One way to do the work."""

    time: Callable[[], float]
    """Does the work once and returns its seconds; `stopwatch` makes one of a plain function."""
    tokens: int | None = None
    """Tokens one repetition has to compute, for `tokens_per_s`; none where nothing is computed."""
    flops: float | None = None
    """Operations one repetition has to do, for `mfu`."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """What this way was set to, for the answer."""
    repeats: int | None = None
    """Repetitions of a slow way; none takes those of all."""
    warm_up: Callable[[], object] | None = None
    """A smaller piece of work to warm up a slow way with; none takes the work itself."""
    peak_mib: Callable[[], float] | None = None
    """Peak memory of the repetitions of this way, where it can tell."""


def stopwatch(work: Callable[[], object], device: Device = Device.CPU) -> Callable[[], float]:
    """Wall seconds of each call of `work`, the card's work included."""

    def time_once() -> float:
        synchronize(device)
        begin = time.perf_counter()
        work()
        synchronize(device)
        return time.perf_counter() - begin

    return time_once


def paired(ways: Mapping[str, Way], repeats: int) -> dict[str, list[float]]:
    """Seconds of every repetition of every way: one warm-up each, then round by round in alternating order."""
    for way in ways.values():
        (way.warm_up or way.time)()
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for round_index in range(repeats):
        for name in list(ways) if round_index % 2 == 0 else reversed(list(ways)):
            if round_index < (ways[name].repeats or repeats):
                seconds[name].append(ways[name].time())
    return seconds


def answer(
    settings: BenchSettings,
    ways: Mapping[str, Way],
    seconds: Mapping[str, list[float]],
    *,
    ceiling_tflops: float | None = None,
    checked: bool,
    ours: str = "ours",
    **figures: Any,
) -> dict[str, Any]:
    """The answer of a benchmark: the common fields are those of the way `ours`, and `ways` holds them for each."""
    each = {name: _figures(way, seconds[name], ceiling_tflops) for name, way in ways.items()}
    return {
        "checked": checked,
        **figures,
        **{name: each[ours][name] for name in ("seconds", "tokens_per_s", "mfu", "peak_mib")},
        "ceiling_tflops": ceiling_tflops,
        "ways": each,
        "settings": settings.record(),
        "machine": describe_machine(),
    }


def _figures(way: Way, seconds: list[float], ceiling_tflops: float | None) -> dict[str, Any]:
    median = statistics.median(seconds)
    computes = way.flops is not None and ceiling_tflops is not None
    return {
        "seconds": {"median": median, "all": seconds},
        "tokens_per_s": None if way.tokens is None else way.tokens / median,
        "mfu": (way.flops or 0.0) / median / ((ceiling_tflops or 1.0) * 1e12) if computes else None,
        "peak_mib": None if way.peak_mib is None else round(way.peak_mib(), 1),
        "settings": dict(way.settings),
    }


def ratio(seconds: Mapping[str, list[float]], slow: str, fast: str) -> float | None:
    """Median of `slow` divided by the median of `fast`; none where one of them was not timed."""
    if slow not in seconds or fast not in seconds:
        return None
    return statistics.median(seconds[slow]) / statistics.median(seconds[fast])


class PeakMemory:
    """Peak memory between two moments: the card's allocator, or this process's resident set as the kernel saw it."""

    def __init__(self, device: Device = Device.CPU) -> None:
        self._device = device

    def start(self) -> None:
        """Forget what was before."""
        if self._device is Device.CUDA:
            torch.cuda.reset_peak_memory_stats()
            return
        # 5 resets the high-water mark to what is resident now (proc_pid_clear_refs).
        Path("/proc/self/clear_refs").write_text("5")

    def mib(self) -> float:
        """MiB since `start`."""
        if self._device is Device.CUDA:
            return torch.cuda.max_memory_allocated() / MIB
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


class Local:
    """Work in this process, timed, with the peak memory of its repetitions."""

    def __init__(self, work: Callable[[], object], device: Device = Device.CPU) -> None:
        self._time = stopwatch(work, device)
        self._peak = PeakMemory(device)
        self._peak_mib = 0.0

    def time(self) -> float:
        """Seconds of one repetition."""
        self._peak.start()
        seconds = self._time()
        self._peak_mib = max(self._peak_mib, self._peak.mib())
        return seconds

    def peak_mib(self) -> float:
        """Largest peak of this process or card so far, with what was there before."""
        return self._peak_mib
