"""The switches of the objective: GRPO's own, and the stages, each with an identity default.

Source: methods.md sections 0 to 6. With every switch at its default this is GRPO as published, apart from `clip_high`,
which is a separate switch (clip-higher) and equals `clip_low` by default. Combinations that make no sense are refused
with the reason; those that depend on other sections of a job are refused in `trainer.objective_checks`.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Self

from pydantic import Field, model_validator

from data.errors import RequestError
from data.settings import Settings
from trainer.anchor import Anchor, AnchorMode, Snips
from trainer.credit_settings import Credit, CreditKind
from trainer.gate import Gate, GateKind
from trainer.tempering import Tempering, TemperingMode, TemperOn
from trainer.truncation import Truncation
from trainer.uncertainty import VarianceKind
from trainer.window import Window, WindowKind


class StdMode(StrEnum):
    """What the centred rewards of a group are divided by."""

    POPULATION = "population"
    """Standard deviation over the group (ddof 0)."""
    SAMPLE = "sample"
    """Unbiased standard deviation (ddof 1), as ReRe."""
    NONE = "none"
    """Nothing: Dr.GRPO."""


class Aggregation(StrEnum):
    """How token losses become one number."""

    SEQUENCE_MEAN = "sequence_mean"
    """Mean over a completion's tokens, then over completions: GRPO."""
    TOKEN_MEAN = "token_mean"
    """Mean over all tokens of the batch: DAPO."""
    FIXED_LENGTH = "fixed_length"
    """Sum over tokens divided by the longest possible completion, then mean over completions: Dr.GRPO."""


class Ratio(StrEnum):
    """What the importance ratio is taken over."""

    TOKEN = "token"
    """Each token its own: GRPO."""
    ITEM = "item"
    """Geometric mean over the tokens of an item: Rank-GRPO."""
    SEQUENCE = "sequence"
    """Geometric mean over the completion: GSPO."""


class RewardOrder(StrEnum):
    """When several rewards become one."""

    SUM = "sum"
    """Weighted and summed, then normalised."""
    GDPO = "gdpo"
    """Each normalised within the group, then weighted and summed, then scaled over the batch."""


class ObjectiveSettings(Settings):
    """GRPO, its switches, and the stages around it."""

    std_mode: StdMode = StdMode.SAMPLE
    """Divisor of the centred rewards: population, sample (TRL, ReRe), or none (Dr.GRPO)."""
    eps: float = Field(1e-4, gt=0, le=1.0)
    """Added to the standard deviation. A group without variance has advantage 0 exactly, whatever this is."""
    aggregation: Aggregation = Aggregation.SEQUENCE_MEAN
    """sequence_mean (GRPO), token_mean (DAPO) or fixed_length (Dr.GRPO)."""
    ratio: Ratio = Ratio.TOKEN
    """Importance ratio per token (GRPO), item (Rank-GRPO) or sequence (GSPO)."""
    clip_low: float = Field(0.2, gt=0, le=1.0)
    """The ratio is clipped below at 1 - clip_low."""
    clip_high: float = Field(0.2, gt=0, le=10.0)
    """The ratio is clipped above at 1 + clip_high; 0.28 is clip-higher."""
    beta: float = Field(0.0, ge=0, le=10.0)
    """Weight of the KL penalty (k3) to the initial policy; 0 needs no reference scores."""
    nll_weight: float = Field(0.0, ge=0, le=100.0)
    """Weight of the full-vocabulary NLL of the ground truth item beside the policy loss."""
    updates: int = Field(1, ge=1, le=64)
    """Passes over a rollout batch; with 1 pass and 1 minibatch every ratio is 1."""
    minibatches: int = Field(1, ge=1)
    """Optimiser steps per pass; divides batch_prompts."""
    policy_weight: float = Field(1.0, ge=0, le=100.0)
    """Weight of the policy loss; with nll_weight and no gate this is a fixed mixture of NLL and GRPO."""
    entropy_weight: float = Field(0.0, ge=0, le=10.0)
    """Weight of the entropy of the policy over the legal set, which is raised."""
    reward_order: RewardOrder = RewardOrder.SUM
    """sum (weigh, sum, normalise) or gdpo (normalise each reward, then weigh and sum)."""
    credit: Credit = Credit()
    """What the positions of ranked lists are credited with (FlexRec)."""
    window: Window = Window()
    """Rank window on the negatives (TAWin)."""
    gate: Gate = Gate()
    """Which prompts get a policy loss (AdaGRPO)."""
    anchor: Anchor = Anchor()
    """The logged recommendation as a group member (ABPO)."""
    tempering: Tempering = Tempering()
    """Softer rows without a response (ABPO)."""
    truncation: Truncation = Truncation()
    """Importance correction between engine and learner."""
    max_distrust: int = Field(2, ge=1, le=64)
    """Most of gate, tempering, uncertainty and own stages that may be on together; each takes from what the others
    left."""
    stages: tuple[str, ...] = ()
    """Multipliers of your own, `package.module:function`; see trainer/own_stages.py."""

    @model_validator(mode="after")
    def _combinations(self) -> Self:
        if self.policy_weight == 0 and self.nll_weight == 0:
            raise RequestError("objective.policy_weight", 0, "above 0, because nll_weight is 0: nothing would train")
        if self.gate.kind is not GateKind.NONE and self.nll_weight == 0:
            raise RequestError(
                "objective.nll_weight", 0, "above 0 with a gate: a prompt whose gate is closed has the NLL alone"
            )
        self._check_anchor()
        self._check_credit()
        self._check_distrust()
        return self

    def _check_credit(self) -> None:
        """Refuse stages that know single items and their hits, where credit goes to positions."""
        kind = self.credit.kind
        if kind is CreditKind.NONE:
            return
        words = f"with objective.credit.kind {kind.value}"
        if self.window.kind is not WindowKind.NONE:
            reason = "a window weighs hits against misses, and credit is neither"
            raise RequestError("objective.window.kind", self.window.kind.value, f"none {words}: {reason}")
        if self.anchor.mode is not AnchorMode.NONE:
            reason = "the logged item has no place in a list that was not shown"
            raise RequestError("objective.anchor.mode", self.anchor.mode.value, f"none {words}: {reason}")
        if self.reward_order is RewardOrder.GDPO:
            raise RequestError("objective.reward_order", "gdpo", f"sum {words}: credit is one reward")
        if self.credit.of_lists and self.gate.kind is not GateKind.NONE:
            reason = "a gate ranks single items"
            raise RequestError("objective.gate.kind", self.gate.kind.value, f"none {words}: {reason}")
        if self.credit.of_lists and self.nll_weight:
            reason = "the ground truth is an item, not a list"
            raise RequestError("objective.nll_weight", self.nll_weight, f"0 {words}: {reason}")

    def _check_distrust(self) -> None:
        """Cap the stages that take learning away: per prompt, kind of feedback, member and item (methods.md 6 d)."""
        on = [name for name, stage in (("gate", self.gate.kind), ("tempering", self.tempering.mode)) if stage != "none"]
        on += ["uncertainty"] * (self.credit.uncertainty.variance is not VarianceKind.OFF)
        on += [f"stages: {path}" for path in self.stages]
        if len(on) > self.max_distrust:
            raise RequestError(
                "objective.max_distrust",
                f"{self.max_distrust}, but {len(on)} are on ({', '.join(on)})",
                f"{len(on)} if that is meant, or fewer of them: their product leaves little to learn from",
            )

    def _check_anchor(self) -> None:
        """Refuse what needs an anchor without one, and rewards that a division by the deviation would undo."""
        anchored = self.anchor.mode is not AnchorMode.NONE
        tempered = self.tempering.mode is not TemperingMode.NONE
        if tempered and not anchored:
            raise RequestError(
                "objective.tempering.mode",
                self.tempering.mode.value,
                "none without objective.anchor.mode: only rows with a logged item can lack a response",
            )
        undone = "none: one anchor against its misses has the same normalised reward whatever its size"
        if tempered and self.tempering.target is TemperOn.REWARD and self.std_mode is not StdMode.NONE:
            raise RequestError(
                "objective.std_mode",
                self.std_mode.value,
                f"{undone}, so objective.tempering.target reward would be lost",
            )
        if anchored and self.anchor.snips is Snips.REWARD and self.std_mode is not StdMode.NONE:
            raise RequestError(
                "objective.std_mode", self.std_mode.value, f"{undone}, so objective.anchor.snips reward would be lost"
            )
        if anchored and self.reward_order is RewardOrder.GDPO:
            raise RequestError(
                "objective.reward_order", "gdpo", "sum with an anchor: feedback is one reward, made in the objective"
            )
