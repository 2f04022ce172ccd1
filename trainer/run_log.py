"""The log of a run: metrics.jsonl, TensorBoard, trackers, and progress for the person who watches.

metrics.jsonl has one JSON object per step, `{"step": 3, "reward/mean": 0.21, ...}`, in the order of steps. It holds
no wall-clock values outside `time/`, `perf/` and `system/`, so that a continued run writes the same bytes as an
undisturbed one elsewhere. When a run continues from the checkpoint of step k, lines beyond k (and a last line that a
crash cut off) are removed, because those steps are taken again.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Self

from data.errors import RequestError
from trainer.durable import write_text
from trainer.run_settings import TrackingSettings
from trainer.trackers import Tracker, open_trackers

METRICS = "metrics.jsonl"
NOT_REPRODUCIBLE = ("time/", "perf/", "system/")
"""Prefixes of metrics that differ between two runs of the same thing."""

Metric = float | int | str | bool | None


class RunLog:
    """Writes the metrics of each step; use as a context manager."""

    def __init__(
        self,
        run_dir: Path,
        tracking: TrackingSettings,
        *,
        resumed_step: int | None = None,
        total_steps: int | None = None,
        config: Mapping[str, Any] | None = None,
        headline: Sequence[str] = ("loss", "reward/mean", "ndcg@10"),
        stream: IO[str] | None = None,
    ) -> None:
        """Open the log; `resumed_step` is the step of the checkpoint that is continued from, none in a fresh run.

        `headline` are the metrics that progress shows. `stream` is where it goes (standard error).

        Raises:
            RequestError: a tracker is switched on that is not installed.
        """
        self._path = run_dir / METRICS
        self._trackers: list[Tracker] = open_trackers(run_dir, tracking, config or {})
        cut_back(self._path, resumed_step)
        self._file = self._path.open("a", encoding="utf-8")
        self._events = _event_writer(run_dir / "tensorboard", resumed_step)
        self._last = read_last_step(self._path)
        self._progress = Progress(stream or sys.stderr, total_steps, resumed_step or 0, headline)

    def write(self, step: int, metrics: Mapping[str, Metric]) -> None:
        """Write the metrics of one step; it is on the disk when this returns.

        A value that is not finite becomes null, and its name is listed under `nonfinite`.

        Raises:
            ValueError: the step was written before.
        """
        if self._last is not None and step <= self._last:
            raise ValueError(f"step {step} after step {self._last}: each step is written once")
        line = json_line(step, metrics)
        self._file.write(line + "\n")
        self._file.flush()
        os.fsync(self._file.fileno())
        self._last = step
        numbers = {name: float(value) for name, value in metrics.items() if isinstance(value, int | float)}
        for name, value in numbers.items():
            self._events.add_scalar(name, value, step)
        for tracker in self._trackers:
            tracker.log(step, {name: value for name, value in numbers.items() if math.isfinite(value)})
        self._progress.step(step, numbers)

    def say(self, message: str) -> None:
        """Tell the person who watches, without breaking a progress bar."""
        self._progress.say(message)

    def close(self) -> None:
        """Close files, trackers and the progress bar."""
        self._file.close()
        self._events.close()
        self._progress.close()
        for tracker in self._trackers:
            tracker.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def json_line(step: int, metrics: Mapping[str, Metric]) -> str:
    """One step as a line of metrics.jsonl."""
    content: dict[str, Any] = {"step": step}
    nonfinite: list[str] = []
    for name, value in metrics.items():
        if isinstance(value, float) and not math.isfinite(value):
            nonfinite.append(name)
            content[name] = None
        else:
            content[name] = value
    if nonfinite:
        content["nonfinite"] = nonfinite
    return json.dumps(content, allow_nan=False)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The steps of a metrics.jsonl; a last line that a crash cut off is left out.

    Raises:
        RequestError: the file is absent, or a line before the last is no JSON object.
    """
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").split("\n")
    except OSError as error:
        raise RequestError(str(path), error.strerror or str(error), "a run directory with metrics.jsonl") from error
    steps: list[dict[str, Any]] = []
    # What follows the last line break was never written to its end.
    for number, line in enumerate(lines[:-1], start=1):
        try:
            content = json.loads(line)
        except ValueError as error:
            raise RequestError(f"{path}:{number}", "is not JSON", "one JSON object per line") from error
        if not isinstance(content, dict) or not isinstance(content.get("step"), int):
            raise RequestError(f"{path}:{number}", "has no step", "one JSON object with `step` per line")
        steps.append(content)
    return steps


def read_last_step(path: Path) -> int | None:
    """The last step in a metrics.jsonl; none when it has no line."""
    steps = read_metrics(path) if path.is_file() else []
    return int(steps[-1]["step"]) if steps else None


def cut_back(path: Path, step: int | None) -> None:
    """Keep the lines up to `step` (none: no line), atomically."""
    if not path.is_file():
        return
    kept = [s for s in read_metrics(path) if step is not None and s["step"] <= step]
    write_text(path, "".join(json.dumps(s) + "\n" for s in kept))


def reproducible(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """The metrics of a step that two runs of the same thing share to the bit."""
    return {name: value for name, value in metrics.items() if not name.startswith(NOT_REPRODUCIBLE)}


def _event_writer(folder: Path, resumed_step: int | None) -> Any:
    from torch.utils.tensorboard import SummaryWriter

    # TensorBoard reads the files in the order of their names, which begin with the second they were made in: a file of
    # the same second as the one before could be read first, and would then be cut back by it.
    newest = max((int(path.name.split(".")[3]) for path in folder.glob("events.out.tfevents.*")), default=0)
    time.sleep(min(1.0, max(0.0, newest + 1 - time.time())))
    # TensorBoard hides earlier events from purge_step on, which is its way of cutting back.
    return SummaryWriter(str(folder), purge_step=0 if resumed_step is None else resumed_step + 1)


class Progress:
    """A bar on a terminal, a line per step otherwise."""

    def __init__(self, stream: IO[str], total: int | None, done: int, headline: Sequence[str]) -> None:
        self._stream = stream
        self._total = total
        self._headline = headline
        self._bar: Any = None
        if stream.isatty():
            from tqdm import tqdm

            self._bar = tqdm(total=total, initial=done, file=stream, unit="step", dynamic_ncols=True)

    def step(self, step: int, numbers: Mapping[str, float]) -> None:
        """Show a finished step."""
        shown = {name: f"{numbers[name]:.4g}" for name in self._headline if name in numbers}
        if self._bar is not None:
            self._bar.n = step
            self._bar.set_postfix(shown)
            return
        of = f"/{self._total}" if self._total is not None else ""
        words = " ".join(f"{name} {value}" for name, value in shown.items())
        print(f"step {step}{of} {words}".rstrip(), file=self._stream, flush=True)

    def say(self, message: str) -> None:
        """Show a message."""
        if self._bar is not None:
            self._bar.write(message, file=self._stream)
        else:
            print(message, file=self._stream, flush=True)

    def close(self) -> None:
        """Take the bar down."""
        if self._bar is not None:
            self._bar.close()
