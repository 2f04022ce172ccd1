"""Two ranks in processes of their own that take one job after the other, so that their imports are paid once."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from threading import Timer
from typing import Any

import numpy as np

RANKS = 2
DEADLINE_S = 400


class RankPair:
    """The processes; close them."""

    def __init__(self, folder: Path) -> None:
        """`folder` is for what they print."""
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self._port = probe.getsockname()[1]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "DS_ACCELERATOR": "cpu"}
        self._logs = [folder / f"rank-{rank}.log" for rank in range(RANKS)]
        self._processes = []
        for rank, path in enumerate(self._logs):
            with path.open("w") as log:
                process = subprocess.Popen(
                    [sys.executable, "-m", "tests.trainer.rank_process", str(rank)],
                    cwd=Path(__file__).parents[2],
                    env=environment,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=log,
                    text=True,
                )
            self._processes.append(process)

    def run(self, folder: Path, tasks: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
        """What each rank found, by the name of the task (`rank_process.run_task`); files go into `folder`."""
        job = json.dumps({"ranks": RANKS, "port": self._port, "tasks": tasks, "out": str(folder)})
        deadline = Timer(DEADLINE_S, self._kill)
        deadline.start()
        try:
            for process in self._processes:
                assert process.stdin is not None
                process.stdin.write(job + "\n")
                process.stdin.flush()
            for process, log in zip(self._processes, self._logs, strict=True):
                assert process.stdout is not None
                assert process.stdout.readline() == "done\n", log.read_text()[-3000:]
        finally:
            deadline.cancel()
        return {
            name: [dict(np.load(folder / f"{name}-{rank}.npz", allow_pickle=False)) for rank in range(RANKS)]
            for name in tasks
        }

    def close(self) -> None:
        """End the processes, which have nothing to keep; by themselves they take seconds to leave their groups."""
        self._kill()
        for process in self._processes:
            process.wait()

    def _kill(self) -> None:
        for process in self._processes:
            process.kill()
