"""Which outcomes of candidates training sees: all, or a seeded share, as where only part of what users do is recorded.

A user's outcome with a candidate is the gain of a next event, or 0 for a candidate that the user did not turn to. Both
are seen or not by the same draw, so a share cuts the positives and the zeros alike. The draw is keyed by the sample:
every need sees the same outcomes, and so does every job with the same seed.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Final

import numpy as np

from data.errors import RequestError
from data.feed import generator
from data.records import Prompt

_FEEDBACK_STREAM: Final = 31


def with_feedback(prompts: Sequence[Prompt], share: float, seed: int, needs: int) -> list[Prompt]:
    """The prompts with a share of their outcomes observed; what is not has gain 0 and is marked so.

    Args:
        prompts: ranking prompts with gains, numbered as `RankingPromptBuilder` numbers them.
        share: probability of each candidate's outcome to be seen, above 0 and at most 1.
        seed: of the draw.
        needs: number of needs, by which a prompt's id tells its sample.

    Raises:
        RequestError: a share outside of 0 to 1.
        ValueError: a prompt without candidates or gains.
    """
    if not 0 < share <= 1:
        raise RequestError("feedback", share, "above 0, at most 1")
    return [_seen(prompt, share, seed, prompt.prompt_id // needs) for prompt in prompts]


def _seen(prompt: Prompt, share: float, seed: int, sample: int) -> Prompt:
    if prompt.candidates is None or prompt.gain_C is None:
        raise ValueError(f"prompt {prompt.prompt_id} ranks nothing, or has no gains")
    # The candidates of a sample come in one order for all needs, so a column is the same outcome for all of them.
    observed_C = generator(seed, _FEEDBACK_STREAM, sample).random(len(prompt.candidates)) < share
    return replace(prompt, gain_C=np.where(observed_C, prompt.gain_C, np.float32(0)), observed_C=observed_C)
