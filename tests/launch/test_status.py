"""Contract: `windlass status` tells where a run is from its folder alone, whether it runs or has ended, and `windlass
scale` changes the engines of a running job: newcomers are asked after a verified push, and the run's weights do not
depend on it. Answers match docs/schemas.

The folder of a run that is not there is a test's own; the job that is scaled is real (long). Not checked here: how
engines join (tests/rollout/test_fleet.py), several machines (test_network.py).
"""

from __future__ import annotations

import fcntl
import json
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from data.errors import RequestError, RunError
from launch.provenance import ROOT
from launch.status_command import scale_command, status, status_command
from tests.requirements import require
from tests.small_world import read_steps, recipe, windlass, write_dataset, write_recipe
from trainer.run_status import SCALE, STATUS, StatusFile, read_wish, write_wish

ENGINE: dict[str, Any] = {
    "name": "vllm-0",
    "state": "healthy",
    "incarnation": 0,
    "weight_version": 3,
    "seconds": 1.5,
    "reason": None,
    "shards": 12,
}


def checked(name: str, answer: dict[str, Any]) -> dict[str, Any]:
    schema = json.loads((ROOT / "docs" / "schemas" / f"{name}.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(json.loads(json.dumps(answer)))
    return answer


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run's folder as a job leaves it in the middle of its work."""
    (tmp_path / "config.yaml").write_text("job: rl\n")
    (tmp_path / ".lock").write_text("1")
    (tmp_path / "checkpoints" / "step-000002").mkdir(parents=True)
    content = {"format": 1, "time": time.time(), "host": "here", "pid": 7, "step": 3, "weight_version": 3}
    content |= {"engines_wanted": None, "engines": [ENGINE], "metrics": {"time/step": 2.0}}
    (tmp_path / STATUS).write_text(json.dumps(content))
    return tmp_path


@pytest.fixture
def running(run: Path) -> Iterator[Path]:
    """The same, with a job at work."""
    with (run / ".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield run


def test_a_run_that_ended(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "summary.json").write_text(json.dumps({"ended_by": "max_steps"}))
    told = checked("status", status_command(run))
    assert (told["running"], told["ended_by"], told["checkpoint"]) == (False, "max_steps", "step-000002")
    assert "ended by max_steps, step 3, weight version 3" in capsys.readouterr().out
    with pytest.raises(RequestError, match="is not running"):
        scale_command(run, engines=2)


def test_a_run_at_work(running: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (running / "summary.json").write_text(json.dumps({"ended_by": "interrupted"}))
    told = checked("status", status_command(running))
    assert told["running"]
    assert told["ended_by"] is None, "the summary is of an earlier start"
    assert "vllm-0" in capsys.readouterr().out
    answer = checked("scale", scale_command(running, engines=2))
    assert answer == {"run": str(running), "engines": 2, "before": 1, "reached": False}
    assert StatusFile(run_dir=running).wanted_engines() == 2
    with pytest.raises(RunError, match=r"not 2 healthy engines within 0\.1 s: vllm-0 healthy"):
        scale_command(running, engines=2, wait_s=0.1)
    StatusFile(run_dir=running).begin()
    assert StatusFile(run_dir=running).wanted_engines() is None


def test_before_the_first_step(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("job: rl\n")
    told = checked("status", status_command(tmp_path))
    assert (told["running"], told["step"], told["engines"]) == (False, None, [])


def test_wrong_requests(tmp_path: Path, running: Path) -> None:
    with pytest.raises(RequestError, match=r"holds no config\.yaml"):
        status(tmp_path / "nothing")
    for engines, wait_s, told in ((0, 0.0, "--engines: 0"), (1, -1.0, "--wait-s: -1")):
        with pytest.raises(RequestError, match=told):
            scale_command(running, engines=engines, wait_s=wait_s)
    for content in ('{"format": 2}', "[1]", "no json", '{"format": 1, "engines": "2"}'):
        (running / SCALE).write_text(content)
        with pytest.raises(RequestError, match=SCALE):
            read_wish(running)
    write_wish(running, 4)
    assert read_wish(running) == 4


@pytest.mark.long
def test_engines_join_and_leave_a_running_job(tmp_path: Path) -> None:
    for part in ("vllm", "deepspeed", "ray"):
        require(part)
    dataset = write_dataset(tmp_path / "source")
    content = recipe(dataset.path, "rl", limits={"max_steps": 30}, checkpoints={"interval": 10, "last": 1})
    write_recipe(tmp_path / "job.yaml", content)
    whole = windlass("train", "job.yaml", "--run-dir", "runs/whole", cwd=tmp_path)
    assert whole.returncode == 0, whole.stderr
    command = [str(Path(sys.executable).parent / "windlass"), "train", "job.yaml", "--run-dir", "runs/scaled"]
    run = tmp_path / "runs" / "scaled"
    # Long enough for a newcomer to come up; the wish to end is a signal.
    command += ["--limits.max-steps", "100000"]
    with subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as job:
        try:
            await_step(job, run, 1)
            assert checked("scale", scale_command(run, engines=2, wait_s=200))["reached"]
            joined = status(run)["step"]
            await_step(job, run, joined + 3)
            assert {one["name"]: one["shards"] > 0 for one in status(run)["engines"]} == {
                "vllm-0": True,
                "vllm-1": True,
            }
            assert scale_command(run, engines=1, wait_s=200)["reached"]
            await_step(job, run, 31)
        finally:
            job.terminate()
            _, said = job.communicate(timeout=120)
    assert job.returncode == 0, said
    assert "scale: vllm-1 is coming up" in said
    ours, theirs = read_steps(run), read_steps(tmp_path / "runs" / "whole")
    # The same steps, whoever generated their groups; the last one of the short run is evaluated besides.
    for mine, other in zip(ours[1:30], theirs[1:30], strict=True):
        for name in ("loss", "reward/mean", "grad_norm", "legal_mass"):
            assert mine[name] == other[name], (mine["step"], name)
    assert max(step["system/engines_healthy"] for step in ours) == 2


def await_step(job: subprocess.Popen[str], run: Path, step: int) -> None:
    deadline = time.monotonic() + 300
    while not (run / STATUS).is_file() or json.loads((run / STATUS).read_text())["step"] < step:
        assert job.poll() is None, job.communicate()[1]
        assert time.monotonic() < deadline
        time.sleep(0.2)
