"""Contract of `data.ideal_lists`: the best order has the ideal DCG of the candidates, and its tokens are the paths."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.catalogue import Catalogue
from data.errors import RequestError
from data.ideal_lists import ideal_completion, ideal_list
from data.records import Prompt

CATALOGUE = Catalogue.from_codes([[0], [1, 0], [1, 1], [1, 1, 2], [2, 0, 1]])


def prompt(gains: list[float] | None) -> Prompt:
    none = np.zeros(0, np.int32)
    items = np.array([3, 0, 4, 2, 1][: len(gains)] if gains is not None else [3], np.int32)
    gain_C = None if gains is None else np.array(gains, np.float32)
    return Prompt(
        prompt_id=8, token_ids=none, user_id=0, history=none, exclusions=none, candidates=items, gain_C=gain_C
    )


@given(gains=st.lists(st.sampled_from([0.0, 1.0, 2.0, 5.0]), min_size=1, max_size=5), length=st.integers(0, 5))
def test_no_order_is_better(gains: list[float], length: int) -> None:
    one = prompt(gains)
    assert one.candidates is not None
    if not any(gains):
        with pytest.raises(RequestError, match="prompt 8: no candidate with a gain"):
            ideal_list(one, length)
        return
    gain = dict(zip(one.candidates.tolist(), gains, strict=True))
    best = ideal_list(one, length).tolist()
    assert len(best) == min(length or 5, sum(value > 0 for value in gains))
    assert all(gain[item] > 0 for item in best)

    def dcg(order: tuple[int, ...] | list[int]) -> float:
        return sum(gain[item] / np.log2(rank + 2) for rank, item in enumerate(order))

    every = itertools.permutations(gain, min(length or len(gains), len(gains)))
    assert dcg(best) == pytest.approx(max(map(dcg, every)))
    # Equal gains keep the order of the prompt.
    place = {item: number for number, item in enumerate(one.candidates.tolist())}
    assert best == sorted(best, key=lambda item: (-gain[item], place[item]))
    assert ideal_completion(one, CATALOGUE, length).tolist() == [
        token for item in best for token in CATALOGUE.tokens(item).tolist()
    ]


def test_prompts_without_gains_are_refused() -> None:
    with pytest.raises(RequestError, match="a ranking prompt with gains"):
        ideal_list(prompt(None))
