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
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import torch

from data.errors import RequestError, RunError
from data.faults import fault_point
from data.feed import Feed
from data.records import DecodeSpec, Groups, IntArray, Prompt, ScoredGroups
from reward.failures import FailureTracker
from reward.scoring import RewardScorer, reward_metrics
from rollout.probe import Gap, GapAlarm, check_gap, gap_limit, policy_gap
from trainer.group_dump import dumped_steps, read_step, step_path
from trainer.jobs import RlJob
from trainer.learner_group import LearnerGroup, ScoreOutputs
from trainer.losses import UpdateInputs
from trainer.members import with_ground_truth
from trainer.objective import objective_coefficients
from trainer.run_settings import GapAction
from trainer.training_loop import Metrics, TrainingLoop
from trainer.trees import Completions


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
    item_tokens: Callable[[int], IntArray]
    """`Catalogue.tokens`: the token path of an item."""
    max_tokens: int
    """Tokens of the longest completion."""

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
        completions = Completions.of_groups(prompts, groups)
        with self.timer.phase("score"):
            scores = self.learners.score(completions, self.job.rollout.temperature)
            metrics |= self._check_gap(step, groups, completions, scores)
        with self.timer.phase("objective"):
            completions, inputs, objective_metrics = self._objective(prompts, scored, completions, scores)
        with self.timer.phase("update"):
            metrics |= self._update(completions, inputs)
        metrics |= objective_metrics | _score_metrics(scores, groups)

        self.state = dataclasses.replace(
            self.state, step=step, cursor=dict(self.feed.state_dict()), failures=dict(self.tracker.state_dict())
        )
        with self.timer.phase("push"):
            metrics |= self.host.push(step)
        return metrics

    def collect(self, step: int) -> tuple[Sequence[Prompt], ScoredGroups, Metrics]:
        """Prompts, their scored groups, and metrics."""
        assert self.rollouts is not None
        batch = self.feed.next()
        with self.timer.phase("rollout"):
            groups = self.rollouts.generate(batch.prompts, decode_spec(self.job, step))
        with self.timer.phase("reward"):
            fault_point("reward")
            scored, metrics = self.rewards.score(batch.prompts, groups)
            self._check_rewards(scored)
        metrics |= {"epoch": self.epochs(), "prompts": float(len(batch.prompts))}
        return batch.prompts, scored, metrics | {f"prompts/{why}": float(n) for why, n in batch.counts.items()}

    def _check_rewards(self, scored: ScoredGroups) -> None:
        """Stop, after a checkpoint of the last good step, when too many rewards failed."""
        verdict = self.tracker.observe(scored.failure_P)
        if verdict.stop:
            self.save_last_good()
            raise RunError(f"step {self.state.step + 1}: {verdict.message}")

    def _check_gap(self, step: int, groups: Groups, completions: Completions, scores: ScoreOutputs) -> Metrics:
        """Compare what the engine returned with the learner's score; stop before the update when they differ."""
        settings = self.job.policy_gap
        gap = policy_gap(groups.logp_PGT, scores.logp_PGT, groups.token_mask_PGT)
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

    def _objective(
        self, prompts: Sequence[Prompt], scored: ScoredGroups, completions: Completions, scores: ScoreOutputs
    ) -> tuple[Completions, UpdateInputs, Metrics]:
        """Stages on the whole batch; the ground truth joins as a branch when the NLL has a weight."""
        settings = self.job.objective
        truth = [self._truth_tokens(prompt) for prompt in prompts] if settings.nll_weight else None
        if truth is not None:
            completions = completions.with_member(truth)
        members, reward_PG = with_ground_truth(scored, completions, added=truth is not None)
        coefficients, metrics = objective_coefficients(members, reward_PG, settings, self.max_tokens)
        old_logp_PGT = _widened(scores.logp_PGT, completions.shape)
        ref_logp_PGT = scores.ref_logp_PGT
        inputs = UpdateInputs(
            advantage_PGT=coefficients.advantage_PGT.float().numpy(),
            old_logp_PGT=old_logp_PGT,
            ref_logp_PGT=None if ref_logp_PGT is None else _widened(ref_logp_PGT, completions.shape),
            policy_weight_PGT=coefficients.policy_weight_PGT.float().numpy(),
            kl_weight_PGT=coefficients.kl_weight_PGT.float().numpy(),
            nll_weight_PGT=coefficients.nll_weight_PGT.float().numpy(),
            ratio=settings.ratio,
            clip_low=settings.clip_low,
            clip_high=settings.clip_high,
            temperature=self.job.rollout.temperature,
        )
        return completions, inputs, metrics

    def _truth_tokens(self, prompt: Prompt) -> IntArray | None:
        tokens: IntArray | None = self.item_tokens(prompt.target) if prompt.target >= 0 else None
        return tokens

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
    )


def _widened(values_PGT: np.ndarray, shape: tuple[int, int, int]) -> np.ndarray:
    """The values in an array of `shape`, zero where it is larger."""
    wide = np.zeros(shape, dtype=np.float32)
    prompts, members, tokens = values_PGT.shape
    wide[:prompts, :members, :tokens] = values_PGT
    return wide


def _score_metrics(scores: ScoreOutputs, groups: Groups) -> Metrics:
    """Means over the completion tokens, and where the groups come from."""
    mask = groups.token_mask_PGT
    return {
        "legal_mass": float(scores.legal_mass_PGT[mask].mean(dtype=np.float64)),
        "entropy": float(scores.entropy_PGT[mask].mean(dtype=np.float64)),
        "weight_version": float(groups.weight_version_P.max()),
        "weight_version/oldest": float(groups.weight_version_P.min()),
        "completion/absent_share": float(1 - groups.valid_PG.mean(dtype=np.float64)),
    }
