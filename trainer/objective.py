"""The objective: stages over a whole batch of groups, from rewards to the learner's per-token coefficients.

Order (../shared/methods.md section 6): group → reward → advantage → multipliers → gate → regularisers. Every stage
is a pure function over `Members`, run once per batch in the driver, so that no statistic depends on ranks or
micro-batches; with every stage at its identity the loss is plain GRPO.

    L = mean_b [ nll_weight * NLL_b
               + gate_b * ( policy_weight * GRPO_b(advantage * q_b * omega_i * wn * cn * own stages)
                            + beta * KL_b - entropy_weight * H_b ) ]

Only members that carry an advantage are counted in a group: rollouts (with random negatives, those that hit, and the
negatives), anchors and demonstrations. A ground truth feeds the NLL.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from data.records import Kind
from trainer.advantage import GroupAdvantages, group_advantages
from trainer.aggregation import token_weights
from trainer.anchor import AnchorMode, AnchorRatio, AnchorWeights, Snips, anchor_weights, feedback_rewards
from trainer.credit_settings import Credit, CreditKind
from trainer.gate import GateKind, gate_decisions, gate_metrics, gate_parts, gate_weights, policy_scores
from trainer.list_credit import (
    BeamCredit,
    beam_credit,
    item_advantages,
    list_metrics,
    list_uncertainty,
    sequence_rewards,
    token_advantages,
)
from trainer.list_signals import ListSignals
from trainer.members import Members
from trainer.objective_settings import ObjectiveSettings, RewardOrder
from trainer.own_stages import own_multipliers
from trainer.several_rewards import several_advantages
from trainer.signals import Signals, needed
from trainer.tempering import (
    TemperingMode,
    confidence,
    row_factors,
    self_certainty,
    tempered_rewards,
    tempering_multipliers,
)
from trainer.truncation import TruncationLevel, truncated_weights, truncation_metrics
from trainer.uncertainty import VarianceKind, uncertainty_weights
from trainer.window import Negatives, WindowKind, window_metrics, window_weights


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
    entropy_weight_PGT: Float[Tensor, "P G T"] | None = None
    """Weight of the entropy bonus; None without one."""
    detached_PGT: Bool[Tensor, "P G T"] | None = None
    """Tokens whose ratio is 1 in value (anchors); None where there is none."""
    anchor_log_mean: float | None = None
    """Moving mean of the anchor weights, for the next batch."""


class _Anchors(NamedTuple):
    """The anchors of a batch, and what tempers and weighs their rows."""

    member_PG: Tensor
    silent_P: Tensor
    confidence_P: Tensor
    weights: AnchorWeights


class _Credit(NamedTuple):
    """The rewards of the members after the credit stage."""

    reward_PG: Tensor
    beam: BeamCredit | None
    metrics: dict[str, float]


def objective_coefficients(
    members: Members,
    reward_PG: Float[Tensor, "P G"],
    settings: ObjectiveSettings,
    fixed_length: int,
    *,
    signals: Signals | None = None,
    seed: int = 0,
    step: int = 0,
    anchor_log_mean: float | None = None,
) -> tuple[Coefficients, dict[str, float]]:
    """Coefficients of one batch, and its metrics.

    Args:
        reward_PG: sum of the configured sources; rewards of feedback and of whole lists are added here.
        fixed_length: tokens of the longest completion, for `fixed_length` aggregation.
        signals: what the recipe's stages read.
        seed, step: key what is random (the random gate).
        anchor_log_mean: state of the anchor stage from the batch before.

    Raises:
        ValueError: a signal that a stage reads is absent.
        RequestError: gains or variances that no credit is defined for.
    """
    signals = signals or Signals()
    carriers = _carriers(members, settings, signals)
    anchors, metrics = _anchors(members, settings, signals, anchor_log_mean)
    if anchors is not None:
        reward_PG = _feedback_rewards(carriers, reward_PG, settings, signals, anchors)
        metrics["reward/with_feedback"] = _mean(reward_PG, carriers.valid_PG)
    credit = _credit(carriers, reward_PG, settings, signals)
    metrics |= credit.metrics
    whole = _advantages(carriers, credit.reward_PG, settings, signals)
    advantage_PGT, live_P = _token_advantages(carriers, whole, settings, signals)
    for factor_PGT, told in _multipliers(carriers, whole.advantage_PG, settings, signals, anchors, credit.beam):
        advantage_PGT = advantage_PGT * factor_PGT
        metrics |= told
    gate_P, told = _gate(members, settings, signals, seed, step)
    metrics |= told
    token_PGT = token_weights(carriers, settings.aggregation, fixed_length)
    gated_PGT = token_PGT if gate_P is None else token_PGT * gate_P[:, None, None]
    policy_PGT = gated_PGT * settings.policy_weight
    if settings.truncation.level is not TruncationLevel.NONE:
        factor_PGT = truncated_weights(
            carriers,
            needed(signals.logp_PGT, "logp_PGT"),
            needed(signals.engine_logp_PGT, "engine_logp_PGT"),
            settings.truncation,
        )
        policy_PGT = policy_PGT * factor_PGT
        metrics |= truncation_metrics(carriers, factor_PGT, settings.truncation)
    detached = anchors is not None and settings.anchor.ratio is AnchorRatio.DETACHED
    coefficients = Coefficients(
        advantage_PGT=advantage_PGT,
        policy_weight_PGT=policy_PGT,
        kl_weight_PGT=gated_PGT * settings.beta,
        nll_weight_PGT=_nll_weights(members) * settings.nll_weight,
        live_P=live_P,
        entropy_weight_PGT=gated_PGT * settings.entropy_weight if settings.entropy_weight else None,
        detached_PGT=_anchor_tokens(carriers) if detached else None,
        anchor_log_mean=anchor_log_mean if anchors is None else anchors.weights.moving_log_mean,
    )
    return coefficients, metrics | _metrics(carriers, advantage_PGT, live_P, gate_P, signals.hit_PG)


def _carriers(members: Members, settings: ObjectiveSettings, signals: Signals) -> Members:
    """The members that carry an advantage."""
    carried_PG = members.rollout_PG
    if settings.window.negatives is Negatives.RANDOM:
        carried_PG = (carried_PG & needed(signals.hit_PG, "hit_PG")) | members.of_kind(Kind.NEGATIVE)
    carried_PG = carried_PG | members.of_kind(Kind.DEMONSTRATION)
    if settings.anchor.is_member:
        carried_PG = carried_PG | members.of_kind(Kind.ANCHOR)
    return members.limited_to(carried_PG)


def _anchor_tokens(carriers: Members) -> Tensor:
    return carriers.token_mask_PGT & carriers.of_kind(Kind.ANCHOR).unsqueeze(-1)


def _anchors(
    members: Members, settings: ObjectiveSettings, signals: Signals, log_mean: float | None
) -> tuple[_Anchors | None, dict[str, float]]:
    if settings.anchor.mode is AnchorMode.NONE:
        return None, {}
    member_PG = members.of_kind(Kind.ANCHOR)
    has_P = member_PG.any(1)
    silent_P = has_P & ~needed(signals.responded_P, "responded_P")
    logp_PG = policy_scores(members, needed(signals.logp_PGT, "logp_PGT"), length_norm=False)
    weights = anchor_weights(
        logp_PG.masked_fill(~member_PG, 0.0).sum(1),
        needed(signals.anchor_logp0_P, "anchor_logp0_P"),
        has_P,
        settings.anchor,
        log_mean,
    )
    metrics = dict(weights.metrics)
    confidence_P = torch.zeros(len(has_P), dtype=logp_PG.dtype)
    if settings.tempering.mode is not TemperingMode.NONE:
        certainty_PG = self_certainty(
            members, needed(signals.certainty_PGT, "certainty_PGT"), needed(signals.choices_PGT, "choices_PGT")
        )
        own_P = certainty_PG.masked_fill(~member_PG, 0.0).sum(1)
        confidence_P = confidence(own_P, silent_P, settings.tempering.scale)
        if silent_P.any():
            factor_P = row_factors(confidence_P, silent_P, settings.tempering.mode)
            metrics["tempering/mean"] = float(factor_P[silent_P].double().mean())
            metrics["tempering/confidence"] = float(confidence_P[silent_P].double().mean())
    metrics["anchor/silent_share"] = float(silent_P.double().mean())
    return _Anchors(member_PG, silent_P, confidence_P, weights), metrics


def _feedback_rewards(
    carriers: Members, reward_PG: Tensor, settings: ObjectiveSettings, signals: Signals, anchors: _Anchors
) -> Tensor:
    """The rewards with those of the feedback; rows without an anchor as they are."""
    has_P1 = anchors.member_PG.any(1)[:, None]
    matched_PG = needed(signals.matched_PG, "matched_PG") & carriers.valid_PG & has_P1
    formatted_PG = needed(signals.formatted_PG, "formatted_PG") & carriers.valid_PG & has_P1
    item_PG, format_PG = feedback_rewards(
        matched_PG, formatted_PG, needed(signals.responded_P, "responded_P"), settings.anchor
    )
    item_PG = tempered_rewards(item_PG, matched_PG, anchors.confidence_P, anchors.silent_P, settings.tempering)
    total_PG = reward_PG + (item_PG + format_PG).to(reward_PG.dtype) * signals.feedback_weight
    if settings.anchor.snips is Snips.REWARD:
        total_PG = torch.where(anchors.member_PG, total_PG * anchors.weights.weight_P[:, None], total_PG)
    return total_PG


def _credit(carriers: Members, reward_PG: Tensor, settings: ObjectiveSettings, signals: Signals) -> _Credit:
    """The rewards with those of whole lists, or the credit of the places in the beam instead of them."""
    credit = settings.credit
    if credit.of_lists:
        lists = _lists(signals)
        total_PG = reward_PG + sequence_rewards(carriers, lists, credit).to(reward_PG.dtype)
        return _Credit(total_PG, None, list_metrics(carriers, lists, credit))
    if credit.kind is CreditKind.BEAM_AS_LIST:
        score_PG = policy_scores(carriers, needed(signals.logp_PGT, "logp_PGT"), length_norm=False)
        uncertain = credit.uncertainty.variance is not VarianceKind.OFF
        variance_PG = needed(signals.gain_variance_PG, "gain_variance_PG") if uncertain else None
        beam = beam_credit(carriers, reward_PG, score_PG, credit, variance_PG)
        no_signal = (carriers.valid_PG.any(1) & ~beam.signal_P).double().mean()
        return _Credit(beam.credit_PG.to(reward_PG.dtype), beam, {"credit/no_signal_share": float(no_signal)})
    return _Credit(reward_PG, None, {})


def _lists(signals: Signals) -> ListSignals:
    if signals.lists is None:
        raise ValueError("the credit stage reads lists, which the loop did not provide")
    return signals.lists


def _advantages(carriers: Members, reward_PG: Tensor, settings: ObjectiveSettings, signals: Signals) -> GroupAdvantages:
    if settings.reward_order is RewardOrder.GDPO:
        return several_advantages(carriers, signals.part_PG, signals.part_weight, settings.std_mode, settings.eps)
    return group_advantages(carriers, reward_PG, settings.std_mode, settings.eps)


def _token_advantages(
    carriers: Members, whole: GroupAdvantages, settings: ObjectiveSettings, signals: Signals
) -> tuple[Tensor, Tensor]:
    """Advantages `[P, G, T]`, and which groups have any: the member's on all its tokens, or of its items on theirs."""
    if settings.credit.kind is not CreditKind.ITEMS:
        return whole.advantage_PG.unsqueeze(-1) * carriers.token_mask_PGT, whole.live_P
    items = item_advantages(carriers, _lists(signals), settings.credit.item_norm, settings.std_mode, settings.eps)
    return token_advantages(carriers, whole.advantage_PG, items.advantage_PGK), whole.live_P | items.live_P


def _multipliers(
    carriers: Members,
    advantage_PG: Tensor,
    settings: ObjectiveSettings,
    signals: Signals,
    anchors: _Anchors | None,
    beam: BeamCredit | None,
) -> list[tuple[Tensor, dict[str, float]]]:
    """Non-negative factors of the advantages and their metrics; those at their identity are not there.

    A factor is `[P, G, 1]`, or `[P, G, T]` where the tokens of a member differ.
    """
    factors: list[tuple[Tensor, dict[str, float]]] = []
    if anchors is not None and settings.tempering.mode is not TemperingMode.NONE:
        matched_PG = needed(signals.matched_PG, "matched_PG")
        factor_PG = tempering_multipliers(matched_PG, anchors.confidence_P, anchors.silent_P, settings.tempering)
        factors.append((factor_PG.unsqueeze(-1), {}))
    if settings.window.kind is not WindowKind.NONE:
        positive_PG = needed(signals.hit_PG, "hit_PG")
        if signals.matched_PG is not None:
            positive_PG = positive_PG | signals.matched_PG
        score_PG = policy_scores(carriers, needed(signals.logp_PGT, "logp_PGT"), length_norm=False)
        weights = window_weights(carriers, score_PG, positive_PG, settings.window)
        factors.append((weights.weight_PG.unsqueeze(-1), window_metrics(weights)))
    if anchors is not None and settings.anchor.snips is Snips.ADVANTAGE:
        weight_P1 = anchors.weights.weight_P[:, None].to(advantage_PG.dtype)
        factor_PG = torch.where(anchors.member_PG, weight_P1, torch.ones_like(advantage_PG))
        factors.append((factor_PG.unsqueeze(-1), {}))
    if settings.credit.uncertainty.variance is not VarianceKind.OFF:
        factor_PGT, told = _uncertainty(carriers, settings.credit, signals, beam)
        factors.append((factor_PGT.to(advantage_PG.dtype), told))
    for number, path in enumerate(settings.stages):
        factor_PG = own_multipliers(path, carriers, signals, advantage_PG)
        factors.append((factor_PG.unsqueeze(-1), {f"stages/{number}/mean": _mean(factor_PG, carriers.valid_PG)}))
    return factors


def _uncertainty(
    carriers: Members, credit: Credit, signals: Signals, beam: BeamCredit | None
) -> tuple[Tensor, dict[str, float]]:
    if beam is None:
        return list_uncertainty(carriers, _lists(signals), credit.uncertainty)
    propagated = credit.uncertainty.variance is VarianceKind.PROPAGATED
    variance_PG = beam.propagated_PG if propagated else signals.gain_variance_PG
    # The tokens of a completion count, as in a list: the mean is over all item tokens of the batch.
    mask_PGT = carriers.token_mask_PGT
    return uncertainty_weights(
        needed(variance_PG, "gain_variance_PG").unsqueeze(-1).expand(mask_PGT.shape), mask_PGT, credit.uncertainty
    )


def _gate(
    members: Members, settings: ObjectiveSettings, signals: Signals, seed: int, step: int
) -> tuple[Tensor | None, dict[str, float]]:
    """Factor of each prompt's policy and KL loss, from all of its rollouts; None without a gate."""
    gate = settings.gate
    if gate.kind is GateKind.NONE:
        return None, {}
    if gate.asks_ranker and signals.ranker is None:
        raise ValueError("the gate reads ranker scores, which the loop did not provide")
    has_truth_P = members.of_kind(Kind.GROUND_TRUTH).any(1)
    parts = gate_parts(
        members,
        score_PG=policy_scores(members, needed(signals.logp_PGT, "logp_PGT"), length_norm=gate.length_norm),
        truth_score_P=needed(signals.truth_logp_P, "truth_logp_P"),
        has_truth_P=has_truth_P,
        hit_PG=needed(signals.hit_PG, "hit_PG"),
        ranker=signals.ranker,
        gate=gate,
    )
    open_P = gate_decisions(parts, has_truth_P, gate, seed=seed, step=step)
    return gate_weights(open_P, gate.norm), gate_metrics(parts, open_P, gate)


def _nll_weights(members: Members) -> Float[Tensor, "P G T"]:
    """Token mean per ground truth, mean over the prompts of the batch (methods.md section 2)."""
    truth_PG = members.of_kind(Kind.GROUND_TRUTH)
    mask = (members.token_mask_PGT & truth_PG.unsqueeze(-1)).float()
    return mask / mask.sum(-1, keepdim=True).clamp_min(1) / mask.shape[0]


def _mean(value_PG: Tensor, mask_PG: Tensor) -> float:
    """Mean over the masked members; 0 without any."""
    return float(value_PG.double().masked_fill(~mask_PG, 0.0).sum() / mask_PG.sum().clamp_min(1))


def _metrics(
    carriers: Members, advantage_PGT: Tensor, live_P: Tensor, gate_P: Tensor | None, hit_PG: Tensor | None
) -> dict[str, float]:
    valid_PG = carriers.valid_PG
    scored_P = valid_PG.any(1)
    advantage_PG = advantage_PGT.double().sum(-1) / carriers.length_PG.clamp_min(1)
    gradient_P = live_P & scored_P & (advantage_PGT != 0).flatten(1).any(1)
    if gate_P is not None:
        gradient_P = gradient_P & (gate_P > 0)
    metrics = {
        "groups/scored_share": float(scored_P.double().mean()),
        "groups/live_share": float(gradient_P.double().mean()),
        "groups/zero_variance_share": float((~live_P & scored_P).double().mean()),
        "groups/members": float(valid_PG.sum(1).double().mean()),
        "advantage/sum": float(advantage_PG.sum()),
        "advantage/abs_mean": float(advantage_PG.abs().sum() / valid_PG.sum().clamp_min(1)),
    }
    if hit_PG is not None:
        metrics["groups/no_hit_share"] = float((scored_P & ~(hit_PG & valid_PG).any(1)).double().mean())
    return metrics
