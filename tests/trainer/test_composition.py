"""The composition of all stages, through the learner's own loss: methods.md section 6 and section 8 items 10 and 12.

Checks bit for bit that closed gates leave the NLL, open gates the fixed mixture and identity stages plain GRPO; that
invalid members and the order of a group change nothing with every stage on; the product of the multipliers; anchors,
GDPO order, own stages, entropy, ratios of anchors; and refused combinations. Single stages have their own files.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data.errors import RequestError, RunError
from data.records import Kind
from tests.trainer import own_stage_examples as examples
from trainer.advantage import group_advantages
from trainer.aggregation import token_weights
from trainer.gate import Gate, GateKind, RankerScores
from trainer.losses import UpdateInputs, token_inputs, token_loss
from trainer.members import KIND_CODE, PADDING, Members
from trainer.objective import Coefficients, objective_coefficients
from trainer.objective_settings import ObjectiveSettings, Ratio, RewardOrder, StdMode
from trainer.own_stages import check_stage, own_multipliers
from trainer.several_rewards import several_advantages
from trainer.signals import Signals

TOKENS = 3
PROMPTS = 5
GROUP = 6
TRUTH, ANCHOR = GROUP, GROUP + 1
SLOTS = GROUP + 2
WHERE = "tests.trainer.own_stage_examples"


class Batch:
    """Random groups: six rollouts, a ground truth and an anchor per prompt, where the row has one."""

    def __init__(self, seed: int, *, anchored: bool) -> None:
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        kind_PG = torch.zeros(PROMPTS, SLOTS, dtype=torch.int64)
        kind_PG[:, TRUTH] = KIND_CODE[Kind.GROUND_TRUTH]
        kind_PG[:, ANCHOR] = KIND_CODE[Kind.ANCHOR]
        valid_PG = torch.ones(PROMPTS, SLOTS, dtype=torch.bool)
        valid_PG[1, 4] = False
        valid_PG[:, ANCHOR] = torch.tensor([True, True, False, True, False]) & anchored
        self.responded_P = torch.tensor([True, False, False, False, False])
        valid_PG[:, TRUTH] = ~valid_PG[:, ANCHOR] | self.responded_P
        length_PG = torch.randint(1, TOKENS + 1, (PROMPTS, SLOTS), generator=generator)
        segment_PGT = torch.where(torch.arange(TOKENS) < length_PG.unsqueeze(-1), 0, PADDING)
        self.members = Members(valid_PG=valid_PG, kind_PG=kind_PG, segment_PGT=segment_PGT)
        hit_PG = torch.zeros(PROMPTS, SLOTS, dtype=torch.bool)
        hit_PG[0, 2] = hit_PG[3, 0] = True
        hit_PG[:, TRUTH] = True
        matched_PG = torch.zeros(PROMPTS, SLOTS, dtype=torch.bool)
        matched_PG[3, 0] = True
        matched_PG[:, ANCHOR] = True
        self.reward_PG = (hit_PG & valid_PG).float()
        self.reward_PG[:, TRUTH:] = 0
        self.logits = normal(PROMPTS, SLOTS, TOKENS, 7)
        logp_PGT = torch.log_softmax(self.logits, -1)[..., 0].masked_fill(segment_PGT == PADDING, 0.0)
        self.signals = Signals(
            hit_PG=hit_PG,
            logp_PGT=logp_PGT,
            engine_logp_PGT=logp_PGT + 0.1 * normal(PROMPTS, SLOTS, TOKENS),
            certainty_PGT=normal(PROMPTS, SLOTS, TOKENS).abs(),
            choices_PGT=torch.full((PROMPTS, SLOTS, TOKENS), 7.0),
            part_PG={"item_match": self.reward_PG, "ranker_score": normal(PROMPTS, SLOTS) * 9},
            part_weight={"item_match": 1.0, "ranker_score": 0.5},
            ranker=RankerScores(
                normal(PROMPTS, SLOTS),
                torch.full((PROMPTS,), 9.0),
                normal(PROMPTS, 3) - 9,
                torch.ones(PROMPTS, 3, dtype=torch.bool),
            ),
            truth_logp_P=logp_PGT[:, TRUTH].sum(-1),
            matched_PG=matched_PG,
            formatted_PG=torch.ones(PROMPTS, SLOTS, dtype=torch.bool),
            responded_P=self.responded_P,
            anchor_logp0_P=normal(PROMPTS) - 3,
        )

    def coefficients(self, objective: ObjectiveSettings, **state: Any) -> tuple[Coefficients, dict[str, float]]:
        return objective_coefficients(self.members, self.reward_PG, objective, TOKENS, signals=self.signals, **state)

    def loss(self, objective: ObjectiveSettings, drift: float = 0.0) -> tuple[Tensor, Tensor]:
        """Loss and its gradient with respect to the logits, as the learner computes them."""
        return loss_of(self, self.coefficients(objective)[0], objective, drift)


def loss_of(
    batch: Batch, found: Coefficients, objective: ObjectiveSettings, drift: float = 0.0
) -> tuple[Tensor, Tensor]:
    shape = found.advantage_PGT.shape
    old = batch.signals.logp_PGT
    assert old is not None
    inputs = UpdateInputs(
        advantage_PGT=found.advantage_PGT.numpy(),
        old_logp_PGT=(old + drift).numpy(),
        ref_logp_PGT=(old - 0.2).numpy() if objective.beta else None,
        policy_weight_PGT=found.policy_weight_PGT.numpy(),
        kl_weight_PGT=found.kl_weight_PGT.numpy(),
        nll_weight_PGT=found.nll_weight_PGT.numpy(),
        ratio=objective.ratio,
        entropy_weight_PGT=None if found.entropy_weight_PGT is None else found.entropy_weight_PGT.numpy(),
        detached_PGT=None if found.detached_PGT is None else found.detached_PGT.numpy(),
    )
    slot_K = torch.arange(int(np.prod(shape)))
    logits = batch.logits.clone().requires_grad_(True)
    log_p = torch.log_softmax(logits, -1)
    logp_K = log_p[..., 0].reshape(-1)
    entropy_K = -(log_p.exp() * log_p).sum(-1).reshape(-1)
    loss, _ = token_loss(logp_K, logp_K - 0.5, token_inputs(inputs, slot_K, slot_K // shape[2]), entropy_K)
    torch.autograd.backward(loss)
    assert logits.grad is not None
    return loss.detach(), logits.grad


@given(seed=st.integers(0, 10**6), beta=st.sampled_from([0.0, 0.04]))
@settings(max_examples=25, deadline=None)
def test_closed_gates_leave_exactly_the_nll(seed: int, beta: float) -> None:
    batch = Batch(seed, anchored=False)
    batch.signals = Signals(**{**vars(batch.signals), "ranker": constant_ranker(), "logp_PGT": batch.signals.logp_PGT})
    gated = ObjectiveSettings(gate=Gate(kind=GateKind.ADAGRPO), nll_weight=0.7, beta=beta, entropy_weight=0.1)
    nll = ObjectiveSettings(nll_weight=0.7, policy_weight=0.0)
    found, metrics = batch.coefficients(gated)
    assert metrics["gate/open"] == 0
    assert metrics["groups/live_share"] == 0
    assert not found.policy_weight_PGT.any()
    loss, gradient = batch.loss(gated)
    exact, exact_gradient = batch.loss(nll)
    assert torch.equal(loss, exact)
    assert torch.equal(gradient, exact_gradient)
    assert exact != 0


def constant_ranker() -> RankerScores:
    return RankerScores(
        torch.ones(PROMPTS, SLOTS),
        torch.ones(PROMPTS),
        torch.ones(PROMPTS, 3),
        torch.ones(PROMPTS, 3, dtype=torch.bool),
    )


def test_a_closed_gate_skips_values_that_are_not_finite() -> None:
    batch = Batch(0, anchored=False)
    batch.signals = Signals(**{**vars(batch.signals), "ranker": constant_ranker()})
    objective = ObjectiveSettings(gate=Gate(kind=GateKind.ADAGRPO), nll_weight=1.0)
    found, _ = batch.coefficients(objective)
    broken = found._replace(advantage_PGT=torch.full_like(found.advantage_PGT, torch.nan))
    loss, gradient = loss_of(batch, broken, objective)
    exact, exact_gradient = loss_of(batch, found, objective)
    assert torch.equal(loss, exact)
    assert torch.equal(gradient, exact_gradient)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=25, deadline=None)
def test_open_gates_equal_the_fixed_mixture(seed: int) -> None:
    batch = Batch(seed, anchored=False)
    opened = Gate(kind=GateKind.HARD, tau=0.01)
    batch.signals = Signals(**{**vars(batch.signals), "truth_logp_P": torch.full((PROMPTS,), -torch.inf)})
    gated = ObjectiveSettings(gate=opened, nll_weight=0.5, policy_weight=0.25, beta=0.1)
    assert batch.coefficients(gated)[1]["gate/open"] == 1
    loss, gradient = batch.loss(gated)
    exact, exact_gradient = batch.loss(ObjectiveSettings(nll_weight=0.5, policy_weight=0.25, beta=0.1))
    assert torch.equal(loss, exact)
    assert torch.equal(gradient, exact_gradient)


@given(seed=st.integers(0, 10**6), ratio=st.sampled_from(Ratio), drift=st.sampled_from([0.0, 0.15, -0.4]))
@settings(max_examples=30, deadline=None)
def test_identity_stages_are_grpo_bit_for_bit(seed: int, ratio: Ratio, drift: float) -> None:
    batch = Batch(seed, anchored=False)
    objective = ObjectiveSettings(ratio=ratio)
    loss, gradient = batch.loss(objective, drift)
    rollouts = Members(
        valid_PG=batch.members.rollout_PG, kind_PG=batch.members.kind_PG, segment_PGT=batch.members.segment_PGT
    )
    advantage_PG, live_P = group_advantages(rollouts, batch.reward_PG, StdMode.SAMPLE, 1e-4)
    weight_PGT = token_weights(rollouts, objective.aggregation, TOKENS)
    plain = Coefficients(
        advantage_PGT=advantage_PG.unsqueeze(-1) * rollouts.token_mask_PGT,
        policy_weight_PGT=weight_PGT,
        kl_weight_PGT=torch.zeros_like(weight_PGT),
        nll_weight_PGT=torch.zeros_like(weight_PGT),
        live_P=live_P,
    )
    exact, exact_gradient = loss_of(batch, plain, objective, drift)
    assert torch.equal(loss, exact)
    assert torch.equal(gradient, exact_gradient)


EVERYTHING = ObjectiveSettings.model_validate(
    {
        "nll_weight": 0.3,
        "beta": 0.02,
        "entropy_weight": 0.01,
        "window": {"kind": "soft", "anchor_rank": 2, "mass": 1.5},
        "gate": {"kind": "inverted"},
        "anchor": {"mode": "append", "clip": 3.0},
        "tempering": {"mode": "soften_confident"},
        "truncation": {"level": "sequence"},
        "stages": [f"{WHERE}:steady"],
        "max_distrust": 3,
    }
)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=20, deadline=None)
def test_order_and_invalid_members_change_nothing_with_every_stage_on(seed: int) -> None:
    batch = Batch(seed, anchored=True)
    order = torch.randperm(SLOTS, generator=torch.Generator().manual_seed(seed))
    plain, metrics = batch.coefficients(EVERYTHING)
    permuted, same = objective_coefficients(
        Members(
            valid_PG=batch.members.valid_PG[:, order],
            kind_PG=batch.members.kind_PG[:, order],
            segment_PGT=batch.members.segment_PGT[:, order],
        ),
        batch.reward_PG[:, order],
        EVERYTHING,
        TOKENS,
        signals=batch.signals.take_members(order),
    )
    spoiled_PG = torch.where(batch.members.valid_PG, batch.reward_PG, torch.tensor(1e6))
    spoiled, _ = objective_coefficients(batch.members, spoiled_PG, EVERYTHING, TOKENS, signals=batch.signals)
    for name in ("advantage_PGT", "policy_weight_PGT", "kl_weight_PGT", "nll_weight_PGT", "entropy_weight_PGT"):
        value = getattr(plain, name)
        torch.testing.assert_close(getattr(permuted, name), value[:, order], rtol=1e-5, atol=1e-6)
        assert torch.equal(getattr(spoiled, name), value), name
        assert not value[~batch.members.valid_PG].any()
    # The sum of the advantages is what float32 leaves of terms of either sign.
    assert same == pytest.approx(metrics, rel=1e-5, abs=1e-5)


def test_the_multipliers_are_a_product_and_the_anchor_keeps_the_window_weight_one() -> None:
    batch = Batch(4, anchored=True)
    names = ("tempering", "window", "stages")
    whole = {**EVERYTHING.model_dump(mode="json"), "gate": {}, "truncation": {}}

    def advantages(*on: str, snips: str = "none") -> Tensor:
        kept = {key: value for key, value in whole.items() if key not in names or key in on}
        kept["anchor"] = {**whole["anchor"], "snips": snips}
        return batch.coefficients(ObjectiveSettings.model_validate(kept))[0].advantage_PGT

    plain = advantages()
    product = plain.clone()
    for one in (advantages("tempering"), advantages("window"), advantages("stages"), advantages(snips="advantage")):
        product = product * torch.where(plain != 0, one / plain, 0.0)
    torch.testing.assert_close(advantages(*names, snips="advantage"), product, rtol=1e-5, atol=1e-7)
    windowed = advantages("window")
    assert torch.equal(windowed[:, ANCHOR], plain[:, ANCHOR])
    torch.testing.assert_close(advantages("tempering")[[0, 2, 4]], plain[[0, 2, 4]], rtol=0, atol=0)


def test_the_anchor_weight_multiplies_the_anchors_alone() -> None:
    batch = Batch(4, anchored=True)
    off = {"anchor": {"mode": "append", "snips": "none"}}
    weighed = {"anchor": {"mode": "append", "snips": "advantage", "moving_below": 0}}
    plain, found = (batch.coefficients(ObjectiveSettings.model_validate(on))[0].advantage_PGT for on in (off, weighed))
    assert torch.equal(found[:, :ANCHOR], plain[:, :ANCHOR])
    rows = batch.members.valid_PG[:, ANCHOR]
    logp_PGT, logp0_P = batch.signals.logp_PGT, batch.signals.anchor_logp0_P
    assert logp_PGT is not None
    assert logp0_P is not None
    ratio = (logp_PGT[rows, ANCHOR].sum(-1) - logp0_P[rows]).exp().clamp_max(10.0)
    expected = plain[rows, ANCHOR] * (ratio / ratio.mean())[:, None]
    torch.testing.assert_close(found[rows, ANCHOR], expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(found[rows, ANCHOR], plain[rows, ANCHOR])


def test_anchors_are_counted_weighed_and_remembered() -> None:
    batch = Batch(1, anchored=True)
    objective = ObjectiveSettings.model_validate({"anchor": {"mode": "append"}, "nll_weight": 0.1})
    found, metrics = batch.coefficients(objective)
    assert metrics["anchor/count"] == 3
    assert metrics["anchor/silent_share"] == pytest.approx(2 / 5)
    assert metrics["groups/members"] == pytest.approx((5 * GROUP - 1 + 3) / 5)
    assert found.anchor_log_mean == pytest.approx(math.log(metrics["anchor/weight_mean"]))
    assert found.detached_PGT is not None
    assert found.detached_PGT[:, ANCHOR].any()
    assert not found.detached_PGT[:, :ANCHOR].any()
    later, _ = batch.coefficients(objective, anchor_log_mean=5.0)
    assert later.anchor_log_mean is not None
    assert later.anchor_log_mean > 4.5
    ratio_one = batch.loss(objective, drift=0.0)
    drifted = batch.loss(objective, drift=-0.9)
    assert torch.equal(ratio_one[1][[0, 1, 3], ANCHOR], drifted[1][[0, 1, 3], ANCHOR])
    old = ObjectiveSettings.model_validate({"anchor": {"mode": "append", "ratio": "old"}, "nll_weight": 0.1})
    assert not torch.equal(batch.loss(old, drift=-0.9)[1][[0, 1, 3], ANCHOR], ratio_one[1][[0, 1, 3], ANCHOR])


def test_a_detached_ratio_has_the_gradient_of_the_log_probability() -> None:
    batch = Batch(2, anchored=True)
    objective = ObjectiveSettings.model_validate({"anchor": {"mode": "append"}, "policy_weight": 1.0})
    found, _ = batch.coefficients(objective)
    _, gradient = loss_of(batch, found, objective, drift=3.0)
    logits = batch.logits.clone().requires_grad_(True)
    logp = torch.log_softmax(logits, -1)[..., 0]
    torch.autograd.backward(-(found.policy_weight_PGT * found.advantage_PGT * logp)[:, ANCHOR].sum())
    assert logits.grad is not None
    torch.testing.assert_close(gradient[:, ANCHOR], logits.grad[:, ANCHOR], rtol=1e-6, atol=1e-8)


def test_without_the_anchor_stage_anchors_take_no_part() -> None:
    found, metrics = Batch(1, anchored=True).coefficients(ObjectiveSettings())
    assert not found.policy_weight_PGT[:, ANCHOR].any()
    assert "anchor/count" not in metrics


def test_snips_on_the_reward_scales_the_anchor_alone() -> None:
    batch = Batch(6, anchored=True)
    whole = {"std_mode": "none", "anchor": {"mode": "append", "snips": "reward", "moving_below": 0}}
    found, _ = batch.coefficients(ObjectiveSettings.model_validate(whole))
    plain = {**whole, "anchor": {"mode": "append", "snips": "none"}}
    exact, _ = batch.coefficients(ObjectiveSettings.model_validate(plain))
    assert torch.equal(found.advantage_PGT[[2, 4]], exact.advantage_PGT[[2, 4]])
    assert not torch.equal(found.advantage_PGT[[0, 1, 3]], exact.advantage_PGT[[0, 1, 3]])


def test_gdpo_normalises_each_reward_before_the_sum() -> None:
    batch = Batch(3, anchored=False)
    rollouts = Members(
        valid_PG=batch.members.rollout_PG, kind_PG=batch.members.kind_PG, segment_PGT=batch.members.segment_PGT
    )
    parts = {name: part.double() for name, part in batch.signals.part_PG.items()}
    weights = {"item_match": 1.0, "ranker_score": 0.5}
    found, live = several_advantages(rollouts, parts, weights, StdMode.SAMPLE, 1e-4)
    total = sum(weights[n] * group_advantages(rollouts, p, StdMode.SAMPLE, 1e-4).advantage_PG for n, p in parts.items())
    assert isinstance(total, Tensor)
    own = total[rollouts.valid_PG]
    torch.testing.assert_close(found[rollouts.valid_PG], own / (own.std() + 1e-4))
    assert live.all()
    scaled, _ = several_advantages(
        rollouts, {**parts, "ranker_score": parts["ranker_score"] * 1000}, weights, StdMode.SAMPLE, 1e-9
    )
    exact, _ = several_advantages(rollouts, parts, weights, StdMode.SAMPLE, 1e-9)
    torch.testing.assert_close(scaled, exact, rtol=1e-6, atol=1e-7)
    off, alive = several_advantages(rollouts, parts, {"item_match": 1.0}, StdMode.SAMPLE, 1e-4)
    assert alive.tolist() == [True, False, False, True, False]
    assert not off[[1, 2, 4]].any()
    composed, _ = batch.coefficients(ObjectiveSettings(reward_order=RewardOrder.GDPO))
    torch.testing.assert_close(composed.advantage_PGT[..., 0].double(), found, rtol=1e-4, atol=1e-6)


def test_entropy_is_raised() -> None:
    batch = Batch(5, anchored=False)
    plain, _ = batch.loss(ObjectiveSettings())
    bonus, _ = batch.loss(ObjectiveSettings(entropy_weight=0.5))
    weight = token_weights(
        Members(
            valid_PG=batch.members.rollout_PG, kind_PG=batch.members.kind_PG, segment_PGT=batch.members.segment_PGT
        ),
        ObjectiveSettings().aggregation,
        TOKENS,
    )
    log_p = torch.log_softmax(batch.logits, -1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    assert float(bonus) == pytest.approx(float(plain - 0.5 * (weight * entropy).sum()), abs=1e-5)


def test_absent_signals_are_a_mistake_and_told() -> None:
    members = Batch(0, anchored=False).members
    for objective in (
        ObjectiveSettings.model_validate({"window": {"kind": "soft"}}),
        ObjectiveSettings.model_validate({"gate": {"kind": "adagrpo"}, "nll_weight": 1.0}),
        ObjectiveSettings.model_validate({"anchor": {"mode": "append"}}),
        ObjectiveSettings.model_validate({"truncation": {"level": "token"}}),
    ):
        with pytest.raises(ValueError, match="the loop did not provide"):
            objective_coefficients(members, torch.zeros(PROMPTS, SLOTS), objective, TOKENS)


@pytest.mark.parametrize(
    ("content", "where", "why"),
    [
        ({"gate": {"kind": "hard"}}, "objective.nll_weight", "closed has the NLL alone"),
        ({"policy_weight": 0.0}, "objective.policy_weight", "nothing would train"),
        ({"tempering": {"mode": "trust_confident"}}, "objective.tempering.mode", "only rows with a logged item"),
        (
            {"anchor": {"mode": "append"}, "tempering": {"mode": "trust_confident", "target": "reward"}},
            "objective.std_mode",
            "would be lost",
        ),
        ({"anchor": {"mode": "append", "snips": "reward"}}, "objective.std_mode", "would be lost"),
        ({"anchor": {"mode": "append"}, "reward_order": "gdpo"}, "objective.reward_order", "feedback is one reward"),
    ],
)
def test_senseless_combinations_are_refused_with_the_reason(content: dict[str, Any], where: str, why: str) -> None:
    with pytest.raises(RequestError) as error:
        ObjectiveSettings.model_validate(content)
    assert error.value.where == where
    assert why in str(error.value)


def test_the_contract_of_own_stages() -> None:
    for kept in ("steady", "curious"):
        check_stage(f"{WHERE}:{kept}")
    for broken, words in examples.BROKEN.items():
        with pytest.raises(AssertionError, match=words):
            check_stage(f"{WHERE}:{broken}")


def test_own_stages_are_found_and_watched() -> None:
    batch = Batch(0, anchored=False)
    advantage = torch.randn(PROMPTS, SLOTS)
    for path in ("nowhere:stage", f"{WHERE}:absent", f"{WHERE}:BROKEN", f"{WHERE}:lonely", "colonless"):
        with pytest.raises(RequestError, match=r"objective\.stages"):
            own_multipliers(path, batch.members, batch.signals, advantage)
    for path in ("negative", "flat", "toneless"):
        with pytest.raises(RunError, match=path):
            own_multipliers(f"{WHERE}:{path}", batch.members, batch.signals, advantage)
