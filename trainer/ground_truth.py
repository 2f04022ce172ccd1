"""The ground truth among the rollouts: it joins, before the rewards, a group that lacks it.

As a member it has the reward, the advantage and the loss of a rollout, but no engine generated it: it has no
behaviour log-probability, and its ratio is taken against the learner's own score before the update.
Source: ../shared/methods.md sections 2 (`gt_in_group`) and 4 (`gt_inject`).

Suffix `_R`: the groups that get it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import numpy as np

from data.catalogue import Catalogue
from data.records import NO_ITEM, BoolArray, Finish, Groups, Prompt
from trainer.group_settings import GroundTruth


def with_ground_truth(
    prompts: Sequence[Prompt], groups: Groups, catalogue: Catalogue, mode: GroundTruth
) -> tuple[Groups, dict[str, float]]:
    """The groups, in which the ground truth is a member where the policy may produce it; and how many it joined.

    `append` adds one slot to every group, which stays empty where the rollouts have the ground truth. `inject` puts
    it in place of the last rollout; a group without a rollout stays empty. Groups whose ground truth is excluded or
    retired are left as they are and counted.
    """
    if mode is GroundTruth.NONE:
        return groups, {}
    target_P = np.array([prompt.target for prompt in prompts], dtype=np.int32)
    path_P = np.where(target_P == NO_ITEM, NO_ITEM, catalogue.active_path_id[target_P])
    path_PG = np.where(groups.item_PG == NO_ITEM, NO_ITEM, catalogue.active_path_id[groups.item_PG])
    lacks_P = (target_P != NO_ITEM) & ~((path_PG == path_P[:, None]) & groups.valid_PG).any(1)
    excluded_P = np.array([bool(np.isin(prompt.target, prompt.exclusions)) for prompt in prompts], dtype=np.bool_)
    legal_P = (path_P != NO_ITEM) & ~excluded_P
    joins_P = lacks_P & legal_P
    if mode is GroundTruth.APPEND:
        groups = _with_empty_slot(groups)
        slot_P = np.full(len(prompts), groups.shape[1] - 1)
    else:
        joins_P &= groups.valid_PG.any(1)
        slot_P = groups.valid_PG.sum(1) - 1
    metrics = {
        "ground_truth/joined": float(joins_P.sum()),
        "ground_truth/not_legal": float((lacks_P & ~legal_P).sum()),
    }
    return _placed(groups, catalogue, target_P, joins_P, slot_P), metrics


def _with_empty_slot(groups: Groups) -> Groups:
    """The groups with one further slot each, in which nothing is."""
    prompts, _, tokens = groups.shape
    one: dict[str, Any] = {
        "valid_PG": np.zeros((prompts, 1), np.bool_),
        "token_PGT": np.full((prompts, 1, tokens), -1, np.int32),
        "length_PG": np.zeros((prompts, 1), np.int32),
        "item_PG": np.full((prompts, 1), NO_ITEM, np.int32),
        "logp_PGT": np.zeros((prompts, 1, tokens), np.float32),
        "finish_PG": np.full((prompts, 1), Finish.ABSENT.value),
    }
    return dataclasses.replace(
        groups, **{name: np.concatenate([getattr(groups, name), slot], 1) for name, slot in one.items()}
    )


def _placed(
    groups: Groups, catalogue: Catalogue, target_P: np.ndarray, joins_P: BoolArray, slot_P: np.ndarray
) -> Groups:
    """The groups with the ground truth in its slot where it joins."""
    row_R = np.flatnonzero(joins_P)
    slot_R = slot_P[row_R]
    token_RT, length_R = catalogue.padded_tokens(target_P[row_R])
    grown = max(0, token_RT.shape[1] - groups.shape[2])
    token_PGT = np.pad(groups.token_PGT, ((0, 0), (0, 0), (0, grown)), constant_values=-1)
    logp_PGT = np.pad(groups.logp_PGT, ((0, 0), (0, 0), (0, grown)))
    token_PGT[row_R, slot_R] = -1
    token_PGT[row_R, slot_R, : token_RT.shape[1]] = token_RT
    logp_PGT[row_R, slot_R] = 0
    changed = {
        "valid_PG": True,
        "length_PG": length_R,
        "item_PG": target_P[row_R],
        "finish_PG": Finish.GIVEN.value,
    }
    arrays: dict[str, Any] = {name: getattr(groups, name).copy() for name in changed}
    # A narrow string type would cut the word.
    arrays["finish_PG"] = arrays["finish_PG"].astype("U16")
    for name, value in changed.items():
        arrays[name][row_R, slot_R] = value
    return dataclasses.replace(groups, token_PGT=token_PGT, logp_PGT=logp_PGT, **arrays)
