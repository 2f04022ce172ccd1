"""From generated lists to what the credit stage reads: gains of their items, observed or estimated, and swap credit.

A gain that nobody observed is the mean of an uncertain ranker (a critic) where one is asked, with its variance, and 0
without one. Source: methods.md section 3: "means replace unobserved gains", "u=0 where the gain is observed".

Suffixes: `_P` prompt, `_G` group member, `_K` position in the list, `_C` candidate.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from data.errors import RequestError
from data.records import NO_ITEM, BoolArray, Groups, IntArray, Prompt, RewardFailure
from reward.batch_scoring import BatchScores
from reward.calibration import Floats
from reward.swap_credit import SwapForm
from trainer.list_signals import ListSignals, closed_form_lists


class CandidateGains(NamedTuple):
    """Gains of the candidates of a batch of prompts, padded."""

    item_PC: IntArray
    """`NO_ITEM` behind the last."""
    gain_PC: Floats
    variance_PC: Floats | None
    """0 where observed; None without estimates."""
    failure_P: npt.NDArray[np.str_]
    """A `RewardFailure` where the estimates of a prompt's unobserved gains failed, the empty string elsewhere."""
    observed_share: float
    """Of the candidates."""


class ListRewards(NamedTuple):
    """The lists of a batch, and which prompts have no reward."""

    signals: ListSignals
    failure_P: npt.NDArray[np.str_]
    metrics: dict[str, float]


def unobserved(prompts: Sequence[Prompt]) -> list[IntArray]:
    """Items whose gains nobody observed, for the call that estimates them; those of each prompt in its order."""
    return [_candidates(prompt)[~_observed(prompt)] for prompt in prompts]


def candidate_gains(prompts: Sequence[Prompt], estimates: BatchScores | None = None) -> CandidateGains:
    """Gains of all candidates.

    Args:
        estimates: scores and variances of `unobserved(prompts)`; None: what nobody observed is worth nothing.

    Raises:
        RequestError: estimates of a ranker that has no variances.
        ValueError: a prompt without candidates or gains.
    """
    if estimates is not None and estimates.variances is None and not (estimates.failure_N != "").all():
        raise RequestError("reward.ranker", "a ranker without variances", "a critic, where gains are to be estimated")
    width = max(len(_candidates(prompt)) for prompt in prompts)
    item_PC = np.full((len(prompts), width), NO_ITEM, dtype=np.int32)
    gain_PC, variance_PC = np.zeros((len(prompts), width)), np.zeros((len(prompts), width))
    failure_P = np.full(len(prompts), RewardFailure.NONE.value, dtype="U16")
    observed = 0
    for row, prompt in enumerate(prompts):
        items, observed_C = _candidates(prompt), _observed(prompt)
        observed += int(observed_C.sum())
        item_PC[row, : len(items)] = items
        seen = np.flatnonzero(observed_C)
        gain_PC[row, seen] = _gains(prompt)[seen]
        missing = np.flatnonzero(~observed_C)
        if estimates is None or not len(missing):
            continue
        failure_P[row] = estimates.failure_N[row]
        if failure_P[row] == RewardFailure.NONE.value and estimates.variances is not None:
            gain_PC[row, missing] = estimates.scores[row]
            variance_PC[row, missing] = estimates.variances[row]
    return CandidateGains(
        item_PC=item_PC,
        gain_PC=gain_PC,
        variance_PC=None if estimates is None else variance_PC,
        failure_P=failure_P,
        observed_share=observed / max(1, int((item_PC != NO_ITEM).sum())),
    )


def list_rewards(
    prompts: Sequence[Prompt], groups: Groups, form: SwapForm, estimates: BatchScores | None = None
) -> ListRewards:
    """Credit of generated lists by the closed form, from the gains of their candidates.

    A list counts when it has as many different candidates as it was asked for; everything else has no credit.

    Raises:
        RequestError: gains below 0 or not finite, or estimates without variances.
        ValueError: groups of single items, or a prompt without candidates or gains.
    """
    if groups.item_PGK is None or groups.spec.lists is None:
        raise ValueError("groups of single items have no lists")
    gains = candidate_gains(prompts, estimates)
    count_P = (gains.item_PC != NO_ITEM).sum(1)
    ranks_P = np.minimum(groups.spec.lists.length or count_P, count_P)
    place_PGK = _places(groups.item_PGK, gains.item_PC)
    permutation_PG = _permutations(groups.item_PGK, place_PGK, ranks_P) & groups.valid_PG
    signals = closed_form_lists(
        torch.from_numpy(_taken(gains.gain_PC, place_PGK)),
        torch.from_numpy(permutation_PG),
        torch.from_numpy(ranks_P.astype(np.int64)),
        form,
        candidate_gain_PC=torch.from_numpy(gains.gain_PC),
        variance_PGK=None if gains.variance_PC is None else torch.from_numpy(_taken(gains.variance_PC, place_PGK)),
    )
    failed = gains.failure_P != RewardFailure.NONE.value
    metrics = {
        "lists/observed_share": gains.observed_share,
        "lists/no_gain_prompts": float(((gains.gain_PC <= 0).all(1) & ~failed).sum()),
        "lists/estimates_failed": float(failed.sum()),
    }
    return ListRewards(signals, gains.failure_P, metrics)


def _candidates(prompt: Prompt) -> IntArray:
    if prompt.candidates is None:
        raise ValueError(f"prompt {prompt.prompt_id} asks for a single item")
    return prompt.candidates


def _gains(prompt: Prompt) -> npt.NDArray[np.float32]:
    if prompt.gain_C is None:
        raise ValueError(f"prompt {prompt.prompt_id} has no gains")
    return prompt.gain_C


def _observed(prompt: Prompt) -> BoolArray:
    """Whose gain was observed; all of them where the prompt does not say."""
    return np.ones(len(_gains(prompt)), dtype=bool) if prompt.observed_C is None else prompt.observed_C


def _places(item_PGK: IntArray, item_PC: IntArray) -> npt.NDArray[np.int64]:
    """Column of each list item among its prompt's candidates, -1 where it is none of them."""
    order_PC = np.argsort(item_PC, axis=1, kind="stable")
    place_PGK = np.full(item_PGK.shape, -1, dtype=np.int64)
    for row, order_C in enumerate(order_PC):
        sorted_C = item_PC[row, order_C]
        found_GK = np.searchsorted(sorted_C, item_PGK[row]).clip(max=len(sorted_C) - 1)
        known_GK = (sorted_C[found_GK] == item_PGK[row]) & (item_PGK[row] != NO_ITEM)
        place_PGK[row] = np.where(known_GK, order_C[found_GK], -1)
    return place_PGK


def _permutations(item_PGK: IntArray, place_PGK: npt.NDArray[np.int64], ranks_P: npt.NDArray[np.int64]) -> BoolArray:
    """True for lists of exactly `ranks_P` items, all of them different candidates."""
    width = item_PGK.shape[2]
    inside_PGK = np.broadcast_to((np.arange(width) < ranks_P[:, None])[:, None, :], item_PGK.shape)
    full_PG = ((place_PGK >= 0) == inside_PGK).all(2) & ((item_PGK != NO_ITEM) == inside_PGK).all(2)
    sorted_PGK = np.sort(item_PGK, axis=2)
    twice_PG = ((sorted_PGK[..., 1:] == sorted_PGK[..., :-1]) & (sorted_PGK[..., 1:] != NO_ITEM)).any(2)
    permutation_PG: BoolArray = full_PG & ~twice_PG & (ranks_P <= width)[:, None]
    return permutation_PG


def _taken(value_PC: Floats, place_PGK: npt.NDArray[np.int64]) -> Floats:
    """The values at the places, 0 where there is none."""
    prompts = np.arange(len(value_PC))[:, None, None]
    taken: Floats = np.where(place_PGK >= 0, value_PC[prompts, place_PGK.clip(min=0)], 0.0)
    return taken
