"""Contract of `trainer.list_checks` and the lengths in `trainer.jobs`: what a job of lists cannot feed or measure is
refused with the field and the reason; what makes sense is taken and read back.

Not checked: the section `lists` itself (test_list_data.py).
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from data.errors import RequestError
from tests.small_world import recipe
from trainer.data_checks import check_catalogue
from trainer.jobs import RlJob, SftJob

LISTS: dict[str, Any] = {"needs": [{"name": "interest"}], "candidates": 12, "positives": 4}
SOUND: dict[str, Any] = {
    "lists": LISTS,
    "rollout": {"decode": "sample"},
    "reward": {"item_match": 0.0, "rank_penalty": 0.0},
    "objective": {"credit": {"kind": "items"}},
}


def job(**sections: Any) -> RlJob:
    content: dict[str, Any] = dict(SOUND)
    for name, value in sections.items():
        content[name] = content.get(name, {}) | value if isinstance(value, dict) else value
    return RlJob.model_validate(recipe(Path("dataset"), "rl", **content))


@pytest.mark.parametrize(
    ("sections", "where", "why"),
    [
        ({"objective": {"credit": {"kind": "none"}}}, "objective.credit.kind", "sequence or items with lists.needs"),
        ({"objective": {"credit": {"kind": "beam_as_list"}}}, "objective.credit.kind", "sequence or items"),
        ({"reward": {"item_match": 1.0}}, "reward.item_match", "rewarded for their gains"),
        ({"reward": {"ranker_score": 1.0, "ranker": "x"}}, "reward.ranker_score", "rewarded for their gains"),
        (
            {"objective": {"credit": {"kind": "items", "uncertainty": {"variance": "item"}}}},
            "objective.credit.uncertainty.variance",
            "off, or a critic as reward.ranker",
        ),
        (
            {"objective": {"credit": {"kind": "items", "form": "suffix_dcg"}}, "reward": {"list_ranker": "a:B"}},
            "objective.credit.form",
            "causal or all_pairs with reward.list_ranker",
        ),
        (
            {
                "objective": {"credit": {"kind": "items", "uncertainty": {"variance": "item"}}},
                "reward": {"list_ranker": "a:B", "ranker": "x"},
            },
            "objective.credit.uncertainty.variance",
            "off with reward.list_ranker",
        ),
        ({"group": {"refill": "oversample"}}, "group.refill", "shows in the objective only"),
        ({"group": {"ground_truth": "append"}}, "group.ground_truth", "an item, not a list"),
        ({"rollout_only": "dump"}, "lists.needs", "dumps hold no credit"),
        ({"feedback": "log"}, "lists.needs", "logs are of single items"),
        ({"evaluation": {"metric": "coverage@10"}}, "evaluation.metric", "ndcg@K, recall@K, mrr@K, hr@K"),
        ({"evaluation": {"k": [1, 10, 13]}}, "evaluation.k", "at most 12, the items of a list"),
        ({"evaluation": {"scores": {"rows": 4}}}, "evaluation.scores.rows", "for single items"),
        ({"evaluation": {"unconstrained_rows": 4}}, "evaluation.unconstrained_rows", "for single items"),
        ({"evaluation": {"feedback": "log"}}, "evaluation.feedback", "none with lists.needs"),
    ],
)
def test_refused_with_the_reason(sections: dict[str, Any], where: str, why: str) -> None:
    with pytest.raises(RequestError) as refusal:
        job(**sections)
    assert refusal.value.where == where
    assert why in str(refusal.value)


@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"rollout": {"decode": "beam"}, "objective": {"credit": {"kind": "sequence", "ndcg_weight": 1.0}}},
        {"objective": {"credit": {"kind": "items"}, "ratio": "item", "truncation": {"level": "item"}}},
        {
            "objective": {"credit": {"kind": "items", "uncertainty": {"variance": "propagated"}}},
            "reward": {"ranker": "critic"},
        },
        {"reward": {"list_ranker": "package.module:Ranker", "swaps": {"swaps": 4}}},
        {"lists": {"length": 5, "text_tokens": 8}, "evaluation": {"k": [1, 5], "metric": "mrr@5"}},
    ],
)
def test_what_makes_sense_is_taken_and_read_back(sections: dict[str, Any]) -> None:
    taken = job(**sections)
    assert RlJob.model_validate(taken.model_dump(mode="json")) == taken


def test_lists_need_room_in_the_rows_and_in_the_engine() -> None:
    # 16 tokens of prompt, 12 items of two tokens: 40 tokens.
    check_catalogue(job(), n_items=48, depth=2)
    with pytest.raises(RequestError, match=r"learner.row_tokens: 32; legal: at least 48 \(.* 16 \+ list 24\)"):
        check_catalogue(job(learner={"row_tokens": 32}), n_items=48, depth=2)
    with pytest.raises(RequestError, match=r"rollout.max_model_len: 39; legal: at least 40"):
        check_catalogue(job(rollout={"max_model_len": 39}), n_items=48, depth=2)
    with pytest.raises(RequestError, match=r"rollout.max_model_len: 64; legal: at least 71 \(.* 16 \+ list 55\)"):
        check_catalogue(job(lists={"text_tokens": 30}, learner={"row_tokens": 96}), n_items=48, depth=2)


def test_a_need_that_no_gain_is_known_for_is_refused() -> None:
    content = recipe(Path("dataset"), "sft", lists={**LISTS, "needs": [{"name": "joy"}]})
    with pytest.raises(RequestError, match="needs: gain of joy: none given"):
        SftJob.model_validate(content)


def test_sections_that_make_no_sense_are_refused_by_name() -> None:
    with pytest.raises(ValidationError, match="length is 13"):
        job(lists={"length": 13})
