"""A command as a job of a running Ray cluster, by its Jobs API.

The folder is shipped as the job's working directory. When it holds our own packages the job runs those, so that a
cluster with the dependencies alone is enough; otherwise the nodes have windlass installed.
"""

from __future__ import annotations

import secrets
import shlex
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from data.errors import RequestError, RunError
from launch.submission.plan import Plan
from launch.submission.shipping import Shipment, shipment, staged

POLL_S = 1.0
ANSWER_S = 60.0
STOP_WAIT = "RAY_JOB_STOP_WAIT_TIME_S"
"""Ray's own name of the time between SIGTERM and SIGKILL; its default of 3 s ends a job before its checkpoint."""


@dataclass
class RayJob:
    """A submitted job, as `launch.submission.following` follows it."""

    client: Any
    job_id: str
    _shown: int = 0

    def output(self) -> str:
        """What the job has printed since the last call."""
        text = str(self.client.get_job_logs(self.job_id))
        new, self._shown = text[self._shown :], max(self._shown, len(text))
        return new

    def exit_code(self) -> int | None:
        """None while the job is on; 0 after success or a stop that was asked for, else the command's own code."""
        info = self.client.get_job_info(self.job_id)
        if not info.status.is_terminal():
            return None
        if info.status.value == "FAILED":
            return int(info.driver_exit_code or 1)
        return 0

    def stop(self) -> None:
        """Send SIGTERM; the job ends at its next step boundary."""
        self.client.stop_job(self.job_id)

    def describe(self) -> str:
        """Name and state."""
        info = self.client.get_job_info(self.job_id)
        return f"{self.job_id} {info.status.value}: {info.message or ''}".strip(": ")


def entrypoint(plan: Plan, what: Shipment) -> str:
    """The shell line of the job's driver; exec, so that a signal reaches windlass itself.

    Installed packages are found with -P only: the shipped folder may hold modules of the same plain names.
    """
    isolated = [] if what.has_packages else ["-P"]
    line = shlex.join([plan.settings.python or "python", *isolated, "-m", "launch.cli", *plan.words])
    checks = [f': "${{{name}:?is not set on this node; windlass submit --secret names it}}"' for name in plan.secrets]
    return "; ".join([*checks, f"exec {line}"])


def runtime_env(plan: Plan) -> dict[str, Any]:
    """What Ray gives the job beside its working directory."""
    return {"env_vars": {**plan.plain, STOP_WAIT: str(plan.settings.grace_s)}}


def files(plan: Plan) -> dict[str, Any]:
    """What the plan says of files."""
    what = shipment(plan.settings.working_dir)
    return {"shipped": what.files, "left_out": what.left_out, "bytes": what.nbytes, "from": str(what.folder)}


def submit(plan: Plan, say: Callable[[str], None]) -> RayJob:
    """Check the cluster, ship the folder, start the job.

    Raises:
        RequestError: nobody answers at the address.
        RunError: the cluster has not what the plan asks for.
    """
    what = shipment(plan.settings.working_dir)
    for name in what.left_out:
        say(f"left out, as it looks like a secret: {name}")
    client = connect(plan.settings.address)
    job_id = f"{plan.settings.name}-{secrets.token_hex(6)}"
    with staged(what) as folder:
        environment = {**runtime_env(plan), "working_dir": str(folder)}
        _send(client, job_id, entrypoint(plan, what), environment, plan.settings.address)
    say(f"submitted {job_id} to {plan.settings.address}")
    return RayJob(client=client, job_id=job_id)


def _send(client: Any, job_id: str, line: str, environment: dict[str, Any], address: str) -> None:
    """Start the job once, though a busy head may drop the connection before it answers.

    Raises:
        RunError: the cluster refuses the job, or does not answer before the deadline.
    """
    deadline = time.monotonic() + ANSWER_S
    while True:
        try:
            client.submit_job(entrypoint=line, runtime_env=environment, submission_id=job_id)
        except RuntimeError as error:
            # The head had taken it although its answer was lost.
            if "already" in str(error):
                return
            raise RunError(f"the cluster at {address} refused the job: {error}") from error
        except OSError as error:
            if time.monotonic() > deadline:
                raise RunError(f"no answer from {address} within {ANSWER_S:.0f} s: {error}") from error
            time.sleep(POLL_S)
        else:
            return


def connect(address: str, *, deadline_s: float = ANSWER_S) -> Any:
    """A client of the Jobs API.

    Raises:
        RequestError: no HTTP address, or nobody answers before the deadline.
    """
    from ray.job_submission import JobSubmissionClient

    if not address.startswith(("http://", "https://")):
        raise RequestError("--address", repr(address), "http://HOST:8265, the cluster's dashboard")
    deadline = time.monotonic() + deadline_s
    while True:
        try:
            return JobSubmissionClient(address)
        except (OSError, RuntimeError) as error:
            # A dashboard that has just started refuses for some seconds; what it says in words is final.
            if time.monotonic() > deadline or "onnect" not in str(error):
                raise RequestError(
                    "--address", f"{address} ({' '.join(str(error).split())[:300]})", "the dashboard of a Ray cluster"
                ) from error
            time.sleep(POLL_S)
