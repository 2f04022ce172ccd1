"""Collecting the batch of a step: prompts from the feed, groups from the fleet, rewards, refills; and batches on disk.

A batch holds everything that the learners' part of a step needs, so that it can be collected steps ahead
(`trainer.lookahead`) and lie in a checkpoint until its step comes.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from data.catalogue import Catalogue
from data.errors import RequestError
from data.faults import fault_point
from data.feed_ahead import FeedAhead
from data.feedback import Anchors
from data.records import DecodeSpec, Groups, Prompt, ScoredGroups
from reward.scoring import RewardScorer
from trainer.batch_signals import FeedbackRows
from trainer.durable import sync_file, write_text
from trainer.given_scores import asking_for, given_items
from trainer.ground_truth import with_ground_truth
from trainer.group_dump import read_step, step_path, steps_in, write_step
from trainer.group_settings import Refill
from trainer.jobs import RlJob
from trainer.list_scoring import ListScorer
from trainer.list_signals import ListSignals
from trainer.phases import PhaseTimer
from trainer.refill import Collected, refilled

Metrics = dict[str, float]


class Rollouts(Protocol):
    """Where groups come from: the fleet, or an engine."""

    def generate(self, prompts: Sequence[Prompt], spec: DecodeSpec) -> Groups:
        """Completions of the prompts, in their order."""
        ...


class Batch(NamedTuple):
    """What the fleet and the reward service made for one step."""

    prompts: Sequence[Prompt]
    scored: ScoredGroups
    failure_N: np.ndarray
    """A `RewardFailure` for every group that was rolled out, those that gave way to others included."""
    metrics: Metrics
    epoch: float
    """Passes over the training rows when it was collected."""
    lists: ListSignals | None = None
    """Credit of the groups' lists; None for single items."""


@dataclass(frozen=True, kw_only=True)
class Collector:
    """Collects the batches of one job, in the order of its steps: rollouts first, then what needs no fleet."""

    job: RlJob
    feed: FeedAhead
    rollouts: Rollouts
    rewards: RewardScorer
    catalogue: Catalogue
    feedback: Anchors | None
    """The log that the prompts come from, by prompt id."""
    rewarding: AbstractContextManager[object]
    """Held while rewards are asked for: the loop's other part asks the same scorer."""
    lists: ListScorer | None = None
    """Scores groups of lists; None for single items."""

    def roll(self, step: int, timer: PhaseTimer) -> Callable[[PhaseTimer], Batch]:
        """Roll out a step with the weights that the fleet holds now; returns what makes the batch of it."""
        drawn = self.feed.next()
        counts, prompts = Counter(drawn.counts), float(len(drawn.prompts))
        if self.job.group.refill is Refill.OVERSAMPLE:
            # Whether the fleet is asked again depends on the rewards.
            first, metrics = self._rewarded(*self._rolled_out(drawn.prompts, step, timer), timer)
            batch, failure_N, told = refilled(
                first, lambda seen: self._further(seen, counts, step, timer), self.job.group.extra_batches
            )
            metrics |= told | self._drawn_metrics(prompts, counts)
            whole = Batch(batch.prompts, batch.scored, failure_N, metrics, self.feed.epochs, batch.lists)
            return lambda timer: whole
        asked, groups = self._rolled_out(drawn.prompts, step, timer)
        told, epoch = self._drawn_metrics(prompts, counts), self.feed.epochs

        def rest(timer: PhaseTimer) -> Batch:
            found, metrics = self._rewarded(asked, groups, timer)
            return Batch(found.prompts, found.scored, found.scored.failure_P, metrics | told, epoch, found.lists)

        return rest

    def _drawn_metrics(self, prompts: float, counts: Counter[str]) -> Metrics:
        """What the feed gave for a step."""
        told = {f"prompts/{why}": float(n) for why, n in counts.items()}
        return {"epoch": self.feed.epochs, "prompts": prompts} | told

    def _rolled_out(self, prompts: Sequence[Prompt], step: int, timer: PhaseTimer) -> tuple[Sequence[Prompt], Groups]:
        """Groups of the prompts, which come back with what they ask for."""
        feedback = None if self.feedback is None else FeedbackRows.of(prompts, self.feedback)
        prompts = asking_for(prompts, given_items(self.job.objective, prompts, feedback), self.catalogue)
        with timer.phase("rollout"):
            return prompts, self.rollouts.generate(prompts, decode_spec(self.job, step))

    def _rewarded(self, prompts: Sequence[Prompt], groups: Groups, timer: PhaseTimer) -> tuple[Collected, Metrics]:
        """Scored groups of the prompts, with their ground truths where the recipe wants them."""
        with timer.phase("reward"):
            fault_point("reward")
            groups, told = with_ground_truth(prompts, groups, self.catalogue, self.job.group.ground_truth)
            with self.rewarding:
                if self.lists is not None:
                    scored_lists = self.lists.score(prompts, groups)
                    return Collected(prompts, scored_lists.scored, scored_lists.signals), scored_lists.metrics
                scored, metrics = self.rewards.score(prompts, groups)
        return Collected(prompts, scored), metrics | told

    def _further(self, seen: set[int], counts: Counter[str], step: int, timer: PhaseTimer) -> Collected | None:
        """Scored groups of the feed's next batch without the prompts that this step has already, which are counted."""
        drawn = self.feed.next()
        fresh = [prompt for prompt in drawn.prompts if prompt.prompt_id not in seen]
        counts.update(drawn.counts)
        counts["repeated"] += len(drawn.prompts) - len(fresh)
        return self._rewarded(*self._rolled_out(fresh, step, timer), timer)[0] if fresh else None


def decode_spec(job: RlJob, step: int) -> DecodeSpec:
    """How the groups of a step are decoded."""
    rollout = job.rollout
    return DecodeSpec(
        decode=rollout.decode,
        width=rollout.width,
        temperature=rollout.temperature,
        seed=job.seed,
        step=step,
        lists=job.lists.spec if job.lists.on else None,
    )


def write_batch(folder: Path, step: int, batch: Batch) -> None:
    """Keep a batch until its step comes."""
    write_step(folder, step, batch.prompts, batch.scored)
    if batch.lists is not None:
        save_file(batch.lists.tensors(), _lists_path(folder, step))
        sync_file(_lists_path(folder, step))
    rest = {"failure_N": batch.failure_N.astype(str).tolist(), "metrics": batch.metrics, "epoch": batch.epoch}
    write_text(_rest_path(folder, step), json.dumps(rest) + "\n")


def read_batches(folder: Path, catalogue_digest: str) -> dict[int, Batch]:
    """The batches of a folder by step; none where there is no folder.

    Raises:
        RequestError: a file that is absent or damaged, or groups of another catalogue.
    """
    return {step: _read_batch(folder, step, catalogue_digest) for step in steps_in(folder)}


def _read_batch(folder: Path, step: int, catalogue_digest: str) -> Batch:
    prompts, scored = read_step(folder, step, catalogue_digest)
    path = _rest_path(folder, step)
    try:
        rest = json.loads(path.read_text(encoding="utf-8"))
        failure_N = np.array(rest["failure_N"], dtype=str)
        lists = None
        if scored.groups.spec.lists is not None:
            path = _lists_path(folder, step)
            lists = ListSignals(**load_file(path))
        return Batch(prompts, scored, failure_N, dict(rest["metrics"]), float(rest["epoch"]), lists)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise RequestError(str(path), f"cannot be read ({error!r})", "a checkpoint as windlass wrote it") from error


def _rest_path(folder: Path, step: int) -> Path:
    return step_path(folder, step).with_suffix(".json")


def _lists_path(folder: Path, step: int) -> Path:
    return step_path(folder, step).with_suffix(".safetensors")
