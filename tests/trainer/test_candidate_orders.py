"""Contract of `trainer.candidate_orders`: the orders of candidates that no policy made, need by need for a critic.

Checked: against hand-sorted candidates, ties, one random order per prompt by its seed, a need that a critic does not
know, a ranker that fails. Not checked: metrics of the orders (test_list_measures.py).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from data.errors import RequestError
from data.records import FloatArray, IntArray, Prompt
from trainer.candidate_orders import candidate_orders

COUNT_I = np.array([9, 1, 5, 5, 0, 7])


def prompt(prompt_id: int, candidates: list[int], gains: list[float], need: str = "interest") -> Prompt:
    none = np.zeros(0, np.int32)
    return Prompt(
        prompt_id=prompt_id,
        token_ids=none,
        user_id=0,
        history=none,
        exclusions=none,
        need=need,
        candidates=np.array(candidates, np.int32),
        gain_C=np.array(gains, np.float32),
    )


PROMPTS = [prompt(4, [2, 3, 0, 4], [0, 2, 1, 2]), prompt(5, [5, 1, 4], [1, 0, 0], "trend")]


class Numbers:
    """Scores an item by its number, turned round for the need `trend`."""

    needs: tuple[str, ...] = ("interest", "trend")

    def score(self, histories: Sequence[IntArray], candidates: Sequence[IntArray]) -> list[FloatArray]:
        return [row.astype(np.float32) for row in candidates]

    def score_with_variance(
        self, histories: Sequence[IntArray], candidates: Sequence[IntArray]
    ) -> tuple[list[FloatArray], list[FloatArray]]:
        return self.score(histories, candidates), [np.ones(len(row), np.float32) for row in candidates]

    def score_for_needs(
        self, histories: Sequence[IntArray], candidates: Sequence[IntArray], needs: Sequence[str]
    ) -> tuple[list[FloatArray], list[FloatArray]]:
        found, variances = self.score_with_variance(histories, candidates)
        return [-row if need == "trend" else row for row, need in zip(found, needs, strict=True)], variances


class Broken(Numbers):
    """Has no score for anything."""

    def score(self, histories: Sequence[IntArray], candidates: Sequence[IntArray]) -> list[FloatArray]:
        return [np.full(len(row), np.nan, np.float32) for row in candidates]


def listed(orders: Sequence[np.ndarray | None]) -> list[list[int]]:
    return [np.asarray(p.candidates)[o].tolist() for p, o in zip(PROMPTS, orders, strict=True) if o is not None]


def test_bounds_counts_and_rankers_sort_as_they_say() -> None:
    found = candidate_orders(PROMPTS, COUNT_I, {"numbers": Numbers()}, seed=0)
    assert listed(found["ideal"]) == [[3, 4, 0, 2], [5, 1, 4]]
    assert listed(found["popularity"]) == [[0, 2, 3, 4], [5, 1, 4]]
    assert listed(found["numbers"]) == [[4, 3, 2, 0], [1, 4, 5]]
    assert [sorted(row) for row in listed(found["random"])] == [[0, 2, 3, 4], [1, 4, 5]]


def test_random_orders_are_keyed_by_seed_and_prompt() -> None:
    many = [prompt(number, list(range(6)), [1, 0, 0, 0, 0, 0]) for number in range(200)]
    first = candidate_orders(many, COUNT_I, {}, seed=3)["random"]
    again = candidate_orders(many[::-1], COUNT_I, {}, seed=3)["random"]
    assert all(np.array_equal(one, other) for one, other in zip(first, again[::-1], strict=True))
    other = candidate_orders(many, COUNT_I, {}, seed=4)["random"]
    assert not all(np.array_equal(one, two) for one, two in zip(first, other, strict=True))
    places = np.bincount([int(np.argmin(order)) for order in first if order is not None], minlength=6)
    assert places.min() > 10


def test_a_critic_has_no_order_for_a_need_it_does_not_know() -> None:
    one = Numbers()
    one.needs = ("trend",)
    found = candidate_orders(PROMPTS, COUNT_I, {"critic": one}, seed=0)["critic"]
    assert found[0] is None
    assert found[1] is not None


def test_a_ranker_that_fails_is_named() -> None:
    with pytest.raises(RequestError, match=r"ranker broken.*non_finite on 1 of 1"):
        candidate_orders(PROMPTS[:1], COUNT_I, {"broken": Broken()}, seed=0)
