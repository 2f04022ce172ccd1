"""Random items of the catalogue as the negatives of a group, for the comparison with beams (WPAUC's ablation).

The hits of a group stay, and each rollout that missed gives way to a random item that the constraint allows, so that
the group keeps its size. No engine drew these items: they have no behaviour log-probability, and their ratio is taken
against the learner's own score before the update. Source: ../shared/methods.md section 4, `neg_source`.

Suffixes: `_P` prompt, `_N` negatives of a prompt, `_I` items.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from data.feed import generator
from data.records import NO_ITEM, IntArray, LongArray, Prompt

_STREAM: Final = 3
"""Tells these draws from the feed's (`data.feed`)."""


def random_negatives(
    prompts: Sequence[Prompt], count_P: LongArray, path_id_I: IntArray, *, seed: int, step: int
) -> IntArray:
    """`count_P` distinct random items per prompt, `NO_ITEM` behind them and where the catalogue has too few: `[P, N]`.

    Never the ground truth, an item the prompt excludes, a retired one, or two with the same path. Keyed by (seed,
    step, prompt), so that a draw depends neither on the rest of the batch nor on its order.

    Args:
        path_id_I: `Catalogue.active_path_id`.
    """
    drawn_PN = np.full((len(prompts), int(count_P.max(initial=0))), NO_ITEM, dtype=np.int32)
    active = np.flatnonzero(path_id_I != NO_ITEM)
    pool = active[np.unique(path_id_I[active], return_index=True)[1]]
    for row, (prompt, count) in enumerate(zip(prompts, count_P.tolist(), strict=True)):
        if count == 0:
            continue
        known = np.append(prompt.exclusions, prompt.target)
        banned = np.unique(path_id_I[known[known != NO_ITEM]])
        random = generator(seed, _STREAM, step, prompt.prompt_id)
        # The first that are left of a random order are a random choice among what is not banned.
        chosen = pool[random.choice(len(pool), min(len(pool), count + len(banned)), replace=False)]
        left = chosen[~np.isin(path_id_I[chosen], banned)][:count]
        drawn_PN[row, : len(left)] = left
    return drawn_PN
