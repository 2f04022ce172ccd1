"""Objectives and groups that their job cannot feed are refused with the field and the reason; what is allowed is not.

What the recipes refuse: tests/launch/test_recipes.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.errors import RequestError
from tests.small_world import recipe
from trainer.jobs import RlJob

RANDOM = {"window": {"negatives": "random"}}
ANCHORED = {
    "objective": {"anchor": {"mode": "append"}},
    "reward": {"item_match": 0.0, "rank_penalty": 0.0, "feedback": 1.0},
    "rollout": {"decode": "sample"},
    "feedback": "log",
}
BEAM_AS_LIST = {"credit": {"kind": "beam_as_list"}}
MATCH = {"item_match": 1.0, "rank_penalty": 0.0}
OWN = "tests.trainer.own_stage_examples:steady"
TRUSTLESS = {"gate": {"kind": "hard"}, "nll_weight": 1.0, "stages": [OWN, OWN]}


def job(**sections: Any) -> RlJob:
    return RlJob.model_validate(recipe(Path("dataset"), "rl", **sections))


@pytest.mark.parametrize(
    ("sections", "where", "why"),
    [
        ({"reward": {"item_match": 0.0, "rank_penalty": 0.0}}, "reward.item_match", "a weight other than 0"),
        ({"objective": RANDOM}, "objective.window.negatives", "no beam rank"),
        ({"objective": RANDOM, "reward": {**MATCH, "ranker_score": 1.0, "ranker": "x"}}, "negatives", "no score"),
        (
            {**ANCHORED, "objective": {**RANDOM, "anchor": {"mode": "append"}}},
            "objective.window.negatives",
            "rows without a response",
        ),
        ({"objective": {"window": {"kind": "soft"}}, "rollout": {"decode": "sample"}}, "negatives", "sample or random"),
        (
            {"objective": {"window": {**RANDOM["window"], "kind": "soft", "anchor_rank": 7}}, "reward": MATCH},
            "objective.window.anchor_rank",
            "at most 6",
        ),
        ({**ANCHORED, "group": {"refill": "oversample"}}, "group.refill", "shows in the objective only"),
        ({**ANCHORED, "group": {"ground_truth": "inject"}}, "group.ground_truth", "outcome is known"),
        ({"group": {"refill": "oversample"}, "rollout_only": "dump"}, "group.refill", "as the engines generated them"),
        ({"group": {"ground_truth": "append"}, "train_only": "dump"}, "group.ground_truth", "rollout_only or train_o"),
        ({"objective": {"credit": {"kind": "items"}}}, "objective.credit.kind", "ask for one item"),
        ({"objective": {"credit": {"kind": "sequence"}}}, "objective.credit.kind", "ask for one item"),
        (
            {"objective": {"credit": {"kind": "beam_as_list", "uncertainty": {"variance": "item"}}}},
            "objective.credit.uncertainty.variance",
            "comes with a variance",
        ),
        ({"objective": BEAM_AS_LIST, "rollout": {"decode": "sample"}}, "rollout.decode", "the beam is the list"),
        ({"objective": BEAM_AS_LIST, "reward": {**MATCH, "rank_penalty": 1.0}}, "reward.rank_penalty", "at least 0"),
        ({"objective": BEAM_AS_LIST, "reward": {**MATCH, "item_match": -1.0}}, "reward.item_match", "at least 0"),
        (
            {"objective": BEAM_AS_LIST, "reward": {**MATCH, "ranker_score": 1.0, "ranker": "x"}},
            "reward.ranker_transform",
            "sigmoid or percentile",
        ),
        (
            {
                "objective": BEAM_AS_LIST,
                "reward": {**MATCH, "ranker_score": 1.0, "ranker": "x", "ranker_transform": "sigmoid"}
                | {"invalid_score": "below_lowest"},
            },
            "reward.invalid_score",
            "lowest with",
        ),
        ({"objective": TRUSTLESS}, "objective.max_distrust", f"3 are on (gate, stages: {OWN}, stages: {OWN})"),
    ],
)
def test_refused_with_the_reason(sections: dict[str, Any], where: str, why: str) -> None:
    with pytest.raises(RequestError) as refusal:
        job(**sections)
    assert where in refusal.value.where
    assert why in str(refusal.value)


@pytest.mark.parametrize(
    "sections",
    [
        {"objective": RANDOM, "reward": MATCH},
        {"objective": BEAM_AS_LIST, "reward": MATCH},
        {
            "objective": {"window": {**RANDOM["window"], "kind": "soft"}},
            "reward": MATCH,
            "rollout": {"decode": "sample"},
        },
        {"objective": {**RANDOM, "truncation": {"level": "token"}}, "reward": MATCH, "train_only": "dump"},
        {"group": {"refill": "oversample", "extra_batches": 1, "ground_truth": "inject"}},
        {"objective": {**TRUSTLESS, "max_distrust": 3}},
        ANCHORED,
    ],
)
def test_what_makes_sense_is_taken_and_read_back(sections: dict[str, Any]) -> None:
    taken = job(**sections)
    assert RlJob.model_validate(taken.model_dump(mode="json")) == taken
