"""The reinforcement learning loop: one step after the other, every one able to die.

    prompts → rollout → reward → learners' score → policy gap → objective → update → push → (evaluate) → (checkpoint)

Who waits for whom:

| waits                | for                                   | unblocked by                                    |
|----------------------|---------------------------------------|-------------------------------------------------|
| rollout of step k    | weight version k-1-S on every engine  | both checks of the push, or the push's deadline |
| reward of step k     | engines that get their first shards   | the request for a later step (S ≥ 1), or        |
| onwards, S ≥ 1       | of a later step                       | `ENGINES_FIRST_S`                               |
| reward               | all groups of the batch               | the last shard, or an engine's deadline         |
| score, colocated     | engines that give their memory back   | their answer, or an engine's deadline           |
| update               | rewards, scores and the gap's verdict | the reward service's answer, or its deadline    |
| push                 | rollouts that are under way (S ≥ 1)   | the last shard, or an engine's deadline         |
| checkpoint           | push, evaluation, rewards (S ≥ 1)     | the next step begins after it is on disk        |

S is `max_staleness`. With 0 everything happens in turn; with S ≥ 1 the batches of the next S steps are collected while
the learners work (`trainer.lookahead`), and those that wait lie in the checkpoint, so that a restart is exact as well.

Step k is what turns weight version k-1 into k; version 0 is the initial model, a candidate in model selection.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property, partial
from pathlib import Path

import numpy as np

from data.catalogue import Catalogue
from data.errors import RunError
from data.feed import Feed
from data.feed_ahead import FeedAhead
from data.feedback import Anchors
from data.records import BoolArray, FloatArray, IntArray, Kind, Prompt, RewardFailure, ScoredGroups
from reward.failures import FailureTracker
from reward.names import StepMetric, count_by_reason
from reward.scoring import ITEM_MATCH, RewardScorer
from rollout.fleet import RolloutFleet
from rollout.probe import GapAlarm, check_gap, policy_gap
from trainer.batch_signals import (
    Extended,
    FeedbackRows,
    batch_signals,
    extended,
    scored_extras,
    widened,
    without_illegal_anchors,
)
from trainer.collection import Batch, Collector, Rollouts, read_batches, write_batch
from trainer.completion_scores import ScoreOutputs
from trainer.data_checks import completion_tokens
from trainer.gap_limit import gap_metrics, step_limit
from trainer.gate import RankerScores
from trainer.gate_scores import gate_scores
from trainer.given_scores import compared_tokens, given_items
from trainer.group_metrics import score_metrics, token_metrics
from trainer.jobs import RlJob
from trainer.learner_group import LearnerGroup
from trainer.list_scoring import ListScorer
from trainer.list_signals import ListSignals
from trainer.lookahead import Lookahead
from trainer.losses import UpdateInputs
from trainer.members import batch_members
from trainer.objective import objective_coefficients
from trainer.phases import PhaseTimer
from trainer.random_negatives import random_negatives
from trainer.run_settings import GapAction
from trainer.settings import Precision
from trainer.staleness import within_bound
from trainer.training_loop import Metrics, TrainingLoop
from trainer.trees import Completions
from trainer.window import Negatives

ENGINES_FIRST_S = 1.0
"""Most seconds that a step waits until the engines have work: it takes the interpreter from who hands it out."""
WAITING = "waiting"
"""Folder of a checkpoint with the batches that were collected ahead."""


@dataclasses.dataclass(kw_only=True)
class RlLoop(TrainingLoop):
    """GRPO on rollouts of the current policy."""

    job: RlJob
    feed: Feed
    rollouts: Rollouts | None = None
    """None only where the groups come from a dump."""
    rewards: RewardScorer
    learners: LearnerGroup
    tracker: FailureTracker
    catalogue: Catalogue
    feedback: Anchors | None = None
    """The log that the prompts come from, by prompt id; None where they come from a dataset."""
    lists: ListScorer | None = None
    """Scores groups of ranked lists; None for single items."""

    pushes_every_step = True
    checks_gap = True

    def __post_init__(self) -> None:
        self._rewarding = threading.Lock()
        self._waiting: Mapping[int, Future[Batch]] = {}
        self._engines_busy = threading.Event()

    @cached_property
    def _drawn(self) -> FeedAhead:
        drawn = FeedAhead(self.feed)

        def meanwhile() -> None:
            drawn.begin()
            self._engines_busy.set()

        if isinstance(self.rollouts, RolloutFleet):
            self.rollouts.meanwhile = meanwhile
        return drawn

    @cached_property
    def _collector(self) -> Collector:
        assert self.rollouts is not None
        return Collector(
            job=self.job,
            feed=self._drawn,
            rollouts=self.rollouts,
            rewards=self.rewards,
            catalogue=self.catalogue,
            feedback=self.feedback,
            rewarding=self._rewarding,
            lists=self.lists,
        )

    @cached_property
    def _ahead(self) -> Lookahead[Batch]:
        return Lookahead(self.roll, self.job.max_staleness, self.job.limits.max_steps)

    def epochs(self) -> float:
        """Passes over the training rows so far."""
        return self.state.epochs

    def restore(self, checkpoint: Path) -> None:
        """Take up the batches that wait in a checkpoint.

        Raises:
            RequestError: they are damaged, or belong to another catalogue.
        """
        self._ahead.restore(read_batches(checkpoint / WAITING, self.catalogue.digest))
        self._waiting = self._ahead.begun()

    def keep(self, folder: Path) -> None:
        """See `TrainingLoop`: the batches that wait for their step."""
        for step, batch in self._waiting.items():
            write_batch(folder / WAITING, step, batch.result())

    def close(self) -> None:
        """See `TrainingLoop`; who asks the fleet after that has no batch to draw."""
        self._ahead.close()
        self._drawn.close()
        if isinstance(self.rollouts, RolloutFleet):
            self.rollouts.meanwhile = None

    def step(self) -> Metrics:
        """Take a batch, score, update, push."""
        step = self.state.step + 1
        with self._wait():
            self._engines_busy.clear()
            batch = self._ahead.take(step)
            if self._ahead.rolling() and isinstance(self.rollouts, RolloutFleet):
                self._engines_busy.wait(ENGINES_FIRST_S)
        self._check_rewards(batch.failure_N)
        prompts, scored, metrics = batch.prompts, batch.scored, dict(batch.metrics)
        groups = scored.groups
        scored, told = self._within_bound(step, scored)
        metrics |= told | token_metrics(prompts, groups)
        feedback = None if self.feedback is None else FeedbackRows.of(prompts, self.feedback)
        with self.timer.phase("reward"):
            scored, ranker, told = self._gate_scores(prompts, scored)
            metrics |= told
        with self.timer.phase("objective"):
            rollouts = Completions.of_groups(prompts, groups)
            negative_PN = self._random_negatives(prompts, scored, step)
            whole = extended(rollouts, prompts, self.job.objective, self.catalogue, feedback, negative_PN)
        metrics |= self.host.rest_engines()
        with self.timer.phase("score"):
            asked = whole.completions if scored_extras(self.job.objective) else rollouts
            scores = self.learners.score(asked, self.job.rollout.temperature)
            given = given_items(self.job.objective, prompts, feedback)
            compared = compared_tokens(prompts, groups, asked, whole.extra, given, scores.legal_PGT)
            metrics |= self._check_gap(step, compared, asked, scores)
        with self.timer.phase("objective"):
            inputs, objective_metrics, log_mean = self._objective(
                prompts, scored, whole, scores, ranker, feedback, negative_PN, batch.lists
            )
        with self.timer.phase("update"):
            metrics |= self._update(whole.completions, inputs)
        metrics |= objective_metrics | score_metrics(scores, groups)

        with self._wait():
            self._ahead.settle()
        self._waiting = self._ahead.begun()
        metrics["queue/batches_waiting"] = float(len(self._waiting))
        self.state = dataclasses.replace(
            self.state,
            step=step,
            cursor=dict(self._drawn.state_dict()),
            epochs=batch.epoch,
            failures=dict(self.tracker.state_dict()),
            anchor_log_mean=log_mean,
        )
        with self.timer.phase("push"):
            metrics |= self.host.push(step)
        return metrics

    def roll(self, step: int) -> Callable[[], Batch]:
        """Roll out a step; returns what makes its batch. Each in a thread of its own where that happens ahead."""
        if not self.job.max_staleness:
            return partial(self._collector.roll(step, self.timer), self.timer)
        timer = PhaseTimer()
        rest = self._collector.roll(step, timer)
        return partial(self._rest_ahead, rest, timer.take())

    def _rest_ahead(self, rest: Callable[[PhaseTimer], Batch], rolling: dict[str, float]) -> Batch:
        """The batch, with the seconds of both parts among its metrics."""
        timer, both = PhaseTimer(), dict(rolling)
        batch = rest(timer)
        for name, seconds in timer.take().items():
            both[name] = both.get(name, 0.0) + seconds
        times = {f"time/ahead/{name.removeprefix('time/')}": seconds for name, seconds in both.items()}
        return batch._replace(metrics=batch.metrics | times)

    def _wait(self) -> AbstractContextManager[None]:
        """Times a wait for the fleet; without staleness its work is timed as what it is."""
        return self.timer.phase("wait") if self.job.max_staleness else nullcontext()

    def _check_rewards(self, failure_N: np.ndarray) -> None:
        """Stop, after a checkpoint of the last good step, when too many rewards failed."""
        verdict = self.tracker.observe(failure_N)
        if verdict.stop:
            self.save_last_good()
            raise RunError(f"step {self.state.step + 1}: {verdict.message}")

    def _within_bound(self, step: int, scored: ScoredGroups) -> tuple[ScoredGroups, Metrics]:
        """The groups, without those that are too old; see `trainer.staleness`."""
        try:
            return within_bound(scored, step, self.job.max_staleness)
        except RunError:
            self.save_last_good()
            raise

    def _check_gap(
        self, step: int, compared: tuple[FloatArray, BoolArray, int], completions: Completions, scores: ScoreOutputs
    ) -> Metrics:
        """Compare what the engine returned with the learner's score; stop before the update when they differ."""
        settings, dtype = self.job.policy_gap, self.job.learner.dtype
        engine_PGT, mask_PGT, given = compared
        gap = policy_gap(engine_PGT, scores.logp_PGT, mask_PGT)
        shorter = dtype is not Precision.FLOAT32
        due = self.state.noise is None or (step - 1) % settings.noise_every == 0
        # A batch may be noisier than the one that was measured last: only its own noise sounds the alarm.
        # Groups of earlier weights differ from the learner by its updates; their versions are checked instead.
        alarms = self.checks_gap and not self.job.max_staleness
        noise = self.state.noise
        measures = alarms and settings.limit is None
        if (shorter and due) or (measures and not gap.within(step_limit(settings, dtype.value, noise))):
            noise = self.learners.noise(completions, self.job.rollout.temperature, scores.logp_PGT)
            if shorter:
                self.state = dataclasses.replace(self.state, noise=noise)
        limit = step_limit(settings, dtype.value, noise)
        try:
            check_gap(gap, limit, f"policy gap of step {step}")
        except GapAlarm:
            if alarms and settings.action is GapAction.STOP:
                self.save_last_good()
                raise
        return gap_metrics(gap, limit, given, noise)

    def _gate_scores(
        self, prompts: Sequence[Prompt], scored: ScoredGroups
    ) -> tuple[ScoredGroups, RankerScores | None, Metrics]:
        """What the gate compares; a prompt without it joins the failed groups and is counted by its reason.

        Raises:
            RunError: more prompts failed than `reward.max_failed_share` allows.
        """
        gate = self.job.objective.gate
        if not gate.asks_ranker:
            return scored, None, {}
        with self._rewarding:
            found = gate_scores(self.rewards, prompts, scored.groups, gate, seed=self.job.seed)
        failed = found.failure_P != RewardFailure.NONE.value
        if failed.mean() > self.job.reward.max_failed_share:
            self.save_last_good()
            reasons = ", ".join(sorted({str(reason) for reason in found.failure_P[failed]}))
            raise RunError(
                f"step {self.state.step + 1}: the gate has no ranker scores for {int(failed.sum())} of {len(failed)} "
                f"prompts ({reasons}), more than reward.max_failed_share = {self.job.reward.max_failed_share:g}"
            )
        failure_P = np.where(scored.usable_P, found.failure_P, scored.failure_P)
        told = count_by_reason(StepMetric.GATE_FAIL, RewardFailure, found.failure_P)
        return dataclasses.replace(scored, failure_P=failure_P), found.scores, told

    def _random_negatives(self, prompts: Sequence[Prompt], scored: ScoredGroups, step: int) -> IntArray | None:
        """Random items in place of the rollouts that missed; None where the recipe does not want them."""
        if self.job.objective.window.negatives is not Negatives.RANDOM:
            return None
        missed_PG = scored.groups.generated_PG & (scored.parts_PG[ITEM_MATCH] == 0)
        return random_negatives(prompts, missed_PG.sum(1), self.catalogue.active_path_id, seed=self.job.seed, step=step)

    def _objective(
        self,
        prompts: Sequence[Prompt],
        scored: ScoredGroups,
        whole: Extended,
        scores: ScoreOutputs,
        ranker: RankerScores | None,
        feedback: FeedbackRows | None,
        negative_PN: IntArray | None,
        lists: ListSignals | None,
    ) -> tuple[UpdateInputs, Metrics, float | None]:
        """Stages on the whole batch; also the state of the anchor stage for the next one."""
        settings = self.job.objective
        shape = whole.completions.shape
        members, reward_PG = batch_members(scored, whole.completions, whole.extra)
        dropped = 0
        if Kind.ANCHOR in whole.extra:
            members, dropped = without_illegal_anchors(members, scores.legal_PGT)
        signals = batch_signals(
            settings,
            prompts,
            scored,
            members,
            scores,
            part_weight=self.job.reward.part_weights(),
            paths=self.rewards.paths,
            feedback_weight=self.job.reward.feedback,
            ranker=ranker,
            feedback=feedback,
            negative_PN=negative_PN,
            lists=lists,
        )
        coefficients, metrics = objective_coefficients(
            members,
            reward_PG,
            settings,
            completion_tokens(self.job, self.catalogue.trie().depth),
            signals=signals,
            seed=self.job.seed,
            step=self.state.step + 1,
            anchor_log_mean=self.state.anchor_log_mean,
        )
        if Kind.ANCHOR in whole.extra:
            anchor_PG = members.of_kind(Kind.ANCHOR).numpy()
            metrics["anchor/not_legal"] = float(dropped)
            metrics["anchor/retired"] = float((anchor_PG & whole.completions.may_leave_PG).sum())
        entropy_PGT, detached_PGT = coefficients.entropy_weight_PGT, coefficients.detached_PGT
        inputs = UpdateInputs(
            advantage_PGT=coefficients.advantage_PGT.float().numpy(),
            old_logp_PGT=widened(scores.logp_PGT, shape),
            ref_logp_PGT=None if scores.ref_logp_PGT is None else widened(scores.ref_logp_PGT, shape),
            policy_weight_PGT=coefficients.policy_weight_PGT.float().numpy(),
            kl_weight_PGT=coefficients.kl_weight_PGT.float().numpy(),
            nll_weight_PGT=coefficients.nll_weight_PGT.float().numpy(),
            ratio=settings.ratio,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            temperature=self.job.rollout.temperature,
            segment_PGT=members.segment_PGT.numpy().astype(np.int32),
            entropy_weight_PGT=None if entropy_PGT is None else entropy_PGT.float().numpy(),
            detached_PGT=None if detached_PGT is None else detached_PGT.numpy(),
        )
        return inputs, metrics, coefficients.anchor_log_mean

    def _update(self, completions: Completions, inputs: UpdateInputs) -> Metrics:
        """All updates on the batch: `objective.updates` passes of `objective.minibatches` optimiser steps."""
        parts: list[Metrics] = []
        for rows in self._minibatches(len(completions.prompt_tokens)):
            share = inputs.take(rows).scaled(self.job.objective.minibatches)
            parts.append(self.learners.update(completions.take(rows), share))
        return {
            name: float((np.max if name.endswith("_max") else np.mean)([part[name] for part in parts]))
            for name in parts[0]
        }

    def _minibatches(self, prompts: int) -> Iterator[np.ndarray]:
        for _ in range(self.job.objective.updates):
            yield from np.split(np.arange(prompts), self.job.objective.minibatches)
