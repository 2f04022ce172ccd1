"""Advantages from several rewards, each normalised on its own (GDPO).

A sum of rewards is ruled by the one with the largest spread. Here each reward is normalised within its group, the
results are summed with the weights, and the sum is scaled over the batch.
Source: ../shared/methods.md section 6 (GDPO order); GDPO in TRL's paper index.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from trainer.advantage import GroupAdvantages, group_advantages, masked_moments
from trainer.members import Members
from trainer.objective_settings import StdMode


def several_advantages(
    members: Members,
    parts_PG: Mapping[str, Float[Tensor, "P G"]],
    weights: Mapping[str, float],
    std_mode: StdMode,
    eps: float,
) -> GroupAdvantages:
    """Weighted sum of group-normalised rewards, divided by its standard deviation over the batch plus `eps`.

    Every normalised reward has mean zero in its group, so the batch's mean is zero as well and is not subtracted: its
    rounding would give groups without variance an advantage. A group is live when one of its weighted rewards is.
    """
    shape = members.valid_PG.shape
    total_PG = torch.zeros(shape, dtype=next(iter(parts_PG.values())).dtype)
    live_P = torch.zeros(shape[0], dtype=torch.bool)
    for name, part_PG in parts_PG.items():
        if weights.get(name, 0.0) == 0:
            continue
        advantage_PG, part_live_P = group_advantages(members, part_PG, std_mode, eps)
        total_PG = total_PG + weights[name] * advantage_PG
        live_P = live_P | part_live_P
    ddof = 1 if std_mode is StdMode.SAMPLE else 0
    _, deviation = masked_moments(total_PG.reshape(1, -1), members.valid_PG.reshape(1, -1), ddof)
    return GroupAdvantages((total_PG / (deviation + eps)).to(total_PG.dtype), live_P)
