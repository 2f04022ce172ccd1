"""Contract of `trainer.list_measures`: gains of a list in its order, what is no list, means over samples but the first
of a beam, a batch at a time.

A scripted generator stands in for the engines, because only scripted lists can be wrong on purpose. Not checked: real
lists (tests/launch/test_list_eval.py), the metrics (tests/reward/test_list_metrics.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np
import pytest

from data.records import NO_ITEM, Decode, DecodeSpec, Groups, ListSpec, Prompt
from tests.trainer.test_candidate_orders import prompt
from trainer.list_measures import list_gains, measure_lists, order_metrics

PROMPT = prompt(0, [7, 3, 9, 5], [0, 2, 0, 1])


@pytest.mark.parametrize(
    ("items", "gains", "sound"),
    [
        ([3, 5, 7, 9], [2, 1, 0, 0], True),
        ([9, 7, 5, 3], [0, 0, 1, 2], True),
        ([3, 5, 7], [2, 1, 0], False),
        ([3, 3, 5, 7], [2, 0, 1, 0], False),
        ([3, 8, 5, 7], [2, 0, 1, 0], False),
        ([], [], False),
    ],
)
def test_gains_of_a_list_and_what_is_none(items: list[int], gains: list[float], sound: bool) -> None:
    found, told = list_gains(PROMPT, np.array(items, np.int32), 0)
    assert (found.tolist(), told) == (gains, sound)


def test_a_list_of_the_first_places_is_whole_at_its_length() -> None:
    assert list_gains(PROMPT, np.array([5, 3], np.int32), 2) == (pytest.approx([1, 2]), True)
    assert not list_gains(PROMPT, np.array([5, 3, 7], np.int32), 2)[1]
    metrics = order_metrics([PROMPT], [np.array([3, 1, 0, 2])], 2, [1, 2])
    assert metrics["ndcg@1"].tolist() == [0.5]
    assert metrics["recall@2"].tolist() == [1.0]


class Scripted:
    """Answers every prompt with given lists."""

    def __init__(self, answers: list[list[list[int]]]) -> None:
        self.answers = answers
        self.specs: list[DecodeSpec] = []

    def generate(self, prompts: Sequence[Prompt], spec: DecodeSpec) -> Groups:
        self.specs.append(spec)
        item_PGK = np.full((len(prompts), spec.width, 4), NO_ITEM, np.int32)
        for row, one in enumerate(prompts):
            for member, items in enumerate(self.answers[one.prompt_id]):
                item_PGK[row, member, : len(items)] = items
        shape = item_PGK.shape[:2]
        return Groups(
            prompt_id_P=np.arange(len(prompts)),
            valid_PG=(item_PGK != NO_ITEM).any(2),
            token_PGT=np.zeros((*shape, 1), np.int32),
            length_PG=np.ones(shape, np.int32),
            item_PG=item_PGK[..., 0],
            logp_PGT=np.zeros((*shape, 1), np.float32),
            finish_PG=np.full(shape, "list"),
            weight_version_P=np.zeros(len(prompts), np.int64),
            engine_id_P=np.full(len(prompts), "scripted"),
            spec=spec,
            constraint="",
            catalogue_digest="",
            item_PGK=item_PGK,
        )


def test_samples_are_averaged_and_of_a_beam_the_first_counts() -> None:
    prompts = [PROMPT, dataclasses.replace(PROMPT, prompt_id=1)]
    scripted = Scripted([[[3, 5, 7, 9], [7, 3, 5, 9]], [[9, 5, 3, 7], [9, 9, 3, 7]]])
    spec = DecodeSpec(decode=Decode.SAMPLE, width=2, seed=7, lists=ListSpec(candidates=4, length=0, text_tokens=0))
    sampled, invalid = measure_lists(scripted, prompts, spec, batch=1, ks=(1, 4))
    assert invalid == 0.25
    assert sampled["ndcg@1"].tolist() == [0.5, 0.0]
    assert sampled["mrr@4"].tolist() == [0.75, pytest.approx((1 / 2 + 1 / 3) / 2)]
    ideal = 2 + 1 / math.log2(3)
    assert sampled["ndcg@4"][0] == pytest.approx((1 + (2 / math.log2(3) + 1 / 2) / ideal) / 2)
    assert scripted.specs == [spec] * 2
    beam = dataclasses.replace(spec, decode=Decode.BEAM)
    first, invalid = measure_lists(scripted, prompts, beam, batch=64, ks=(1, 4))
    assert (first["ndcg@1"].tolist(), invalid) == ([1.0, 0.0], 0.0)


def test_single_items_are_not_measured_as_lists() -> None:
    spec = DecodeSpec(decode=Decode.BEAM, width=1, seed=7)
    with pytest.raises(ValueError, match="single items"):
        measure_lists(Scripted([]), [PROMPT], spec, batch=1, ks=(1,))
