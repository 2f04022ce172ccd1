"""The objective: stages over a whole batch of groups, from rewards to the learner's per-token coefficients.

Order (../shared/methods.md section 6): group → reward → advantage → multipliers → gate → regularisers. Every stage
is a pure function over `Members`, run once per batch in the driver, so that no statistic depends on ranks or
micro-batches; with every stage at its identity the loss is plain GRPO.
"""

from __future__ import annotations

from typing import NamedTuple

from jaxtyping import Bool, Float
from torch import Tensor

from data.records import Kind
from trainer.advantage import group_advantages
from trainer.aggregation import token_weights
from trainer.members import KIND_CODE, Members
from trainer.objective_settings import ObjectiveSettings


class Coefficients(NamedTuple):
    """What the learner needs per token beside log-probabilities; all detached and free of rank or packing."""

    advantage_PGT: Float[Tensor, "P G T"]
    policy_weight_PGT: Float[Tensor, "P G T"]
    """Weight of the clipped surrogate."""
    kl_weight_PGT: Float[Tensor, "P G T"]
    """Weight of the k3 penalty (beta times the aggregation weight)."""
    nll_weight_PGT: Float[Tensor, "P G T"]
    """Weight of the full-vocabulary NLL (ground-truth members only)."""
    live_P: Bool[Tensor, " P"]
    """Groups that carry a policy gradient."""


def objective_coefficients(
    members: Members, reward_PG: Float[Tensor, "P G"], settings: ObjectiveSettings, fixed_length: int
) -> tuple[Coefficients, dict[str, float]]:
    """Coefficients of one batch, and its metrics.

    Ground-truth members carry no advantage; they are there for the NLL alone and are not counted in the group.
    """
    rollouts = Members(valid_PG=members.rollout_PG, kind_PG=members.kind_PG, segment_PGT=members.segment_PGT)
    advantage_PG, live_P = group_advantages(rollouts, reward_PG, settings.std_mode, settings.eps)
    weight_PGT = token_weights(rollouts, settings.aggregation, fixed_length)
    coefficients = Coefficients(
        advantage_PGT=advantage_PG.unsqueeze(-1) * rollouts.token_mask_PGT,
        policy_weight_PGT=weight_PGT,
        kl_weight_PGT=weight_PGT * settings.beta,
        nll_weight_PGT=_nll_weights(members) * settings.nll_weight,
        live_P=live_P,
    )
    return coefficients, _metrics(rollouts, advantage_PG, live_P)


def _nll_weights(members: Members) -> Float[Tensor, "P G T"]:
    """Token mean per ground truth, mean over the prompts of the batch (methods.md section 2)."""
    truth_PG = members.valid_PG & (members.kind_PG == KIND_CODE[Kind.GROUND_TRUTH])
    mask = (members.token_mask_PGT & truth_PG.unsqueeze(-1)).float()
    return mask / mask.sum(-1, keepdim=True).clamp_min(1) / mask.shape[0]


def _metrics(rollouts: Members, advantage_PG: Tensor, live_P: Tensor) -> dict[str, float]:
    valid_PG = rollouts.valid_PG
    scored_P = valid_PG.any(1)
    return {
        "groups/scored_share": float(scored_P.double().mean()),
        "groups/live_share": float((live_P & scored_P).double().mean()),
        "groups/zero_variance_share": float((~live_P & scored_P).double().mean()),
        "groups/members": float(valid_PG.sum(1).double().mean()),
        "advantage/sum": float(advantage_PG.double().sum()),
        "advantage/abs_mean": float(advantage_PG.abs().double().sum() / valid_PG.sum().clamp_min(1)),
    }
