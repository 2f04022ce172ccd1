"""Objectives that make no sense in their job: what a stage needs from rollouts, rewards and data.

Checks within the objective alone are in `trainer.objective_settings`. Each refusal says why.
"""

from __future__ import annotations

from pathlib import Path

from data.errors import RequestError
from data.records import Decode
from reward.settings import InvalidScore, RankerTransform, RewardSettings
from rollout.settings import RolloutSettings
from trainer.anchor import AnchorMode
from trainer.credit_settings import CreditKind
from trainer.gate import GateKind
from trainer.group_settings import GroundTruth, GroupSettings, Refill
from trainer.objective_settings import ObjectiveSettings, RewardOrder
from trainer.own_stages import load_stage
from trainer.truncation import TruncationLevel
from trainer.uncertainty import VarianceKind
from trainer.window import Negatives, WindowKind


def check_objective(
    objective: ObjectiveSettings,
    rollout: RolloutSettings,
    reward: RewardSettings,
    group: GroupSettings,
    *,
    batch_prompts: int,
    feedback: Path | None,
    dumps: bool = False,
    lists: bool = False,
) -> None:
    """Refuse an objective that its job cannot feed.

    Args:
        dumps: the groups go to a dump or come from one.
        lists: the completions are ranked lists (`trainer.list_checks` has their own checks).

    Raises:
        RequestError: names the field to change and the reason.
    """
    if rollout.decode is Decode.SAMPLE_WITHOUT_REPLACEMENT:
        raise RequestError(
            "rollout.decode",
            rollout.decode.value,
            "beam or sample for rl: its draws need weights of their own, and the objective weighs all members alike",
        )
    if not any(reward.part_weights().values()) and not reward.feedback and not lists:
        legal = "a weight other than 0 for item_match, rank_penalty, ranker_score or feedback"
        raise RequestError("reward.item_match", 0, legal)
    _check_credit(objective, rollout, reward, lists=lists)
    _check_window(objective, rollout)
    _check_negatives(objective, reward)
    _check_group(objective, group, dumps)
    _check_gate(objective, reward, batch_prompts)
    _check_feedback(objective, reward, feedback)
    level = objective.truncation.level
    if level in (TruncationLevel.ITEM, TruncationLevel.SEQUENCE) and rollout.decode is Decode.BEAM:
        raise RequestError(
            "objective.truncation.level",
            level.value,
            "none or token with rollout.decode beam: beams are not drawn, so a whole completion has no propensity",
        )
    sources = sum(weight != 0 for weight in reward.part_weights().values())
    if objective.reward_order is RewardOrder.GDPO and sources < 2:
        raise RequestError("objective.reward_order", "gdpo", "sum: there is only one reward with a weight")
    for path in objective.stages:
        load_stage(path)


def _check_credit(
    objective: ObjectiveSettings, rollout: RolloutSettings, reward: RewardSettings, *, lists: bool
) -> None:
    """Credit of a beam needs gains that are at least 0; that of lists has its checks in `trainer.list_checks`."""
    credit = objective.credit
    if credit.of_lists and not lists:
        legal = "none or beam_as_list without lists.needs: the prompts of this job ask for one item"
        raise RequestError("objective.credit.kind", credit.kind.value, legal)
    if credit.kind is CreditKind.NONE or lists:
        return
    if credit.uncertainty.variance is not VarianceKind.OFF:
        where, reason = "objective.credit.uncertainty.variance", "no reward of this job comes with a variance"
        raise RequestError(where, credit.uncertainty.variance.value, f"off: {reason}")
    words = "with objective.credit.kind beam_as_list"
    if rollout.decode is not Decode.BEAM:
        raise RequestError("rollout.decode", rollout.decode.value, f"beam {words}: the beam is the list")
    reason = "rewards are the gains of an NDCG there, at least 0"
    if reward.rank_penalty:
        raise RequestError("reward.rank_penalty", reward.rank_penalty, f"0 {words}: {reason}")
    for name, weight in (("item_match", reward.item_match), ("ranker_score", reward.ranker_score)):
        if weight < 0:
            raise RequestError(f"reward.{name}", weight, f"0 or more {words}: {reason}")
    if reward.ranker_score and reward.ranker_transform is RankerTransform.RAW:
        raise RequestError("reward.ranker_transform", "raw", f"sigmoid or percentile {words}: {reason}")
    if reward.ranker_score and reward.invalid_score is InvalidScore.BELOW_LOWEST:
        raise RequestError("reward.invalid_score", "below_lowest", f"lowest {words}: {reason}")


def _check_window(objective: ObjectiveSettings, rollout: RolloutSettings) -> None:
    window = objective.window
    if window.kind is WindowKind.NONE:
        return
    replaced = objective.anchor.mode is AnchorMode.REPLACE_LAST
    negatives = rollout.width - 1 - replaced
    if window.anchor_rank >= negatives:
        words = " and with the anchor for the last rollout" if replaced else ""
        raise RequestError(
            "objective.window.anchor_rank",
            window.anchor_rank,
            f"at most {negatives - 1}: a group of rollout.width {rollout.width} with the hit{words} has {negatives} "
            "negatives",
        )
    if window.negatives is Negatives.RANDOM:
        return
    if (window.negatives is Negatives.BEAM) != (rollout.decode is Decode.BEAM):
        other = "beam" if rollout.decode is Decode.BEAM else "sample"
        raise RequestError(
            "objective.window.negatives",
            window.negatives.value,
            f"{other} or random, because rollout.decode is {rollout.decode.value}",
        )


def _check_negatives(objective: ObjectiveSettings, reward: RewardSettings) -> None:
    """Random negatives have a reward that is known without asking anybody: the item match, which is 0."""
    if objective.window.negatives is not Negatives.RANDOM:
        return
    where, found = "objective.window.negatives", "random"
    if objective.anchor.mode is not AnchorMode.NONE:
        reason = "they take the places of what missed the ground truth, which rows without a response do not have"
        raise RequestError(where, found, f"beam or sample with objective.anchor: {reason}")
    if not reward.item_match or reward.rank_penalty or reward.ranker_score:
        reason = "random items have no beam rank, and no score was asked for them"
        raise RequestError(where, found, f"beam or sample, or reward.item_match as the only weight: {reason}")


def _check_group(objective: ObjectiveSettings, group: GroupSettings, dumps: bool) -> None:
    anchored = objective.anchor.mode is not AnchorMode.NONE
    refill, truth = group.refill, group.ground_truth
    if refill is not Refill.NONE and anchored:
        reason = "whether a group has variance shows in the objective only, where the feedback becomes rewards"
        raise RequestError("group.refill", refill.value, f"none with objective.anchor: {reason}")
    if truth is not GroundTruth.NONE and anchored:
        reason = "the anchor is the member whose outcome is known"
        raise RequestError("group.ground_truth", truth.value, f"none with objective.anchor: {reason}")
    for name, value in (("refill", refill.value), ("ground_truth", truth.value)):
        if dumps and value != "none":
            reason = "a dump has the groups as the engines generated them"
            raise RequestError(f"group.{name}", value, f"none with rollout_only or train_only: {reason}")


def _check_gate(objective: ObjectiveSettings, reward: RewardSettings, batch_prompts: int) -> None:
    gate = objective.gate
    if gate.asks_ranker and not reward.asks_ranker:
        raise RequestError(
            "reward.ranker", "none", f"a ranker, because objective.gate.kind {gate.kind.value} compares its scores"
        )
    if gate.kind is not GateKind.NONE and gate.asks_negatives and batch_prompts < 2:
        raise RequestError("batch_prompts", batch_prompts, "2 or more: cross-negatives come from other prompts")


def _check_feedback(objective: ObjectiveSettings, reward: RewardSettings, feedback: Path | None) -> None:
    anchored = objective.anchor.mode is not AnchorMode.NONE
    if anchored and feedback is None:
        raise RequestError("feedback", "none", "a feedback log, because objective.anchor needs logged exposures")
    if anchored != (reward.feedback > 0):
        legal = "above 0 with objective.anchor" if anchored else "0 without objective.anchor, which it belongs to"
        raise RequestError("reward.feedback", reward.feedback, legal)
    if anchored and (reward.ranker_score or reward.rank_penalty or reward.item_match):
        raise RequestError(
            "reward.feedback",
            reward.feedback,
            "the only weight: the anchor has no reward of item_match, rank_penalty or ranker_score, so its group "
            "would compare it with rollouts that do",
        )
