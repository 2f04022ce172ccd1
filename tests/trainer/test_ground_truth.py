"""The ground truth among the rollouts: which groups it joins, in which slot, with which reward and part in the loss.

Checks ReRe's rank penalties of an injected target against their closed form. Not checked here: the loop with it
(test_group_building.py).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from data.records import NO_ITEM, Finish, Groups, Kind
from reward.scoring import RewardScorer
from reward.settings import RewardSettings
from tests.trainer.groups_of_items import catalogue, groups_of, prompts_for
from trainer.gate_scores import cross_negatives
from trainer.ground_truth import with_ground_truth
from trainer.group_settings import GroundTruth
from trainer.members import KIND_CODE, batch_members
from trainer.objective import objective_coefficients
from trainer.objective_settings import ObjectiveSettings
from trainer.signals import Signals
from trainer.trees import Completions
from trainer.truncation import Truncation, truncated_weights

TARGETS = (5, 1, 3, NO_ITEM, 7, 6)
"""Missing; missing with a longer path; there as the item that shares its path; none; retired; excluded."""
ITEMS = ((0, 2, 6), (0, 2, NO_ITEM), (0, 2, 5), (0, 2, 6), (0, 2, 6), (0, 2, 5))


def build(mode: GroundTruth) -> tuple[Groups, Groups, dict[str, float]]:
    """The groups before and after, and the metrics."""
    prompts = prompts_for(TARGETS)
    prompts[5] = prompts_for((6,), first_id=5, exclusions=(6,))[0]
    groups = groups_of(prompts, ITEMS)
    return groups, *with_ground_truth(prompts, groups, catalogue(), mode)


@pytest.mark.parametrize("mode", [GroundTruth.APPEND, GroundTruth.INJECT])
def test_it_joins_the_groups_that_lack_it_and_can_have_it(mode: GroundTruth) -> None:
    before, groups, metrics = build(mode)
    width = before.shape[1]
    given_PG = groups.finish_PG == Finish.GIVEN.value
    slot = {GroundTruth.APPEND: (3, 3), GroundTruth.INJECT: (2, 1)}[mode]
    assert np.argwhere(given_PG).tolist() == [[0, slot[0]], [1, slot[1]]]
    assert metrics == {"ground_truth/joined": 2.0, "ground_truth/not_legal": 2.0}
    for row, target in ((0, 5), (1, 1)):
        length = int(groups.length_PG[row, slot[row]])
        tokens = groups.token_PGT[row, slot[row]]
        assert tokens[:length].tolist() == catalogue().tokens(target).tolist()
        assert (tokens[length:] == -1).all()
        assert not groups.logp_PGT[row, slot[row]].any()
    untouched = ~given_PG[:, :width]
    assert np.array_equal(groups.item_PG[:, :width][untouched], before.item_PG[untouched])
    assert np.array_equal(groups.valid_PG[:, :width][untouched], before.valid_PG[untouched])
    assert (groups.generated_PG == (groups.valid_PG & ~given_PG)).all()
    if mode is GroundTruth.APPEND:
        assert groups.valid_PG[:, 3].tolist() == [True, True, False, False, False, False]


def test_without_the_switch_nothing_changes_and_an_empty_group_stays_empty() -> None:
    before, groups, metrics = build(GroundTruth.NONE)
    assert groups is before
    assert metrics == {}
    prompts = prompts_for((5,))
    empty = groups_of(prompts, [(NO_ITEM, NO_ITEM)])
    injected, metrics = with_ground_truth(prompts, empty, catalogue(), GroundTruth.INJECT)
    assert not injected.valid_PG.any()
    assert metrics["ground_truth/joined"] == 0
    appended, _ = with_ground_truth(prompts, empty, catalogue(), GroundTruth.APPEND)
    assert appended.valid_PG.tolist() == [[False, False, True]]


def test_an_injected_target_turns_the_misses_into_rere_s_penalties() -> None:
    prompts = prompts_for((5,))
    groups, _ = with_ground_truth(prompts, groups_of(prompts, [(0, 2, 4, 6)]), catalogue(), GroundTruth.INJECT)
    settings = RewardSettings(item_match=1.0, rank_penalty=1.0)
    scorer = RewardScorer(settings, None, path_id_I=catalogue().active_path_id)
    scored, metrics = scorer.score(prompts, groups)
    total = sum(1 / math.log2(q + 2) for q in range(4))
    expected = [-1 / math.log2(i + 2) / total for i in range(3)] + [1.0]
    assert scored.reward_PG[0].tolist() == pytest.approx(expected)
    assert metrics["reward/hit"] == 1


def test_it_carries_an_advantage_and_has_no_part_in_what_speaks_of_engines_and_policies() -> None:
    prompts = prompts_for((5, 4))
    groups, _ = with_ground_truth(prompts, groups_of(prompts, [(0, 2), (4, 6)]), catalogue(), GroundTruth.APPEND)
    scored, _ = RewardScorer(RewardSettings(), None).score(prompts, groups)
    members, reward_PG = batch_members(scored, Completions.of_groups(prompts, groups))
    assert members.kind_PG[0].tolist() == [0, 0, KIND_CODE[Kind.DEMONSTRATION]]
    assert members.rollout_PG.tolist() == [[True, True, False], [True, True, False]]
    found, metrics = objective_coefficients(members, reward_PG, ObjectiveSettings(), 3, signals=Signals())
    assert found.advantage_PGT[0, 2, 0] > 0
    assert found.policy_weight_PGT[0, 2].any()
    assert not found.nll_weight_PGT.any()
    assert metrics["groups/members"] == 2.5
    logp_PGT = torch.full(members.segment_PGT.shape, -0.5)
    factor_PGT = truncated_weights(
        members, logp_PGT, torch.tensor(groups.logp_PGT), Truncation.model_validate({"level": "sequence"})
    )
    assert (factor_PGT[0, 2] == 1).all()
    assert factor_PGT[0, 0, 0] > 1
    # Another prompt's ground truth is no item that its policy got.
    assert 5 not in cross_negatives(prompts, groups, 4, seed=0)[1]
