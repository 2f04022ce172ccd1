"""From the records of a step to what the stages read: further members of the groups, and their `Signals`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.catalogue import Catalogue
from data.feedback import Anchors
from data.records import NO_ITEM, BoolArray, FloatArray, IntArray, Kind, Prompt, ScoredGroups
from trainer.anchor import AnchorMode
from trainer.completion_scores import ScoreOutputs
from trainer.gate import GateKind, RankerScores, policy_scores
from trainer.list_signals import ListSignals
from trainer.members import KIND_CODE, Members
from trainer.objective_settings import ObjectiveSettings
from trainer.signals import Signals
from trainer.trees import Completions
from trainer.window import Negatives

Paths = Callable[[IntArray], IntArray]


@dataclass(frozen=True, kw_only=True)
class FeedbackRows:
    """The logged exposure of each prompt of a batch."""

    item_P: IntArray
    responded_P: BoolArray
    logp0_P: FloatArray

    @staticmethod
    def of(prompts: Sequence[Prompt], anchors: Anchors) -> FeedbackRows:
        """The rows of the prompts; a prompt's id is its row in the log."""
        rows = np.array([prompt.prompt_id for prompt in prompts], dtype=np.int64)
        return FeedbackRows(
            item_P=anchors.item_N[rows],
            responded_P=anchors.response_N[rows] > 0,
            logp0_P=anchors.logp0_N[rows],
        )


@dataclass(frozen=True, kw_only=True)
class Extended:
    """The completions of a batch with its further members."""

    completions: Completions
    extra: tuple[Kind, ...]
    """What the last members are."""


def scored_extras(settings: ObjectiveSettings) -> bool:
    """Whether the learner must score the further members too, not only train on them."""
    return (
        settings.gate.kind is not GateKind.NONE
        or settings.anchor.mode is not AnchorMode.NONE
        or settings.window.negatives is Negatives.RANDOM
    )


def extended(
    completions: Completions,
    prompts: Sequence[Prompt],
    settings: ObjectiveSettings,
    catalogue: Catalogue,
    feedback: FeedbackRows | None,
    negative_PN: IntArray | None = None,
) -> Extended:
    """The groups with the ground truth (for NLL and gate), negatives and the anchor, where the recipe has a use.

    An anchor of an item that was retired since is open (`trainer.legal`), unless the prompt excludes the item.

    Args:
        negative_PN: random items (`trainer.random_negatives`); None without.
    """
    extra: list[Kind] = []
    rollouts = completions.shape[1]
    if settings.nll_weight:
        target_P1 = np.array([prompt.target for prompt in prompts], dtype=np.int32)[:, None]
        completions = completions.with_members(*catalogue.padded_tokens(target_P1))
        extra.append(Kind.GROUND_TRUTH)
    if negative_PN is not None:
        completions = completions.with_members(*catalogue.padded_tokens(negative_PN))
        extra += [Kind.NEGATIVE] * negative_PN.shape[1]
    if settings.anchor.mode is not AnchorMode.NONE:
        if feedback is None:
            raise ValueError("the objective has an anchor, but the prompts come without feedback")
        if settings.anchor.mode is AnchorMode.REPLACE_LAST:
            completions = _without_last(completions, rollouts)
        tokens = catalogue.padded_tokens(feedback.item_P[:, None])
        completions = completions.with_members(*tokens, _retired_anchors(prompts, catalogue, feedback)[:, None])
        extra.append(Kind.ANCHOR)
    return Extended(completions=completions, extra=tuple(extra))


def _retired_anchors(prompts: Sequence[Prompt], catalogue: Catalogue, feedback: FeedbackRows) -> BoolArray:
    """`[P]` whose exposed item is retired and not excluded."""
    seen = [item in prompt.exclusions for item, prompt in zip(feedback.item_P, prompts, strict=True)]
    return ~catalogue.active[feedback.item_P] & ~np.array(seen, dtype=np.bool_)


def _without_last(completions: Completions, rollouts: int) -> Completions:
    """The completions without the last present rollout of each group; the anchor takes its place."""
    valid_PG = completions.valid_PG.copy()
    count_P = valid_PG[:, :rollouts].sum(1)
    rows = np.flatnonzero(count_P > 0)
    last = rollouts - 1 - valid_PG[rows, :rollouts][:, ::-1].argmax(1)
    valid_PG[rows, last] = False
    return dataclasses.replace(completions, valid_PG=valid_PG)


def without_illegal_anchors(members: Members, legal_PGT: BoolArray) -> tuple[Members, int]:
    """Members without the anchors that the constraint forbids (of items that were seen), and how many those are.

    Their log-probability on the legal set does not exist, so they have no importance weight.
    """
    legal_PG = (torch.from_numpy(legal_PGT) | ~members.token_mask_PGT).all(-1)
    gone_PG = members.of_kind(Kind.ANCHOR) & ~legal_PG
    return members.limited_to(~gone_PG), int(gone_PG.sum())


def batch_signals(
    settings: ObjectiveSettings,
    prompts: Sequence[Prompt],
    scored: ScoredGroups,
    members: Members,
    scores: ScoreOutputs,
    *,
    part_weight: dict[str, float],
    paths: Paths,
    feedback_weight: float = 1.0,
    ranker: RankerScores | None = None,
    feedback: FeedbackRows | None = None,
    negative_PN: IntArray | None = None,
    lists: ListSignals | None = None,
) -> Signals:
    """Signals in the order of the members, with zeros where the learner or the ranker was not asked.

    Args:
        paths: `RewardScorer.paths`. A completion is a path, so it is the ground truth, or the exposed item, when it
            shares its path; the reward says the same. A retired item is nobody's answer but that of its own anchor.
        lists: credit of ranked lists, which have no ground truth to hit.
    """
    prompts_count, slots, _ = members.segment_PGT.shape
    shape = (prompts_count, slots, members.segment_PGT.shape[2])
    groups = scored.groups
    item_PG = _item_of(members, prompts, scored, feedback, negative_PN)
    target_P = np.array([prompt.target for prompt in prompts], dtype=np.int32)
    logp_PGT = torch.from_numpy(widened(scores.logp_PGT, shape))
    truth_PG = members.of_kind(Kind.GROUND_TRUTH)
    signals = Signals(
        hit_PG=_same_answer(item_PG, target_P, paths) if lists is None else None,
        lists=lists,
        logp_PGT=logp_PGT,
        engine_logp_PGT=torch.from_numpy(widened(groups.logp_PGT, shape)),
        certainty_PGT=torch.from_numpy(widened(scores.certainty_PGT, shape)),
        choices_PGT=torch.from_numpy(widened(scores.choices_PGT, shape)),
        part_PG={name: _padded(torch.tensor(part), slots) for name, part in scored.parts_PG.items()},
        part_weight=part_weight,
        feedback_weight=feedback_weight,
        ranker=None if ranker is None else ranker._replace(rollout_PG=_padded(ranker.rollout_PG, slots)),
    )
    if settings.gate.kind is not GateKind.NONE:
        score_PG = policy_scores(members, logp_PGT, length_norm=settings.gate.length_norm)
        legal_PGT = torch.from_numpy(widened(scores.legal_PGT.astype(np.float32), shape)) > 0
        legal_PG = (legal_PGT | ~members.token_mask_PGT).all(-1)
        own_P = score_PG.masked_fill(~truth_PG, 0.0).sum(1)
        signals = dataclasses.replace(
            signals, truth_logp_P=torch.where((truth_PG & ~legal_PG).any(1), -torch.inf, own_P)
        )
    if feedback is not None:
        signals = dataclasses.replace(
            signals,
            matched_PG=_same_answer(item_PG, feedback.item_P, paths),
            formatted_PG=torch.from_numpy(item_PG != NO_ITEM),
            responded_P=torch.from_numpy(feedback.responded_P),
            anchor_logp0_P=torch.from_numpy(feedback.logp0_P),
        )
    return signals


def _same_answer(item_PG: IntArray, wanted_P: IntArray, paths: Paths) -> Tensor:
    """Members that share the path of the wanted item, or are that very item, which has no path once it is retired."""
    wanted_P1, path_P1 = wanted_P[:, None], paths(wanted_P)[:, None]
    shares_PG = (paths(item_PG) == path_P1) & (path_P1 != NO_ITEM)
    return torch.from_numpy(shares_PG | ((item_PG == wanted_P1) & (wanted_P1 != NO_ITEM)))


def _item_of(
    members: Members,
    prompts: Sequence[Prompt],
    scored: ScoredGroups,
    feedback: FeedbackRows | None,
    negative_PN: IntArray | None,
) -> IntArray:
    """Items of all members."""
    item_PG = np.full(members.kind_PG.shape, NO_ITEM, dtype=np.int32)
    own = scored.groups.item_PG
    item_PG[:, : own.shape[1]] = own
    kind_G = members.kind_PG[0].numpy()
    item_PG[:, kind_G == KIND_CODE[Kind.GROUND_TRUTH]] = np.array([p.target for p in prompts], dtype=np.int32)[:, None]
    if negative_PN is not None:
        item_PG[:, kind_G == KIND_CODE[Kind.NEGATIVE]] = negative_PN
    if feedback is not None:
        item_PG[:, kind_G == KIND_CODE[Kind.ANCHOR]] = feedback.item_P[:, None]
    return item_PG


def _padded(value_PG: Tensor, slots: int) -> Tensor:
    """The values with zeros for the further members."""
    return torch.nn.functional.pad(value_PG, (0, slots - value_PG.shape[1]))


def widened(value_PGT: FloatArray, shape: tuple[int, int, int]) -> FloatArray:
    """The values in a float32 array of `shape`, zero where it is larger."""
    wide = np.zeros(shape, dtype=np.float32)
    prompts, members, tokens = value_PGT.shape
    wide[:prompts, :members, :tokens] = value_PGT
    return wide
