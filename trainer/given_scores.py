"""Ground truths and anchors that the engine scores beside the rollouts, in the same pass over their prompt.

Where the objective reads the log-probabilities of such members (a gate those of the ground truth, an anchor its own),
the learner scores them before the update. The engine is asked for them too, so that the policy gap is measured on the
numbers that the objective reads, and not on generated tokens alone.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

import numpy as np

from data.catalogue import Catalogue
from data.records import NO_ITEM, BoolArray, FloatArray, Groups, IntArray, Kind, Prompt
from trainer.anchor import AnchorMode
from trainer.batch_signals import FeedbackRows, scored_extras, widened
from trainer.objective_settings import ObjectiveSettings
from trainer.trees import Completions


def given_items(
    settings: ObjectiveSettings, prompts: Sequence[Prompt], feedback: FeedbackRows | None
) -> dict[Kind, IntArray]:
    """Items `[P]` that the learner scores and that are known before the rollout; empty where it scores none."""
    items: dict[Kind, IntArray] = {}
    if not scored_extras(settings):
        return items
    if settings.nll_weight:
        items[Kind.GROUND_TRUTH] = np.array([prompt.target for prompt in prompts], dtype=np.int32)
    if settings.anchor.mode is not AnchorMode.NONE and feedback is not None:
        items[Kind.ANCHOR] = feedback.item_P
    return items


def asking_for(prompts: Sequence[Prompt], items: Mapping[Kind, IntArray], catalogue: Catalogue) -> Sequence[Prompt]:
    """The prompts with `scored_items`; retired items are in no trie, so the engine has no score of them."""
    if not items:
        return prompts
    item_PE = np.stack(list(items.values()), 1)
    known_PE = (item_PE != NO_ITEM) & (catalogue.active_path_id[item_PE] != NO_ITEM)
    wanted = [dict.fromkeys(item_E[known_E].tolist()) for item_E, known_E in zip(item_PE, known_PE, strict=True)]
    return [dataclasses.replace(prompt, scored_items=tuple(some)) for prompt, some in zip(prompts, wanted, strict=True)]


def compared_tokens(
    prompts: Sequence[Prompt],
    groups: Groups,
    completions: Completions,
    extra: Sequence[Kind],
    items: Mapping[Kind, IntArray],
    legal_PGT: BoolArray,
) -> tuple[FloatArray, BoolArray, int]:
    """The engine's log-probabilities `[P, G, T]`, the tokens that have one, and how many of those are given.

    Args:
        completions: what the learner scored: the groups, and the members `extra` behind them where `items` has any.
        items: of `given_items`. Groups of a dump come without their scores, and have those of rollouts alone.
        legal_PGT: tokens of the completions that the learner found legal; others have no log-probability.
    """
    _, members, tokens = groups.shape
    engine_PGT = widened(groups.logp_PGT, completions.shape)
    mask_PGT = np.zeros(completions.shape, dtype=np.bool_)
    generated_PG = completions.valid_PG[:, :members] & groups.generated_PG
    mask_PGT[:, :members, :tokens] = groups.token_mask_PGT & generated_PG[..., None]
    if not items or groups.scored_logp_PMT is None:
        return engine_PGT, mask_PGT, 0
    generated = int(mask_PGT.sum())
    token_mask_PGT = completions.token_mask_PGT & legal_PGT
    for member, kind in enumerate(extra, start=completions.shape[1] - len(extra)):
        for row, prompt in enumerate(prompts if kind in items else ()):
            item = int(items[kind][row])
            if item in prompt.scored_items:
                logp_T = groups.scored_logp_PMT[row, prompt.scored_items.index(item)]
                engine_PGT[row, member, : len(logp_T)] = logp_T
                mask_PGT[row, member] = token_mask_PGT[row, member]
    return engine_PGT, mask_PGT, int(mask_PGT.sum()) - generated
