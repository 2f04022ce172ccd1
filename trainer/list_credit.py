"""Credit stage: item advantages of ranked lists, on the tokens of their items.

    A[i, t] = advantage of the position of token t   on tokens of an item
            = advantage of the whole list            on format tokens

A completion that is no list has no credit at any position and stays in its group. `beam_as_list` reads the beam of a
prompt as one list; its credit stands in for the rewards.

Source: methods.md section 3, "Advantages"; section 6 for `beam_as_list`.
Suffixes: `_P` prompt, `_G` group member, `_T` token, `_K` position in the list.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from reward.swap_credit import credit_variance, swap_credit
from trainer.advantage import masked_advantages
from trainer.credit_settings import Credit, CreditKind, ItemNorm
from trainer.list_signals import ListSignals
from trainer.members import Members
from trainer.objective_settings import StdMode
from trainer.uncertainty import Uncertainty, VarianceKind, uncertainty_weights


class ItemAdvantages(NamedTuple):
    """Advantages of positions, and which groups have any."""

    advantage_PGK: Float[Tensor, "P G K"]
    live_P: Bool[Tensor, " P"]


class BeamCredit(NamedTuple):
    """Credit of the members of beams."""

    credit_PG: Float[Tensor, "P G"]
    signal_P: Bool[Tensor, " P"]
    """The beam holds a gain above zero."""
    propagated_PG: Float[Tensor, "P G"] | None
    """Variance of the credit; None without variances of the gains."""


def sequence_rewards(carriers: Members, lists: ListSignals, credit: Credit) -> Float[Tensor, "P G"]:
    """`R_seq`: 1 for a permutation of the candidates plus `ndcg_weight` times its NDCG, 0 for anything else. float64.

    Source: methods.md section 3, "Sequence reward".
    """
    list_PG = lists.permutation_PG & carriers.valid_PG
    return torch.where(list_PG, 1.0 + credit.ndcg_weight * lists.ndcg_PG, 0.0)


def item_advantages(
    carriers: Members, lists: ListSignals, norm: ItemNorm, std_mode: StdMode, eps: float
) -> ItemAdvantages:
    """Credit normalised within the group, per position or over all of them; 0 behind the end of a prompt's lists.

    Every valid member counts at every position of the prompt's lists, also one that is no list: its credit is 0.
    Source: methods.md section 3, `item_norm`.
    """
    prompts, members, width = lists.credit_PGK.shape
    there_PK = torch.arange(width) < lists.ranks_P[:, None]
    mask_PGK = carriers.valid_PG.unsqueeze(-1) & there_PK[:, None, :]
    credit_PGK = torch.where(lists.permutation_PG.unsqueeze(-1), lists.credit_PGK, 0.0)
    if norm is ItemNorm.POOLED:
        found = masked_advantages(credit_PGK.reshape(prompts, -1), mask_PGK.reshape(prompts, -1), std_mode, eps)
        return ItemAdvantages(found.advantage_PG.reshape(prompts, members, width), found.live_P)
    by_rank_XG = credit_PGK.transpose(1, 2).reshape(-1, members)
    found = masked_advantages(by_rank_XG, mask_PGK.transpose(1, 2).reshape(-1, members), std_mode, eps)
    advantage_PGK = found.advantage_PG.reshape(prompts, width, members).transpose(1, 2)
    return ItemAdvantages(advantage_PGK, found.live_P.reshape(prompts, width).any(1))


def token_advantages(
    carriers: Members, sequence_PG: Float[Tensor, "P G"], item_PGK: Float[Tensor, "P G K"]
) -> Float[Tensor, "P G T"]:
    """The advantage of each token: of its position on item tokens, of the whole list on format tokens, 0 elsewhere.

    Raises:
        ValueError: a token belongs to a position that has no advantage.
    """
    own_PGT = _at_positions(carriers, item_PGK.to(sequence_PG.dtype))
    whole_PGT = sequence_PG.unsqueeze(-1).expand_as(own_PGT)
    return torch.where(carriers.segment_PGT >= 0, own_PGT, whole_PGT) * carriers.token_mask_PGT


def list_uncertainty(
    carriers: Members, lists: ListSignals, uncertainty: Uncertainty
) -> tuple[Float[Tensor, "P G T"], dict[str, float]]:
    """Factor of each token, 1 on format tokens, and metrics.

    What is no list has factor 1 as well and does not enter the mean: its credit of 0 is a rule, not an estimate.

    Raises:
        ValueError: the lists come without variances.
        RequestError: a variance that is negative or not finite.
    """
    propagated = uncertainty.variance is VarianceKind.PROPAGATED
    variance_PGK = lists.propagated_PGK if propagated else lists.variance_PGK
    if variance_PGK is None:
        raise ValueError("the uncertainty stage reads variances, which the loop did not provide")
    item_PGT = carriers.token_mask_PGT & (carriers.segment_PGT >= 0) & lists.permutation_PG.unsqueeze(-1)
    return uncertainty_weights(_at_positions(carriers, variance_PGK), item_PGT, uncertainty)


def beam_credit(
    carriers: Members,
    gain_PG: Float[Tensor, "P G"],
    score_PG: Float[Tensor, "P G"],
    credit: Credit,
    variance_PG: Float[Tensor, "P G"] | None = None,
) -> BeamCredit:
    """Credit of each completion of a beam at its position in it, 0 for invalid members.

    Args:
        gain_PG: what each completion's item is worth, e.g. its reward.
        score_PG: log-probability of each completion; the largest stands first. Equal ones stand in slot order.
        credit: kind `beam_as_list`.
        variance_PG: variance of the gains.

    Raises:
        RequestError: gains that are negative or not finite.

    Source: methods.md section 6, "Swap rewards degenerate for S=1".
    """
    valid_PG = carriers.valid_PG
    by_score_PK = torch.sort(score_PG.double(), dim=1, descending=True, stable=True).indices
    absent_first = torch.sort((~valid_PG).gather(1, by_score_PK).int(), dim=1, stable=True).indices
    order_PK = by_score_PK.gather(1, absent_first)
    place_PG = torch.argsort(order_PK, dim=1)
    length_P = valid_PG.sum(1)
    gain_PK = gain_PG.masked_fill(~valid_PG, 0.0).gather(1, order_PK)
    found = swap_credit(gain_PK, credit.form, length_N=length_P)
    propagated_PG = None
    if variance_PG is not None:
        variance_PK = variance_PG.masked_fill(~valid_PG, 0.0).gather(1, order_PK)
        propagated_PK = credit_variance(variance_PK, found.ideal_N, credit.form, length_N=length_P)
        propagated_PG = propagated_PK.gather(1, place_PG)
    return BeamCredit(found.credit_NK.gather(1, place_PG), found.ideal_N > 0, propagated_PG)


def list_metrics(carriers: Members, lists: ListSignals, credit: Credit) -> dict[str, float]:
    """Shares of the members that are no list or have no signal, mean NDCG, and mean credit by position."""
    valid_PG = carriers.valid_PG
    count = valid_PG.sum().clamp_min(1)
    list_PG = valid_PG & lists.permutation_PG
    lists_count = list_PG.sum().clamp_min(1)
    metrics = {
        "credit/not_a_list_share": float((valid_PG & ~lists.permutation_PG).sum() / count),
        "credit/no_signal_share": float((list_PG & ~lists.signal_PG).sum() / lists_count),
        "credit/ndcg": float(lists.ndcg_PG.masked_fill(~list_PG, 0.0).sum() / lists_count),
    }
    if credit.kind is CreditKind.ITEMS:
        total_K = lists.credit_PGK.masked_fill(~list_PG.unsqueeze(-1), 0.0).sum((0, 1))
        metrics |= {f"credit/rank/{rank}": value for rank, value in enumerate((total_K / lists_count).tolist())}
    return metrics


def _at_positions(carriers: Members, value_PGK: Tensor) -> Tensor:
    """The value of each token's position; that of position 0 on tokens without one."""
    segment_PGT = carriers.segment_PGT
    if segment_PGT.numel() and int(segment_PGT.max()) >= value_PGK.shape[2]:
        raise ValueError(f"tokens of position {int(segment_PGT.max())} in lists of {value_PGK.shape[2]} positions")
    return value_PGK.gather(2, segment_PGT.clamp_min(0))
