"""Metrics of a step's groups: how many tokens they have, and what the learners' scores say of them."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from data.records import Groups, Prompt
from trainer.completion_scores import ScoreOutputs


def token_metrics(prompts: Sequence[Prompt], groups: Groups) -> dict[str, float]:
    """Tokens of the step: prompts once, and all completions."""
    return {
        "tokens/prompt": float(sum(len(prompt.token_ids) for prompt in prompts)),
        "tokens/completion": float(groups.token_mask_PGT.sum()),
    }


def score_metrics(scores: ScoreOutputs, groups: Groups) -> dict[str, float]:
    """Means over the completion tokens, and where the groups come from."""
    _, members, tokens = groups.shape
    # A slot that gave way to an anchor was not scored.
    mask = groups.token_mask_PGT & groups.generated_PG[..., None] & (scores.choices_PGT[:, :members, :tokens] > 0)
    return {
        "legal_mass": float(scores.legal_mass_PGT[:, :members, :tokens][mask].mean(dtype=np.float64)),
        "entropy": float(scores.entropy_PGT[:, :members, :tokens][mask].mean(dtype=np.float64)),
        "weight_version": float(groups.weight_version_P.max()),
        "weight_version/oldest": float(groups.weight_version_P.min()),
        "completion/absent_share": float(1 - groups.valid_PG[:, : groups.spec.width].mean(dtype=np.float64)),
    }
