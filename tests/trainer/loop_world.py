"""The RL loop's surroundings inside one process: reference engine, a DeepSpeed learner and the real weight channel."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from reward.client import RewardClient
from reward.failures import FailureTracker
from reward.scoring import RewardScorer
from rollout.channel import WeightChannel
from rollout.engine import Engine, build_engine
from rollout.peers import LocalPeer
from rollout.probe import item_probe
from tests.reward.rankers import local_swaps
from trainer.evaluation import Evaluation
from trainer.initial_model import prepare_initial_model
from trainer.jobs import RlJob
from trainer.learner_group import LearnerGroup
from trainer.list_evaluation import ListEvaluation
from trainer.list_jobs import list_scorer, prompt_rows
from trainer.loop import RlLoop
from trainer.policy_data import PolicyData
from trainer.policy_jobs import item_feed
from trainer.replay_loop import ReplayLoop
from trainer.run_log import reproducible
from trainer.run_state import RunState
from trainer.training_loop import Metrics
from trainer.truncation import TruncationLevel


@dataclasses.dataclass
class LocalHost:
    """The surroundings of a loop inside this process; keeps in memory what a run writes to disk."""

    channel: WeightChannel | None
    data: PolicyData
    job: RlJob
    engine: Engine | None
    learners: LearnerGroup
    folder: Path
    steps: dict[int, Metrics] = dataclasses.field(default_factory=dict)
    saved: dict[int, RunState] = dataclasses.field(default_factory=dict)
    withheld: set[int] = dataclasses.field(default_factory=set)
    asleep: list[int] = dataclasses.field(default_factory=list)
    """Weight versions of the engine when it fell asleep."""

    def rest_engines(self) -> Metrics:
        if self.engine is not None and self.job.rollout.sleeps:
            self.asleep.append(self.engine.weight_version)
            self.engine.fall_asleep()
        return {}

    def push(self, version: int) -> Metrics:
        if self.channel is not None and version not in self.withheld:
            self.channel.push(version)
        return {}

    def evaluate(self, step: int) -> Evaluation | ListEvaluation | None:
        return None if self.engine is None else self.data.evaluator(self.job).run(self.engine)

    def save(self, state: RunState, keep: Callable[[Path], None]) -> None:
        self.saved[state.step] = state
        self.learners.save(self.folder / f"state-{state.step}")
        keep(self.folder / f"state-{state.step}")

    def log(self, step: int, metrics: Metrics) -> None:
        assert step not in self.steps
        self.steps[step] = reproducible(metrics)

    def interrupted(self) -> bool:
        return False


@dataclasses.dataclass
class World:
    """One job's parts; `build` makes a loop with fresh ones."""

    job: RlJob
    data: PolicyData
    folder: Path
    built: list[LearnerGroup] = dataclasses.field(default_factory=list)
    client: RewardClient | None = None
    """Of a ranker; None without one."""

    def learners(self, hf_dir: Path, job: RlJob) -> LearnerGroup:
        for group in self.built:
            group.close()
        self.built.clear()
        reference = hf_dir if job.objective.beta else None
        group = LearnerGroup.local(
            job.learner, hf_dir, self.data.constraint(), seed=job.seed, total_steps=4, reference_dir=reference
        )
        self.built.append(group)
        return group

    def build(self, name: str, *, state: RunState | None = None, load: Path | None = None, **changes: Any) -> RlLoop:
        job = self.job.model_copy(update=changes)
        torch.manual_seed(0)
        hf_dir = prepare_initial_model(
            "tiny", self.data.catalogue, seed=1, dtype=torch.float32, target=self.folder / name / "initial"
        )
        learners = self.learners(hf_dir, job)
        if load is not None:
            learners.load(load)
        engine = None if job.train_only else build_engine(job.rollout, hf_dir, engine_id="reference-0")
        channel = None
        if engine is not None:
            catalogue = self.data.catalogue
            paths = [catalogue.tokens(item) for item in range(catalogue.n_items)]
            channel = WeightChannel(
                settings=job.weights,
                source=learners.source,
                engines={"reference-0": LocalPeer("reference-0", engine)},
                probe=item_probe(paths, bos=catalogue.vocabulary.bos),
                dtype="float32",
            )
        host = LocalHost(channel, self.data, job, engine, learners, self.folder / name)
        feed = item_feed(job, self.data, None) if self.data.lists is None else prompt_rows(job, self.data).feed
        rewards = RewardScorer(job.reward, self.client)
        if state is not None:
            assert feed.load_state_dict(state.cursor) is None
        common: dict[str, Any] = {
            "settings": job,
            "job": job,
            "host": host,
            "state": state or RunState(),
            "resumed": state is not None,
            "feed": feed,
            "rewards": rewards,
            "lists": None if self.data.lists is None else list_scorer(job, rewards, local_swaps(job.reward)),
            "learners": learners,
            "tracker": FailureTracker(job.reward),
            "catalogue": self.data.catalogue,
        }
        if job.train_only is not None:
            return ReplayLoop(**common, folder=job.train_only, catalogue_digest=self.data.catalogue.digest)
        assert engine is not None
        return RlLoop(**common, rollouts=engine)


def weights(loop: RlLoop, folder: Path) -> dict[str, bytes]:
    """The learner's weights, as bytes."""
    from safetensors.numpy import load_file

    loop.learners.export_hf(folder)
    return {name: value.tobytes() for name, value in load_file(folder / "model.safetensors").items()}


def host_of(loop: RlLoop) -> LocalHost:
    assert isinstance(loop.host, LocalHost)
    return loop.host


def stale(world: World, staleness: int) -> dict[str, Any]:
    """Changes of a job that trains on groups of earlier weights."""
    truncation = world.job.objective.truncation.model_copy(update={"level": TruncationLevel.TOKEN})
    objective = world.job.objective.model_copy(update={"truncation": truncation})
    return {"max_staleness": staleness, "objective": objective}
