"""The switches of plain GRPO.

Source: methods.md section 0. With every switch at its default this is GRPO as published, apart from `clip_high`,
which is a separate switch (clip-higher) and equals `clip_low` by default.
"""

from __future__ import annotations

from enum import StrEnum

from pydantic import Field

from data.settings import Settings


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


class ObjectiveSettings(Settings):
    """GRPO and its switches."""

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
