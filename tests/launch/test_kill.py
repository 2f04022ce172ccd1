"""Kills: a run that dies by SIGKILL anywhere continues when it is started again, to the same weights and metrics.

Compares final weights bit for bit and metrics.jsonl outside `time/`, `perf/` and `system/` with an undisturbed run of
the same configuration. All points and three random kills run in `make test-long`; what `make test` kills is in
test_chaos.py.
With restarts allowed, a run that loses engines or learners goes on by itself, to the same bits. Does not check kills of
several processes at once, nor other machines.
"""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from data.faults import FaultPoint
from tests.requirements import require
from tests.small_world import read_steps, recipe, windlass, write_dataset, write_recipe
from trainer.run_log import reproducible

pytestmark = pytest.mark.long
STEPS = 4
PASSINGS = {
    # Evaluation asks the engine for 4 shards at step 0, training for 2 in every step: the 7th is in step 2.
    FaultPoint.ROLLOUT: 7,
    FaultPoint.REWARD: 2,
    FaultPoint.BACKWARD: 2,
    FaultPoint.OPTIMISER_STEP: 2,
    # Version 0 and 1 before it; the small model fits into one bucket.
    FaultPoint.PUSH: 3,
    # Two passings per checkpoint: the second one of step 1.
    FaultPoint.CHECKPOINT_WRITE: 4,
    FaultPoint.STEP: 3,
}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a recipe and the undisturbed run `runs/whole`."""
    for part in ("vllm", "deepspeed", "ray"):
        require(part)
    folder = tmp_path_factory.mktemp("kill")
    dataset = write_dataset(folder / "source")
    # Restarts are switched off but where a test switches them on: a fault is to end the run.
    restarts = {"engine_restarts": 0, "learner_restarts": 0}
    write_recipe(folder / "job.yaml", recipe(dataset.path, "rl", limits={"max_steps": STEPS}, cluster=restarts))
    done = windlass("train", "job.yaml", "--run-dir", "runs/whole", cwd=folder)
    assert done.returncode == 0, done.stderr
    return folder


def assert_same_run(run: Path, whole: Path) -> None:
    """Final weights and reproducible metrics are equal to the bit."""
    last = f"checkpoints/step-{STEPS:06d}/hf/model.safetensors"
    ours, theirs = load_file(run / last), load_file(whole / last)
    assert ours.keys() == theirs.keys()
    for name in theirs:
        assert ours[name].tobytes() == theirs[name].tobytes(), name
    assert [reproducible(step) for step in read_steps(run)] == [reproducible(step) for step in read_steps(whole)]


def kill_and_continue(world: Path, point: FaultPoint) -> None:
    run = world / "runs" / f"killed-{point.value}"
    fault = {"WINDLASS_FAULT": f"{point.value}:{PASSINGS[point]}"}
    died = windlass("train", "job.yaml", "--run-dir", str(run), cwd=world, **fault)
    assert died.returncode != 0, "the fault point was not passed often enough"
    assert len(read_steps(run)) < STEPS + 1
    again = windlass("train", "job.yaml", "--run-dir", str(run), cwd=world)
    assert again.returncode == 0, again.stderr
    assert_same_run(run, world / "runs" / "whole")


@pytest.mark.parametrize("point", list(PASSINGS))
def test_a_kill_at_every_point(world: Path, point: FaultPoint) -> None:
    kill_and_continue(world, point)


def test_a_run_that_keeps_losing_its_engine_goes_on(world: Path) -> None:
    run = world / "runs" / "engines"
    # Every engine dies at its seventh shard, and so do those that take its place.
    fault = {"WINDLASS_FAULT": f"rollout:{PASSINGS[FaultPoint.ROLLOUT]}"}
    words = ["train", "job.yaml", "--run-dir", str(run), "--cluster.engine_restarts", "9"]
    done = windlass(*words, cwd=world, **fault)
    assert done.returncode == 0, done.stderr
    assert_same_run(run, world / "runs" / "whole")
    assert read_steps(run)[-1]["system/engine_restarts"] >= 2


def test_a_run_that_loses_its_learners_begins_again_from_the_manifest(world: Path) -> None:
    run = world / "runs" / "learners"
    fault = {"WINDLASS_FAULT": "optimiser_step:3"}
    words = ["train", "job.yaml", "--run-dir", str(run), "--cluster.learner_restarts", "1"]
    done = windlass(*words, cwd=world, **fault)
    assert done.returncode == 0, done.stderr
    assert "restart_learners" in done.stderr
    assert_same_run(run, world / "runs" / "whole")


def test_a_run_ahead_that_loses_its_last_engine_goes_on(world: Path) -> None:
    """The learners are at work then: the next engine takes what their last push left behind."""
    ahead = ("--max-staleness", "1", "--objective.truncation.level", "token")
    for name, fault in (
        ("ahead", {}),
        ("ahead-engines", {"WINDLASS_FAULT": f"rollout:{PASSINGS[FaultPoint.ROLLOUT]}"}),
    ):
        words = ["train", "job.yaml", "--run-dir", f"runs/{name}", "--cluster.engine_restarts", "9", *ahead]
        done = windlass(*words, cwd=world, **fault)
        assert done.returncode == 0, done.stderr
    assert_same_run(world / "runs" / "ahead-engines", world / "runs" / "ahead")
    assert read_steps(world / "runs" / "ahead-engines")[-1]["system/engine_restarts"] >= 2
    assert not (world / "runs" / "ahead-engines" / "weights").exists()


def test_a_colocated_run_is_the_same_to_the_bit(world: Path) -> None:
    run = world / "runs" / "colocated"
    done = windlass("train", "job.yaml", "--run-dir", str(run), "--cluster.colocated", "true", cwd=world)
    assert done.returncode == 0, done.stderr
    assert_same_run(run, world / "runs" / "whole")
    assert all(step["time/sleep"] > 0 for step in read_steps(run)[1:])


def test_three_kills_at_random_times(world: Path) -> None:
    run = world / "runs" / "random"
    chance = random.Random(7)
    for _ in range(3):
        # From before the first step to beyond the last one on a quiet machine.
        kill_driver_after(world, run, chance.uniform(4, 40))
    again = windlass("train", "job.yaml", "--run-dir", str(run), cwd=world)
    assert again.returncode == 0, again.stderr
    assert_same_run(run, world / "runs" / "whole")


def kill_driver_after(world: Path, run: Path, seconds: float) -> None:
    """Start the job and kill its driver; Ray's processes end by themselves."""
    command = [str(Path(sys.executable).parent / "windlass"), "train", "job.yaml", "--run-dir", str(run)]
    started = subprocess.Popen(command, cwd=world, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    time.sleep(seconds)
    if started.poll() is None:
        os.kill(started.pid, signal.SIGKILL)
    started.wait()


def test_sigterm_ends_at_a_step_boundary_and_the_run_continues(world: Path) -> None:
    run = world / "runs" / "terminated"
    command = [str(Path(sys.executable).parent / "windlass"), "train", "job.yaml", "--run-dir", str(run)]
    started = subprocess.Popen(command, cwd=world, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while started.poll() is None and not (run / "checkpoints" / "step-000001").exists():
        time.sleep(0.05)
    started.send_signal(signal.SIGTERM)
    assert started.wait(timeout=120) == 0
    again = windlass("train", "job.yaml", "--run-dir", str(run), cwd=world)
    assert again.returncode == 0, again.stderr
    assert_same_run(run, world / "runs" / "whole")


def test_a_damaged_checkpoint_is_refused_in_one_line(world: Path) -> None:
    run = world / "runs" / "damaged"
    shutil.copytree(world / "runs" / "whole", run)
    weights = run / "checkpoints" / f"step-{STEPS:06d}" / "hf" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    refused = windlass("train", "job.yaml", "--run-dir", str(run), "--limits.max-steps", "9", cwd=world)
    assert refused.returncode == 2
    assert "wrong digest" in refused.stderr
    assert len(refused.stderr.strip().splitlines()) == 1
