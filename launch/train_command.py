"""The body of `windlass train`: from a job and its run directory to a summary on disk."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Mapping
from typing import Any

from data.dataset import Dataset
from launch.cluster import cluster
from launch.memory import MemorySampler
from launch.node_check import check_nodes
from launch.run_directory import RunDirectory
from trainer.checkpoints import CheckpointStore, latest_checkpoint, read_manifest
from trainer.failure_policy import Action, Failure, Part, Situation, decide
from trainer.interruption import Interruption
from trainer.jobs import CriticJob, Job, LaacJob, PolicyJobSettings, RankerJob, RlJob, SftJob
from trainer.learner_group import LearnerLost
from trainer.preflight import check_cluster
from trainer.run_log import RunLog
from trainer.run_status import StatusFile


def train(job: Job, run: RunDirectory) -> dict[str, Any]:
    """Run a job to its end in a cluster of its own, and write summary.json.

    Raises:
        RequestError: something the job names is absent or does not fit.
        RunError: the run failed; its last checkpoint stays valid.
    """
    with Interruption() as interruption, MemorySampler() as memory:
        if isinstance(job, RankerJob):
            summary = train_ranker_job(job, run, interruption)
        elif isinstance(job, CriticJob):
            summary = train_critic_job(job, run, interruption)
        elif isinstance(job, LaacJob):
            summary = train_laac_job(job, run, interruption)
        else:
            StatusFile(run_dir=run.path).begin()
            with cluster(job.cluster, folders=[run.path]):
                summary = train_policy_job(job, run, interruption)
        summary["peak_pss_gib"] = memory.peak_pss_gib
    run.write_summary(summary)
    return summary


def train_policy_job(job: PolicyJobSettings, run: RunDirectory, interruption: Interruption) -> dict[str, Any]:
    """Run an `sft` or `rl` job in the connected cluster; returns the summary without writing it.

    When learners die, all parts begin again from the newest checkpoint, as often as the failure policy allows.
    """
    failures: list[Failure] = []
    check_newcomers(job, run)
    while True:
        try:
            return _run_parts(job, run, interruption, len(failures))
        except LearnerLost as error:
            failure = Failure(part=Part.LEARNER, at=time.monotonic(), told=str(error))
            manifest = CheckpointStore(run.path / "checkpoints", job.checkpoints).latest() is not None
            situation = Situation(healthy_engines=0, has_manifest=manifest)
            decision = decide(failure, failures, situation, job.cluster)
            if decision.action is not Action.RESTART_LEARNERS:
                raise
            failures.append(failure)
            print(f"windlass: {error}: {decision.action.value} ({decision.reason})", file=sys.stderr)


def check_newcomers(job: PolicyJobSettings, run: RunDirectory) -> None:
    """Wait for the nodes that the job asks for, and check those that came since the cluster was joined.

    Raises:
        RequestError: what is missing within `cluster.preflight_deadline_s`, or a node that does not share the run.
        RunError: a node that does not fit.
    """
    if not job.cluster.joins or not isinstance(job, SftJob | RlJob):
        return
    if not isinstance(job, RlJob) or job.rollout_only is None:
        check_cluster(job, with_fleet=not isinstance(job, RlJob) or job.train_only is None)
    check_nodes([run.path])


def _run_parts(job: PolicyJobSettings, run: RunDirectory, interruption: Interruption, restarts: int) -> dict[str, Any]:
    from trainer.policy_jobs import run_rl, run_sft

    if isinstance(job, SftJob):
        return run_sft(job, run.path, interruption, learner_restarts=restarts)
    if isinstance(job, RlJob):
        return run_rl(job, run.path, interruption, learner_restarts=restarts)
    raise TypeError(f"{type(job).__name__} is no policy job")


def train_ranker_job(job: RankerJob, run: RunDirectory, interruption: Interruption) -> dict[str, Any]:
    """Train a ranker in this process into `RUN/ranker`."""
    from trainer.ranker_training import resumed_step, train_ranker

    begun = time.monotonic()
    folder = run.path / "ranker"
    with RunLog(
        run.path, job.tracking, resumed_step=resumed_step(folder), headline=("loss", job.evaluation.metric)
    ) as log:

        def write(step: int, metrics: Mapping[str, float]) -> None:
            log.write(step, metrics)

        trained = train_ranker(
            job, Dataset.open(job.data.dataset), folder, log=write, interrupted=lambda: interruption.requested
        )
    return {
        "job": "ranker",
        "ranker": str(folder),
        "interrupted": interruption.requested,
        "wall_seconds": time.monotonic() - begun,
        "digest": trained.digest,
        "selection": {"metric": job.evaluation.metric, "best_step": trained.step, "best_score": trained.value},
        "ended_by": trained.stopped,
    }


def train_critic_job(job: CriticJob, run: RunDirectory, interruption: Interruption) -> dict[str, Any]:
    """Train a critic in this process into `RUN/ranker`."""
    from trainer.critic_job import finished_epochs, run_critic

    begun = time.monotonic()
    folder = run.path / "ranker"
    done = finished_epochs(folder)
    with RunLog(run.path, job.tracking, resumed_step=done, headline=("loss", "validation/loss")) as log:

        def write(epoch: int, metrics: Mapping[str, float]) -> None:
            log.write(epoch, metrics)

        outcome = run_critic(job, folder, log=write, interrupted=lambda: interruption.requested)
    return {
        "job": "critic",
        "ranker": str(folder),
        "interrupted": not outcome.digest,
        "wall_seconds": time.monotonic() - begun,
        "digest": outcome.digest,
        **outcome.facts,
    }


def train_laac_job(job: LaacJob, run: RunDirectory, interruption: Interruption) -> dict[str, Any]:
    """Train an actor-critic or a baseline; a cluster is up only where the job starts processes."""
    from trainer.laac_job import LaacRun, needs_cluster

    begun = time.monotonic()
    newest = latest_checkpoint(run.path / "checkpoints")
    resumed = None if newest is None else read_manifest(newest).step
    up = cluster(job.cluster, folders=[run.path]) if needs_cluster(job, run.path) else contextlib.nullcontext()
    headline = ("td", "gap", "grounding", job.evaluation.metric)
    with (
        up,
        RunLog(
            run.path, job.tracking, resumed_step=resumed, total_steps=job.limits.max_steps, headline=headline
        ) as log,
    ):
        outcome = LaacRun(job, run.path, log.write, say=log.say).run(lambda: interruption.requested)
    return {
        "job": "laac",
        "method": job.laac.method.value,
        "interrupted": outcome["ended_by"] == "interrupted",
        "wall_seconds": time.monotonic() - begun,
        **outcome,
    }
