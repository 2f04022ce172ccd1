"""Contract: which items the engine is asked for beside the rollouts, and which of their tokens are compared.

Not here: that engines score them right (tests/rollout/test_engines.py), and the loop (test_loop_stages.py).
"""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from data.catalogue import Catalogue
from data.records import NO_ITEM, Decode, DecodeSpec, Finish, Groups, Kind, Prompt
from trainer.batch_signals import FeedbackRows
from trainer.given_scores import asking_for, compared_tokens, given_items
from trainer.objective_settings import ObjectiveSettings
from trainer.trees import Completions

EMPTY = np.zeros(0, np.int32)
PATHS = [[0, 0], [0, 1], [1], [2, 0]]


def prompts(*targets: int) -> list[Prompt]:
    return [
        Prompt(prompt_id=row, token_ids=EMPTY, user_id=row, history=EMPTY, exclusions=EMPTY, target=target)
        for row, target in enumerate(targets)
    ]


def log(*items: int) -> FeedbackRows:
    rows = len(items)
    return FeedbackRows(
        item_P=np.array(items, np.int32), responded_P=np.ones(rows, np.bool_), logp0_P=np.zeros(rows, np.float32)
    )


@pytest.mark.parametrize(
    ("content", "kinds"),
    [
        ({}, set()),
        ({"nll_weight": 0.1}, set()),  # trained on, never scored
        ({"nll_weight": 0.1, "gate": {"kind": "inverted"}}, {Kind.GROUND_TRUTH}),
        ({"anchor": {"mode": "append"}}, {Kind.ANCHOR}),
        ({"nll_weight": 0.1, "anchor": {"mode": "append"}}, {Kind.GROUND_TRUTH, Kind.ANCHOR}),
    ],
)
def test_the_engine_is_asked_for_what_the_learner_scores(content: dict[str, object], kinds: set[Kind]) -> None:
    items = given_items(ObjectiveSettings.model_validate(content), prompts(3), log(2))
    assert set(items) == kinds
    assert all(items[kind].tolist() == [{Kind.GROUND_TRUTH: 3, Kind.ANCHOR: 2}[kind]] for kind in items)


def test_absent_and_retired_items_are_not_asked_for_and_none_twice() -> None:
    catalogue = Catalogue.from_codes(PATHS, active=[True, False, True, True])
    items = {Kind.GROUND_TRUTH: np.array([3, 1, NO_ITEM]), Kind.ANCHOR: np.array([3, 0, 2])}
    asked = asking_for(prompts(3, 1, NO_ITEM), items, catalogue)
    assert [prompt.scored_items for prompt in asked] == [(3,), (0,), (2,)]


def test_tokens_are_compared_member_by_member() -> None:
    """A rollout, a ground truth of one token, and an anchor whose second token is not legal."""
    asked = [dataclasses.replace(prompt, scored_items=(2, 1)) for prompt in prompts(2)]
    groups = Groups(
        prompt_id_P=np.array([0]),
        valid_PG=np.array([[True, False]]),
        token_PGT=np.array([[[4, 7], [-1, -1]]], np.int32),
        length_PG=np.array([[2, 0]], np.int32),
        item_PG=np.array([[0, NO_ITEM]], np.int32),
        logp_PGT=np.array([[[-0.5, -0.25], [0, 0]]], np.float32),
        finish_PG=np.array([[Finish.ITEM.value, Finish.ABSENT.value]]),
        weight_version_P=np.array([0]),
        engine_id_P=np.array(["a"]),
        spec=DecodeSpec(decode=Decode.SAMPLE, width=2),
        constraint="item_trie",
        catalogue_digest="",
        scored_logp_PMT=np.array([[[-3.0, 0.0], [-1.0, -np.inf]]], np.float32),
    )
    whole = Completions.of_groups(asked, groups).with_members(
        np.array([[[5, -1], [4, 8]]], np.int32), np.array([[1, 2]], np.int32)
    )
    legal_PGT = whole.token_mask_PGT.copy()
    legal_PGT[0, 3, 1] = False
    extra = (Kind.GROUND_TRUTH, Kind.ANCHOR)
    items = {Kind.GROUND_TRUTH: np.array([2]), Kind.ANCHOR: np.array([1])}
    engine_PGT, mask_PGT, given = compared_tokens(asked, groups, whole, extra, items, legal_PGT)
    assert mask_PGT[0].tolist() == [[True, True], [False, False], [True, False], [True, False]]
    assert engine_PGT[mask_PGT].tolist() == [-0.5, -0.25, -3.0, -1.0]
    assert given == 2
    # A dump from a run that did not ask has the rollouts alone.
    plain = dataclasses.replace(groups, scored_logp_PMT=None)
    engine_PGT, mask_PGT, given = compared_tokens(asked, plain, whole, extra, items, legal_PGT)
    assert engine_PGT[mask_PGT].tolist() == [-0.5, -0.25]
    assert given == 0
