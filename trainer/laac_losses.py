"""The losses of LAAC, row by row: what a policy, a reference and the log are worth to a critic.

The critic lowers its values on the policy's actions and raises them on those of the reference (`gap`), is held to the
log by `grounding`, and to the rewards by `backup_error`. Every function takes values `f(s, .)` that are already there
and returns one number per row, so that a batch may be cut among ranks: the mean is taken once, over the whole batch.

Source: methods.md section 5, "Objective". Suffixes: `_B` row, `_R` answer of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import StrEnum

import torch
from jaxtyping import Bool, Float
from torch import Tensor


class Grounding(StrEnum):
    """How the values of the reference's actions are tied to those of the logged ones (E_g)."""

    SQUARE = "square"
    """(f(s,a) - f(s,reference))^2."""
    HINGE = "hinge"
    """relu(f(s,reference) - f(s,a))^2: only optimism is penalised."""
    PER_ACTION = "per_action"
    """The square for each of the reference's actions, weighted by its probability."""


class Backup(StrEnum):
    """What the temporal difference regresses on."""

    TARGET = "target"
    """The target networks."""
    RESIDUAL = "residual_0.5_0.5"
    """Half on the target networks, half on the critic's own next value with its gradient (ATAC)."""


def gap(policy_value_B: Float[Tensor, " B"], reference_value_B: Float[Tensor, " B"]) -> Float[Tensor, " B"]:
    """`L(f,pi)` of each row: f(s,pi) - f(s,reference)."""
    return policy_value_B - reference_value_B


def grounding(
    data_value_B: Float[Tensor, " B"],
    answer_value_BR: Float[Tensor, "B R"],
    weight_BR: Float[Tensor, "B R"],
    form: Grounding,
) -> Float[Tensor, " B"]:
    """`E_g(f)` of each row.

    Args:
        data_value_B: f(s,a) of the logged action.
        answer_value_BR: f(s, .) of the reference's actions.
        weight_BR: their probabilities; 0 where there is no action. A row of zeros is worth nothing.
    """
    if form is Grounding.PER_ACTION:
        return (weight_BR * (data_value_B[:, None] - answer_value_BR).square()).sum(1)
    difference_B = data_value_B * weight_BR.sum(1) - (weight_BR * answer_value_BR).sum(1)
    if form is Grounding.HINGE:
        difference_B = difference_B.clamp(max=0)
    return difference_B.square()


def bounded_target(
    reward_B: Float[Tensor, " B"],
    done_B: Bool[Tensor, " B"],
    next_value_B: Float[Tensor, " B"],
    discount: float,
) -> Float[Tensor, " B"]:
    """r + discount * (1 - done) * f(s',pi), clipped to what rewards in [0, 1] can be worth: [0, 1/(1-discount)]."""
    target_B = reward_B + discount * torch.where(done_B, 0.0, next_value_B)
    return target_B.clamp(0.0, 1.0 / (1.0 - discount) if discount < 1 else math.inf)


def backup_error(
    data_value_B: Float[Tensor, " B"],
    target_B: Float[Tensor, " B"],
    own_target_B: Float[Tensor, " B"] | None = None,
) -> Float[Tensor, " B"]:
    """`E_td(f)` of each row: (f(s,a) - target)^2, averaged with the residual where the critic's own target is given."""
    error_B = (data_value_B - target_B).square()
    if own_target_B is None:
        return error_B
    return 0.5 * error_B + 0.5 * (data_value_B - own_target_B).square()


def critic_loss(
    gap_term: Float[Tensor, ""],
    grounding_term: Float[Tensor, ""],
    backup_term: Float[Tensor, ""],
    *,
    alpha: float,
    beta: float,
    normalized_sum: bool,
) -> Float[Tensor, ""]:
    """L + alpha * E_g + beta * E_td; with `normalized_sum` divided by the largest weight where it is above 1."""
    total = gap_term + alpha * grounding_term + beta * backup_term
    return total / max(1.0, alpha, beta) if normalized_sum else total


def actor_loss(
    policy_value_B: Float[Tensor, " B"], entropy_B: Float[Tensor, " B"] | None, entropy_weight: float
) -> Float[Tensor, " B"]:
    """-f1(s,pi) - entropy_weight * H(pi) of each row; of the reference it knows nothing."""
    return -policy_value_B if entropy_B is None else -policy_value_B - entropy_weight * entropy_B


@torch.no_grad()
def project_norms(weights: Sequence[Tensor], limit: float) -> int:
    """Scale every weight whose L2 norm is above the limit back to it; returns how many were.

    Biases too: an item's bias alone would be a direction in which the critic's loss is unbounded.
    """
    projected = 0
    for weight, norm in zip(weights, torch.stack(torch._foreach_norm(list(weights))).tolist(), strict=True):
        if norm > limit:
            weight.mul_(limit / norm)
            projected += 1
    return projected


@torch.no_grad()
def follow(targets: Sequence[Tensor], sources: Sequence[Tensor], rate: float) -> None:
    """Polyak averaging: target <- (1 - rate) * target + rate * source."""
    torch._foreach_lerp_(list(targets), list(sources), rate)
