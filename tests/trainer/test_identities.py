"""Identities of methods.md section 8 items 10 and 12 through the learner's loss: what must not matter does not.

Identity stages give a reference GRPO, written here in plain torch, bit for bit in loss and gradient; a closed gate
gives the reference NLL bit for bit; further invalid members, more padding and another order of a group change neither,
with every stage on. docs/methods.md lists which test proves which identity of the other items.
"""

from __future__ import annotations

from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data.records import Kind
from tests.trainer.test_composition import EVERYTHING, PROMPTS, SLOTS, TOKENS, Batch, constant_ranker
from trainer.gate import Gate, GateKind
from trainer.members import KIND_CODE, PADDING, Members
from trainer.objective_settings import ObjectiveSettings
from trainer.signals import Signals

SEEDS = st.integers(0, 10**6)


def leaf_and_logp(batch: Batch) -> tuple[Tensor, Tensor]:
    logits = batch.logits.clone().requires_grad_(True)
    return logits, torch.log_softmax(logits, -1)[..., 0]


def tokens_of(batch: Batch, kind: Kind) -> Tensor:
    """Tokens of the valid members of a kind."""
    of_kind_PG = batch.members.valid_PG & (batch.members.kind_PG == KIND_CODE[kind])
    return (batch.members.segment_PGT != PADDING) & of_kind_PG.unsqueeze(-1)


def reference_grpo(batch: Batch, drift: float) -> tuple[Tensor, Tensor]:
    """GRPO's loss and gradient by the formulas of methods.md section 0, with none of our stages."""
    mask_PGT = tokens_of(batch, Kind.ROLLOUT)
    advantage_PG = torch.zeros_like(batch.reward_PG)
    for prompt, valid_G in enumerate(mask_PGT.any(-1)):
        reward = batch.reward_PG[prompt, valid_G].double()
        if reward.max() > reward.min():
            advantage_PG[prompt, valid_G] = ((reward - reward.mean()) / (reward.std() + 1e-4)).float()
    group_P11 = mask_PGT.any(-1).sum(1)[:, None, None]
    weight_PGT = mask_PGT.float() / (PROMPTS * group_P11) / mask_PGT.sum(-1, keepdim=True).clamp_min(1)
    logits, logp_PGT = leaf_and_logp(batch)
    old_PGT = batch.signals.logp_PGT
    assert old_PGT is not None
    rho_PGT = torch.where(mask_PGT, logp_PGT - (old_PGT + drift), 0.0).exp()
    surrogate_PGT = torch.minimum(
        rho_PGT * advantage_PG.unsqueeze(-1), rho_PGT.clamp(0.8, 1.2) * advantage_PG.unsqueeze(-1)
    )
    loss = (weight_PGT * -surrogate_PGT).reshape(-1).sum()
    torch.autograd.backward(loss)
    assert logits.grad is not None
    return loss.detach(), logits.grad


@given(seed=SEEDS, drift=st.sampled_from([0.0, 0.15, -0.4]))
@settings(max_examples=40, deadline=None)
def test_identity_stages_are_the_reference_grpo_bit_for_bit(seed: int, drift: float) -> None:
    batch = Batch(seed, anchored=False)
    loss, gradient = batch.loss(ObjectiveSettings(), drift)
    exact, exact_gradient = reference_grpo(batch, drift)
    assert torch.equal(loss, exact)
    assert torch.equal(gradient, exact_gradient)
    assert gradient.any()


@given(seed=SEEDS, beta=st.sampled_from([0.0, 0.1]))
@settings(max_examples=25, deadline=None)
def test_gates_closed_everywhere_are_the_reference_nll_bit_for_bit(seed: int, beta: float) -> None:
    batch = Batch(seed, anchored=False)
    batch.signals = Signals(**{**vars(batch.signals), "ranker": constant_ranker()})
    gated = ObjectiveSettings(gate=Gate(kind=GateKind.ADAGRPO), nll_weight=0.7, beta=beta, entropy_weight=0.1)
    loss, gradient = batch.loss(gated)
    mask = tokens_of(batch, Kind.GROUND_TRUTH).float()
    weight = mask / mask.sum(-1, keepdim=True).clamp_min(1) / PROMPTS * 0.7
    logits, logp = leaf_and_logp(batch)
    # `loss_of` takes log p - 0.5 for the full vocabulary's.
    exact = (weight * torch.where(weight != 0, -(logp - 0.5), 0.0)).reshape(-1).sum()
    torch.autograd.backward(exact)
    assert torch.equal(loss, exact.detach())
    assert logits.grad is not None
    assert torch.equal(gradient, logits.grad)


def taken(batch: Batch, order: Tensor) -> Batch:
    """The batch with the members of `order`; what comes a second time is invalid, with rewards that are no numbers."""
    other = Batch(0, anchored=False)
    again = torch.tensor([int(slot) in order[:place].tolist() for place, slot in enumerate(order)])
    other.members = Members(
        valid_PG=batch.members.valid_PG[:, order] & ~again,
        kind_PG=batch.members.kind_PG[:, order],
        segment_PGT=batch.members.segment_PGT[:, order],
    )
    other.reward_PG = batch.reward_PG[:, order].masked_fill(again, torch.nan)
    other.signals = batch.signals.take_members(order)
    other.logits = batch.logits[:, order]
    return other


CHANGES: list[dict[str, Any]] = [
    {},
    {"window": {"kind": "hard", "anchor_rank": 1, "mass": 2.0}, "aggregation": "token_mean", "ratio": "sequence"},
    {"gate": {"kind": "hard"}, "anchor": {"mode": "append", "ratio": "old"}, "aggregation": "fixed_length"},
]


def check_taken(seed: int, changes: dict[str, Any], order: list[int]) -> None:
    """Loss and gradient of the batch with the members of `order` are those of the batch."""
    objective = ObjectiveSettings.model_validate({**EVERYTHING.model_dump(mode="json"), **changes})
    batch = Batch(seed, anchored=True)
    loss, gradient = batch.loss(objective, 0.1)
    same, same_gradient = taken(batch, torch.tensor(order)).loss(objective, 0.1)
    torch.testing.assert_close(same, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(same_gradient[:, :SLOTS], gradient[:, order[:SLOTS]], rtol=1e-4, atol=1e-6)
    assert not same_gradient[:, SLOTS:].any()


@given(seed=SEEDS, changes=st.sampled_from(CHANGES), order=st.permutations(range(SLOTS)))
@settings(max_examples=30, deadline=None)
def test_another_order_changes_neither_loss_nor_gradient(seed: int, changes: dict[str, Any], order: list[int]) -> None:
    check_taken(seed, changes, order)


@given(
    seed=SEEDS, changes=st.sampled_from(CHANGES), further=st.lists(st.integers(0, SLOTS - 1), min_size=1, max_size=4)
)
@settings(max_examples=30, deadline=None)
def test_more_invalid_members_change_neither_loss_nor_gradient(
    seed: int, changes: dict[str, Any], further: list[int]
) -> None:
    check_taken(seed, changes, [*range(SLOTS), *further])


@given(seed=SEEDS, changes=st.sampled_from(CHANGES), further=st.integers(1, 4))
@settings(max_examples=25, deadline=None)
def test_more_padding_changes_neither_loss_nor_gradient(seed: int, changes: dict[str, Any], further: int) -> None:
    objective = ObjectiveSettings.model_validate({**EVERYTHING.model_dump(mode="json"), **changes})
    batch = Batch(seed, anchored=True)
    padded = Batch(seed, anchored=True)

    def wide(value: Tensor, fill: float) -> Tensor:
        return torch.cat([value, torch.full((PROMPTS, SLOTS, further, *value.shape[3:]), fill).to(value.dtype)], 2)

    members = batch.members
    padded.members = Members(
        valid_PG=members.valid_PG, kind_PG=members.kind_PG, segment_PGT=wide(members.segment_PGT, PADDING)
    )
    padded.logits = wide(batch.logits, 1.0)
    fields = {name: value for name, value in vars(batch.signals).items() if name.endswith("_PGT")}
    padded.signals = Signals(**{**vars(batch.signals), **{name: wide(value, 7.0) for name, value in fields.items()}})
    loss, gradient = batch.loss(objective, 0.1)
    same, same_gradient = padded.loss(objective, 0.1)
    torch.testing.assert_close(same, loss, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(same_gradient[:, :, :TOKENS], gradient, rtol=1e-5, atol=1e-7)
    assert not same_gradient[:, :, TOKENS:].any()
