"""From a step's records to members and signals: who joins a group, what the gate asks the ranker, which anchors leave.

Fakes: a ranker that tells every (history, item) pair apart. The loop around it: tests/trainer/test_loop_stages.py.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from data.catalogue import Catalogue
from data.feedback import Anchors
from data.records import NO_ITEM, Decode, DecodeSpec, Groups, IntArray, Kind, Prompt, RewardFailure, ScoredGroups
from reward.batch_scoring import BatchScores
from reward.client import RewardClient
from reward.scoring import RewardScorer
from reward.settings import RewardSettings
from reward.wire import ScoreCall
from tests.reward.rankers import plain_scores
from trainer.batch_signals import FeedbackRows, batch_signals, extended, scored_extras, without_illegal_anchors
from trainer.completion_scores import ScoreOutputs
from trainer.gate import Gate, GateKind
from trainer.gate_scores import cross_negatives, gate_scores
from trainer.members import KIND_CODE, batch_members
from trainer.objective_settings import ObjectiveSettings
from trainer.trees import Completions

ITEMS = np.array([[3, 5, 6], [6, 7, 8], [1, 2, NO_ITEM]], np.int32)
TARGETS = (5, 4, NO_ITEM)
GATED = ObjectiveSettings(gate=Gate(kind=GateKind.ADAGRPO), nll_weight=1.0)


def ints(*values: int) -> IntArray:
    return np.array(values, np.int32)


def tokens(item: int) -> IntArray:
    return ints(10 + item, 20 + item)


def catalogue() -> Catalogue:
    """Ten items with the paths of `tokens`."""
    plain = Catalogue.from_codes([[item, 0] for item in range(10)])
    return dataclasses.replace(plain, path_values=np.concatenate([tokens(item) for item in range(10)]))


def prompts() -> list[Prompt]:
    return [
        Prompt(prompt_id=i, token_ids=ints(1, 2), user_id=i, history=ints(i), exclusions=ints(i), target=target)
        for i, target in enumerate(TARGETS)
    ]


def scored() -> ScoredGroups:
    valid_PG = ITEMS != NO_ITEM
    token_PGT = np.stack([ITEMS + 10, ITEMS + 20], -1).astype(np.int32)
    groups = Groups(
        prompt_id_P=np.arange(3),
        valid_PG=valid_PG,
        token_PGT=token_PGT,
        length_PG=np.full(ITEMS.shape, 2, np.int32),
        item_PG=ITEMS,
        logp_PGT=np.full((*ITEMS.shape, 2), -1.0, np.float32),
        finish_PG=np.full(ITEMS.shape, "item"),
        weight_version_P=np.zeros(3, np.int64),
        engine_id_P=np.full(3, "e"),
        spec=DecodeSpec(decode=Decode.SAMPLE, width=3, step=4),
        constraint="item_trie",
        catalogue_digest="",
    )
    reward_PG = np.array([[0, 1, 0], [0, 0, 0], [0, 0, 0]], np.float32)
    return ScoredGroups(
        groups=groups, reward_PG=reward_PG, failure_P=np.full(3, "", "U16"), parts_PG={"item_match": reward_PG}
    )


def outputs(completions: Completions) -> ScoreOutputs:
    shape = completions.shape
    return ScoreOutputs(
        logp_PGT=np.full(shape, -2.0, np.float32),
        full_logp_PGT=np.zeros(shape, np.float32),
        legal_mass_PGT=np.ones(shape, np.float32),
        entropy_PGT=np.zeros(shape, np.float32),
        certainty_PGT=np.ones(shape, np.float32),
        choices_PGT=np.full(shape, 3.0, np.float32),
        legal_PGT=np.ones(shape, np.bool_),
    )


def anchors() -> Anchors:
    return Anchors(
        item_N=ints(5, 9, 2),
        response_N=np.array([1, 0, 0], np.float32),
        logp0_N=np.array([-1, -2, -3], np.float32),
        policy_version_N=np.array(["v"] * 3),
    )


def rewards(failing: tuple[int, ...] = ()) -> RewardScorer:
    def attempt(call: ScoreCall, deadline_s: float) -> BatchScores:
        failure_N = np.full(len(call), "", "U16")
        failure_N[list(failing)] = RewardFailure.TIMEOUT.value
        return BatchScores(scores=plain_scores(call.histories(), call.candidates()), failure_N=failure_N)

    given = RewardSettings(ranker="x", retries=0)
    return RewardScorer(given, RewardClient(attempt, given))


def test_cross_negatives_are_items_of_others_and_of_nobody_here() -> None:
    groups = scored().groups
    for seed in range(30):
        drawn = cross_negatives(prompts(), groups, 3, seed=seed)
        everything = set(ITEMS[ITEMS != NO_ITEM].tolist())
        for row, prompt in enumerate(prompts()):
            chosen = [item for item in drawn[row].tolist() if item != NO_ITEM]
            assert len(set(chosen)) == len(chosen)
            forbidden = {*ITEMS[row].tolist(), prompt.target, *prompt.history.tolist(), *prompt.exclusions.tolist()}
            assert set(chosen) <= everything - forbidden
    many = cross_negatives(prompts(), groups, 9, seed=0)
    assert set(many[0].tolist()) == {1, 2, 7, 8, NO_ITEM}
    assert set(many[2].tolist()) == {3, 5, 6, 7, 8, NO_ITEM}
    shuffled = groups.take(np.array([2, 0, 1]))
    again = cross_negatives([prompts()[i] for i in (2, 0, 1)], shuffled, 3, seed=0)
    assert np.array_equal(again[[1, 2, 0]], cross_negatives(prompts(), groups, 3, seed=0))


def test_a_ground_truth_that_others_got_is_no_cross_negative() -> None:
    first, *others = prompts()
    wanted = [dataclasses.replace(first, target=7), *others]
    assert set(cross_negatives(wanted, scored().groups, 9, seed=0)[0].tolist()) == {1, 2, 8, NO_ITEM}


def test_prompts_with_the_same_items_to_draw_from_draw_their_own() -> None:
    """The same prompt twice under two ids: the same pool, other draws."""
    groups = scored().groups.take(np.array([0, 0, 1]))
    first, _, other = prompts()
    twins = [first, dataclasses.replace(first, prompt_id=8), other]
    drawn = [cross_negatives(twins, groups, 2, seed=seed)[:2] for seed in range(30)]
    assert {tuple(sorted(row.tolist())) for pair in drawn for row in pair} == {(7, 8)}
    assert any(not np.array_equal(*pair) for pair in drawn)


def test_the_gate_asks_for_everything_in_one_request() -> None:
    scorer = rewards(failing=(1,))
    found = gate_scores(scorer, prompts(), scored().groups, Gate(kind=GateKind.ADAGRPO, negatives=2), seed=0)
    assert scorer.client is not None
    assert scorer.client.requests == 1
    assert found.scores.rollout_PG[0].tolist() == [3, 5, 6]
    assert float(found.scores.truth_P[0]) == 5
    cross = cross_negatives(prompts(), scored().groups, 2, seed=0)
    assert found.scores.cross_PM[0].tolist() == cross[0].tolist()
    assert found.scores.rollout_PG[2, :2].tolist() == [2001, 2002]
    assert found.failure_P.tolist() == ["", "timeout", ""]
    head = gate_scores(rewards(), prompts(), scored().groups, Gate(kind=GateKind.HEAD), seed=0)
    assert not head.scores.cross_valid_PM.any()


def whole(settings: ObjectiveSettings) -> tuple[Completions, tuple[Kind, ...]]:
    feedback = FeedbackRows.of(prompts(), anchors()) if settings.anchor.mode != "none" else None
    made = extended(Completions.of_groups(prompts(), scored().groups), prompts(), settings, catalogue(), feedback)
    return made.completions, made.extra


def test_members_join_where_the_recipe_has_a_use_for_them() -> None:
    assert whole(ObjectiveSettings())[1] == ()
    assert not scored_extras(ObjectiveSettings(nll_weight=1.0))
    assert scored_extras(GATED)
    completions, extra = whole(GATED)
    assert extra == (Kind.GROUND_TRUTH,)
    assert completions.valid_PG[:, 3].tolist() == [True, True, False]
    both = ObjectiveSettings.model_validate({"anchor": {"mode": "append"}, "nll_weight": 1.0})
    completions, extra = whole(both)
    assert extra == (Kind.GROUND_TRUTH, Kind.ANCHOR)
    assert completions.token_PGT[1, 4].tolist() == [19, 29]
    replaced, _ = whole(ObjectiveSettings.model_validate({"anchor": {"mode": "replace_last"}}))
    assert replaced.valid_PG.tolist() == [[1, 1, 0, 1], [1, 1, 0, 1], [1, 0, 0, 1]]


def test_signals_speak_of_every_member() -> None:
    settings = ObjectiveSettings.model_validate(
        {"anchor": {"mode": "append"}, "nll_weight": 1.0, "gate": {"kind": "hard"}}
    )
    completions, extra = whole(settings)
    members, reward_PG = batch_members(scored(), completions, extra)
    assert members.kind_PG[0].tolist() == [0, 0, 0, KIND_CODE[Kind.GROUND_TRUTH], KIND_CODE[Kind.ANCHOR]]
    assert reward_PG.shape == (3, 5)
    assert not reward_PG[:, 3:].any()
    scores = outputs(completions)
    scores.legal_PGT[1, 3, 1] = False
    signals = batch_signals(
        settings,
        prompts(),
        scored(),
        members,
        scores,
        part_weight={"item_match": 1.0},
        paths=rewards().paths,
        feedback=FeedbackRows.of(prompts(), anchors()),
    )
    assert signals.hit_PG is not None
    assert signals.matched_PG is not None
    assert signals.truth_logp_P is not None
    assert signals.responded_P is not None
    assert signals.hit_PG[:2].int().tolist() == [[0, 1, 0, 1, 1], [0, 0, 0, 1, 0]]
    assert not signals.hit_PG[2].any()
    assert signals.matched_PG.int().tolist() == [[0, 1, 0, 1, 1], [0, 0, 0, 0, 1], [0, 1, 0, 0, 1]]
    assert signals.truth_logp_P.tolist() == [-4.0, -torch.inf, 0.0]
    assert signals.responded_P.tolist() == [True, False, False]


def test_a_completion_is_every_item_of_its_path() -> None:
    settings = ObjectiveSettings.model_validate({"anchor": {"mode": "append"}})
    completions, extra = whole(settings)
    members, _ = batch_members(scored(), completions, extra)
    path_id_I = np.array([0, 1, 1, 3, 4, 3, 6, 4, 8, 8], np.int32)
    signals = batch_signals(
        settings,
        prompts(),
        scored(),
        members,
        outputs(completions),
        part_weight={},
        paths=RewardScorer(RewardSettings(), None, path_id_I=path_id_I).paths,
        feedback=FeedbackRows.of(prompts(), anchors()),
    )
    assert signals.hit_PG is not None
    assert signals.matched_PG is not None
    assert signals.hit_PG.int().tolist() == [[1, 1, 0, 1], [0, 1, 0, 0], [0, 0, 0, 0]]
    assert signals.matched_PG.int().tolist() == [[1, 1, 0, 1], [0, 0, 1, 1], [1, 1, 0, 1]]


def test_anchors_that_the_constraint_forbids_leave_and_are_counted() -> None:
    settings = ObjectiveSettings.model_validate({"anchor": {"mode": "append"}})
    completions, extra = whole(settings)
    members, _ = batch_members(scored(), completions, extra)
    scores = outputs(completions)
    scores.legal_PGT[2, 3, 0] = False
    scores.legal_PGT[0, 0, 0] = False
    kept, dropped = without_illegal_anchors(members, scores.legal_PGT)
    assert dropped == 1
    assert kept.valid_PG[:, 3].tolist() == [True, True, False]
    assert torch.equal(kept.valid_PG[:, :3], members.valid_PG[:, :3])


def test_anchors_of_retired_items_are_open_unless_the_prompt_excludes_them() -> None:
    settings = ObjectiveSettings.model_validate({"anchor": {"mode": "append"}, "nll_weight": 1.0})
    first, second, third = prompts()
    seen = [first, dataclasses.replace(second, exclusions=ints(1, 9)), third]
    rollouts = Completions.of_groups(seen, scored().groups)
    feedback = FeedbackRows.of(seen, anchors())
    made = extended(rollouts, seen, settings, catalogue().retire([5, 9]), feedback).completions
    # The ground truth of the first prompt is the retired item 5 as well: its likelihood needs no legal set.
    assert made.may_leave_PG.tolist() == [[0, 0, 0, 0, 1], [0] * 5, [0] * 5]
    assert made.token_PGT[0, 3:].tolist() == [[15, 25], [15, 25]]
    assert not extended(rollouts, seen, settings, catalogue(), feedback).completions.may_leave_PG.any()


def test_an_anchor_of_a_retired_item_has_its_own_response_and_nobody_else_has() -> None:
    settings = ObjectiveSettings.model_validate({"anchor": {"mode": "append"}, "nll_weight": 1.0})
    completions, extra = whole(settings)
    members, _ = batch_members(scored(), completions, extra)
    # Items 5 and 2 are retired; 5 shares the path of 3.
    path_id_I = np.array([0, 1, NO_ITEM, 3, 4, NO_ITEM, 6, 7, 8, 9], np.int32)
    signals = batch_signals(
        settings,
        prompts(),
        scored(),
        members,
        outputs(completions),
        part_weight={},
        paths=RewardScorer(RewardSettings(), None, path_id_I=path_id_I).paths,
        feedback=FeedbackRows.of(prompts(), anchors()),
    )
    assert signals.hit_PG is not None
    assert signals.matched_PG is not None
    assert signals.formatted_PG is not None
    assert signals.matched_PG[:, [0, 4]].int().tolist() == [[0, 1], [0, 1], [0, 1]]
    assert signals.hit_PG[:, [0, 4]].int().tolist() == [[0, 1], [0, 0], [0, 0]]
    assert signals.formatted_PG[:, 4].all()


def test_a_failed_group_keeps_its_ground_truth_and_loses_its_anchor() -> None:
    settings = ObjectiveSettings.model_validate({"anchor": {"mode": "append"}, "nll_weight": 1.0})
    completions, extra = whole(settings)
    failed = dataclasses.replace(scored(), failure_P=np.array(["", "timeout", ""]))
    members, _ = batch_members(failed, completions, extra)
    assert members.valid_PG[1].tolist() == [False, False, False, True, False]
