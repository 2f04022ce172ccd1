"""Refill (DAPO's dynamic sampling): which groups are replaced by which, the bound, the counts, and repeated prompts.

Against a reference written with lists. Not checked here: the loop with it, and its restart (test_group_building.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.records import RewardFailure, ScoredGroups
from tests.trainer.groups_of_items import groups_of, prompts_for
from trainer.refill import Collected, refilled, without_variance

LIVE, DEAD, FAILED = "live", "dead", "failed"
REWARDS = {LIVE: [0.0, 1.0], DEAD: [1.0, 1.0], FAILED: [0.0, 0.0]}


def collected(states: Sequence[str], first_id: int) -> Collected:
    prompts = prompts_for([5] * len(states), first_id=first_id)
    groups = groups_of(prompts, [(5, 6)] * len(states))
    reward_PG = np.array([REWARDS[state] for state in states], np.float32)
    failure_P = np.array([RewardFailure.TIMEOUT.value if state == FAILED else "" for state in states], "U16")
    scored = ScoredGroups(
        groups=groups, reward_PG=reward_PG, failure_P=failure_P, parts_PG={"item_match": reward_PG * 2}
    )
    return Collected(prompts, scored)


def test_a_group_without_variance_has_rewards_and_they_are_equal() -> None:
    made = collected([LIVE, DEAD, FAILED], 0)
    assert without_variance(made.scored).tolist() == [False, True, False]
    alone = groups_of(made.prompts, [(5, -1), (-1, -1), (5, 6)])
    scored = ScoredGroups(groups=alone, reward_PG=made.scored.reward_PG, failure_P=np.full(3, "", "U16"), parts_PG={})
    assert without_variance(scored).tolist() == [True, True, True]


@given(
    batches=st.lists(st.lists(st.sampled_from([LIVE, DEAD, FAILED]), min_size=4, max_size=4), min_size=1, max_size=6),
    bound=st.integers(1, 5),
)
@settings(max_examples=150, deadline=None)
def test_live_groups_of_further_prompts_take_the_places_in_order(batches: list[list[str]], bound: int) -> None:
    asked: list[set[int]] = []

    def further(seen: set[int]) -> Collected | None:
        asked.append(set(seen))
        number = len(asked)
        return collected(batches[number], 10 * number) if number < len(batches) else None

    result = refilled(collected(batches[0], 0), further, bound)
    # The reference: which prompts are rolled out, and which of them are trained on.
    expected = list(range(4))
    places = [i for i, state in enumerate(batches[0]) if state == DEAD]
    spare: list[int] = []
    extra: list[str] = []
    used_batches = 0
    while used_batches < bound and len(spare) < len(places):
        used_batches += 1
        states = batches[used_batches] if used_batches < len(batches) else []
        extra += states
        spare += [10 * used_batches + i for i, state in enumerate(states) if state == LIVE]
    for place, prompt in zip(places, spare, strict=False):
        expected[place] = prompt
    assert [prompt.prompt_id for prompt in result.batch.prompts] == expected
    assert result.batch.scored.groups.prompt_id_P.tolist() == expected
    assert len(asked) == used_batches
    replaced = min(len(places), len(spare))
    assert result.metrics == {
        "refill/dropped_groups": replaced + extra.count(DEAD),
        "refill/extra_prompts": len(extra),
        "refill/missing_groups": len(places) - replaced,
        "refill/unused_groups": len(spare) - replaced,
    }
    assert (result.failure_N != "").sum() == (batches[0] + extra).count(FAILED)
    scored = result.batch.scored
    assert int(without_variance(scored).sum()) == len(places) - replaced
    assert np.array_equal(scored.parts_PG["item_match"], scored.reward_PG * 2)
    assert (scored.failure_P != "").sum() == batches[0].count(FAILED)
    for number, seen in enumerate(asked):
        rolled_out = {*range(4), *(10 * n + i for n in range(1, number + 1) if n < len(batches) for i in range(4))}
        assert seen == rolled_out


def test_a_full_batch_rolls_nothing_out() -> None:
    def further(seen: set[int]) -> Collected:
        raise AssertionError("nothing is missing")

    first = collected([LIVE, FAILED], 0)
    result = refilled(first, further, 3)
    assert result.batch.prompts == first.prompts
    assert result.metrics == pytest.approx(dict.fromkeys(result.metrics, 0.0))
