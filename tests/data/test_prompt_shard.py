"""Contract of `data.prompt_shard`: what arrives in another process are the prompts that were sent, whatever they carry.

Not checked: how fast it is.
"""

from __future__ import annotations

import dataclasses
import pickle

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from data.prompt_shard import PromptShard
from data.records import Prompt

ITEMS = st.lists(st.integers(-1, 2**31 - 1), max_size=5).map(lambda items: np.array(items, np.int32))
NUMBERS = st.integers(-(2**40), 2**40)
GAINS = st.lists(st.floats(width=32, allow_nan=False), max_size=4).map(lambda gains: np.array(gains, np.float32))


@st.composite
def prompts(draw: st.DrawFn) -> Prompt:
    gains = draw(st.none() | GAINS)
    return Prompt(
        prompt_id=draw(NUMBERS),
        token_ids=draw(ITEMS),
        user_id=draw(NUMBERS),
        history=draw(ITEMS),
        exclusions=draw(ITEMS),
        target=draw(NUMBERS),
        timestamp=draw(NUMBERS),
        scored_items=tuple(draw(st.lists(st.integers(0, 9), max_size=2))),
        need=draw(st.sampled_from(["", "sleep"])),
        candidates=draw(st.none() | ITEMS),
        gain_C=gains,
        observed_C=None if gains is None else gains > 0,
    )


@settings(deadline=None, max_examples=100)
@given(st.lists(prompts(), max_size=5), st.integers(2, pickle.HIGHEST_PROTOCOL))
def test_they_arrive_as_they_were(sent: list[Prompt], protocol: int) -> None:
    arrived = pickle.loads(pickle.dumps(PromptShard(sent), protocol))
    assert len(arrived) == len(sent)
    for ours, theirs in zip(sent, arrived, strict=True):
        for field in dataclasses.fields(Prompt):
            mine, his = getattr(ours, field.name), getattr(theirs, field.name)
            assert type(mine) is type(his), field.name
            if isinstance(mine, np.ndarray):
                assert mine.dtype == his.dtype
                np.testing.assert_array_equal(mine, his)
            else:
                assert mine == his
    assert list(arrived[1:3]) == list(arrived)[1:3]
