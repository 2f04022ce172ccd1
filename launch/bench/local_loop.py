"""The RL loop of a job with its engine, a learner and the weight channel in one process, all checks on."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import Any

from data.catalogue import Catalogue
from data.dataset import Samples
from data.feed import Feed
from data.trie_constraint import TrieConstraint
from launch.bench.step_job import prompt_builder
from reward.failures import FailureTracker
from reward.scoring import RewardScorer
from rollout.channel import WeightChannel
from rollout.engine import build_engine
from rollout.peers import LocalPeer
from rollout.probe import item_probe
from trainer.jobs import RlJob
from trainer.learner_group import LearnerGroup
from trainer.loop import RlLoop
from trainer.run_state import RunState


class BenchHost:
    """The surroundings of the loop: a weight channel, and nothing on disk."""

    def __init__(self, channel: WeightChannel) -> None:
        self._channel = channel

    def push(self, version: int) -> dict[str, float]:
        """See `trainer.training_loop.Host`."""
        self._channel.push(version)
        return {}

    def rest_engines(self) -> dict[str, float]:
        """Its engines have processors of their own."""
        return {}

    def evaluate(self, step: int) -> None:
        """A benchmark evaluates nothing."""

    def save(self, state: RunState, keep: Callable[[Path], None]) -> None:
        """A benchmark keeps nothing."""

    def log(self, step: int, metrics: dict[str, float]) -> None:
        """A benchmark logs nothing."""

    def interrupted(self) -> bool:
        """It runs to its end."""
        return False


@contextmanager
def local_loop(
    job: RlJob,
    hf_dir: Path,
    catalogue: Catalogue,
    samples: Samples,
    *,
    rewards: RewardScorer | None = None,
    **more: Any,
) -> Iterator[tuple[RlLoop, Any]]:
    """The loop, ready for its first step, and its engine.

    Args:
        rewards: None scores by the rules of the job alone.
        more: further fields of the loop.
    """
    with ExitStack() as stack:
        engine = stack.enter_context(closing(build_engine(job.rollout, hf_dir)))
        constraint = TrieConstraint(catalogue.trie(), exclude=True)
        learners = stack.enter_context(
            closing(LearnerGroup.local(job.learner, hf_dir, constraint, seed=job.seed, total_steps=1_000_000))
        )
        channel = WeightChannel(
            settings=job.weights,
            source=learners.source,
            engines={engine.engine_id: LocalPeer(engine.engine_id, engine)},
            probe=item_probe(
                [catalogue.tokens(item) for item in range(catalogue.n_items)], bos=catalogue.vocabulary.bos
            ),
            dtype=job.learner.dtype.value,
        )
        channel.push(0)
        loop = RlLoop(
            settings=job,
            job=job,
            host=BenchHost(channel),
            state=RunState(),
            feed=Feed(samples, prompt_builder(job, catalogue), job.batch_prompts, job.seed, fingerprint="bench"),
            rollouts=engine,
            rewards=RewardScorer(job.reward, None) if rewards is None else rewards,
            learners=learners,
            tracker=FailureTracker(job.reward),
            catalogue=catalogue,
            **more,
        )
        yield stack.enter_context(closing(loop)), engine
