"""A run that is struck at random: processes of its parts get SIGKILL or SIGSTOP, the driver included.

After each strike the run must take a step that it had not taken before, so that a run of N strikes ends. A stopped
process is let go after a while, or never, as the seed says. A dead driver is started again by the same command, as a
job's restart policy would. Only processes below the driver that this object started are touched.
"""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path

import psutil


class Victim(StrEnum):
    """Parts of a run."""

    ENGINE = "engine"
    LEARNER = "learner"
    REWARD = "reward"
    WORKER = "worker"
    DRIVER = "driver"


TITLES = {
    Victim.ENGINE: ("ray::VllmEngine", "ray::ReferenceEngine"),
    Victim.LEARNER: ("ray::LearnerActor",),
    Victim.REWARD: ("ray::ServeReplica",),
    Victim.WORKER: ("ray::IDLE",),
}
"""How Ray names the processes."""


@dataclass
class Chaos:
    """One run and its strikes."""

    folder: Path
    run: Path
    seed: int
    victims: Sequence[Victim]
    """What is struck, drawn evenly among those that are there."""
    first: Victim | None = None
    """Who is killed by the first strike; none draws it like the others."""
    pause_s: float = 1.0
    """Longest pause before a strike, so that it falls anywhere in a step."""
    patience_s: float = 240.0
    """Within so much the run must go on after a strike."""
    strikes: Counter[str] = field(default_factory=Counter)
    """Strikes so far, by victim and signal."""
    log: list[str] = field(default_factory=list)
    _job: subprocess.Popen[bytes] | None = None

    def __post_init__(self) -> None:
        """Draw nothing yet."""
        self._chance = random.Random(self.seed)
        self._furthest = -1

    def go(self, count: int) -> None:
        """Strike so many times, then let the run end.

        Raises:
            AssertionError: the run ended too early or failed, or did not go on after a strike.
        """
        self._start()
        try:
            for _ in range(count):
                self._await_progress()
                time.sleep(self._chance.uniform(0, self.pause_s))
                self._strike()
            self._await_progress()
            assert self._job is not None
            assert self._job.wait(timeout=self.patience_s) == 0, self.told()
        finally:
            self._end()

    def told(self) -> str:
        """The strikes and the last words of the run."""
        words = (self.run.parent / f"{self.run.name}.log").read_text()[-2500:]
        return "\n".join([*self.log[-8:], words])

    def _start(self) -> None:
        command = [str(Path(sys.executable).parent / "windlass"), "train", "job.yaml", "--run-dir", str(self.run)]
        self.run.parent.mkdir(exist_ok=True)
        with (self.run.parent / f"{self.run.name}.log").open("ab") as log:
            self._job = subprocess.Popen(command, cwd=self.folder, stdout=log, stderr=log, start_new_session=True)

    def _steps(self) -> int:
        """The last step whose metrics are on disk."""
        path = self.run / "metrics.jsonl"
        return path.read_text().count("\n") - 1 if path.is_file() else -1

    def _await_progress(self) -> None:
        assert self._job is not None
        deadline = time.monotonic() + self.patience_s
        while self._steps() <= self._furthest:
            code = self._job.poll()
            if code == -signal.SIGKILL:
                self._start()
            else:
                assert code is None, f"the run ended with {code}: {self.told()}"
            assert time.monotonic() < deadline, f"no step after {self._furthest}: {self.told()}"
            time.sleep(0.05)
        self._furthest = self._steps()

    def _strike(self) -> None:
        assert self._job is not None
        assert self._job.poll() is None, f"the run ended before the last strike: {self.told()}"
        there = self._processes()
        certain = None if self.strikes else self.first
        kind = certain or self._chance.choice([victim for victim in self.victims if there[victim]])
        process = self._chance.choice(there[kind])
        stop = self._chance.random() < 0.4 and certain is None
        # The driver is not left stopped for good: nobody would ever end it.
        seconds = self._chance.choice([0.3, 2.0] if kind is Victim.DRIVER else [0.3, 2.0, None])
        how = f"stop for {seconds or 'ever'}" if stop else "kill"
        self.strikes[f"{kind.value}/{how.split()[0]}"] += 1
        self.log.append(f"step {self._furthest}: {how} {kind.value} {process.pid}")
        try:
            process.send_signal(signal.SIGSTOP if stop else signal.SIGKILL)
            if stop and seconds is not None:
                time.sleep(seconds)
                process.send_signal(signal.SIGCONT)
        except psutil.NoSuchProcess:
            self.log.append(f"{kind.value} {process.pid} was gone")
        if kind is Victim.DRIVER and not stop:
            self._job.wait(timeout=30)
            # What it wrote between the last look and the strike is no step taken after it.
            self._furthest = self._steps()

    def _processes(self) -> dict[Victim, list[psutil.Process]]:
        assert self._job is not None
        found: dict[Victim, list[psutil.Process]] = {victim: [] for victim in Victim}
        driver = psutil.Process(self._job.pid)
        found[Victim.DRIVER] = [driver]
        for process in driver.children(recursive=True):
            try:
                title = " ".join(process.cmdline())
            except (psutil.NoSuchProcess, psutil.ZombieProcess):
                continue
            for victim, titles in TITLES.items():
                if title.startswith(titles):
                    found[victim].append(process)
        # In an order that does not depend on the machine.
        return {victim: sorted(processes, key=lambda one: one.pid) for victim, processes in found.items()}

    def _end(self) -> None:
        assert self._job is not None
        if self._job.poll() is None:
            for processes in self._processes().values():
                for process in processes:
                    with_suppressed_kill(process)
            os.kill(self._job.pid, signal.SIGKILL)
            self._job.wait(timeout=30)


def with_suppressed_kill(process: psutil.Process) -> None:
    """End a process that may be gone."""
    try:
        process.kill()
    except psutil.NoSuchProcess:
        return
