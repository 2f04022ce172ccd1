"""Credit of ranked lists in the learner: values, the tokens they land on, and the chain of the objective with them.

Checked: sequence and item advantages against plain loops (per rank and pooled, all divisors), lists that are none,
groups of unequal list length, items of unequal path length with free text before them, uncertainty per token
(methods.md section 8 item 9), beams read as lists, orders of the group, the list-level baseline, and refusals. Not
checked: the credit itself (tests/reward/test_swap_credit.py), factors by value (test_uncertainty.py).
"""

from __future__ import annotations

import dataclasses
import math
import statistics
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data.errors import RequestError
from reward.swap_credit import SwapForm, credit_variance, swap_credit
from tests.trainer import own_stage_examples
from trainer.advantage import group_advantages
from trainer.aggregation import token_weights
from trainer.credit_settings import Credit, CreditKind, ItemNorm
from trainer.list_credit import beam_credit, item_advantages, sequence_rewards, token_advantages
from trainer.list_signals import ListSignals, closed_form_lists
from trainer.members import PADDING, Members
from trainer.objective import Coefficients, objective_coefficients
from trainer.objective_settings import Aggregation, ObjectiveSettings, StdMode
from trainer.signals import Signals

PROMPTS, GROUP, RANKS = 3, 4, 5
RANKS_P = torch.tensor([5, 3, 5])
FORMAT = -1


class Lists:
    """Random groups of lists: paths of one to three tokens per item, up to two format tokens before, one behind."""

    def __init__(self, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def whole(high: int, *shape: int) -> Tensor:
            return torch.randint(high, shape, generator=generator)

        self.gain_PGK = whole(4, PROMPTS, GROUP, RANKS).double()
        self.variance_PGK = torch.rand(PROMPTS, GROUP, RANKS, generator=generator, dtype=torch.float64)
        self.permutation_PG = torch.ones(PROMPTS, GROUP, dtype=torch.bool)
        self.permutation_PG[0, 1] = False
        valid_PG = torch.ones(PROMPTS, GROUP, dtype=torch.bool)
        valid_PG[2, 3] = False
        self.permutation_PG &= valid_PG
        rows = []
        for prompt in range(PROMPTS):
            for member in range(GROUP):
                # What is no list was cut short: two of its items are there.
                ranks = int(RANKS_P[prompt]) if self.permutation_PG[prompt, member] else 2
                tokens = [FORMAT] * int(whole(3, 1))
                for rank in range(ranks):
                    tokens += [rank] * (1 + int(whole(3, 1)))
                rows.append(torch.tensor([*tokens, FORMAT]))
        segment_NT = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=PADDING)
        self.members = Members(
            valid_PG=valid_PG,
            kind_PG=torch.zeros(PROMPTS, GROUP, dtype=torch.int64),
            segment_PGT=segment_NT.reshape(PROMPTS, GROUP, -1),
        )

    def signals(self, form: SwapForm = SwapForm.CAUSAL) -> ListSignals:
        return closed_form_lists(self.gain_PGK, self.permutation_PG, RANKS_P, form, variance_PGK=self.variance_PGK)

    def coefficients(self, **objective: Any) -> tuple[Coefficients, dict[str, float]]:
        return objective_coefficients(
            self.members,
            torch.zeros(PROMPTS, GROUP),
            ObjectiveSettings.model_validate(objective),
            20,
            signals=Signals(lists=self.signals()),
        )


def credit_by_hand(lists: Lists, form: SwapForm) -> list[list[list[float]]]:
    """Credit [P][G][rank] of valid members, zeros for what is no list."""
    found = []
    for prompt in range(PROMPTS):
        ranks = int(RANKS_P[prompt])
        rows = []
        for member in range(GROUP):
            if not lists.members.valid_PG[prompt, member]:
                continue
            gains = lists.gain_PGK[prompt, member, :ranks]
            alone = swap_credit(gains[None], form).credit_NK[0].tolist()
            rows.append(alone if lists.permutation_PG[prompt, member] else [0.0] * ranks)
        found.append(rows)
    return found


def scaled(values: list[float], std_mode: StdMode, eps: float) -> list[float]:
    mean = statistics.fmean(values)
    if max(values) == min(values):
        return [0.0] * len(values)
    if std_mode is StdMode.NONE:
        return [value - mean for value in values]
    spread = statistics.pstdev(values) if std_mode is StdMode.POPULATION else statistics.stdev(values)
    return [(value - mean) / (spread + eps) for value in values]


@pytest.mark.parametrize("std_mode", list(StdMode))
@pytest.mark.parametrize("norm", list(ItemNorm))
@pytest.mark.parametrize("form", list(SwapForm))
def test_item_advantages_equal_a_plain_loop(form: SwapForm, norm: ItemNorm, std_mode: StdMode) -> None:
    lists = Lists(3)
    found = item_advantages(lists.members, lists.signals(form), norm, std_mode, 1e-4).advantage_PGK
    for prompt, rows in enumerate(credit_by_hand(lists, form)):
        ranks = int(RANKS_P[prompt])
        if norm is ItemNorm.PER_RANK:
            columns = [scaled([row[rank] for row in rows], std_mode, 1e-4) for rank in range(ranks)]
            wanted = [[columns[rank][member] for rank in range(ranks)] for member in range(len(rows))]
        else:
            flat = scaled([value for row in rows for value in row], std_mode, 1e-4)
            wanted = [flat[member * ranks : (member + 1) * ranks] for member in range(len(rows))]
        torch.testing.assert_close(
            found[prompt, : len(rows), :ranks], torch.tensor(wanted, dtype=torch.float64), atol=1e-9, rtol=1e-7
        )
        assert not found[prompt, len(rows) :].any()
        assert not found[prompt, :, ranks:].any()


def test_under_causal_credit_per_rank_the_last_item_gets_nothing() -> None:
    lists = Lists(1)
    found = item_advantages(lists.members, lists.signals(), ItemNorm.PER_RANK, StdMode.SAMPLE, 1e-4)
    assert not found.advantage_PGK[0, :, 4].any()
    assert not found.advantage_PGK[1, :, 2].any()
    assert found.live_P.tolist() == [True, True, True]


def test_what_is_no_list_has_no_credit_and_stays_in_the_group() -> None:
    lists = Lists(0)
    rewards = sequence_rewards(lists.members, lists.signals(), Credit(kind=CreditKind.ITEMS))
    assert rewards[0].tolist() == [1.0, 0.0, 1.0, 1.0]
    assert rewards[2].tolist() == [1.0, 1.0, 1.0, 0.0]
    signals = lists.signals()
    assert not signals.credit_PGK[0, 1].any()
    spoiled = dataclasses.replace(
        signals, credit_PGK=torch.where(lists.permutation_PG[..., None], signals.credit_PGK, 9.0)
    )
    plain, same = (
        item_advantages(lists.members, one, ItemNorm.PER_RANK, StdMode.SAMPLE, 1e-4).advantage_PGK
        for one in (signals, spoiled)
    )
    assert torch.equal(plain, same)
    assert plain[0, 1, :4].any()
    _, metrics = lists.coefficients(credit={"kind": "items"})
    assert metrics["credit/not_a_list_share"] == pytest.approx(1 / 11)


def test_ndcg_joins_the_reward_of_the_list() -> None:
    lists = Lists(0)
    credit = Credit(kind=CreditKind.SEQUENCE, ndcg_weight=0.5)
    found = sequence_rewards(lists.members, lists.signals(), credit)
    for prompt in range(PROMPTS):
        for member in range(GROUP):
            if not lists.permutation_PG[prompt, member]:
                assert found[prompt, member] == 0
                continue
            gains = lists.gain_PGK[prompt, member, : RANKS_P[prompt]].tolist()
            dcg, ideal = (
                sum(gain / math.log2(place + 2) for place, gain in enumerate(row))
                for row in (gains, sorted(gains, reverse=True))
            )
            assert float(found[prompt, member]) == pytest.approx(1 + 0.5 * dcg / ideal)


@given(seed=st.integers(0, 10**6), norm=st.sampled_from(ItemNorm))
@settings(max_examples=20, deadline=None)
def test_every_token_has_the_advantage_of_its_position(seed: int, norm: ItemNorm) -> None:
    lists = Lists(seed)
    found, metrics = lists.coefficients(credit={"kind": "items", "item_norm": norm.value, "ndcg_weight": 1.0})
    credit = Credit(kind=CreditKind.ITEMS, ndcg_weight=1.0)
    reward_PG = sequence_rewards(lists.members, lists.signals(), credit).float()
    whole_PG = group_advantages(lists.members, reward_PG, StdMode.SAMPLE, 1e-4).advantage_PG
    item_PGK = item_advantages(lists.members, lists.signals(), norm, StdMode.SAMPLE, 1e-4).advantage_PGK.float()
    for prompt in range(PROMPTS):
        for member in range(GROUP):
            for token, rank in enumerate(lists.members.segment_PGT[prompt, member].tolist()):
                value = float(found.advantage_PGT[prompt, member, token])
                if rank == PADDING or not lists.members.valid_PG[prompt, member]:
                    assert value == 0
                else:
                    wanted = whole_PG[prompt, member] if rank == FORMAT else item_PGK[prompt, member, rank]
                    assert value == float(wanted)
    assert metrics["groups/live_share"] == 1
    assert torch.equal(found.policy_weight_PGT, token_weights(lists.members, Aggregation.SEQUENCE_MEAN, 20))


def test_the_list_level_baseline_is_grpo_on_the_reward_of_the_list() -> None:
    lists = Lists(5)
    found, _ = lists.coefficients(credit={"kind": "sequence", "ndcg_weight": 1.0})
    credit = Credit(kind=CreditKind.SEQUENCE, ndcg_weight=1.0)
    reward_PG = sequence_rewards(lists.members, lists.signals(), credit).float()
    exact, _ = objective_coefficients(lists.members, reward_PG, ObjectiveSettings(), 20)
    assert torch.equal(found.advantage_PGT, exact.advantage_PGT)
    assert torch.equal(found.policy_weight_PGT, exact.policy_weight_PGT)


def test_tokens_outside_of_the_lists_are_a_mistake_and_told() -> None:
    lists = Lists(0)
    with pytest.raises(ValueError, match="tokens of position 4 in lists of 4 positions"):
        token_advantages(lists.members, torch.zeros(PROMPTS, GROUP), torch.zeros(PROMPTS, GROUP, 4))
    for objective in ({"credit": {"kind": "items"}}, {"credit": {"kind": "sequence"}}):
        with pytest.raises(ValueError, match="the loop did not provide"):
            objective_coefficients(
                lists.members, torch.zeros(PROMPTS, GROUP), ObjectiveSettings.model_validate(objective), 20
            )


def test_constant_variance_is_plain_credit_bit_for_bit() -> None:
    lists = Lists(2)
    plain, _ = lists.coefficients(credit={"kind": "items"})
    lists.variance_PGK = torch.full_like(lists.variance_PGK, 0.37)
    found, _ = lists.coefficients(credit={"kind": "items", "uncertainty": {"variance": "item"}})
    assert torch.equal(found.advantage_PGT, plain.advantage_PGT)


@pytest.mark.parametrize("variance", ["item", "propagated"])
@given(seed=st.integers(0, 10**6))
@settings(max_examples=15, deadline=None)
def test_uncertainty_scales_the_tokens_of_its_item_alone(variance: str, seed: int) -> None:
    lists = Lists(seed)
    uncertainty = {"variance": variance, "eps": 0.05, "low": 0.0, "high": 1e6}
    plain, _ = lists.coefficients(credit={"kind": "items"})
    found, metrics = lists.coefficients(credit={"kind": "items", "uncertainty": uncertainty})
    signals = lists.signals()
    u_PGK = signals.variance_PGK if variance == "item" else signals.propagated_PGK
    assert u_PGK is not None
    segment_PGT = lists.members.segment_PGT
    c = {
        (p, g, t): 1 / (float(u_PGK[p, g, segment_PGT[p, g, t]]) + 0.05)
        for p, g, t in (segment_PGT >= 0).nonzero().tolist()
        if lists.permutation_PG[p, g]
    }
    mean = statistics.fmean(c.values())
    wanted = plain.advantage_PGT.double().clone()
    for place, value in c.items():
        wanted[place] *= value / mean
    torch.testing.assert_close(found.advantage_PGT.double(), wanted, rtol=1e-5, atol=1e-7)
    assert torch.equal(found.advantage_PGT.sign(), plain.advantage_PGT.sign())
    assert metrics["uncertainty/items"] == len(c)


def test_propagated_variance_is_that_of_the_credit() -> None:
    lists = Lists(7)
    found = lists.signals().propagated_PGK
    assert found is not None
    gains, spread = lists.gain_PGK[1, 0, :3][None], lists.variance_PGK[1, 0, :3][None]
    alone = credit_variance(spread, swap_credit(gains, SwapForm.CAUSAL).ideal_N, SwapForm.CAUSAL)
    torch.testing.assert_close(found[1, 0, :3], alone[0])
    assert not found[1, 0, 3:].any()


def test_lists_without_a_gain_are_credited_with_nothing_and_counted() -> None:
    lists = Lists(0)
    lists.gain_PGK[1] = 0
    found, metrics = lists.coefficients(credit={"kind": "items", "ndcg_weight": 1.0})
    assert not found.advantage_PGT[1].any()
    assert metrics["credit/no_signal_share"] == pytest.approx(4 / 10)
    assert metrics["groups/live_share"] == pytest.approx(2 / 3)


def test_the_order_of_the_group_changes_nothing_and_own_stages_apply() -> None:
    lists = Lists(11)
    objective = ObjectiveSettings.model_validate(
        {
            "credit": {"kind": "items", "ndcg_weight": 0.3, "uncertainty": {"variance": "propagated"}},
            "stages": [f"{own_stage_examples.__name__}:steady"],
            "ratio": "item",
        }
    )
    order = torch.tensor([2, 0, 3, 1])
    members = lists.members
    moved = Members(
        valid_PG=members.valid_PG[:, order],
        kind_PG=members.kind_PG[:, order],
        segment_PGT=members.segment_PGT[:, order],
    )
    signals = Signals(lists=lists.signals(), hit_PG=lists.permutation_PG)
    plain, told = objective_coefficients(members, torch.zeros(PROMPTS, GROUP), objective, 20, signals=signals)
    permuted, same = objective_coefficients(
        moved, torch.zeros(PROMPTS, GROUP), objective, 20, signals=signals.take_members(order)
    )
    torch.testing.assert_close(permuted.advantage_PGT, plain.advantage_PGT[:, order], rtol=1e-5, atol=1e-6)
    assert same == pytest.approx(told, rel=1e-5, abs=1e-5)


def beam(score: list[float], gain: list[float], valid: list[bool]) -> tuple[Members, Tensor, Tensor]:
    members = Members(
        valid_PG=torch.tensor([valid]),
        kind_PG=torch.zeros(1, len(valid), dtype=torch.int64),
        segment_PGT=torch.zeros(1, len(valid), 2, dtype=torch.int64),
    )
    return members, torch.tensor([gain]), torch.tensor([score])


def test_a_beam_is_one_list_in_the_order_of_its_probabilities() -> None:
    members, gain, score = beam([-3.0, -1.0, -9.0, -2.0, 0.0], [1.0, 0.0, 2.0, 5.0, 99.0], [True] * 4 + [False])
    variance = torch.tensor([[0.4, 0.3, 0.2, 0.1, 7.0]])
    credit = Credit(kind=CreditKind.BEAM_AS_LIST)
    found = beam_credit(members, gain, score, credit, variance)
    exact = swap_credit(torch.tensor([[0.0, 5.0, 1.0, 2.0]]), SwapForm.CAUSAL)
    assert found.credit_PG[0, [1, 3, 0, 2]].tolist() == exact.credit_NK[0].tolist()
    assert found.credit_PG[0, 4] == 0
    assert found.signal_P.all()
    spread = credit_variance(torch.tensor([[0.3, 0.1, 0.4, 0.2]]), exact.ideal_N, SwapForm.CAUSAL)
    assert found.propagated_PG is not None
    torch.testing.assert_close(found.propagated_PG[0, [1, 3, 0, 2]], spread[0])
    minus = beam([-torch.inf] * 4 + [0.0], [1.0, 0.0, 2.0, 5.0, 99.0], [True] * 4 + [False])
    slots = swap_credit(gain[:, :4], SwapForm.CAUSAL).credit_NK
    torch.testing.assert_close(beam_credit(*minus, credit).credit_PG[:, :4], slots)


@pytest.mark.parametrize("variance", ["off", "item", "propagated"])
def test_the_credit_of_a_beam_stands_in_for_its_rewards(variance: str) -> None:
    generator = torch.Generator().manual_seed(4)
    members = Members(
        valid_PG=torch.tensor([[True] * 6, [True] * 5 + [False]]),
        kind_PG=torch.zeros(2, 6, dtype=torch.int64),
        segment_PGT=torch.where(torch.arange(3) < torch.tensor([[1], [3], [2], [3], [1], [2]]), 0, PADDING).repeat(
            2, 1, 1
        ),
    )
    reward_PG = torch.rand(2, 6, generator=generator)
    logp_PGT = -torch.rand(2, 6, 3, generator=generator)
    spread_PG = torch.rand(2, 6, generator=generator)
    signals = Signals(logp_PGT=logp_PGT, gain_variance_PG=spread_PG)
    credit = Credit.model_validate(
        {"kind": "beam_as_list", "uncertainty": {"variance": variance, "eps": 0.1, "low": 0, "high": 100}}
    )
    found, metrics = objective_coefficients(members, reward_PG, ObjectiveSettings(credit=credit), 3, signals=signals)
    score_PG = logp_PGT.masked_fill(~members.token_mask_PGT, 0.0).sum(-1)
    own = beam_credit(members, reward_PG, score_PG, credit, spread_PG)
    wanted = group_advantages(members, own.credit_PG.float(), StdMode.SAMPLE, 1e-4).advantage_PG.double()
    if variance != "off":
        u_PG = spread_PG.double() if variance == "item" else own.propagated_PG
        assert u_PG is not None
        c_PG = 1 / (u_PG + 0.1)
        wanted = wanted * c_PG / ((c_PG * members.length_PG).sum() / members.length_PG.sum())
    torch.testing.assert_close(
        found.advantage_PGT.double(), wanted.unsqueeze(-1) * members.token_mask_PGT, rtol=1e-5, atol=1e-7
    )
    assert metrics["credit/no_signal_share"] == 0
    flat, told = objective_coefficients(
        members, torch.zeros(2, 6), ObjectiveSettings(credit=credit), 3, signals=signals
    )
    assert not flat.advantage_PGT.any()
    assert told["credit/no_signal_share"] == 1


@pytest.mark.parametrize(
    ("content", "where", "why"),
    [
        ({"credit": {"kind": "items"}, "window": {"kind": "soft"}}, "objective.window.kind", "hits against misses"),
        ({"credit": {"kind": "beam_as_list"}, "window": {"kind": "hard"}}, "objective.window.kind", "neither"),
        ({"credit": {"kind": "items"}, "anchor": {"mode": "append"}}, "objective.anchor.mode", "not shown"),
        ({"credit": {"kind": "beam_as_list"}, "reward_order": "gdpo"}, "objective.reward_order", "one reward"),
        (
            {"credit": {"kind": "items"}, "gate": {"kind": "hard"}, "nll_weight": 1.0},
            "objective.gate.kind",
            "ranks single items",
        ),
        ({"credit": {"kind": "sequence"}, "nll_weight": 1.0}, "objective.nll_weight", "not a list"),
        ({"credit": {"ndcg_weight": 1.0}}, "objective.credit.ndcg_weight", "only whole lists"),
        (
            {"credit": {"kind": "sequence", "uncertainty": {"variance": "item"}}},
            "objective.credit.uncertainty.variance",
            "credit of positions",
        ),
    ],
)
def test_senseless_combinations_are_refused_with_the_reason(content: dict[str, Any], where: str, why: str) -> None:
    with pytest.raises(RequestError) as error:
        ObjectiveSettings.model_validate(content)
    assert error.value.where == where
    assert why in str(error.value)


def test_uncertainty_counts_as_distrust() -> None:
    whole = {
        "credit": {"kind": "beam_as_list", "uncertainty": {"variance": "item"}},
        "gate": {"kind": "hard"},
        "nll_weight": 1.0,
        "max_distrust": 1,
    }
    with pytest.raises(RequestError, match=r"2 are on \(gate, uncertainty\)"):
        ObjectiveSettings.model_validate(whole)
    ObjectiveSettings.model_validate({**whole, "max_distrust": 2})
