"""Gate stage (AdaGRPO): against a reference with Python loops, and methods.md section 8 item 10.

Checks ties, monotone maps of the ranker, a constant ranker, the ablations, both norms, permutations and invalid
members. That a closed gate leaves exactly the NLL is checked in tests/trainer/test_composition.py.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.gate import (
    Gate,
    GateKind,
    GateNorm,
    GateParts,
    RankerScores,
    WithoutTruth,
    gate_decisions,
    gate_metrics,
    gate_parts,
    gate_weights,
    policy_scores,
)
from trainer.members import PADDING, Members


def members(valid_PG: Tensor, tokens: int = 2) -> Members:
    return Members(
        valid_PG=valid_PG,
        kind_PG=torch.zeros(valid_PG.shape, dtype=torch.int64),
        segment_PGT=torch.zeros(*valid_PG.shape, tokens, dtype=torch.int64),
    )


def reference(
    policy: list[float],
    truth_policy: float,
    ranker: list[float],
    truth_ranker: float,
    cross: list[float],
    hits: list[bool],
    gate: Gate,
) -> tuple[bool, bool, bool]:
    """The formulas of methods.md section 2 for one prompt."""
    count = len(policy)
    rivals = [i for i in range(count) if not hits[i]]
    rank_pi = 1 + sum(policy[i] > truth_policy for i in rivals)
    rank_rm = 1 + sum(ranker[i] >= truth_ranker for i in rivals)
    everybody = [truth_ranker, *(ranker[i] for i in rivals), *cross]
    ranks = [1 + sum(other > own for other in everybody) for own in cross]
    tail = min(ranks) > (1 - gate.rho) * len(everybody) + 1e-9
    return rank_pi > gate.tau * count + 1e-9, rank_rm <= gate.tau * count + 1e-9, tail


@st.composite
def prompts(draw: st.DrawFn) -> tuple[list[float], float, list[float], float, list[float], list[bool]]:
    count = draw(st.integers(1, 12))
    value = st.integers(-4, 4).map(float)  # few values, so that there are ties
    many = st.lists(value, min_size=count, max_size=count)
    hits = draw(st.lists(st.booleans(), min_size=count, max_size=count))
    return draw(many), draw(value), draw(many), draw(value), draw(st.lists(value, min_size=1, max_size=5)), hits


def parts_of(
    policy: list[float],
    truth_policy: float,
    ranker: list[float],
    truth_ranker: float,
    cross: list[float],
    hits: list[bool],
    gate: Gate,
) -> GateParts:
    return gate_parts(
        members(torch.ones(1, len(policy), dtype=torch.bool)),
        score_PG=torch.tensor([policy]),
        truth_score_P=torch.tensor([truth_policy]),
        has_truth_P=torch.tensor([True]),
        hit_PG=torch.tensor([hits]),
        ranker=RankerScores(
            torch.tensor([ranker]),
            torch.tensor([truth_ranker]),
            torch.tensor([cross]),
            torch.ones(1, len(cross), dtype=torch.bool),
        ),
        gate=gate,
    )


def flags(parts: GateParts) -> tuple[bool, bool, bool]:
    return bool(parts.hard_P), bool(parts.head_P), bool(parts.tail_P)


@given(prompt=prompts(), tau=st.sampled_from([0.1, 0.25, 0.3, 0.5, 1.0]), rho=st.sampled_from([0.1, 0.3, 0.5, 0.9]))
@settings(max_examples=200, deadline=None)
def test_parts_equal_the_formulas(
    prompt: tuple[list[float], float, list[float], float, list[float], list[bool]], tau: float, rho: float
) -> None:
    gate = Gate(kind=GateKind.ADAGRPO, tau=tau, rho=rho)
    assert flags(parts_of(*prompt, gate)) == reference(*prompt, gate)


@given(prompt=prompts())
@settings(max_examples=80, deadline=None)
def test_increasing_maps_of_the_ranker_change_nothing(
    prompt: tuple[list[float], float, list[float], float, list[float], list[bool]],
) -> None:
    policy, truth_policy, ranker, truth, cross, hits = prompt
    gate = Gate(kind=GateKind.ADAGRPO, tau=0.5)

    def raised(value: float) -> float:
        return value**3 * 2 + 7

    plain = parts_of(policy, truth_policy, ranker, truth, cross, hits, gate)
    mapped = parts_of(
        policy, truth_policy, [raised(v) for v in ranker], raised(truth), [raised(v) for v in cross], hits, gate
    )
    assert flags(plain) == flags(mapped)


@given(prompt=prompts(), value=st.integers(-4, 4).map(float), tau=st.sampled_from([0.1, 0.25, 0.5, 0.99]))
@settings(max_examples=80, deadline=None)
def test_a_constant_ranker_closes_every_gate(
    prompt: tuple[list[float], float, list[float], float, list[float], list[bool]], value: float, tau: float
) -> None:
    policy, truth_policy, _, _, cross, hits = prompt
    gate = Gate(kind=GateKind.ADAGRPO, tau=tau)
    parts = parts_of(policy, truth_policy, [value] * len(policy), value, [value] * len(cross), hits, gate)
    assert not parts.tail_P.any()
    assert not gate_decisions(parts, torch.tensor([True]), gate, seed=0, step=0).any()


def test_a_constant_ranker_closes_the_gate() -> None:
    parts = parts_of([-1.0] * 8, -9.0, [0.5] * 8, 0.5, [0.5] * 4, [False] * 8, Gate(kind=GateKind.ADAGRPO))
    assert flags(parts) == (True, False, False)


def test_policy_ties_favour_the_ground_truth() -> None:
    gate = Gate(kind=GateKind.ADAGRPO, tau=0.25)
    tied = parts_of([-1.0] * 4, -1.0, [0.0] * 4, 1.0, [-1.0], [False] * 4, gate)
    assert int(tied.rank_policy_P) == 1
    assert flags(tied) == (False, True, True)


def test_a_duplicate_of_the_truth_is_no_rival() -> None:
    gate = Gate(kind=GateKind.ADAGRPO, tau=0.25)
    parts = parts_of([-0.5, -2.0, -3.0, -4.0], -1.0, [2.0, 0.0, 0.0, 0.0], 2.0, [-1.0], [True] + [False] * 3, gate)
    assert int(parts.rank_policy_P) == 1
    assert int(parts.rank_ranker_P) == 1


def test_no_cross_negative_closes_and_no_rollout_is_unknown() -> None:
    ranker = RankerScores(
        torch.zeros(2, 3), torch.ones(2), torch.full((2, 2), -1.0), torch.tensor([[False, False], [True, True]])
    )
    parts = gate_parts(
        members(torch.tensor([[True] * 3, [False] * 3])),
        score_PG=torch.zeros(2, 3),
        truth_score_P=torch.full((2,), -torch.inf),
        has_truth_P=torch.tensor([True, True]),
        hit_PG=torch.zeros(2, 3, dtype=torch.bool),
        ranker=ranker,
        gate=Gate(kind=GateKind.ADAGRPO, tau=0.5),
    )
    assert parts.tail_P.tolist() == [False, False]
    assert parts.known_P.tolist() == [True, False]
    assert parts.hard_P.tolist() == [True, False]


def test_invalid_members_and_order_change_nothing() -> None:
    torch.manual_seed(0)
    score, ranked = torch.randn(1, 6), torch.randn(1, 6)
    cross, there = torch.randn(1, 3) - 2, torch.ones(1, 3, dtype=torch.bool)
    truth = torch.tensor([True])

    def parts(order: list[int], extra: bool) -> GateParts:
        valid = torch.tensor([[True] * 6 + [False] * extra])
        pad = torch.full((1, int(extra)), 99.0)
        return gate_parts(
            members(valid),
            score_PG=torch.cat([score[:, order], pad], 1),
            truth_score_P=torch.tensor([-0.3]),
            has_truth_P=truth,
            hit_PG=torch.zeros(1, 6 + extra, dtype=torch.bool),
            ranker=RankerScores(torch.cat([ranked[:, order], pad], 1), torch.tensor([1.0]), cross, there),
            gate=Gate(kind=GateKind.ADAGRPO),
        )

    plain = parts([0, 1, 2, 3, 4, 5], False)
    for other in (parts([5, 3, 1, 0, 2, 4], False), parts([0, 1, 2, 3, 4, 5], True)):
        for one, two in zip(plain, other, strict=True):
            assert torch.equal(one, two)


def some_parts() -> GateParts:
    flag = torch.tensor
    return GateParts(
        hard_P=flag([True, True, True, False, False, False]),
        head_P=flag([True, True, False, True, False, False]),
        tail_P=flag([True, False, True, True, True, False]),
        rank_policy_P=torch.arange(6),
        rank_ranker_P=torch.arange(6),
        known_P=flag([True, True, True, True, True, False]),
    )


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        (GateKind.NONE, [1, 1, 1, 1, 1, 1]),
        (GateKind.ADAGRPO, [1, 0, 0, 0, 0, 1]),
        (GateKind.HARD, [1, 1, 1, 0, 0, 1]),
        (GateKind.DISCRIMINABILITY, [1, 0, 0, 1, 0, 1]),
        (GateKind.HEAD, [1, 1, 0, 1, 0, 1]),
        (GateKind.INVERTED, [0, 1, 1, 1, 1, 1]),
    ],
)
def test_ablations_combine_their_parts(kind: GateKind, expected: list[int]) -> None:
    has_truth = torch.tensor([True] * 5 + [False])
    opened = gate_decisions(some_parts(), has_truth, Gate(kind=kind), seed=0, step=1)
    assert opened.int().tolist() == expected
    if kind is not GateKind.NONE:
        unknown = gate_decisions(some_parts(), torch.ones(6, dtype=torch.bool), Gate(kind=kind), seed=0, step=1)
        assert unknown.int().tolist() == [*expected[:5], 0]
        closed = Gate(kind=kind, without_truth=WithoutTruth.CLOSED)
        assert gate_decisions(some_parts(), has_truth, closed, seed=0, step=1).int().tolist() == [*expected[:5], 0]


def test_the_random_gate_keeps_the_rate_and_is_keyed_by_seed_and_step() -> None:
    has_truth = torch.tensor([True] * 5 + [False])
    gate = Gate(kind=GateKind.RANDOM)
    seen = set()
    for step in range(40):
        opened = gate_decisions(some_parts(), has_truth, gate, seed=3, step=step)
        assert torch.equal(opened, gate_decisions(some_parts(), has_truth, gate, seed=3, step=step))
        assert opened[:5].sum() == 1
        assert opened[5]
        seen.add(int(opened[:5].int().argmax()))
    assert seen == {0, 1, 2, 3, 4}


def test_norms() -> None:
    opened = torch.tensor([True, False, False, True, False])
    assert gate_weights(opened, GateNorm.BATCH).tolist() == [1, 0, 0, 1, 0]
    assert gate_weights(opened, GateNorm.OPEN).tolist() == [2.5, 0, 0, 2.5, 0]
    assert not gate_weights(torch.zeros(3, dtype=torch.bool), GateNorm.OPEN).any()


@pytest.mark.parametrize(
    ("kind", "absent"),
    [
        (GateKind.RANDOM, set()),
        (GateKind.HEAD, {"gate/tail"}),
        (GateKind.HARD, {"gate/head", "gate/tail", "gate/rank_ranker"}),
    ],
)
def test_parts_that_the_gate_does_not_ask_for_have_no_rate(kind: GateKind, absent: set[str]) -> None:
    opened = torch.ones(6, dtype=torch.bool)
    everything = gate_metrics(some_parts(), opened, Gate(kind=GateKind.ADAGRPO))
    assert everything.keys() - gate_metrics(some_parts(), opened, Gate(kind=kind)).keys() == absent


def test_metrics_and_length_norm() -> None:
    parts = some_parts()
    metrics = gate_metrics(parts, parts.hard_P & parts.head_P & parts.tail_P, Gate(kind=GateKind.ADAGRPO))
    assert metrics == pytest.approx(
        {
            "gate/open": 1 / 6,
            "gate/hard": 1 / 2,
            "gate/head": 1 / 2,
            "gate/tail": 2 / 3,
            "gate/known": 5 / 6,
            "gate/rank_policy": 2.0,
            "gate/rank_ranker": 2.0,
        }
    )
    segment = torch.tensor([[[0, 0], [0, PADDING]]])
    short = Members(
        valid_PG=torch.tensor([[True, True]]), kind_PG=torch.zeros(1, 2, dtype=torch.int64), segment_PGT=segment
    )
    logp = torch.tensor([[[-1.0, -3.0], [-2.0, -50.0]]])
    assert policy_scores(short, logp, length_norm=False).tolist() == [[-4.0, -2.0]]
    assert policy_scores(short, logp, length_norm=True).tolist() == [[-2.0, -2.0]]
