"""Contract: what fails after a run has begun is exit code 1 and one line, and leaves the last checkpoint. No traceback.

Whole command lines in processes of their own: a loss that is not finite, and (long) rewards that fail in every way.
What is refused before a run begins: test_bad_input.py; parts that are killed: test_kill.py.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.requirements import require
from tests.small_world import read_steps, windlass, write_jobs
from trainer.checkpoints import latest_checkpoint, open_checkpoint


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a dataset and recipes."""
    folder = tmp_path_factory.mktemp("failing")
    write_jobs(folder)
    return folder


RANKERS = """
import os
import time

import numpy as np


class NotFinite:
    def score(self, histories, candidates):
        return [np.full(len(row), np.nan, np.float32) for row in candidates]


class Slow:
    def score(self, histories, candidates):
        time.sleep(60)


class Dying:
    calls = 0

    def score(self, histories, candidates):
        Dying.calls += 1
        if Dying.calls > 1:
            os._exit(3)
        return [np.ones(len(row), np.float32) for row in candidates]


class Unbuildable:
    def __init__(self):
        raise RuntimeError("no weights here")

    def score(self, histories, candidates):
        return []
"""


def failed(world: Path, run: Path, *arguments: object) -> str:
    """Train in processes of its own; the run must fail in one line, which comes back, with its checkpoints whole."""
    for part in ("deepspeed", "ray"):
        require(part)
    (world / "hostile.py").write_text(RANKERS)
    done = windlass(
        "train", *map(str, arguments), "--run-dir", str(run), cwd=world, WINDLASS_PACKAGE_DIGEST="unchecked"
    )
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    lines = [line for line in done.stderr.splitlines() if line.startswith("windlass: ")]
    assert len(lines) == 1
    for checkpoint in (run / "checkpoints").glob("*"):
        open_checkpoint(checkpoint)
    return lines[0]


def test_a_loss_that_is_not_finite_stops_before_the_step(world: Path, tmp_path: Path) -> None:
    # The learners stop; who would have evaluated does not matter.
    line = failed(world, tmp_path / "run", "sft.yaml", "--learner.lr", "1e30", "--rollout.engine", "reference")
    assert " in optimiser step 2; stopped before the step, the last checkpoint stays valid" in line
    assert [step["step"] for step in read_steps(tmp_path / "run")] == [0, 1]
    assert latest_checkpoint(tmp_path / "run" / "checkpoints") == tmp_path / "run" / "checkpoints" / "step-000001"


@pytest.mark.long
@pytest.mark.parametrize(
    ("arguments", "words", "last"),
    [
        (["--reward.ranker", "hostile:NotFinite"], "step 1: 8 of 8 groups have no reward (8 non_finite)", 0),
        (
            ["--reward.ranker", "hostile:Slow", "--reward.deadline_s", "2"],
            "8 of 8 groups have no reward (8 timeout)",
            0,
        ),
        (["--reward.ranker", "hostile:Dying", "--reward.retries", "0"], "step 2: 8 of 8 groups have no reward", 1),
        (["--reward.url", "http://127.0.0.1:1"], "step 1: 8 of 8 groups have no reward (8 unavailable)", 0),
        (
            ["--reward.ranker", "hostile:Unbuildable"],
            "the reward service did not start: RuntimeError: no weights here",
            None,
        ),
    ],
    ids=["NaN", "slow", "dies", "down", "does not start"],
)
def test_rewards_that_fail_stop_the_run_after_a_checkpoint(
    world: Path, tmp_path: Path, arguments: list[str], words: str, last: int | None
) -> None:
    run = tmp_path / "run"
    line = failed(world, run, "rl.yaml", *arguments, "--checkpoints.interval", "100", "--reward.backoff_s", "0")
    assert words in line
    newest = latest_checkpoint(run / "checkpoints")
    assert newest == (None if last is None else run / "checkpoints" / f"step-{last:06d}")
