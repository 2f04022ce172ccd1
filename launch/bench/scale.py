"""`windlass bench scale`: whole steps with more engines and more learner ranks, against those of the first pair.

The loop of a job with its fleet, its learner ranks and the weight channel as processes of a Ray cluster: one of this
machine, or that of `--address`. Every part has the same number of threads (or one GPU), the batch is the same for all
pairs, so a perfect machine does it in time divided by the number of parts.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager
from typing import Annotated, Any

import tyro
from pydantic import Field

from data.catalogue import Catalogue
from data.errors import RequestError
from data.feed import Feed
from launch.bench.local_loop import BenchHost
from launch.bench.machine import describe_machine
from launch.bench.models import BenchModel, bench_model
from launch.bench.settings import Device
from launch.bench.step_job import StepBench, prompt_builder, random_samples
from launch.cluster import cluster
from reward.failures import FailureTracker
from reward.scoring import RewardScorer
from rollout.fleet import RolloutFleet
from trainer.jobs import RlJob
from trainer.learner_group import LearnerGroup
from trainer.loop import RlLoop
from trainer.run_channel import weight_channel
from trainer.run_settings import ClusterSettings
from trainer.run_state import RunState

PHASES = ("rollout", "score", "update", "push")


class ScaleBench(StepBench):
    """Arguments of `windlass bench scale`; `--threads` are those of every engine and of every rank."""

    prompts: int = Field(16, ge=1)
    """Prompts of a step."""
    engines: str = "1,2"
    """Comma-separated numbers of engines, one for each number of learners."""
    learners: str = "1,2"
    """Comma-separated numbers of learner ranks."""
    threads: int = Field(1, ge=1, le=4096)
    """Computing threads of each part, on CPU."""
    repeats: int = Field(3, ge=1)
    """Measured steps, after one of warm-up."""
    address: str | None = None
    """Address of a running Ray cluster; none takes RAY_ADDRESS, or starts one on this machine."""
    unauthenticated: bool = False
    """Join a cluster that takes calls without a token."""

    def pairs(self) -> list[tuple[int, int]]:
        """(engines, learner ranks) of each measurement.

        Raises:
            RequestError: no lists of numbers, of different lengths, or a batch that they cannot share.
        """
        lists = []
        for name, text in (("--engines", self.engines), ("--learners", self.learners)):
            try:
                lists.append([int(word) for word in text.split(",")])
            except ValueError as error:
                raise RequestError(name, text, "comma-separated numbers, like 1,2") from error
            if min(lists[-1]) < 1:
                raise RequestError(name, text, "numbers from 1")
        engines, learners = lists
        if len(engines) != len(learners):
            raise RequestError("--learners", self.learners, f"as many numbers as --engines, {len(engines)}")
        for count in engines:
            if self.prompts % count:
                raise RequestError("--prompts", self.prompts, f"a multiple of every number of engines, also of {count}")
        return list(zip(engines, learners, strict=True))


def scale_bench_command(
    settings: Annotated[ScaleBench, tyro.conf.arg(name=""), tyro.conf.EnumChoicesFromValues],
) -> dict[str, Any]:
    """Time whole steps with more and more engines and learners."""
    pairs = settings.pairs()
    cards = settings.device is Device.CUDA
    place = ClusterSettings(address=settings.address, unauthenticated=settings.unauthenticated)
    with bench_model(settings) as model, cluster(place):
        runs = [measure(settings, model, engines, learners, cards=cards) for engines, learners in pairs]
    first = runs[0]
    for run in runs:
        run["speedup"] = first["seconds"] / run["seconds"]
        run["efficiency"] = run["prompts_per_s_per_part"] / first["prompts_per_s_per_part"]
    return {
        **{name: runs[-1][name] for name in ("engines", "learners", "prompts_per_s_per_part", "efficiency", "push_s")},
        "part": "gpu" if cards else "core",
        "checked": all(run["checked"] for run in runs),
        "runs": runs,
        "settings": settings.record(),
        "model": model.record(),
        "machine": describe_machine(),
    }


def measure(settings: ScaleBench, model: BenchModel, engines: int, learners: int, *, cards: bool) -> dict[str, Any]:
    """One pair: medians over the measured steps."""
    job = settings.job(
        model.levels,
        model.config.max_position_embeddings,
        rollout={"engines": engines, "shard_size": settings.prompts // engines},
        learner={"ranks": learners},
    )
    steps: list[dict[str, float]] = []
    with distributed_loop(settings, job, model) as (loop, fleet):
        for step in range(1 + settings.repeats):
            loop.timer.take()
            metrics = loop.step()
            times = loop.timer.take()
            # The first step warms up.
            if step:
                steps.append(times | {"gap": metrics["policy_gap/mean"], "version": metrics["weight_version"]})
        checked = not fleet.violations.total() and [one["version"] for one in steps] == list(range(1, len(steps) + 1))
        checked = checked and len(fleet.shards) == engines
    seconds = statistics.median(one["time/step"] for one in steps)
    # Engines and ranks work in turn, so a core or card serves one of each.
    parts = max(engines, learners) * (1 if cards else settings.threads)
    return {
        "engines": engines,
        "learners": learners,
        "seconds": seconds,
        "phases": {name: statistics.median(one.get(f"time/{name}", 0.0) for one in steps) for name in PHASES},
        "push_s": statistics.median(one["time/push"] for one in steps),
        "prompts_per_s": settings.prompts / seconds,
        "prompts_per_s_per_part": settings.prompts / seconds / parts,
        "policy_gap": max(one["gap"] for one in steps),
        "checked": checked,
    }


@contextmanager
def distributed_loop(settings: ScaleBench, job: RlJob, model: BenchModel) -> Iterator[tuple[RlLoop, RolloutFleet]]:
    """The loop of a job over processes in the connected Ray cluster, ready for its first step."""
    catalogue: Catalogue = model.catalogue
    with ExitStack() as stack:
        fleet = stack.enter_context(closing(RolloutFleet.start(job.rollout, model.hf_dir, catalogue)))
        learners = stack.enter_context(
            closing(LearnerGroup.start(job.learner, model.hf_dir, catalogue, job.seed, total_steps=1_000_000))
        )
        channel = weight_channel(job, catalogue, learners, fleet)
        channel.push(0)
        fleet.verified(fleet.incarnations(), 0)
        loop = RlLoop(
            settings=job,
            job=job,
            host=FleetHost(channel, fleet),
            state=RunState(),
            feed=Feed(
                random_samples(settings, catalogue),
                prompt_builder(job, catalogue),
                job.batch_prompts,
                job.seed,
                fingerprint="bench",
            ),
            rollouts=fleet,
            rewards=RewardScorer(job.reward, None),
            learners=learners,
            tracker=FailureTracker(job.reward),
            catalogue=catalogue,
        )
        yield stack.enter_context(closing(loop)), fleet


class FleetHost(BenchHost):
    """The surroundings of the loop, with a fleet that is told of every push."""

    def __init__(self, channel: Any, fleet: RolloutFleet) -> None:
        super().__init__(channel)
        self._fleet = fleet

    def push(self, version: int) -> dict[str, float]:
        """See `trainer.training_loop.Host`."""
        told = super().push(version)
        self._fleet.verified(self._fleet.incarnations(), version)
        return told
