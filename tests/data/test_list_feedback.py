"""Contract of `data.list_feedback`: a share of one keeps every gain and marks all outcomes seen; a smaller one leaves
each outcome, positive or zero, with that probability, the same for all needs and in every call, and what is not seen
has no gain; a share outside of its bounds is refused.

Not checked: what a policy learns from it.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.errors import RequestError
from data.list_feedback import with_feedback
from data.records import Prompt

NEEDS, CANDIDATES = 3, 20


def prompts(samples: int, seed: int = 0) -> list[Prompt]:
    """Every sample for every need; half of the candidates have gains."""
    rng = np.random.default_rng(seed)
    return [
        Prompt(
            prompt_id=sample * NEEDS + need,
            token_ids=np.array([1], np.int32),
            user_id=sample,
            history=np.zeros(0, np.int32),
            exclusions=np.zeros(0, np.int32),
            candidates=np.arange(CANDIDATES, dtype=np.int32),
            gain_C=(rng.integers(1, 6, CANDIDATES) * (np.arange(CANDIDATES) % 2)).astype(np.float32),
            observed_C=np.arange(CANDIDATES) % 2 > 0,
        )
        for sample in range(samples)
        for need in range(NEEDS)
    ]


def gains(prompt: Prompt) -> np.ndarray:
    assert prompt.gain_C is not None
    return prompt.gain_C


def observed(prompt: Prompt) -> np.ndarray:
    assert prompt.observed_C is not None
    return prompt.observed_C


def test_the_whole_feedback_leaves_every_gain() -> None:
    given_ones = prompts(4)
    for before, after in zip(given_ones, with_feedback(given_ones, 1.0, 0, NEEDS), strict=True):
        assert gains(after).tolist() == gains(before).tolist()
        assert observed(after).all()


@given(share=st.floats(0.01, 0.99), seed=st.integers(0, 1000))
def test_what_is_not_seen_has_no_gain_and_needs_see_the_same(share: float, seed: int) -> None:
    before = prompts(3)
    after = with_feedback(before, share, seed, NEEDS)
    for old, new in zip(before, after, strict=True):
        assert (gains(new) == np.where(observed(new), gains(old), 0)).all()
        assert observed(new).tolist() == observed(after[old.prompt_id // NEEDS * NEEDS]).tolist()
    # A prompt is a function of itself, not of those beside it.
    alone = with_feedback(before[4:5], share, seed, NEEDS)[0]
    assert observed(alone).tolist() == observed(after[4]).tolist()


def test_positives_and_zeros_are_seen_alike() -> None:
    before = prompts(600)
    seen = np.concatenate([observed(prompt) for prompt in with_feedback(before, 0.1, 5, NEEDS)[::NEEDS]])
    positive = np.concatenate([gains(prompt) > 0 for prompt in before[::NEEDS]])
    for some in (positive, ~positive):
        # 6,000 draws: five deviations are 0.02.
        assert seen[some].mean() == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("share", [0.0, -0.5, 1.5, float("nan")])
def test_a_share_that_is_none_is_refused(share: float) -> None:
    with pytest.raises(RequestError, match=r"feedback: .*legal: above 0, at most 1"):
        with_feedback(prompts(1), share, 0, NEEDS)
