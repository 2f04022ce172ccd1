"""Contract: the generated script under a real Slurm of one node: Ray comes up on the allocation, the command runs on
it, its output and exit code come back, a stop reaches the command as SIGTERM and leaves a checkpoint, Ray goes away.

Slurm from Debian's packages (slurm-wlm, munge), started by the test. Not checked here: several nodes, GPUs.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.launch.submission.slurm_cluster import free_ports, lacking, slurm
from tests.requirements import require
from tests.small_world import recipe, write_dataset, write_recipe

pytestmark = pytest.mark.long
CPUS = 8


@pytest.fixture(scope="module")
def variables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """The environment of a Slurm user."""
    for part in ("ray", "vllm", "deepspeed"):
        require(part)
    if lacking():
        pytest.skip(lacking())
    with slurm(tmp_path_factory.mktemp("slurm"), cpus=CPUS) as found:
        yield found


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe."""
    folder = tmp_path_factory.mktemp("world")
    dataset = write_dataset(folder / "source")
    write_recipe(folder / "job.yaml", recipe(dataset.path, "sft", batch_rows=8, limits={"max_steps": 2}))
    return folder


def submit(world: Path, variables: dict[str, str], *words: str) -> tuple[subprocess.Popen[str], int]:
    """Run `windlass submit --to slurm`; also returns the port of the Ray head."""
    (port,) = free_ports(1)
    windlass = str(Path(sys.executable).parent / "windlass")
    options = ["--cpus-per-node", str(CPUS), "--hours", "0.2", "--grace-s", "60", "--port", str(port)]
    process = subprocess.Popen(
        [windlass, "submit", "--to", "slurm", *options, "--", *words],
        cwd=world,
        env={**os.environ, **variables},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return process, port


def listeners(port: int) -> list[str]:
    """Processes that name the port on their command line."""
    return [" ".join(p.info["cmdline"] or []) for p in psutil.process_iter(["cmdline"]) if f":{port}" in str(p.info)]


def test_a_command_runs_on_the_allocation(variables: dict[str, str], world: Path) -> None:
    process, port = submit(world, variables, "train", "job.yaml", "--run-dir", "runs/whole")
    told, _ = process.communicate(timeout=400)
    assert process.returncode == 0, told
    assert "runs/whole: " in told, "the output of the job is shown"
    assert json.loads((world / "runs/whole/summary.json").read_text())["interrupted"] is False
    deadline = time.monotonic() + 30
    while listeners(port) and time.monotonic() < deadline:
        time.sleep(0.5)
    assert not listeners(port), "Ray is taken down"


def test_a_stop_leaves_a_checkpoint(variables: dict[str, str], world: Path) -> None:
    run = world / "runs" / "stopped"
    process, _ = submit(world, variables, "train", "job.yaml", "--run-dir", str(run), "--limits.max_steps", "100000")
    deadline = time.monotonic() + 200
    while not list(run.glob("checkpoints/step-*")) and time.monotonic() < deadline:
        time.sleep(0.5)
    process.send_signal(signal.SIGINT)
    told, _ = process.communicate(timeout=200)
    assert process.returncode == 0, told
    assert json.loads((run / "summary.json").read_text())["interrupted"] is True


def test_the_exit_code_comes_back(variables: dict[str, str], world: Path) -> None:
    process, _ = submit(world, variables, "eval", str(world / "none"), "--data", str(world / "none"))
    told, _ = process.communicate(timeout=200)
    assert process.returncode == 2, told
