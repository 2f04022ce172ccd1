"""Truncated importance sampling between the engine, which drew the rollouts, and the learner, which trains on them.

The two compute the same policy up to rounding, staleness and quantisation. The factor min(pi_learner / pi_engine,
limit) multiplies the policy loss and carries no gradient.

Source: ../shared/methods.md section 6 (multipliers); Yao et al. 2025, "Your efficient RL framework secretly brings you
off-policy RL training" (truncated importance sampling).
"""

from __future__ import annotations

from enum import StrEnum

import torch
from jaxtyping import Float
from pydantic import Field
from torch import Tensor

from data.settings import Settings
from trainer.members import Members


class TruncationLevel(StrEnum):
    """What the ratio of learner and engine is taken over."""

    NONE = "none"
    """No correction: the identity."""
    TOKEN = "token"
    """Each token its own."""
    ITEM = "item"
    """Product over the tokens of an item."""
    SEQUENCE = "sequence"
    """Product over the completion."""


class Truncation(Settings):
    """Correct for what the engine computes differently from the learner."""

    level: TruncationLevel = TruncationLevel.NONE
    """none, token, item or sequence."""
    limit: float = Field(2.0, ge=1, le=1e6)
    """Largest factor."""


def truncated_weights(
    members: Members,
    learner_logp_PGT: Float[Tensor, "P G T"],
    engine_logp_PGT: Float[Tensor, "P G T"],
    truncation: Truncation,
) -> Float[Tensor, "P G T"]:
    """Factor of each token of a valid rollout, 1 elsewhere: anchors and ground truths were not drawn by the engine."""
    with torch.no_grad():
        on_PGT = members.token_mask_PGT & members.rollout_PG.unsqueeze(-1)
        log_PGT = (learner_logp_PGT.double() - engine_logp_PGT.double()).masked_fill(~on_PGT, 0.0)
        if truncation.level is TruncationLevel.SEQUENCE:
            log_PGT = log_PGT.sum(-1, keepdim=True).expand_as(log_PGT)
        elif truncation.level is TruncationLevel.ITEM:
            segment_PGT = members.segment_PGT
            # Format tokens (segment -1) are a unit of their own.
            same_PGTT = segment_PGT.unsqueeze(-1) == segment_PGT.unsqueeze(-2)
            log_PGT = (same_PGTT * log_PGT.unsqueeze(-2)).sum(-1)
        factor_PGT = log_PGT.exp().clamp_max(truncation.limit).to(learner_logp_PGT.dtype)
        if truncation.level is TruncationLevel.NONE:
            factor_PGT = torch.ones_like(learner_logp_PGT)
        return torch.where(on_PGT, factor_PGT, torch.ones_like(factor_PGT))


def truncation_metrics(members: Members, factor_PGT: Tensor, truncation: Truncation) -> dict[str, float]:
    """Mean factor over the rollouts' tokens and the share at the limit."""
    own = factor_PGT[members.token_mask_PGT & members.rollout_PG.unsqueeze(-1)].double()
    if own.numel() == 0:
        return {}
    return {
        "truncation/mean": float(own.mean()),
        "truncation/limited_share": float((own >= truncation.limit).double().mean()),
    }
