"""Staying with a submitted job: its output as it comes, its exit code, and a stop that is passed on.

submitted → running → ended: exit code
    Ctrl-C or SIGTERM here: the job gets SIGTERM and is awaited; a second one leaves it alone and returns
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Protocol

from data.errors import RunError
from trainer.interruption import Interruption

POLL_S = 1.0
LOST_S = 120.0
"""Seconds without an answer of the scheduler after which following ends."""


class Followed(Protocol):
    """A job of any scheduler."""

    def output(self) -> str:
        """What it has printed since the last call."""
        ...

    def exit_code(self) -> int | None:
        """None while it is on."""
        ...

    def stop(self) -> None:
        """Ask it to end at its next step boundary."""
        ...

    def describe(self) -> str:
        """Name and state."""
        ...


def follow(job: Followed, *, grace_s: float, clock: Callable[[], float] = time.monotonic) -> int:
    """Show a job's output until it ends; returns its exit code.

    Raises:
        RunError: the scheduler does not answer, or the job does not end within the grace after a stop.
    """
    answered = clock()
    stopped: float | None = None
    with Interruption() as interruption:
        while True:
            try:
                if interruption.requested and stopped is None:
                    job.stop()
                    stopped = clock()
                    print("asked the job to end at its next step boundary; waiting for it", file=sys.stderr)
                code = job.exit_code()
                print(job.output(), end="", flush=True)
                answered = clock()
            except (OSError, RuntimeError, RunError) as error:
                # The service of a busy head may miss a request.
                if clock() - answered > LOST_S:
                    raise RunError(f"no answer about the job for {LOST_S:.0f} s: {error}; it may still run") from error
                code = None
            if code is not None:
                return code
            if stopped is not None and clock() - stopped > grace_s + LOST_S:
                raise RunError(f"the job did not end within {grace_s + LOST_S:.0f} s: {job.describe()}")
            time.sleep(POLL_S)
