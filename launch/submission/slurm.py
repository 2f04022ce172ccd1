"""A command as a Slurm job: a script that starts Ray on the allocation, runs the command, and takes Ray down again.

Slurm sends SIGTERM to the script alone (`--signal=B:TERM@grace`); the script passes it to the command, which ends with
a checkpoint. Ray's token is made in the job's memory and reaches the nodes as an environment variable of srun; neither
it nor any secret is written.
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from data.errors import RequestError, RunError
from launch.submission.plan import Plan

TIMEOUT_S = 60.0
LOG = "slurm-%j.log"
KEPT = ("PATH", "HOME", "USER", "LANG", "LD_LIBRARY_PATH")
"""Variables of the submitter that a job needs to find its programs."""
RUNNING = (
    "PENDING",
    "RUNNING",
    "CONFIGURING",
    "COMPLETING",
    "SUSPENDED",
    "REQUEUED",
    "RESIZING",
    "STOPPED",
    "SIGNALING",
)

BODY = r"""
set -uo pipefail
umask 077
# sbatch --export narrows what srun passes on; the token below is to reach the nodes.
export SLURM_EXPORT_ENV=ALL
export RAY_AUTH_MODE=token
export RAY_AUTH_TOKEN="$(od -An -N32 -tx1 /dev/urandom | tr -d ' \n')"
mapfile -t hosts < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
head="${hosts[0]}"
# The name of a host may stand for its loopback address in its own /etc/hosts.
address="$(srun --overlap --nodes=1 --ntasks=1 --nodelist="$head" hostname --all-ip-addresses | tr ' ' '\n' \
  | grep -v '^127\.' | head -n1)"
address="${address:-127.0.0.1}"
daemons=()
# A daemon that ends ends its step; --kill-on-bad-exit would take the command down with a node of engines.
ray_start() { srun --overlap --kill-on-bad-exit=0 --no-kill --ntasks-per-node=1 "$@" & daemons+=($!); }
take_down() { kill -TERM "${daemons[@]}" 2>/dev/null; wait "${daemons[@]}" 2>/dev/null; }
trap take_down EXIT
ray_start --nodes=1 --ntasks=1 --nodelist="$head" \
  "$RAY" start --head --node-ip-address="$address" --port="$RAY_PORT" "${RAY_RESOURCES[@]}" \
  --include-dashboard=false --disable-usage-stats --block
if (( ${#hosts[@]} > 1 )); then
  others=$(( ${#hosts[@]} - 1 ))
  ray_start --nodes="$others" --ntasks="$others" --exclude="$head" \
    "$RAY" start --address="$address:$RAY_PORT" "${RAY_RESOURCES[@]}" --disable-usage-stats --block
fi
export RAY_ADDRESS="$address:$RAY_PORT"
command=""
stopped=0
stop() { stopped=1; [[ -n "$command" ]] && kill -TERM "$command" 2>/dev/null; }
trap stop TERM INT
"$PYTHON" -P -m launch.submission.nodes "$RAY_ADDRESS" "${#hosts[@]}" || exit $?
(( stopped )) && exit 0
"$PYTHON" -P -m launch.cli "${COMMAND[@]}" &
command=$!
# `wait` returns early, with the signal's number, when a signal was trapped.
while :; do
  wait "$command"; code=$?
  if (( code > 128 && stopped )); then
    kill -0 "$command" 2>/dev/null && continue
    wait "$command" 2>/dev/null; late=$?
    (( late != 127 )) && code=$late
  fi
  exit "$code"
done
"""


def script(plan: Plan) -> str:
    """The batch script."""
    settings = plan.settings
    options = [
        f"--job-name={settings.name}",
        f"--nodes={settings.nodes}",
        "--ntasks-per-node=1",
        f"--cpus-per-task={settings.cpus_per_node}",
        f"--time={_minutes(settings.hours)}",
        f"--signal=B:TERM@{settings.grace_s}",
        f"--output={LOG}",
        "--open-mode=append",
        f"--export={','.join([*KEPT, *plan.plain, *plan.secrets])}",
    ]
    if settings.gpus_per_node:
        options.append(f"--gpus-per-node={settings.gpus_per_node}")
    if settings.memory_gib_per_node:
        options.append(f"--mem={settings.memory_gib_per_node}G")
    options += [f"--partition={settings.partition}"] if settings.partition else []
    options += [f"--account={settings.account}"] if settings.account else []
    options += [f"--{option}" for option in settings.sbatch]
    resources = [f"--num-cpus={settings.cpus_per_node}", f"--num-gpus={settings.gpus_per_node}"]
    python = interpreter(settings.python or sys.executable)
    facts = [
        f"PYTHON={shlex.quote(python)}",
        f"RAY={shlex.quote(str(Path(python).parent / 'ray'))}",
        f"RAY_PORT={settings.port}",
        f"RAY_RESOURCES=({shlex.join(resources)})",
        f"COMMAND=({shlex.join(plan.words)})",
    ]
    header = ["#!/bin/bash", *(f"#SBATCH {option}" for option in options)]
    return "\n".join([*header, *facts]) + BODY


def interpreter(name: str) -> str:
    """The path of the interpreter, which is on a file system that the nodes share.

    Raises:
        RequestError: there is none by this name.
    """
    found = shutil.which(name)
    if found is None:
        raise RequestError("--python", repr(name), "an interpreter, by its path")
    return str(Path(found).absolute())


def _minutes(hours: float) -> int:
    return max(1, round(hours * 60))


def files(plan: Plan) -> dict[str, Any]:
    """What the plan says of files: the script, which goes to sbatch by standard input."""
    return {"script": script(plan)}


@dataclass
class SlurmJob:
    """A submitted job, as `launch.submission.following` follows it."""

    job_id: str
    log: Path
    _shown: int = 0

    def output(self) -> str:
        """What the job has printed since the last call."""
        if not self.log.is_file():
            return ""
        with self.log.open("rb") as file:
            file.seek(self._shown)
            new = file.read()
        self._shown += len(new)
        return new.decode(errors="replace")

    def exit_code(self) -> int | None:
        """None while the job is on; else the script's own code, 1 where a signal ended it."""
        state, code, signal = self._state()
        if state in RUNNING:
            return None
        return code or (1 if signal or state not in ("COMPLETED", "FAILED") else 0)

    def _state(self) -> tuple[str, int, int]:
        facts = dict(
            word.partition("=")[::2] for word in tell(["scontrol", "show", "job", "--oneliner", self.job_id]).split()
        )
        code, _, signal = facts["ExitCode"].partition(":")
        return facts["JobState"], int(code), int(signal)

    def stop(self) -> None:
        """SIGTERM to the script, as Slurm itself sends it before the time is over."""
        tell(["scancel", "--batch", "--signal=TERM", self.job_id])

    def describe(self) -> str:
        """Name and state."""
        state, code, signal = self._state()
        return f"Slurm job {self.job_id} {state}, exit code {code}, signal {signal}, log {self.log}"


def submit(plan: Plan, say: Callable[[str], None]) -> SlurmJob:
    """Hand the script to sbatch.

    Raises:
        RequestError: there is no sbatch here, or it refuses the job.
    """
    if shutil.which("sbatch") is None:
        raise RequestError("--to", "slurm, and there is no sbatch on this machine", "a login node of the cluster")
    # The values of plain variables come from the submission, those of secrets from this environment.
    done = subprocess.run(
        ["sbatch", "--parsable"],
        input=script(plan),
        env={**os.environ, **plan.plain},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise RequestError("sbatch", " ".join(done.stderr.split()), "a request that the cluster can meet")
    job_id = done.stdout.strip().partition(";")[0]
    log = Path.cwd() / LOG.replace("%j", job_id)
    say(f"submitted Slurm job {job_id}; its output goes to {log}")
    return SlurmJob(job_id=job_id, log=log)


def tell(command: Sequence[str]) -> str:
    """Standard output of one of Slurm's commands.

    Raises:
        RunError: it failed; in its own words.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S, check=False)
    except subprocess.TimeoutExpired as error:
        raise RunError(f"{command[0]}: no answer within {TIMEOUT_S:.0f} s") from error
    if done.returncode:
        raise RunError(f"{command[0]}: {' '.join(done.stderr.split())}")
    return done.stdout
