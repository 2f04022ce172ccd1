"""Tempering stage: how much a no-response row counts, by the policy's self-certainty (ABPO).

A row without a response is ambiguous. Its advantages are scaled by q(c), with c in [0, 1) the confidence of the policy
in the exposed item. Source: ../shared/methods.md section 1.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import Self

import torch
from jaxtyping import Bool, Float
from pydantic import Field, model_validator
from torch import Tensor

from data.errors import RequestError
from data.settings import Settings
from trainer.members import Members


class TemperingMode(StrEnum):
    """What confidence does to a no-response row."""

    NONE = "none"
    """Nothing, q = 1: the identity."""
    SOFTEN_CONFIDENT = "soften_confident"
    """q = 1 - c: a policy that is sure of the item is punished less for it."""
    TRUST_CONFIDENT = "trust_confident"
    """q = c."""
    ADDITIVE = "additive"
    """The reward of a match becomes c minus the penalty."""


class TemperOn(StrEnum):
    """What is scaled."""

    ROW = "row"
    """All advantages of the row."""
    MATCHED = "matched"
    """The advantages of members that are the exposed item."""
    REWARD = "reward"
    """The item rewards of the row, before they are normalised."""


class Tempering(Settings):
    """Soften what is learned from rows without a response."""

    mode: TemperingMode = TemperingMode.NONE
    """none (q = 1), soften_confident (q = 1 - c), trust_confident (q = c) or additive (reward c - penalty)."""
    target: TemperOn = TemperOn.ROW
    """Scales the row's advantages, those of the matched members, or the rewards."""
    scale: float | None = Field(None, gt=0, le=1e6)
    """Self-certainty (nats) with confidence 1 - 1/e; none takes the batch, so that the median confidence is 0.5."""

    @model_validator(mode="after")
    def _additive_is_a_reward(self) -> Self:
        if self.mode is TemperingMode.ADDITIVE and self.target is not TemperOn.REWARD:
            raise RequestError(
                "objective.tempering.target",
                self.target.value,
                "reward, because additive tempering is a term of the reward",
            )
        return self


def self_certainty(
    members: Members, certainty_PGT: Float[Tensor, "P G T"], choices_PGT: Float[Tensor, "P G T"]
) -> Float[Tensor, "P G"]:
    """Mean over a completion's tokens of KL(uniform || policy) on the legal set, nats; 0 without a token to choose.

    Tokens with one legal continuation are skipped: there is nothing to be certain of.

    Args:
        certainty_PGT: KL per token (`ScoreOutputs.certainty_PGT`).
        choices_PGT: number of legal continuations.

    Source: methods.md section 1, SC.
    """
    counted_PGT = members.token_mask_PGT & (choices_PGT > 1)
    total_PG = certainty_PGT.masked_fill(~counted_PGT, 0.0).sum(-1)
    return total_PG / counted_PGT.sum(-1).clamp_min(1)


def token_certainty(logits_NC: Float[Tensor, "N C"], legal_NC: Bool[Tensor, "N C"]) -> Float[Tensor, " N"]:
    """KL(uniform || softmax) over the legal entries: logsumexp - mean - log V, at least 0; 0 where one is legal."""
    count_N = legal_NC.sum(1).clamp_min(1)
    total_N = logits_NC.masked_fill(~legal_NC, -torch.inf).logsumexp(1)
    mean_N = logits_NC.masked_fill(~legal_NC, 0.0).sum(1) / count_N
    value_N = (total_N - mean_N - count_N.to(logits_NC.dtype).log()).clamp_min(0)
    return torch.where(count_N > 1, value_N, torch.zeros_like(value_N))


def confidence(
    certainty_P: Float[Tensor, " P"], rows_P: Bool[Tensor, " P"], scale: float | None
) -> Float[Tensor, " P"]:
    """`c = 1 - exp(-certainty / scale)` in [0, 1) where `rows_P`, 0 elsewhere. No gradient.

    Without a scale it is the median over `rows_P` divided by log 2, over the whole batch. Rows whose certainty is 0
    have confidence 0, also where all are.
    """
    with torch.no_grad():
        own_P = certainty_P.double()
        if scale is None:
            chosen = own_P[rows_P]
            scale = float(chosen.quantile(0.5)) / math.log(2) if chosen.numel() else 1.0
        ratio_P = own_P / scale if scale > 0 else torch.where(own_P > 0, torch.inf, 0.0).to(own_P)
        value_P = -torch.expm1(-ratio_P)
        return torch.where(rows_P, value_P, 0.0).to(certainty_P.dtype)


def row_factors(
    confidence_P: Float[Tensor, " P"], rows_P: Bool[Tensor, " P"], mode: TemperingMode
) -> Float[Tensor, " P"]:
    """q of each row: 1 outside `rows_P` and for `none` and `additive`."""
    if mode is TemperingMode.SOFTEN_CONFIDENT:
        factor_P = 1 - confidence_P
    elif mode is TemperingMode.TRUST_CONFIDENT:
        factor_P = confidence_P
    else:
        return torch.ones_like(confidence_P)
    return torch.where(rows_P, factor_P, torch.ones_like(factor_P))


def tempered_rewards(
    reward_PG: Float[Tensor, "P G"],
    matched_PG: Bool[Tensor, "P G"],
    confidence_P: Float[Tensor, " P"],
    rows_P: Bool[Tensor, " P"],
    tempering: Tempering,
) -> Float[Tensor, "P G"]:
    """Item rewards of the no-response rows, scaled or with the confidence added to a match; others as they are."""
    if tempering.target is not TemperOn.REWARD or tempering.mode is TemperingMode.NONE:
        return reward_PG
    on_PG = matched_PG & rows_P[:, None]
    if tempering.mode is TemperingMode.ADDITIVE:
        return torch.where(on_PG, reward_PG + confidence_P[:, None], reward_PG)
    return torch.where(on_PG, reward_PG * row_factors(confidence_P, rows_P, tempering.mode)[:, None], reward_PG)


def tempering_multipliers(
    matched_PG: Bool[Tensor, "P G"], confidence_P: Float[Tensor, " P"], rows_P: Bool[Tensor, " P"], tempering: Tempering
) -> Float[Tensor, "P G"]:
    """Factors of the advantages; 1 where nothing is tempered or where the reward is."""
    ones_PG = torch.ones(matched_PG.shape, dtype=confidence_P.dtype, device=confidence_P.device)
    if tempering.target is TemperOn.REWARD:
        return ones_PG
    factor_PG = row_factors(confidence_P, rows_P, tempering.mode)[:, None] * ones_PG
    return factor_PG if tempering.target is TemperOn.ROW else torch.where(matched_PG, factor_PG, ones_PG)
