"""What the gate asks the ranker: scores of the rollouts, the ground truth and cross-negatives after the same history.

Cross-negatives are items that the groups of other prompts of the batch got: plausible items, but not here.
Source: ../shared/methods.md section 2.

Suffix `_M`: cross-negatives.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np
import torch

from data.records import NO_ITEM, FloatArray, Groups, IntArray, Prompt
from reward.batch_scoring import BatchScores
from trainer.gate import Gate, RankerScores


class RawScorer(Protocol):
    """What gives the ranker's own scores: the scorer of a run, or a ranker in this process."""

    def raw_scores(self, prompts: Sequence[Prompt], wanted: Sequence[IntArray]) -> BatchScores:
        """The ranker's scores of the wanted items after each prompt's history."""
        ...


class GateScores(NamedTuple):
    """Raw scores, and why a prompt has none."""

    scores: RankerScores
    failure_P: np.ndarray
    """A `RewardFailure` per prompt."""


def cross_negatives(prompts: Sequence[Prompt], groups: Groups, count: int, *, seed: int) -> IntArray:
    """`count` items per prompt from the groups of the others, `NO_ITEM` where there are fewer: `[P, M]`.

    Never the ground truth, an item of the prompt's own group, or one it shows or excludes. Drawn without replacement,
    keyed by (seed, step, prompt), so that the draw does not depend on the rest of the batch's order.
    """
    drawn_PM = np.full((len(prompts), count), NO_ITEM, dtype=np.int32)
    got_PG = np.where(groups.generated_PG, groups.item_PG, NO_ITEM)
    everything = np.unique(got_PG[got_PG != NO_ITEM])
    for number, (prompt, own) in enumerate(zip(prompts, got_PG, strict=True)):
        known = np.concatenate([own, prompt.history, prompt.exclusions, [prompt.target]])
        pool = np.setdiff1d(everything, known)
        generator = np.random.default_rng([seed, groups.spec.step, prompt.prompt_id])
        chosen = generator.permutation(pool)[:count]
        drawn_PM[number, : len(chosen)] = chosen
    return drawn_PM


def gate_scores(rewards: RawScorer, prompts: Sequence[Prompt], groups: Groups, gate: Gate, *, seed: int) -> GateScores:
    """Ask the ranker for everything the gate compares, in one request."""
    count = gate.negatives if gate.asks_negatives else 1
    cross_PM = cross_negatives(prompts, groups, count, seed=seed)
    if not gate.asks_negatives:
        cross_PM[:] = NO_ITEM
    wanted = []
    for prompt, items, valid, cross in zip(prompts, groups.item_PG, groups.valid_PG, cross_PM, strict=True):
        everyone = np.concatenate([items[valid], cross, [prompt.target]]).astype(np.int32)
        wanted.append(np.unique(everyone[everyone != NO_ITEM]))
    result = rewards.raw_scores(prompts, wanted)
    rollout_PG = np.zeros(groups.item_PG.shape, np.float32)
    truth_P = np.zeros(len(prompts), np.float32)
    score_PM = np.zeros(cross_PM.shape, np.float32)
    for number, (items, scores) in enumerate(zip(wanted, result.scores, strict=True)):
        if result.failure_N[number] or len(items) == 0:
            continue
        rollout_PG[number] = _looked_up(groups.item_PG[number], items, scores)
        score_PM[number] = _looked_up(cross_PM[number], items, scores)
        truth_P[number] = _looked_up(np.array([prompts[number].target]), items, scores)[0]
    return GateScores(
        RankerScores(
            torch.from_numpy(rollout_PG),
            torch.from_numpy(truth_P),
            torch.from_numpy(score_PM),
            torch.from_numpy(cross_PM != NO_ITEM),
        ),
        result.failure_N,
    )


def _looked_up(wanted: IntArray, items: IntArray, scores: FloatArray) -> FloatArray:
    """Scores of the wanted items; the lowest of all for what is no item."""
    place = np.minimum(np.searchsorted(items, wanted), len(items) - 1)
    found: FloatArray = np.where(items[place] == wanted, scores[place], scores.min()).astype(np.float32)
    return found
