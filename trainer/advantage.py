"""Advantage stage: rewards of a group, centred and scaled within the group.

With every other stage at its identity this is GRPO's advantage. Source: ../shared/methods.md section 0.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from trainer.members import Members
from trainer.objective_settings import StdMode


class GroupAdvantages(NamedTuple):
    """Advantages of the members and which groups carry gradient."""

    advantage_PG: Float[Tensor, "P G"]
    live_P: Bool[Tensor, " P"]
    """False where all rewards of the group are equal: its advantages are exactly zero."""


def masked_moments(
    value_PG: Float[Tensor, "P G"], mask_PG: Bool[Tensor, "P G"], ddof: int
) -> tuple[Float[Tensor, " P"], Float[Tensor, " P"]]:
    """Mean and standard deviation of the masked members of each group; zero deviation with `ddof` members or fewer.

    In float64: the square of a large float32 reward is infinite, and its group's advantages would be 0.
    """
    count_P = mask_PG.sum(1)
    wide_PG = value_PG.double().masked_fill(~mask_PG, 0.0)
    mean_P = wide_PG.sum(1) / count_P.clamp_min(1)
    centred_PG = (wide_PG - mean_P[:, None]).masked_fill(~mask_PG, 0.0)
    deviation_P = (centred_PG.square().sum(1) / (count_P - ddof).clamp_min(1)).sqrt()
    return mean_P, deviation_P


def group_advantages(
    members: Members, reward_PG: Float[Tensor, "P G"], std_mode: StdMode, eps: float
) -> GroupAdvantages:
    """`masked_advantages` of the valid members of each group."""
    return masked_advantages(reward_PG, members.valid_PG, std_mode, eps)


def masked_advantages(
    reward_PG: Float[Tensor, "P G"], mask_PG: Bool[Tensor, "P G"], std_mode: StdMode, eps: float
) -> GroupAdvantages:
    """Group-normalised rewards `(r - mean) / (std + eps)` of the masked members, zero for all others.

    A group is without gradient when the largest reward equals the smallest, not when a deviation falls below a
    threshold, so that rounding cannot invent an advantage. Source: methods.md section 0.
    """
    mean_P, std_P = masked_moments(reward_PG, mask_PG, ddof=1 if std_mode is StdMode.SAMPLE else 0)
    high_P = reward_PG.masked_fill(~mask_PG, -torch.inf).amax(1)
    low_P = reward_PG.masked_fill(~mask_PG, torch.inf).amin(1)
    live_P = high_P > low_P
    scale_P = torch.ones_like(std_P) if std_mode is StdMode.NONE else std_P + eps
    advantage_PG = ((reward_PG - mean_P[:, None]) / scale_P[:, None]).to(reward_PG.dtype)
    return GroupAdvantages(advantage_PG.masked_fill(~(mask_PG & live_P[:, None]), 0.0), live_P)
