"""Random negatives: which items are drawn, that each is as likely as the next, what a draw depends on, and the groups
they make: AUC against random items, ranks among them, no part for what missed.

Not checked here: the loop with them (test_group_building.py).
"""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.records import NO_ITEM, IntArray, Kind, Prompt
from trainer.members import KIND_CODE, Members
from trainer.objective import objective_coefficients
from trainer.objective_settings import ObjectiveSettings
from trainer.random_negatives import random_negatives
from trainer.signals import Signals


def prompt(prompt_id: int, target: int = NO_ITEM, exclusions: tuple[int, ...] = ()) -> Prompt:
    empty = np.zeros(0, np.int32)
    return Prompt(
        prompt_id=prompt_id,
        token_ids=empty,
        user_id=0,
        history=empty,
        exclusions=np.array(exclusions, np.int32),
        target=target,
    )


@given(
    paths=st.lists(st.integers(-1, 30), min_size=1, max_size=30),
    counts=st.lists(st.integers(0, 12), min_size=1, max_size=4),
    seed=st.integers(0, 1000),
    data=st.data(),
)
@settings(max_examples=100, deadline=None)
def test_only_allowed_items_are_drawn_as_many_as_there_are(
    paths: list[int], counts: list[int], seed: int, data: st.DataObject
) -> None:
    items = st.integers(0, len(paths) - 1)
    excluded = [tuple(sorted(set(data.draw(st.lists(items, max_size=6))))) for _ in counts]
    targets = [data.draw(st.one_of(st.just(NO_ITEM), items)) for _ in counts]
    prompts = [prompt(i, target, own) for i, (target, own) in enumerate(zip(targets, excluded, strict=True))]
    drawn = random_negatives(prompts, np.array(counts), np.array(paths, np.int32), seed=seed, step=1)
    assert drawn.shape == (len(counts), max(counts))
    for row, count in enumerate(counts):
        chosen = [item for item in drawn[row].tolist() if item != NO_ITEM]
        banned = {paths[item] for item in excluded[row]} | ({paths[targets[row]]} if targets[row] != NO_ITEM else set())
        allowed = {path for path in paths if path != NO_ITEM} - banned
        assert drawn[row].tolist() == chosen + [NO_ITEM] * (max(counts) - len(chosen))
        assert len(chosen) == min(count, len(allowed))
        found = [paths[item] for item in chosen]
        assert len(set(found)) == len(found)
        assert set(found) <= allowed


def test_a_draw_depends_on_seed_step_and_prompt_alone() -> None:
    paths: IntArray = np.arange(500, dtype=np.int32)
    prompts = [prompt(i, target=i) for i in range(4)]
    counts = np.array([5, 3, 5, 4])
    drawn = random_negatives(prompts, counts, paths, seed=1, step=2)
    order = [3, 0, 2, 1]
    again = random_negatives([prompts[i] for i in order], counts[order], paths, seed=1, step=2)
    assert np.array_equal(again, drawn[order])
    assert len({tuple(row) for row in drawn.tolist()}) == 4
    for seed, step in ((2, 2), (1, 3)):
        assert not np.array_equal(random_negatives(prompts, counts, paths, seed=seed, step=step), drawn)


def test_every_allowed_item_is_as_likely() -> None:
    paths: IntArray = np.arange(12, dtype=np.int32)
    prompts = [prompt(i, target=3, exclusions=(0, 7)) for i in range(6000)]
    drawn = random_negatives(prompts, np.full(6000, 4), paths, seed=0, step=1)
    share = np.bincount(drawn.reshape(-1), minlength=12) / 6000
    assert not share[[0, 3, 7]].any()
    # Each of nine items is among the four with probability 4/9; five standard errors.
    assert share[[1, 2, 4, 5, 6, 8, 9, 10, 11]] == pytest.approx(4 / 9, abs=5 * math.sqrt(20 / 81 / 6000))


def members_of(kinds: list[list[Kind]], valid: list[list[bool]]) -> Members:
    kind_PG = torch.tensor([[KIND_CODE[kind] for kind in row] for row in kinds])
    segment_PGT = torch.zeros(*kind_PG.shape, 2, dtype=torch.int64)
    return Members(valid_PG=torch.tensor(valid), kind_PG=kind_PG, segment_PGT=segment_PGT)


def test_misses_leave_and_negatives_are_what_the_hits_are_compared_with() -> None:
    kinds = [[Kind.ROLLOUT] * 4 + [Kind.NEGATIVE] * 3] * 2
    hit_PG = torch.tensor([[False, True, False, False] + [False] * 3, [False] * 7])
    score_PG = torch.tensor([[-1.0, -2, -1, -1, -9, -3, -5], [-1.0] * 7])
    members = members_of(kinds, [[True] * 7, [True] * 4 + [True, True, False]])
    reward_PG = hit_PG.float()
    given = {"std_mode": "population", "eps": 1e-12, "window": {"negatives": "random"}}
    signals = Signals(hit_PG=hit_PG, logp_PGT=(score_PG / 2).unsqueeze(-1).expand(2, 7, 2))
    found, metrics = objective_coefficients(
        members, reward_PG, ObjectiveSettings.model_validate(given), 2, signals=signals
    )
    advantage_PG = found.advantage_PGT[..., 0]
    # One hit among three negatives: advantages sqrt(3) and -1/sqrt(3), the linear AUC of methods.md section 8, item 1.
    expected = [0, math.sqrt(3), 0, 0, *[-1 / math.sqrt(3)] * 3]
    assert advantage_PG[0].tolist() == pytest.approx(expected)
    assert not found.policy_weight_PGT[0, [0, 2, 3]].any()
    gap = score_PG[0, 1] - score_PG[0, 4:].mean()
    value = float((advantage_PG[0] * score_PG[0]).sum() / 4)
    assert value == pytest.approx(math.sqrt(3 / 16) * float(gap))
    assert not advantage_PG[1].any()
    assert metrics["groups/zero_variance_share"] == 0.5
    assert metrics["groups/members"] == (4 + 2) / 2
    windowed = {**given, "window": {"kind": "hard", "anchor_rank": 1, "mass": 1.0, "negatives": "random"}}
    found, metrics = objective_coefficients(
        members, reward_PG, ObjectiveSettings.model_validate(windowed), 2, signals=signals
    )
    # Ranks among the negatives: -3, then -5, then -9.
    assert found.advantage_PGT[0, :, 0].tolist() == pytest.approx([0, math.sqrt(3), 0, 0, 0, 0, -math.sqrt(3)])
    # The two of the other group have equal scores, and share their weights.
    assert metrics["window/mass/1"] == pytest.approx((3 + 1) / 2)
