"""Window stage: focus the negatives of a group on the ranks that decide Recall@K (TAWin).

Weights only: positives, anchors and ground truths keep weight 1, and the negatives of a group have weights of mean 1,
so that the sum of binary advantages stays zero. Source: ../shared/methods.md section 4, "TAWin weights".

Suffix `_J`: negatives of a group by rank.
"""

from __future__ import annotations

import math
from enum import StrEnum
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from data.records import Kind
from data.settings import Settings
from trainer.members import Members


class WindowKind(StrEnum):
    """How the weights fall off around the anchor rank."""

    NONE = "none"
    """All weights 1: the identity."""
    SOFT = "soft"
    """Soft top-k in closed form."""
    HARD = "hard"
    """The `mass` ranks nearest to the anchor rank; ranks at equal distance share what is left."""


class RankMap(StrEnum):
    """The scale on which the distance to the anchor rank is taken."""

    RAW = "raw"
    """The rank itself."""
    LOG2 = "log2"
    """log2(rank + 1) of the 0-based rank, the scale of NDCG's discount."""


class Negatives(StrEnum):
    """Where the negatives of a group come from."""

    BEAM = "beam"
    """Beam search: the hardest ones."""
    SAMPLE = "sample"
    """Samples of the policy."""
    RANDOM = "random"
    """Random items of the catalogue, in place of the rollouts that missed (`trainer.random_negatives`)."""


class Window(Settings):
    """Focus the negatives of a group on one window of ranks."""

    kind: WindowKind = WindowKind.NONE
    """none (all weights 1), soft (soft top-k) or hard (the nearest ranks)."""
    anchor_rank: int = Field(0, ge=0, le=4096)
    """0-based rank of the negative with the largest weight; K-1 aims at Recall@K."""
    mass: float = Field(1.0, gt=0, le=4096)
    """Sum of the soft top-k weights before they are scaled to mean one; 1 is a softmax."""
    temperature: float = Field(1.0, gt=0, le=1e6)
    """Softness of the window, in ranks: towards 0 it is the hard one, towards infinity plain GRPO."""
    rank_map: RankMap = RankMap.RAW
    """Distances of ranks as they are (raw) or of log2(rank + 1) (log2)."""
    negatives: Negatives = Negatives.BEAM
    """beam or sample, as rollout.decode has them, or random: items of the catalogue in place of the misses."""


class WindowWeights(NamedTuple):
    """Weights of the members, and what they are for the metrics."""

    weight_PG: Float[Tensor, "P G"]
    rank_PG: Int[Tensor, "P G"]
    """0-based rank among the negatives of the group, -1 for everything else."""
    clamped_P: Bool[Tensor, " P"]
    """Groups with too few negatives for the anchor rank; theirs is the last rank they have."""


def window_weights(
    members: Members, score_PG: Float[Tensor, "P G"], positive_PG: Bool[Tensor, "P G"], window: Window
) -> WindowWeights:
    """Weights of the group members: 1 for positives, mean 1 over the valid negatives of each group.

    Args:
        score_PG: the policy's log-probability of each member; the largest has rank 0. Negatives of equal score get
            the mean of their ranks' weights, so that the order of a group changes nothing.
        positive_PG: members that are no negatives.

    Source: methods.md section 4, "TAWin weights". The result carries no gradient.
    """
    with torch.no_grad():
        negative_PG = (members.rollout_PG | members.of_kind(Kind.NEGATIVE)) & ~positive_PG
        key_PG = score_PG.double().masked_fill(~negative_PG, -torch.inf)
        order_PJ = torch.sort(key_PG, dim=1, descending=True, stable=True).indices
        place_PG = torch.argsort(order_PJ, dim=1)
        count_P = negative_PG.sum(1)
        # A negative of score -inf sorts among the others; ranks are counted over the negatives alone.
        rank_PG = _ranks_within(negative_PG, order_PJ, place_PG)
        clamped_P = (count_P > 0) & (count_P <= window.anchor_rank)
        if window.kind is WindowKind.NONE:
            return WindowWeights(torch.ones_like(score_PG), rank_PG, torch.zeros_like(clamped_P))
        anchor_P = (count_P - 1).clamp(min=0, max=window.anchor_rank)
        distance_PG = (_mapped(rank_PG, window.rank_map) - _mapped(anchor_P, window.rank_map)[:, None]).abs()
        if window.kind is WindowKind.HARD:
            top_PG = hard_top_k(-distance_PG, negative_PG, window.mass)
        else:
            top_PG = soft_top_k(-distance_PG, negative_PG, window.mass, window.temperature)
        scaled_PG = top_PG * (count_P / top_PG.sum(1).clamp_min(torch.finfo(top_PG.dtype).tiny))[:, None]
        tied_PGG = (key_PG[:, :, None] == key_PG[:, None, :]) & negative_PG[:, None, :]
        shared_PG = (tied_PGG * scaled_PG[:, None, :]).sum(2) / tied_PGG.sum(2).clamp_min(1)
        weight_PG = torch.where(negative_PG, shared_PG, 1.0).to(score_PG.dtype)
        return WindowWeights(weight_PG, rank_PG, clamped_P)


def _ranks_within(negative_PG: Tensor, order_PJ: Tensor, place_PG: Tensor) -> Int[Tensor, "P G"]:
    """Rank among the negatives in the given order; -1 elsewhere."""
    before_PJ = negative_PG.gather(1, order_PJ).cumsum(1) - 1
    return torch.where(negative_PG, before_PJ.gather(1, place_PG), -1)


def _mapped(rank: Tensor, rank_map: RankMap) -> Tensor:
    wide = rank.clamp_min(0).double()
    return torch.log2(wide + 1) if rank_map is RankMap.LOG2 else wide


def soft_top_k(
    x_PJ: Float[Tensor, "P J"], mask_PJ: Bool[Tensor, "P J"], k: float, temperature: float
) -> Float[Tensor, "P J"]:
    """`min(1, exp((x - lam) / temperature))` with `lam` such that the masked weights of a row sum to `k`.

    In closed form: with m weights saturated at 1, lam_m = temperature * (logsumexp of the others - log(k - m)), and m
    is right when the m-th largest x is at or above lam_m and the next below. All ones where `k` is at least the number
    of masked entries; 0 outside the mask. `k = 1` is `softmax(x / temperature)`.

    Source: methods.md section 4; spaces.ac.cn/archives/10373. float64.
    """
    scaled_PJ = x_PJ.double().masked_fill(~mask_PJ, -torch.inf) / temperature
    count_P = mask_PJ.sum(1)
    sorted_PJ = torch.sort(scaled_PJ, dim=1, descending=True).values
    saturated = min(math.ceil(k), x_PJ.shape[1])
    # Suffix logsumexp: entry m is over the sorted entries m, m+1, ...
    rest_PJ = torch.logcumsumexp(sorted_PJ.flip(1), dim=1).flip(1)[:, :saturated]
    m_J = torch.arange(saturated, dtype=torch.float64, device=x_PJ.device)
    lam_PJ = rest_PJ - torch.log(k - m_J)
    infinity = torch.full_like(lam_PJ[:, :1], torch.inf)
    above_PJ = torch.cat([infinity, sorted_PJ[:, : saturated - 1]], 1)
    # The one m without a violation, or the smallest where rounding leaves none.
    violation_PJ = torch.maximum(lam_PJ - above_PJ, sorted_PJ[:, :saturated] - lam_PJ).clamp_min(0)
    violation_PJ = violation_PJ.masked_fill(m_J >= count_P[:, None], torch.inf)
    lam_P1 = lam_PJ.gather(1, violation_PJ.nan_to_num(nan=torch.inf).argmin(1, keepdim=True))
    weight_PJ = (scaled_PJ - lam_P1).clamp_max(0).exp()
    weight_PJ = torch.where((count_P <= k)[:, None], torch.ones_like(weight_PJ), weight_PJ)
    return weight_PJ.masked_fill(~mask_PJ, 0.0)


def hard_top_k(x_PJ: Float[Tensor, "P J"], mask_PJ: Bool[Tensor, "P J"], k: float) -> Float[Tensor, "P J"]:
    """1 for the `k` largest masked entries of a row; entries that tie at the edge share what is left of `k`. float64.

    This is the limit of `soft_top_k` at temperature 0.
    """
    larger_PJ = ((x_PJ[:, None, :] > x_PJ[:, :, None]) & mask_PJ[:, None, :]).sum(2)
    equal_PJ = ((x_PJ[:, None, :] == x_PJ[:, :, None]) & mask_PJ[:, None, :]).sum(2).clamp_min(1)
    weight_PJ = ((k - larger_PJ.double()) / equal_PJ).clamp(0, 1)
    return weight_PJ.masked_fill(~mask_PJ, 0.0)


def window_metrics(weights: WindowWeights, ranks: int = 20) -> dict[str, float]:
    """Mean weight by rank over the groups that have the rank, and how many groups were clamped."""
    metrics = {"window/clamped_groups": float(weights.clamped_P.sum())}
    there_PG = (weights.rank_PG >= 0) & (weights.rank_PG < ranks)
    rank_N = weights.rank_PG[there_PG]
    # Ranks are counted from 0 in every group, so none is left out below the largest.
    mass_J = torch.bincount(rank_N, weights.weight_PG[there_PG].double()) / torch.bincount(rank_N)
    return metrics | {f"window/mass/{rank}": mass for rank, mass in enumerate(mass_J.tolist())}
