"""How engines and learners of one host share its cores (CPU; on GPUs these threads only feed the cards).

In turn, each kind has all cores while it works: the other's threads wait passively (`OMP_WAIT_POLICY=PASSIVE`), which
costs nothing. At once (`max_staleness` above 0) the cores are dealt out, so that neither slows the other down.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass

from trainer.jobs import RlJob, SftJob


@dataclass(frozen=True, kw_only=True)
class ThreadPlan:
    """Computing threads of each process."""

    cores: int
    """Cores that this process may use."""
    engine: int
    """Threads of each engine."""
    learner: int
    """Threads of each learner rank."""
    at_once: bool
    """Whether engines and learners work at the same time."""

    def record(self) -> dict[str, int | bool]:
        """Plain values for the summary."""
        return asdict(self)


def thread_plan(
    *, cores: int, engines: int, ranks: int, at_once: bool, engine_threads: int = 0, learner_threads: int = 0
) -> ThreadPlan:
    """Deal the cores out; at least one thread each, and what was asked for (above 0) stays.

    Working at once, the engines share one half of the cores and the learners the other, unless one of the two asked for
    a number: then the other kind shares what that leaves.
    """
    engine_cores = learner_cores = cores
    if at_once:
        engine_cores = cores - learner_threads * ranks if learner_threads else cores // 2
        learner_cores = cores - (engine_threads * engines if engine_threads else engine_cores)
    return ThreadPlan(
        cores=cores,
        engine=engine_threads or max(1, engine_cores // engines),
        learner=learner_threads or max(1, learner_cores // ranks),
        at_once=at_once,
    )


def plan_threads(job: SftJob | RlJob) -> tuple[SftJob | RlJob, ThreadPlan]:
    """The job with the threads of this host's plan in `rollout.threads` and `learner.threads`, and the plan."""
    plan = thread_plan(
        cores=len(os.sched_getaffinity(0)),
        engines=job.rollout.engines,
        ranks=job.learner.ranks,
        at_once=isinstance(job, RlJob) and job.max_staleness > 0,
        engine_threads=job.rollout.threads,
        learner_threads=job.learner.threads,
    )
    changes = {
        "rollout": job.rollout.model_copy(update={"threads": plan.engine}),
        "learner": job.learner.model_copy(update={"threads": plan.learner}),
    }
    return job.model_copy(update=changes), plan
