"""Gate stage: reinforcement only where the policy fails and the reward model can tell (AdaGRPO).

A prompt's gate opens when the ground truth is outside the policy's best (`hard`), inside the ranker's best (`head`),
and when items of other prompts all lie at the ranker's bottom (`tail`). Where it is closed, the NLL alone trains.
Source: ../shared/methods.md section 2.

Suffix `_M`: cross-negatives.
"""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from pydantic import Field
from torch import Tensor

from data.settings import Settings
from trainer.members import Members

_TOLERANCE = 1e-9
"""Shares of group sizes are decimal fractions, whose float products may miss a whole number by rounding."""


class GateKind(StrEnum):
    """Which of the gate's parts decide."""

    NONE = "none"
    """Always open: the identity."""
    ADAGRPO = "adagrpo"
    """hard and head and tail."""
    HARD = "hard"
    """Policy difficulty alone."""
    DISCRIMINABILITY = "discriminability"
    """head and tail: the ranker alone."""
    HEAD = "head"
    """The ranker's head alone, without cross-negatives."""
    RANDOM = "random"
    """The decisions of `adagrpo`, dealt to random prompts of the batch: the same rate without the information."""
    INVERTED = "inverted"
    """Open where `adagrpo` is closed."""


class GateNorm(StrEnum):
    """What the gated loss is averaged over."""

    BATCH = "batch"
    """All prompts: a batch with few open gates takes a small step."""
    OPEN = "open"
    """The prompts with an open gate."""


class WithoutTruth(StrEnum):
    """The gate of a prompt without a ground truth."""

    OPEN = "open"
    """Open: a no-response row has no NLL, so it would train nothing otherwise."""
    CLOSED = "closed"
    """Closed."""


class Gate(Settings):
    """Per prompt: does the policy loss count beside the NLL?"""

    kind: GateKind = GateKind.NONE
    """none (always open), adagrpo, or an ablation: hard, discriminability, head, random, inverted."""
    tau: float = Field(0.25, gt=0, le=1)
    """Head of a ranking, as a share of the rollouts: hard means outside the policy's, head inside the ranker's."""
    rho: float = Field(0.5, gt=0, lt=1)
    """Tail of the ranker's ranking: all cross-negatives must lie in this last share of it."""
    negatives: int = Field(4, ge=1, le=256)
    """Cross-negatives per prompt: items that other prompts' groups of the batch got."""
    norm: GateNorm = GateNorm.BATCH
    """The gated loss is a mean over all prompts (batch) or over those with an open gate (open)."""
    without_truth: WithoutTruth = WithoutTruth.OPEN
    """Gate of a prompt without a ground truth: open or closed."""
    length_norm: bool = False
    """Rank by log-probability per token; for titles, whose lengths differ."""

    @property
    def asks_ranker(self) -> bool:
        """True when the ranker's scores decide."""
        return self.kind not in (GateKind.NONE, GateKind.HARD)

    @property
    def asks_negatives(self) -> bool:
        """True when cross-negatives are needed."""
        return self.asks_ranker and self.kind is not GateKind.HEAD


class RankerScores(NamedTuple):
    """Scores of the reward model after the same context, raw; only their order counts."""

    rollout_PG: Float[Tensor, "P G"]
    truth_P: Float[Tensor, " P"]
    cross_PM: Float[Tensor, "P M"]
    cross_valid_PM: Bool[Tensor, "P M"]
    """False where no item was drawn, or one that is no negative here."""


class GateParts(NamedTuple):
    """What decides, and the ranks behind it (1-based)."""

    hard_P: Bool[Tensor, " P"]
    head_P: Bool[Tensor, " P"]
    tail_P: Bool[Tensor, " P"]
    rank_policy_P: Int[Tensor, " P"]
    rank_ranker_P: Int[Tensor, " P"]
    known_P: Bool[Tensor, " P"]
    """Prompts with a ground truth and a rollout; all parts are False elsewhere."""


def policy_scores(members: Members, logp_PGT: Float[Tensor, "P G T"], *, length_norm: bool) -> Float[Tensor, "P G"]:
    """Log-probability of each member, per token with `length_norm`; 0 for invalid ones."""
    total_PG = logp_PGT.masked_fill(~members.token_mask_PGT, 0.0).sum(-1)
    return total_PG / members.length_PG.clamp_min(1) if length_norm else total_PG


def gate_parts(
    members: Members,
    *,
    score_PG: Float[Tensor, "P G"],
    truth_score_P: Float[Tensor, " P"],
    has_truth_P: Bool[Tensor, " P"],
    hit_PG: Bool[Tensor, "P G"],
    ranker: RankerScores | None,
    gate: Gate,
) -> GateParts:
    """The gate's parts. Carries no gradient.

    The ranking holds the ground truth and the valid rollouts without its duplicates (`hit_PG`). Policy ties favour the
    ground truth, ranker ties count against it and for the cross-negatives, so that a constant ranker closes the gate;
    so does a prompt without a cross-negative.

    Args:
        score_PG: `policy_scores` of the rollouts.
        truth_score_P: that of the ground truth; -inf where the policy cannot produce it.
        ranker: None where only `hard` is asked for; `head` and `tail` are False then.

    Source: methods.md section 2, "Diagnostics".
    """
    with torch.no_grad():
        rival_PG = members.rollout_PG & ~hit_PG
        count_P = members.rollout_PG.sum(1)
        known_P = has_truth_P & (count_P > 0)
        edge_P = gate.tau * count_P.double()
        rank_policy_P = 1 + ((score_PG > truth_score_P[:, None]) & rival_PG).sum(1)
        hard_P = known_P & (rank_policy_P > edge_P + _TOLERANCE)
        if ranker is None:
            nothing_P = torch.zeros_like(known_P)
            return GateParts(hard_P, nothing_P, nothing_P, rank_policy_P, torch.zeros_like(rank_policy_P), known_P)
        rank_ranker_P = 1 + ((ranker.rollout_PG >= ranker.truth_P[:, None]) & rival_PG).sum(1)
        head_P = known_P & (rank_ranker_P <= edge_P + _TOLERANCE)
        tail_P = known_P & _all_in_tail(rival_PG, ranker, gate.rho)
        return GateParts(hard_P, head_P, tail_P, rank_policy_P, rank_ranker_P, known_P)


def _all_in_tail(rival_PG: Tensor, ranker: RankerScores, rho: float) -> Bool[Tensor, " P"]:
    """Whether the best cross-negative lies in the last `rho` of the ranking of everybody; ties rank it higher."""
    cross_PM, there_PM = ranker.cross_PM, ranker.cross_valid_PM
    best_P = cross_PM.masked_fill(~there_PM, -torch.inf).amax(1)
    above_P = ((ranker.rollout_PG > best_P[:, None]) & rival_PG).sum(1) + (ranker.truth_P > best_P)
    size_P = 1 + rival_PG.sum(1) + there_PM.sum(1)
    return there_PM.any(1) & (1 + above_P > (1 - rho) * size_P.double() + _TOLERANCE)


def gate_decisions(parts: GateParts, has_truth_P: Tensor, gate: Gate, *, seed: int, step: int) -> Bool[Tensor, " P"]:
    """Which gates are open.

    Args:
        seed, step: key the permutation of `random`, which deals the decisions of the prompts with known parts among
            them, so that its rate is that of `adagrpo` in every batch.
    """
    both_P = parts.hard_P & parts.head_P & parts.tail_P
    match gate.kind:
        case GateKind.NONE:
            return torch.ones_like(has_truth_P)
        case GateKind.HARD:
            open_P = parts.hard_P
        case GateKind.DISCRIMINABILITY:
            open_P = parts.head_P & parts.tail_P
        case GateKind.HEAD:
            open_P = parts.head_P
        case GateKind.INVERTED:
            open_P = parts.known_P & ~both_P
        case GateKind.RANDOM:
            generator = torch.Generator().manual_seed((seed * 1_000_003 + step) % 2**63)
            known = parts.known_P.nonzero()[:, 0]
            open_P = both_P.clone()
            open_P[known] = both_P[known[torch.randperm(len(known), generator=generator)]]
        case _:
            open_P = both_P
    return torch.where(has_truth_P, open_P, gate.without_truth is WithoutTruth.OPEN)


def gate_weights(open_P: Bool[Tensor, " P"], norm: GateNorm) -> Float[Tensor, " P"]:
    """Factor of each prompt's policy and KL loss, which are means over all prompts of the batch."""
    weight_P = open_P.float()
    if norm is GateNorm.OPEN:
        weight_P = weight_P * (len(open_P) / open_P.sum().clamp_min(1))
    return weight_P


def gate_metrics(parts: GateParts, open_P: Tensor, gate: Gate) -> dict[str, float]:
    """Rates over the whole batch, and the ranks of the ground truth where it has some; of what the gate asks alone."""
    known_P = parts.known_P
    metrics = {
        "gate/open": float(open_P.double().mean()),
        "gate/hard": float(parts.hard_P.double().mean()),
        "gate/known": float(known_P.double().mean()),
    }
    if gate.asks_ranker:
        metrics["gate/head"] = float(parts.head_P.double().mean())
    if gate.asks_negatives:
        metrics["gate/tail"] = float(parts.tail_P.double().mean())
    if known_P.any():
        metrics["gate/rank_policy"] = float(parts.rank_policy_P[known_P].double().mean())
        if gate.asks_ranker:
            metrics["gate/rank_ranker"] = float(parts.rank_ranker_P[known_P].double().mean())
    return metrics
