"""`windlass bench orchestrator`: how many engines one driver keeps at work.

The loop of a job (`trainer.loop.RlLoop`), the fleet with its states, Ray's object store and the records are the real
ones, with payloads of real size; engines and learners are simulated by fixed latencies. So what is measured is the
driver: dispatch, records, violations, rewards by rule, objective, and the schedule with staleness 1.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import psutil
import tyro
from pydantic import Field

from data.catalogue import Catalogue
from data.dataset import Samples
from data.errors import RequestError
from data.feed import Feed
from launch.bench.machine import describe_machine
from launch.bench.models import random_catalogue
from launch.bench.settings import BenchSettings
from launch.bench.simulated_engines import SimulatedFleet
from launch.bench.step_job import prompt_builder
from launch.cluster import cluster
from reward.failures import FailureTracker
from reward.scoring import RewardScorer
from trainer.completion_scores import ScoreOutputs
from trainer.jobs import RlJob
from trainer.learner_group import LearnerGroup
from trainer.loop import RlLoop
from trainer.losses import UpdateInputs
from trainer.run_settings import LOCAL, ClusterSettings
from trainer.run_state import RunState
from trainer.trees import Completions

MIB = 2**20


class OrchestratorBench(BenchSettings):
    """Arguments of `windlass bench orchestrator`; `--model` gives the catalogue alone, `--width` changes nothing."""

    engines: str = "8,64,256"
    """Comma-separated numbers of simulated engines."""
    latency_s: float = Field(4.0, gt=0)
    """Seconds an engine takes for a shard of `--prompts` groups."""
    shards_per_engine: int = Field(4, ge=1)
    """Shards of a step for each engine."""
    learn_share: float = Field(0.5, ge=0, le=4)
    """Seconds of an update, as a share of the seconds that the fleet takes for a step."""
    steps: int = Field(4, ge=2)
    """Measured steps, after one of warm-up."""
    max_staleness: int = Field(1, ge=0, le=8)
    """As in a job."""
    object_store_mib: int = Field(1024, ge=80)
    """Ray's shared memory."""

    def counts(self) -> list[int]:
        """The numbers of engines.

        Raises:
            RequestError: no list of numbers.
        """
        try:
            found = [int(word) for word in self.engines.split(",")]
        except ValueError as error:
            raise RequestError("--engines", self.engines, "comma-separated numbers, like 8,64") from error
        if min(found) < 1:
            raise RequestError("--engines", self.engines, "numbers from 1")
        return found

    def rollout_seconds(self) -> float:
        """Seconds that a fleet with nothing else to wait for takes for a step."""
        return self.latency_s * self.shards_per_engine


def orchestrator_command(
    settings: Annotated[OrchestratorBench, tyro.conf.arg(name=""), tyro.conf.EnumChoicesFromValues],
) -> dict[str, Any]:
    """Run the loop over simulated engines and say how busy they were and what the driver took."""
    import torch

    counts = settings.counts()
    torch.set_num_threads(settings.threads)
    catalogue = random_catalogue(settings)
    local = ClusterSettings(address=LOCAL, object_store_mib=settings.object_store_mib)
    with cluster(local):
        runs = [measure(settings, catalogue, count) for count in counts]
    return {
        **{name: runs[-1][name] for name in ("engines", "busy_share", "driver_cpu", "rss_growth_mib")},
        "checked": all(run["checked"] for run in runs),
        "runs": runs,
        "settings": settings.record(),
        "machine": describe_machine(),
    }


def measure(settings: OrchestratorBench, catalogue: Catalogue, engines: int) -> dict[str, Any]:
    """One number of engines."""
    job = bench_job(settings, catalogue, engines)
    with closing(SimulatedFleet.of(job.rollout, catalogue, settings.latency_s)) as fleet:
        host = SimulatedHost(fleet, last_step=settings.steps + 1)
        loop = RlLoop(
            settings=job,
            job=job,
            host=host,
            state=RunState(),
            feed=Feed(
                samples(settings, catalogue, job.batch_prompts),
                prompt_builder(job, catalogue),
                job.batch_prompts,
                job.seed,
                fingerprint="bench",
            ),
            rollouts=fleet,
            rewards=RewardScorer(job.reward, None),
            learners=SimulatedLearners(settings.learn_share * settings.rollout_seconds(), catalogue),
            tracker=FailureTracker(job.reward),
            catalogue=catalogue,
        )
        loop.run()
        begin, end = host.marks[1], host.marks[-1]
        busy = fleet.busy_seconds(begin.time, end.time) / (engines * (end.time - begin.time))
        # The start, the step of warm-up, and the measured ones.
        checked = host.lags == [0.0, *(min(step, settings.max_staleness) for step in range(settings.steps + 1))]
        checked = checked and not fleet.violations.total() and fleet.healthy() == engines
    return {
        "engines": engines,
        "busy_share": busy,
        "driver_cpu": (end.cpu - begin.cpu) / (end.time - begin.time),
        "rss_growth_mib": (end.rss - begin.rss) / MIB,
        "rss_mib": end.rss / MIB,
        "steps": settings.steps,
        "seconds": end.time - begin.time,
        "groups_per_step": job.batch_prompts,
        "shards_per_s": busy * engines / settings.latency_s,
        "times": host.times,
        "checked": checked,
    }


def bench_job(settings: OrchestratorBench, catalogue: Catalogue, engines: int) -> RlJob:
    """The job whose loop runs."""
    levels = catalogue.trie().depth
    row = -(-(settings.prompt_len + levels) // 16) * 16
    return RlJob.model_validate(
        {
            "job": "rl",
            "seed": settings.seed,
            "data": {
                "dataset": "bench",
                "history": -(-settings.prompt_len // levels),
                "max_prompt_tokens": settings.prompt_len,
                "exclude_seen": False,
            },
            "batch_prompts": engines * settings.shards_per_engine * settings.prompts,
            "max_staleness": settings.max_staleness,
            # Never met: to the end of the measured steps the fleet has later ones to work for.
            "limits": {"max_steps": 1_000_000_000},
            "evaluation": {"every": 0},
            "checkpoints": {"interval": 1_000_000},
            "learner": {"dtype": "float32", "row_tokens": row, "token_budget": max(row, 4096)},
            "rollout": {
                "engine": "reference",
                "dtype": "float32",
                "engines": engines,
                "width": settings.group,
                "shard_size": settings.prompts,
            },
            "objective": {"beta": 0.0, "truncation": {"level": "token"}} if settings.max_staleness else {"beta": 0.0},
        }
    )


def samples(settings: OrchestratorBench, catalogue: Catalogue, batch: int) -> Samples:
    """Rows for two batches: histories out of one pool of items, targets at random."""
    random = np.random.default_rng(settings.seed)
    rows, history = 2 * batch, settings.prompt_len
    pool = random.integers(0, catalogue.n_items, 100_000 + history).astype(np.int32)
    start_N = random.integers(0, 100_000, rows).astype(np.int64)
    return Samples(
        user_id_N=np.arange(rows, dtype=np.int32),
        target_N=random.integers(0, catalogue.n_items, rows).astype(np.int32),
        timestamp_N=np.zeros(rows, dtype=np.int64),
        sample_id_N=np.arange(rows, dtype=np.int64),
        values=pool,
        start_N=start_N,
        end_N=start_N + history,
    )


class Mark:
    """The end of a step, as the driver's process stands there."""

    def __init__(self) -> None:
        self.time = time.monotonic()
        self.cpu = time.process_time()
        self.rss = psutil.Process(os.getpid()).memory_info().rss


class SimulatedHost:
    """The surroundings of the loop: pushes reach the simulated engines, nothing is evaluated or kept."""

    def __init__(self, fleet: SimulatedFleet, last_step: int) -> None:
        self._fleet = fleet
        self._last_step = last_step
        self.marks: list[Mark] = []
        """One for each step; the first is before the first step."""
        self.lags: list[float] = []
        """Staleness of each step's groups, the start counted as 0."""
        self.times: dict[str, float] = {}
        """Seconds of the last step by phase."""

    def push(self, version: int) -> dict[str, float]:
        """See `trainer.training_loop.Host`."""
        self._fleet.publish(version)
        return {}

    def rest_engines(self) -> dict[str, float]:
        """Simulated engines hold no memory."""
        return {}

    def evaluate(self, step: int) -> None:
        """A benchmark evaluates nothing."""

    def save(self, state: RunState, keep: Callable[[Path], None]) -> None:
        """A benchmark keeps nothing."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """Note where the driver stands."""
        self.marks.append(Mark())
        self.lags.append(metrics.get("staleness/max", 0.0))
        self.times = {name: value for name, value in metrics.items() if name.startswith("time/")}

    def interrupted(self) -> bool:
        """It ends after the measured steps."""
        return len(self.marks) > self._last_step


class SimulatedLearners(LearnerGroup):
    """Learners that take a fixed time for an update and know that every token has log-probability -1."""

    def __init__(self, update_s: float, catalogue: Catalogue) -> None:
        self._update_s = update_s
        self._choices = float(catalogue.vocabulary.size)

    def score(self, completions: Completions, temperature: float) -> ScoreOutputs:
        """See `LearnerGroup.score`."""
        mask_PGT = completions.token_mask_PGT
        one_PGT = mask_PGT.astype(np.float32)
        return ScoreOutputs(
            logp_PGT=-one_PGT,
            full_logp_PGT=-one_PGT,
            legal_mass_PGT=one_PGT,
            entropy_PGT=one_PGT,
            certainty_PGT=one_PGT,
            choices_PGT=one_PGT * self._choices,
            legal_PGT=mask_PGT,
        )

    def update(self, completions: Completions, inputs: UpdateInputs) -> dict[str, float]:
        """See `LearnerGroup.update`."""
        time.sleep(self._update_s)
        return {"loss": 0.0}
