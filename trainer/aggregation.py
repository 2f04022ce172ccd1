"""Aggregation stage: the weight of each token in the batch loss, from denominators of the whole batch.

The denominators never depend on ranks, packing or accumulation, because they are taken over the whole batch in the
driver. Source: ../shared/methods.md section 0 (`agg`).
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from trainer.members import Members
from trainer.objective_settings import Aggregation


def token_weights(members: Members, aggregation: Aggregation, fixed_length: int) -> Float[Tensor, "P G T"]:
    """Weights whose sum over a token quantity is its batch aggregate; zero in the padding.

    The mean over prompts divides by all prompts of the batch, also by those without a valid member: failed groups
    shrink the step instead of enlarging the others.
    """
    mask_PGT = members.token_mask_PGT
    prompts = mask_PGT.shape[0]
    mask = mask_PGT.float()
    if aggregation is Aggregation.TOKEN_MEAN:
        return mask / mask.sum().clamp_min(1)
    group_P = members.valid_PG.sum(1).clamp_min(1)
    per_member = mask / (prompts * group_P)[:, None, None]
    if aggregation is Aggregation.FIXED_LENGTH:
        return per_member / fixed_length
    return per_member / members.length_PG.clamp_min(1).unsqueeze(-1)
