"""The reinforcement learning loop: one step after the other, every one able to die.

    prompts → rollout → reward → learners' score → policy gap → objective → update → push → (evaluate) → (checkpoint)

Who waits for whom, with synchronous rollouts (staleness 0):

| waits                | for                                  | unblocked by                                   |
|----------------------|--------------------------------------|------------------------------------------------|
| rollout of step k+1  | weight version k+1 on every engine   | both checks of the push, or the push's deadline |
| reward               | all groups of the batch              | the last shard, or an engine's deadline        |
| update               | rewards, scores and the gap's verdict | the reward service's answer, or its deadline   |
| checkpoint           | the push and the evaluation          | the next step begins after it is on disk       |

Step k is what turns weight version k-1 into k; version 0 is the initial model, a candidate in model selection.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from data.catalogue import Catalogue
from data.errors import RequestError, RunError
from data.faults import fault_point
from data.feed import Feed
from data.feedback import Anchors
from data.records import DecodeSpec, Groups, IntArray, Kind, Prompt, RewardFailure, ScoredGroups
from reward.failures import FailureTracker
from reward.scoring import ITEM_MATCH, RewardScorer, reward_metrics
from rollout.probe import Gap, GapAlarm, check_gap, gap_limit, policy_gap
from trainer.batch_signals import (
    Extended,
    FeedbackRows,
    batch_signals,
    extended,
    scored_extras,
    widened,
    without_illegal_anchors,
)
from trainer.gate import RankerScores
from trainer.gate_scores import gate_scores
from trainer.ground_truth import with_ground_truth
from trainer.group_dump import dumped_steps, read_step, step_path
from trainer.group_settings import Refill
from trainer.jobs import RlJob
from trainer.learner_group import LearnerGroup, ScoreOutputs
from trainer.losses import UpdateInputs
from trainer.members import batch_members
from trainer.objective import objective_coefficients
from trainer.random_negatives import random_negatives
from trainer.refill import Collected, refilled
from trainer.run_settings import GapAction
from trainer.training_loop import Metrics, TrainingLoop
from trainer.trees import Completions
from trainer.window import Negatives


class Rollouts(Protocol):
    """Where groups come from: the fleet, or a dump."""

    def generate(self, prompts: Sequence[Prompt], spec: DecodeSpec) -> Groups:
        """Completions of the prompts, in their order."""
        ...


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

    pushes_every_step = True
    checks_gap = True

    def epochs(self) -> float:
        """Passes over the training rows so far."""
        return self.feed.epoch + self.feed.batch / self.feed.batches_per_epoch

    def step(self) -> Metrics:
        """Roll out, reward, score, update, push."""
        step = self.state.step + 1
        prompts, scored, metrics = self.collect(step)
        groups = scored.groups
        feedback = None if self.feedback is None else FeedbackRows.of(prompts, self.feedback)
        with self.timer.phase("reward"):
            scored, ranker = self._gate_scores(prompts, scored)
        with self.timer.phase("objective"):
            rollouts = Completions.of_groups(prompts, groups)
            negative_PN = self._random_negatives(prompts, scored, step)
            whole = extended(rollouts, prompts, self.job.objective, self.catalogue, feedback, negative_PN)
        with self.timer.phase("score"):
            asked = whole.completions if scored_extras(self.job.objective) else rollouts
            scores = self.learners.score(asked, self.job.rollout.temperature)
            metrics |= self._check_gap(step, groups, asked, scores)
        with self.timer.phase("objective"):
            inputs, objective_metrics, log_mean = self._objective(
                prompts, scored, whole, scores, ranker, feedback, negative_PN
            )
        with self.timer.phase("update"):
            metrics |= self._update(whole.completions, inputs)
        metrics |= objective_metrics | _score_metrics(scores, groups)

        self.state = dataclasses.replace(
            self.state,
            step=step,
            cursor=dict(self.feed.state_dict()),
            failures=dict(self.tracker.state_dict()),
            anchor_log_mean=log_mean,
        )
        with self.timer.phase("push"):
            metrics |= self.host.push(step)
        return metrics

    def collect(self, step: int) -> tuple[Sequence[Prompt], ScoredGroups, Metrics]:
        """Prompts, their scored groups, and metrics."""
        batch = self.feed.next()
        first, metrics = self._rolled_out(batch.prompts, step)
        collected, failure_N = first, first.scored.failure_P
        if self.job.group.refill is Refill.OVERSAMPLE:
            collected, failure_N, told = refilled(
                first, lambda seen: self._further(seen, step), self.job.group.extra_batches
            )
            metrics |= told
        self._check_rewards(failure_N)
        metrics |= {"epoch": self.epochs(), "prompts": float(len(batch.prompts))}
        metrics |= {f"prompts/{why}": float(n) for why, n in batch.counts.items()}
        return collected.prompts, collected.scored, metrics

    def _rolled_out(self, prompts: Sequence[Prompt], step: int) -> tuple[Collected, Metrics]:
        """Scored groups of the prompts, with their ground truths where the recipe wants them."""
        assert self.rollouts is not None
        with self.timer.phase("rollout"):
            groups = self.rollouts.generate(prompts, decode_spec(self.job, step))
        with self.timer.phase("reward"):
            fault_point("reward")
            groups, told = with_ground_truth(prompts, groups, self.catalogue, self.job.group.ground_truth)
            scored, metrics = self.rewards.score(prompts, groups)
        return Collected(prompts, scored), metrics | told

    def _further(self, seen: set[int], step: int) -> Collected | None:
        """Scored groups of the feed's next batch without the prompts that this step has already."""
        fresh = [prompt for prompt in self.feed.next().prompts if prompt.prompt_id not in seen]
        return self._rolled_out(fresh, step)[0] if fresh else None

    def _check_rewards(self, failure_N: np.ndarray) -> None:
        """Stop, after a checkpoint of the last good step, when too many rewards failed."""
        verdict = self.tracker.observe(failure_N)
        if verdict.stop:
            self.save_last_good()
            raise RunError(f"step {self.state.step + 1}: {verdict.message}")

    def _check_gap(self, step: int, groups: Groups, completions: Completions, scores: ScoreOutputs) -> Metrics:
        """Compare what the engine returned with the learner's score; stop before the update when they differ."""
        settings = self.job.policy_gap
        _, members, tokens = groups.shape
        mask_PGT = groups.token_mask_PGT & (completions.valid_PG[:, :members] & groups.generated_PG)[..., None]
        gap = policy_gap(groups.logp_PGT, scores.logp_PGT[:, :members, :tokens], mask_PGT)
        dtype = self.job.learner.dtype.value
        if dtype != "float32" and (self.state.noise is None or (step - 1) % settings.noise_every == 0):
            noise = self.learners.noise(completions, self.job.rollout.temperature)
            self.state = dataclasses.replace(self.state, noise=noise)
        measured = None if self.state.noise is None else Gap(mean=self.state.noise["mean"], max=self.state.noise["max"])
        limit = gap_limit(dtype, measured, settings.noise_factor)
        if settings.limit is not None:
            limit = Gap(mean=settings.limit, max=torch.inf)
        try:
            check_gap(gap, limit, f"policy gap of step {step}")
        except GapAlarm:
            if self.checks_gap and settings.action is GapAction.STOP:
                self.save_last_good()
                raise
        metrics = {"policy_gap/mean": gap.mean, "policy_gap/max": gap.max, "policy_gap/limit_mean": limit.mean}
        if measured is not None:
            metrics |= {"policy_gap/noise_mean": measured.mean, "policy_gap/noise_max": measured.max}
        return metrics

    def _gate_scores(self, prompts: Sequence[Prompt], scored: ScoredGroups) -> tuple[ScoredGroups, RankerScores | None]:
        """What the gate compares; a prompt without it joins the failed groups.

        Raises:
            RunError: more prompts failed than `reward.max_failed_share` allows.
        """
        gate = self.job.objective.gate
        if not gate.asks_ranker:
            return scored, None
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
        return dataclasses.replace(scored, failure_P=failure_P), found.scores

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
        )
        coefficients, metrics = objective_coefficients(
            members,
            reward_PG,
            settings,
            self.catalogue.trie().depth,
            signals=signals,
            seed=self.job.seed,
            step=self.state.step + 1,
            anchor_log_mean=self.state.anchor_log_mean,
        )
        if Kind.ANCHOR in whole.extra:
            metrics["anchor/not_legal"] = float(dropped)
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
            entropy_weight_PGT=None if entropy_PGT is None else entropy_PGT.float().numpy(),
            detached_PGT=None if detached_PGT is None else detached_PGT.numpy(),
        )
        return inputs, metrics, coefficients.anchor_log_mean

    def _update(self, completions: Completions, inputs: UpdateInputs) -> Metrics:
        """All updates on the batch: `objective.updates` passes of `objective.minibatches` optimiser steps."""
        parts: list[Metrics] = []
        for rows in self._minibatches(len(completions.prompt_tokens)):
            share = _scaled(inputs.take(rows), self.job.objective.minibatches)
            parts.append(self.learners.update(completions.take(rows), share))
        return {
            name: float((np.max if name.endswith("_max") else np.mean)([part[name] for part in parts]))
            for name in parts[0]
        }

    def _minibatches(self, prompts: int) -> Iterator[np.ndarray]:
        for _ in range(self.job.objective.updates):
            yield from np.split(np.arange(prompts), self.job.objective.minibatches)


@dataclasses.dataclass(kw_only=True)
class ReplayLoop(RlLoop):
    """Trains on dumped groups (`--train-only`), one dump per step, in their order; no engine runs."""

    folder: Path
    catalogue_digest: str
    pushes_every_step = False
    checks_gap = False
    """The groups come from the dump's weights, so the gap is staleness and no alarm."""

    def __post_init__(self) -> None:
        self._steps = dumped_steps(self.folder)

    def epochs(self) -> float:
        """Passes over the dump so far."""
        return self.state.step / len(self._steps)

    def finished(self) -> str | None:
        """A dump is used once."""
        return super().finished() or ("dump_ended" if self.state.step >= len(self._steps) else None)

    def collect(self, step: int) -> tuple[Sequence[Prompt], ScoredGroups, Metrics]:
        """The groups of the next dump."""
        number = self._steps[step - 1]
        prompts, scored = read_step(self.folder, number, self.catalogue_digest)
        self._check_fits(step_path(self.folder, number), scored.groups)
        return prompts, scored, reward_metrics(scored) | {"epoch": self.epochs(), "prompts": float(len(prompts))}

    def _check_fits(self, path: Path, groups: Groups) -> None:
        """Refuse groups that the job's settings would train as something else than they are.

        Raises:
            RequestError: another temperature, or groups that the minibatches do not divide.
        """
        asked, found = self.job.rollout.temperature, groups.spec.temperature
        if found != asked:
            raise RequestError("rollout.temperature", asked, f"{found}, with which {path} was decoded")
        size, parts = groups.shape[0], self.job.objective.minibatches
        if size % parts:
            raise RequestError("objective.minibatches", parts, f"a divisor of {size}, the groups in {path}")


def decode_spec(job: RlJob, step: int) -> DecodeSpec:
    """How the groups of a step are decoded."""
    rollout = job.rollout
    return DecodeSpec(
        decode=rollout.decode, width=rollout.width, temperature=rollout.temperature, seed=job.seed, step=step
    )


def _scaled(inputs: UpdateInputs, factor: int) -> UpdateInputs:
    """The weights of a minibatch, so that its loss is its own mean and not its share of the batch's."""
    return dataclasses.replace(
        inputs,
        policy_weight_PGT=inputs.policy_weight_PGT * factor,
        kl_weight_PGT=inputs.kl_weight_PGT * factor,
        nll_weight_PGT=inputs.nll_weight_PGT * factor,
        entropy_weight_PGT=None if inputs.entropy_weight_PGT is None else inputs.entropy_weight_PGT * factor,
    )


def _score_metrics(scores: ScoreOutputs, groups: Groups) -> Metrics:
    """Means over the completion tokens, and where the groups come from."""
    _, members, tokens = groups.shape
    # A slot that gave way to an anchor was not scored.
    mask = groups.token_mask_PGT & groups.generated_PG[..., None] & (scores.choices_PGT[:, :members, :tokens] > 0)
    return {
        "legal_mass": float(scores.legal_mass_PGT[:, :members, :tokens][mask].mean(dtype=np.float64)),
        "entropy": float(scores.entropy_PGT[:, :members, :tokens][mask].mean(dtype=np.float64)),
        "weight_version": float(groups.weight_version_P.max()),
        "weight_version/oldest": float(groups.weight_version_P.min()),
        "completion/absent_share": float(1 - groups.valid_PG[:, : groups.spec.width].mean(dtype=np.float64)),
    }
