"""Window stage (TAWin): the identities of methods.md section 8 item 4, and what may not change the weights.

Checks soft top-k against bisection, sums, means and limits on random groups, the weighted AUC identity, ties,
permutations and invalid members. Does not check which window is good for which K.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data.records import Kind
from trainer.advantage import group_advantages
from trainer.members import KIND_CODE, Members
from trainer.objective_settings import StdMode
from trainer.window import RankMap, Window, WindowKind, hard_top_k, soft_top_k, window_metrics, window_weights

SCORES = st.lists(st.floats(-20, 0), min_size=2, max_size=17, unique=True)
MASSES = st.floats(0.05, 20.0)
TEMPERATURES = st.floats(0.02, 50.0)


def members(valid_PG: Tensor, kind_PG: Tensor | None = None) -> Members:
    kind_PG = torch.zeros(valid_PG.shape, dtype=torch.int64) if kind_PG is None else kind_PG
    return Members(valid_PG=valid_PG, kind_PG=kind_PG, segment_PGT=torch.zeros(*valid_PG.shape, 3, dtype=torch.int64))


def everyone(prompts: int, group: int) -> Members:
    return members(torch.ones(prompts, group, dtype=torch.bool))


def bisected(x: list[float], k: float, temperature: float) -> list[float]:
    """Soft top-k by bisection of `lam`, with Python floats."""
    if k >= len(x):
        return [1.0] * len(x)

    def weights(lam: float) -> list[float]:
        return [1.0 if v >= lam else math.exp(max((v - lam) / temperature, -745.0)) for v in x]

    low, high = min(x) - 1000 * temperature - 1, max(x) + temperature * (math.log(len(x)) - math.log(min(k, 1)) + 1)
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if sum(weights(middle)) > k else (low, middle)
    return weights((low + high) / 2)


@given(x=st.lists(st.floats(-30, 30), min_size=1, max_size=16), k=MASSES, temperature=TEMPERATURES)
@settings(max_examples=200, deadline=None)
def test_soft_top_k_sums_to_k_and_equals_bisection(x: list[float], k: float, temperature: float) -> None:
    found = soft_top_k(torch.tensor([x], dtype=torch.float64), torch.ones(1, len(x), dtype=torch.bool), k, temperature)
    assert float(found.min()) >= 0
    assert float(found.max()) <= 1
    assert float(found.sum()) == pytest.approx(min(k, len(x)), rel=1e-9)
    assert found[0].tolist() == pytest.approx(bisected(x, k, temperature), abs=1e-7)


@given(x=st.lists(st.floats(-30, 30), min_size=2, max_size=16), temperature=TEMPERATURES)
@settings(max_examples=50, deadline=None)
def test_mass_one_is_a_softmax(x: list[float], temperature: float) -> None:
    row = torch.tensor([x], dtype=torch.float64)
    found = soft_top_k(row, torch.ones(1, len(x), dtype=torch.bool), 1.0, temperature)
    torch.testing.assert_close(found, torch.softmax(row / temperature, 1), rtol=1e-9, atol=1e-12)


def test_entries_outside_the_mask_take_no_part() -> None:
    mask = torch.tensor([[True, False, True, False, True]])
    row = torch.tensor([[0.0, 9.0, -1.0, 4.0, -2.0]])
    whole = soft_top_k(row, mask, 1.5, 0.7)
    alone = soft_top_k(row[mask][None], torch.ones(1, 3, dtype=torch.bool), 1.5, 0.7)
    torch.testing.assert_close(whole[mask][None], alone, rtol=0, atol=1e-15)
    assert not whole[~mask].any()
    assert not soft_top_k(row, torch.zeros_like(mask), 1.5, 0.7).any()


@given(
    score=SCORES,
    mass=MASSES,
    temperature=TEMPERATURES,
    anchor=st.integers(0, 20),
    kind=st.sampled_from([WindowKind.SOFT, WindowKind.HARD]),
    rank_map=st.sampled_from(RankMap),
    data=st.data(),
)
@settings(max_examples=150, deadline=None)
def test_negatives_have_mean_one_and_advantages_still_sum_to_zero(
    score: list[float],
    mass: float,
    temperature: float,
    anchor: int,
    kind: WindowKind,
    rank_map: RankMap,
    data: st.DataObject,
) -> None:
    hits = data.draw(st.lists(st.booleans(), min_size=len(score), max_size=len(score)))
    positive = torch.tensor([hits])
    window = Window(kind=kind, mass=mass, temperature=temperature, anchor_rank=anchor, rank_map=rank_map)
    score_PG = torch.tensor([score], dtype=torch.float64)
    weights = window_weights(everyone(1, len(score)), score_PG, positive, window)
    assert (weights.weight_PG[positive] == 1).all()
    assert (weights.weight_PG >= 0).all()
    if not positive.all():
        assert float(weights.weight_PG[~positive].mean()) == pytest.approx(1.0, rel=1e-9)
    reward = positive.double()
    advantage, _ = group_advantages(everyone(1, len(score)), reward, StdMode.POPULATION, 1e-4)
    assert float((weights.weight_PG * advantage).sum()) == pytest.approx(0.0, abs=1e-9)


@given(score=SCORES, anchor=st.integers(0, 16), data=st.data())
@settings(max_examples=80, deadline=None)
def test_the_weighted_auc_identity(score: list[float], anchor: int, data: st.DataObject) -> None:
    hits = data.draw(st.lists(st.booleans(), min_size=len(score), max_size=len(score)))
    if all(hits) or not any(hits):
        return
    positive = torch.tensor([hits])
    score_PG = torch.tensor([score], dtype=torch.float64)
    whole = everyone(1, len(score))
    weight = window_weights(whole, score_PG, positive, Window(kind=WindowKind.SOFT, anchor_rank=anchor)).weight_PG
    advantage, _ = group_advantages(whole, positive.double(), StdMode.POPULATION, 0.0)
    share = float(positive.double().mean())
    gap = score_PG[positive].mean() - (weight * score_PG)[~positive].mean()
    assert float((weight * advantage * score_PG).mean()) == pytest.approx(
        math.sqrt(share * (1 - share)) * float(gap), abs=1e-8
    )


def test_a_wide_window_is_grpo_and_a_narrow_one_is_hard() -> None:
    torch.manual_seed(3)
    score, positive = torch.randn(4, 9), torch.zeros(4, 9, dtype=torch.bool)
    positive[:, 2] = True
    wide = window_weights(everyone(4, 9), score, positive, Window(kind=WindowKind.SOFT, anchor_rank=3, temperature=1e6))
    torch.testing.assert_close(wide.weight_PG, torch.ones(4, 9), rtol=0, atol=1e-4)
    for mass in (1, 3, 5):  # an odd number of ranks around an inner anchor has no distance tie at its edge
        narrow, hard = (
            window_weights(
                everyone(4, 9), score, positive, Window(kind=kind, anchor_rank=3, mass=mass, temperature=1e-3)
            )
            for kind in (WindowKind.SOFT, WindowKind.HARD)
        )
        torch.testing.assert_close(narrow.weight_PG, hard.weight_PG, rtol=0, atol=1e-6)
        inside = ((hard.rank_PG - 3).abs() <= (mass - 1) // 2) & (hard.rank_PG >= 0)
        assert (hard.weight_PG[inside] == 8 / mass).all()
        assert not hard.weight_PG[~inside & ~positive].any()


def test_hard_ties_share_what_is_left() -> None:
    row = -torch.tensor([[1.0, 0.0, 1.0, 2.0]])
    whole = torch.ones(1, 4, dtype=torch.bool)
    assert hard_top_k(row, whole, 2.0)[0].tolist() == [0.5, 1.0, 0.5, 0.0]
    assert hard_top_k(row, whole, 9.0)[0].tolist() == [1.0] * 4


def test_ranks_count_from_the_best_negative_and_the_anchor_rank_is_the_heaviest() -> None:
    score = torch.tensor([[-3.0, -1.0, -2.0, -4.0, -0.5]])
    positive = torch.tensor([[False, True, False, False, False]])
    weights = window_weights(everyone(1, 5), score, positive, Window(kind=WindowKind.SOFT, anchor_rank=2))
    assert weights.rank_PG[0].tolist() == [2, -1, 1, 3, 0]
    assert int(weights.weight_PG.masked_fill(positive, 0).argmax()) == 0
    log2 = window_weights(
        everyone(1, 5), score, positive, Window(kind=WindowKind.SOFT, anchor_rank=2, rank_map=RankMap.LOG2)
    )
    expected = torch.softmax(-torch.tensor([abs(math.log2(r + 1) - math.log2(3)) for r in range(4)]), 0) * 4
    torch.testing.assert_close(log2.weight_PG[0, [4, 2, 0, 3]], expected)


def test_small_groups_are_clamped_and_counted() -> None:
    score = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -2.0, -3.0]])
    positive = torch.tensor([[False, False, False], [True, False, False]])
    weights = window_weights(everyone(2, 3), score, positive, Window(kind=WindowKind.SOFT, anchor_rank=2))
    assert weights.clamped_P.tolist() == [False, True]
    assert weights.weight_PG[1, 2] > weights.weight_PG[1, 1]
    assert window_metrics(weights)["window/clamped_groups"] == 1.0


@pytest.mark.parametrize("kind", [WindowKind.SOFT, WindowKind.HARD])
def test_order_ties_invalid_members_and_anchors_change_nothing(kind: WindowKind) -> None:
    torch.manual_seed(0)
    window = Window(kind=kind, anchor_rank=1, mass=2.0)
    score = torch.tensor([[-1.0, -2.0, -2.0, -3.0, -0.5, -2.0]])
    positive = torch.tensor([[False, False, False, False, True, False]])
    plain = window_weights(everyone(1, 6), score, positive, window).weight_PG
    assert plain[0, 1] == plain[0, 2] == plain[0, 5]
    order = torch.randperm(6)
    permuted = window_weights(everyone(1, 6), score[:, order], positive[:, order], window).weight_PG
    torch.testing.assert_close(permuted, plain[:, order], rtol=0, atol=1e-7)
    valid = torch.tensor([[True] * 6 + [False, True]])
    kinds = torch.tensor([[0] * 7 + [KIND_CODE[Kind.ANCHOR]]])
    wide = window_weights(
        members(valid, kinds),
        torch.cat([score, torch.tensor([[0.0, -1.5]])], 1),
        torch.cat([positive, torch.zeros(1, 2, dtype=torch.bool)], 1),
        window,
    ).weight_PG
    torch.testing.assert_close(wide[:, :6], plain, rtol=0, atol=0)
    assert wide[0, 7] == 1


def test_no_window_gives_ones_and_no_gradient_flows() -> None:
    score = torch.randn(2, 4, requires_grad=True)
    nothing = torch.zeros(2, 4, dtype=torch.bool)
    assert torch.equal(window_weights(everyone(2, 4), score, nothing, Window()).weight_PG, torch.ones(2, 4))
    assert not window_weights(everyone(2, 4), score, nothing, Window(kind=WindowKind.SOFT)).weight_PG.requires_grad
