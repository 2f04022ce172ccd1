"""Contract of `data.prompts`: `<bos>` and item paths oldest first, bounded by items and by tokens, with every mending
counted, and exclusions from the whole history.
"""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.catalogue import Catalogue
from data.errors import RequestError
from data.prompts import PromptBuilder
from data.records import NO_ITEM
from tests.data.tiny import samples

# Paths of 1, 2 and 3 tokens; item 4 is retired.
CATALOGUE = Catalogue.from_codes([[0], [1, 0], [1, 1, 0], [2, 2], [2, 1]], active=[1, 1, 1, 1, 0])


@settings(deadline=None, max_examples=200)
@given(
    history=st.lists(st.integers(-1, 6), max_size=12),
    shown=st.integers(1, 6),
    limit=st.integers(4, 20),
    exclude=st.booleans(),
)
def test_against_a_plain_loop(history: list[int], shown: int, limit: int, exclude: bool) -> None:
    builder = PromptBuilder(CATALOGUE, shown, exclude, limit)
    batch = builder.build(samples([[3], history], [0, 1]), np.array([1]))
    prompt = batch.prompts[0]

    known = [item for item in history if 0 <= item < 5]
    kept = known[-shown:]
    tokens = [token for item in kept for token in CATALOGUE.tokens(item).tolist()]
    shortened = 0
    while 1 + len(tokens) > limit:
        shortened = 1
        kept = kept[1:]
        tokens = [token for item in kept for token in CATALOGUE.tokens(item).tolist()]
    assert prompt.token_ids.tolist() == [1, *tokens]
    assert prompt.history.tolist() == kept
    assert prompt.exclusions.tolist() == (sorted(set(known)) if exclude else [])
    assert (prompt.prompt_id, prompt.user_id, prompt.target, prompt.timestamp) == (1, 1, 1, 1001)
    assert batch.counts == {
        "shortened": shortened,
        "unknown_items": len(history) - len(known),
        "empty_history": int(not kept),
        "target_unreachable": int(exclude and 1 in known),
    }


def test_the_target_may_be_out_of_reach() -> None:
    builder = PromptBuilder(CATALOGUE, 3, True, 32)
    batch = builder.build(samples([[0], [0], [0], [0, 1, 2, 3]], [4, 0, 9, 0]))
    assert batch.counts["target_unreachable"] == 4
    without = PromptBuilder(CATALOGUE, 3, False, 32).build(samples([[0], [0], [0, 1]], [4, 0, 0]))
    assert without.counts["target_unreachable"] == 1


def test_a_request_without_a_user() -> None:
    prompt, counts = PromptBuilder(CATALOGUE, 3, True, 32).prompt(np.array([0, 77, 1]), prompt_id=5)
    assert prompt.history.tolist() == [0, 1]
    assert (prompt.prompt_id, prompt.target) == (5, NO_ITEM)
    assert counts["unknown_items"] == 1
    assert counts["target_unreachable"] == 0


def test_a_limit_below_one_item_is_refused() -> None:
    with pytest.raises(RequestError, match="max_prompt_tokens: 3; legal: at least 4"):
        PromptBuilder(CATALOGUE, 3, True, 3)


@settings(deadline=None, max_examples=100)
@given(
    histories=st.lists(st.lists(st.integers(-1, 6), max_size=9), min_size=1, max_size=6),
    shown=st.integers(1, 6),
    limit=st.integers(4, 12),
    exclude=st.booleans(),
    block=st.integers(1, 4),
)
def test_many_rows_are_those_of_each_alone(
    histories: list[list[int]], shown: int, limit: int, exclude: bool, block: int
) -> None:
    builder = PromptBuilder(CATALOGUE, shown, exclude, limit)
    source = samples(histories, [index % 7 - 1 for index in range(len(histories))])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("data.prompts.BLOCK", block)
        whole = builder.build(source)
    alone = [builder.build(source, np.array([row])) for row in range(len(histories))]
    assert whole.counts == {name: sum(one.counts[name] for one in alone) for name in whole.counts}
    for ours, (theirs,) in zip(whole.prompts, (one.prompts for one in alone), strict=True):
        for name in ("token_ids", "history", "exclusions"):
            mine, his = getattr(ours, name), getattr(theirs, name)
            assert mine.tolist() == his.tolist()
            assert mine.dtype == his.dtype == np.int32
        assert (ours.prompt_id, ours.target, ours.timestamp) == (theirs.prompt_id, theirs.target, theirs.timestamp)
