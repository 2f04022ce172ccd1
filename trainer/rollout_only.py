"""`--rollout-only`: generate and score groups with the initial model and dump them; nothing is trained.

A dump that was cut off is continued by the same command: the steps that its metrics.jsonl names are on disk.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from data.errors import RequestError, RunError
from data.feed import Feed
from reward.failures import FailureTracker
from reward.scoring import RewardScorer
from rollout.fleet import RolloutFleet
from rollout.settings import EngineDtype
from trainer.collection import decode_spec
from trainer.evaluation import Generator
from trainer.group_dump import step_path, steps_in, write_step
from trainer.interruption import Interruption
from trainer.jobs import RlJob
from trainer.policy_data import PolicyData
from trainer.run_log import METRICS, RunLog, read_last_step


def dump_rollouts(
    job: RlJob,
    data: PolicyData,
    feed: Feed,
    rewards: RewardScorer,
    run_dir: Path,
    interruption: Interruption,
    *,
    steps: int,
) -> dict[str, Any]:
    """Dump the groups of `steps` steps into `job.rollout_only`; returns the summary.

    Raises:
        RequestError: the folder holds steps that this run did not write.
        RunError: too many rewards failed.
    """
    assert job.rollout_only is not None
    begun = time.monotonic()
    done = read_last_step(run_dir / METRICS) or 0
    check_folder(job.rollout_only, done)
    dtype = torch.float32 if job.rollout.dtype is EngineDtype.FLOAT32 else torch.bfloat16
    hf_dir = data.initial_model(job, run_dir / "initial", dtype=dtype, resumed=done > 0)
    with (
        closing(RolloutFleet.start(job.rollout, hf_dir, data.catalogue)) as fleet,
        RunLog(
            run_dir,
            job.tracking,
            resumed_step=done or None,
            total_steps=steps,
            headline=("reward/mean", "reward/hit"),
        ) as log,
    ):
        for step, metrics in dumped(job, feed, fleet, rewards, interruption, done=done, steps=steps):
            log.write(step, metrics | {"constraint.violations": float(sum(fleet.violations.values()))})
            done = step
    return {
        "job": "rl",
        "mode": "rollout_only",
        "steps": done,
        "folder": str(job.rollout_only),
        "interrupted": done < steps,
        "wall_seconds": time.monotonic() - begun,
    }


def check_folder(folder: Path, done: int) -> None:
    """Refuse to mix two dumps: beyond the `done` steps of this run, only the one it was writing may be there.

    Raises:
        RequestError: another step is.
    """
    foreign = [step for step in steps_in(folder) if step > done + 1]
    if foreign:
        found = f"{folder} holds {step_path(folder, foreign[0]).name} of another dump"
        raise RequestError("rollout_only", found, "an empty folder, or the --run-dir of that dump")


def dumped(
    job: RlJob,
    feed: Feed,
    generator: Generator,
    rewards: RewardScorer,
    interruption: Interruption,
    *,
    done: int,
    steps: int,
) -> Iterator[tuple[int, dict[str, float]]]:
    """Write the steps behind `done`, one after the other; yields each with its metrics when it is on disk.

    Raises:
        RunError: too many rewards failed.
    """
    assert job.rollout_only is not None
    tracker = FailureTracker(job.reward)
    feed.epoch, feed.batch = divmod(done, feed.batches_per_epoch)
    for step in range(done + 1, steps + 1):
        if interruption.requested:
            return
        batch = feed.next()
        groups = generator.generate(batch.prompts, decode_spec(job, step))
        scored, metrics = rewards.score(batch.prompts, groups)
        verdict = tracker.observe(scored.failure_P)
        if verdict.stop:
            raise RunError(f"step {step}: {verdict.message}")
        write_step(job.rollout_only, step, batch.prompts, scored)
        yield step, metrics
