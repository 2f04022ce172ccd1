"""Anchor stage: the logged recommendation as a member of its group, weighted off-policy (ABPO).

The exposed item joins the rollouts with its feedback reward. It was drawn by the serving policy, so its term carries
a self-normalised importance weight over the whole batch. Source: ../shared/methods.md section 1.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from pydantic import Field
from torch import Tensor

from data.settings import Settings


class AnchorMode(StrEnum):
    """How the logged item joins the group."""

    NONE = "none"
    """Not at all: the identity."""
    APPEND = "append"
    """As a further member."""
    REPLACE_LAST = "replace_last"
    """In place of the last rollout, so that the group keeps its size."""
    FEEDBACK_ONLY = "feedback_only"
    """Not as a member: rollouts that are the logged item get its feedback, and nothing is weighted (an ablation)."""


class Snips(StrEnum):
    """What the importance weight multiplies."""

    NONE = "none"
    """Nothing: weight 1."""
    ADVANTAGE = "advantage"
    """The anchor's advantage, behind the normalisation of the group."""
    REWARD = "reward"
    """Its reward, before it."""


class AnchorRatio(StrEnum):
    """The ratio in the anchor's surrogate."""

    DETACHED = "detached"
    """exp(lp - stop_gradient(lp)): 1 in value, never clipped, since the weight carries pi/pi0 already."""
    OLD = "old"
    """Against the policy before the update, like a rollout."""


class Anchor(Settings):
    """The logged recommendation of a feedback log as a group member."""

    mode: AnchorMode = AnchorMode.NONE
    """none, append (a further member), replace_last (for the last rollout), or feedback_only (rewards alone)."""
    snips: Snips = Snips.ADVANTAGE
    """Self-normalised importance weight on the anchor's advantage, its reward, or none."""
    ratio: AnchorRatio = AnchorRatio.DETACHED
    """detached (the weight carries the ratio) or old (as for a rollout)."""
    clip: float = Field(10.0, gt=0, le=1e6)
    """Largest importance weight before normalisation."""
    moving_below: int = Field(32, ge=0)
    """Batches with fewer anchors are normalised by a moving mean of the weights; 0 never."""
    decay: float = Field(0.9, ge=0, lt=1)
    """Share of the old value in the moving mean."""
    penalty: float = Field(1.0, ge=0, le=1000)
    """Reward of the exposed item in a row without a response is minus this."""
    format_weight: float = Field(0.1, ge=0, le=1000)
    """Reward of a completion that is an item of the catalogue."""

    @property
    def is_member(self) -> bool:
        """True when the logged item joins the group."""
        return self.mode in (AnchorMode.APPEND, AnchorMode.REPLACE_LAST)


class AnchorWeights(NamedTuple):
    """Normalised weights, and what they came from."""

    weight_P: Float[Tensor, " P"]
    """1 in rows without an anchor; no gradient."""
    moving_log_mean: float | None
    """Logarithm of the moving mean, for the next batch; as it came where the batch has no anchor."""
    metrics: dict[str, float]


def anchor_weights(
    logp_P: Float[Tensor, " P"],
    logp0_P: Float[Tensor, " P"],
    has_P: Bool[Tensor, " P"],
    anchor: Anchor,
    moving_log_mean: float | None = None,
) -> AnchorWeights:
    """`min(pi / pi0, clip)` divided by its mean over all anchors of the batch, of both kinds of feedback.

    Computed in logarithms, so that weights that underflow still have a mean. A batch below `moving_below` anchors is
    divided by the moving mean instead, which the batch has already entered.

    Args:
        logp_P: log-probability of the exposed item under the present policy, on the support of `logp0_P`.
        logp0_P: logged log-propensity.

    Source: methods.md section 1, "Anchor weight"; Swaminathan and Joachims 2015.
    """
    with torch.no_grad():
        count = int(has_P.sum())
        ones_P = torch.ones_like(logp_P)
        if count == 0:
            return AnchorWeights(ones_P, moving_log_mean, {"anchor/count": 0.0})
        raw_P = logp_P.double() - logp0_P.double()
        log_P = raw_P.clamp_max(math.log(anchor.clip))[has_P]
        batch_mean = float(torch.logsumexp(log_P, 0)) - math.log(count)
        moving = batch_mean if moving_log_mean is None else _mixed(moving_log_mean, batch_mean, anchor.decay)
        mean = moving if count < anchor.moving_below else batch_mean
        own = (log_P - mean).exp()
        weight_P = ones_P.clone()
        weight_P[has_P] = own.to(weight_P.dtype)
        metrics = {
            "anchor/count": float(count),
            "anchor/weight_mean": math.exp(batch_mean),
            "anchor/weight_max": float(log_P.max().exp()),
            "anchor/clipped_share": float((raw_P[has_P] > math.log(anchor.clip)).double().mean()),
            "anchor/effective_size": math.exp(
                2 * float(torch.logsumexp(log_P, 0)) - float(torch.logsumexp(2 * log_P, 0))
            ),
        }
        return AnchorWeights(weight_P, moving, metrics)


def _mixed(old: float, new: float, decay: float) -> float:
    """log(decay * exp(old) + (1 - decay) * exp(new))."""
    if decay == 0:
        return new
    terms = torch.tensor([math.log(decay) + old, math.log1p(-decay) + new], dtype=torch.float64)
    return float(torch.logsumexp(terms, 0))


def feedback_rewards(
    matched_PG: Bool[Tensor, "P G"],
    formatted_PG: Bool[Tensor, "P G"],
    positive_P: Bool[Tensor, " P"],
    anchor: Anchor,
) -> tuple[Float[Tensor, "P G"], Float[Tensor, "P G"]]:
    """Item rewards and format rewards of rows with feedback.

    A match of the exposed item is 1 with a response and minus the penalty without. Every other completion has an
    unknown outcome: 0, never negative.

    Source: methods.md section 1, "Rewards".
    """
    value_P = torch.where(positive_P, 1.0, -anchor.penalty)
    return matched_PG * value_P[:, None], formatted_PG * anchor.format_weight
