"""`--rollout-only`: generate and score groups with the initial model and dump them; nothing is trained."""

from __future__ import annotations

import time
from contextlib import closing
from pathlib import Path
from typing import Any

import torch

from data.errors import RunError
from data.feed import Feed
from reward.failures import FailureTracker
from reward.scoring import RewardScorer
from rollout.fleet import RolloutFleet
from rollout.settings import EngineDtype
from trainer.group_dump import write_step
from trainer.initial_model import prepare_initial_model
from trainer.interruption import Interruption
from trainer.jobs import RlJob
from trainer.loop import decode_spec
from trainer.policy_data import PolicyData
from trainer.run_log import RunLog


def dump_rollouts(
    job: RlJob, data: PolicyData, feed: Feed, rewards: RewardScorer, run_dir: Path, interruption: Interruption
) -> dict[str, Any]:
    """Dump the groups of `limits.max_steps` steps (else of one epoch) into `job.rollout_only`; returns the summary.

    Raises:
        RunError: too many rewards failed.
    """
    assert job.rollout_only is not None
    begun = time.monotonic()
    dtype = torch.float32 if job.rollout.dtype is EngineDtype.FLOAT32 else torch.bfloat16
    hf_dir = prepare_initial_model(
        job.init,
        data.catalogue,
        seed=job.seed,
        dtype=dtype,
        target=run_dir / "initial",
        codebooks=data.codebooks(job),
    )
    steps = job.limits.max_steps or feed.batches_per_epoch
    tracker = FailureTracker(job.reward)
    done = 0
    with (
        closing(RolloutFleet.start(job.rollout, hf_dir, data.catalogue)) as fleet,
        RunLog(run_dir, job.tracking, total_steps=steps, headline=("reward/mean", "reward/hit")) as log,
    ):
        for step in range(1, steps + 1):
            if interruption.requested:
                break
            batch = feed.next()
            groups = fleet.generate(batch.prompts, decode_spec(job, step))
            scored, metrics = rewards.score(batch.prompts, groups)
            verdict = tracker.observe(scored.failure_P)
            if verdict.stop:
                raise RunError(f"step {step}: {verdict.message}")
            write_step(job.rollout_only, step, batch.prompts, scored)
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
