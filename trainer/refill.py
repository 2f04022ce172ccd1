"""Refill: groups without variance give way to groups of further prompts (DAPO's dynamic sampling).

A group whose rewards are all equal has no gradient, so a batch of many of them is a small, noisy step. Further whole
batches of the feed are rolled out, up to a bound, and their groups with variance take the places, in their order. The
feed's cursor counts the further batches, so a resumed run sees what an undisturbed one sees.
Source: DAPO (Yu et al. 2025), section 3.2; ../shared/methods.md section 6 (group builder).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from data.records import BoolArray, Prompt, ScoredGroups
from trainer.list_signals import ListSignals


class Collected(NamedTuple):
    """Prompts and their scored groups."""

    prompts: Sequence[Prompt]
    scored: ScoredGroups
    lists: ListSignals | None = None
    """Credit of the groups' lists; None for single items, which alone are refilled."""


class Refilled(NamedTuple):
    """The batch to train on."""

    batch: Collected
    failure_N: np.ndarray
    """A `RewardFailure` for every group that was rolled out."""
    metrics: dict[str, float]


def without_variance(scored: ScoredGroups) -> BoolArray:
    """`[P]`: groups that have rewards, all of which are equal. Groups without a reward are another matter."""
    valid_PG = scored.groups.valid_PG
    high_P = np.where(valid_PG, scored.reward_PG, -np.inf).max(1)
    low_P = np.where(valid_PG, scored.reward_PG, np.inf).min(1)
    dead_P: BoolArray = scored.usable_P & ~(high_P > low_P)
    return dead_P


def refilled(first: Collected, further: Callable[[set[int]], Collected | None], extra_batches: int) -> Refilled:
    """The batch with groups of further prompts in the places of its groups without variance.

    Args:
        further: rolls out the next batch without the prompts of the given ids (an epoch may end within a step, and a
            prompt's random numbers are keyed by the step); None where nothing is left of it.
        extra_batches: how often it is called at most.
    """
    seen = {prompt.prompt_id for prompt in first.prompts}
    places = np.flatnonzero(without_variance(first.scored))
    dropped = len(places)
    parts = [first]
    found: list[int] = []
    rows = len(first.prompts)
    for _ in range(extra_batches):
        if len(found) >= len(places):
            break
        more = further(seen)
        if more is None:
            continue
        seen |= {prompt.prompt_id for prompt in more.prompts}
        dead_P = without_variance(more.scored)
        dropped += int(dead_P.sum())
        found += (rows + np.flatnonzero(~dead_P & more.scored.usable_P)).tolist()
        rows += len(more.prompts)
        parts.append(more)
    used = min(len(found), len(places))
    order = np.arange(len(first.prompts))
    order[places[:used]] = found[:used]
    prompts = [prompt for part in parts for prompt in part.prompts]
    scored = ScoredGroups.concat([part.scored for part in parts]) if len(parts) > 1 else first.scored
    return Refilled(
        batch=Collected([prompts[row] for row in order], scored.take(order)),
        failure_N=scored.failure_P,
        metrics={
            "refill/dropped_groups": float(dropped - (len(places) - used)),
            "refill/extra_prompts": float(rows - len(first.prompts)),
            "refill/missing_groups": float(len(places) - used),
            "refill/unused_groups": float(len(found) - used),
        },
    )
