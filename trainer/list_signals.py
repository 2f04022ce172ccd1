"""What the credit stage reads of ranked lists: credit per position, and how sure of it the rewards are.

Suffixes: `_P` prompt, `_G` group member, `_K` position in the list, `_C` candidate.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from reward.swap_credit import SwapForm, credit_variance, discounts, swap_credit


@dataclass(frozen=True, kw_only=True)
class ListSignals:
    """The ranked lists of a batch of groups, in the order of the members."""

    ranks_P: Tensor
    """int64: positions of a whole list of the prompt."""
    permutation_PG: Tensor
    """bool: the completion is a permutation of its candidates, or its first positions; only those have credit."""
    credit_PGK: Tensor
    """float64: credit of each position; zero in completions that are no permutation and behind the end."""
    ndcg_PG: Tensor
    """float64: NDCG of the list, zero where the ideal DCG is."""
    signal_PG: Tensor
    """bool: the candidates have a gain above zero; without one a list is credited with nothing."""
    variance_PGK: Tensor | None = None
    """float64: variance of the gain at each position, 0 where it was observed; None where nothing gives one."""
    propagated_PGK: Tensor | None = None
    """float64: variance of the credit; None where nothing gives one."""

    def tensors(self) -> dict[str, Tensor]:
        """Those of the fields that are there, by name, each in memory of its own: what a file keeps."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {name: value.contiguous().clone() for name, value in fields.items() if value is not None}

    def take_members(self, order: Tensor) -> ListSignals:
        """The signals with the members in another order."""
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        taken = {
            name: value[:, order] if value is not None and name.endswith(("_PG", "_PGK")) else value
            for name, value in fields.items()
        }
        return ListSignals(**taken)


def closed_form_lists(
    gain_PGK: Float[Tensor, "P G K"],
    permutation_PG: Bool[Tensor, "P G"],
    ranks_P: Int[Tensor, " P"],
    form: SwapForm,
    *,
    candidate_gain_PC: Float[Tensor, "P C"] | None = None,
    variance_PGK: Float[Tensor, "P G K"] | None = None,
) -> ListSignals:
    """Signals of lists whose items have gains of their own, by the closed form.

    Args:
        gain_PGK: gains in list order; what is no permutation, or behind the end, is ignored.
        permutation_PG: as in `ListSignals`.
        ranks_P: as in `ListSignals`.
        form: which counterfactuals.
        candidate_gain_PC: gains of all candidates, zeros behind the last; None: lists show all their candidates.
        variance_PGK: variance of the gains, 0 where observed.

    Raises:
        RequestError: gains that are negative or not finite, or `ranks_P` outside of 0..K.
    """
    prompts, members, width = gain_PGK.shape
    length_N = torch.where(permutation_PG, ranks_P[:, None], 0).reshape(-1)
    candidates_NC = None if candidate_gain_PC is None else candidate_gain_PC.repeat_interleave(members, dim=0)
    gain_NK = gain_PGK.reshape(-1, width)
    credit = swap_credit(gain_NK, form, length_N=length_N, candidate_gain_NC=candidates_NC)
    outside_NK = torch.arange(width, device=gain_NK.device) >= length_N[:, None]
    dcg_N = gain_NK.double().masked_fill(outside_NK, 0.0) @ discounts(width).to(gain_NK.device)
    signal_N = credit.ideal_N > 0
    propagated_PGK = None
    if variance_PGK is not None:
        variance_NK = variance_PGK.reshape(-1, width)
        propagated_PGK = credit_variance(variance_NK, credit.ideal_N, form, length_N=length_N)
    return ListSignals(
        ranks_P=ranks_P,
        permutation_PG=permutation_PG,
        credit_PGK=credit.credit_NK.reshape(prompts, members, width),
        ndcg_PG=torch.where(signal_N, dcg_N / credit.ideal_N, 0.0).reshape(prompts, members),
        signal_PG=signal_N.reshape(prompts, members),
        variance_PGK=variance_PGK,
        propagated_PGK=None if propagated_PGK is None else propagated_PGK.reshape(prompts, members, width),
    )
