"""The learner's token loss, against the formulas in Python floats and against closed-form gradients.

Checks every term, ratio and clip on random tokens, the statistics, tokens without weight, and methods.md section 8
items 1 and 2 by autograd on a tabular softmax policy: GRPO's gradient is that of the linear AUC, also with clips, and
groups without variance have none. Does not check where coefficients and log-probabilities come from:
tests/trainer/test_composition.py and test_trees.py; nor TRL's opinion: test_trl_equality.py.
"""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from trainer.advantage import group_advantages
from trainer.losses import UpdateInputs, join_statistics, token_inputs, token_loss, update_metrics
from trainer.members import Members
from trainer.objective_settings import Ratio, StdMode

PROMPTS, GROUP, TOKENS = 2, 3, 4
SHAPE = (PROMPTS, GROUP, TOKENS)
SLOT_K = torch.arange(PROMPTS * GROUP * TOKENS)
UNIT_K = SLOT_K // TOKENS


def random_inputs(seed: int, ratio: Ratio) -> UpdateInputs:
    """Coefficients with zero weights among them, two items per completion, and anchors in the last member."""
    random = np.random.default_rng(seed)

    def weights() -> np.ndarray:
        return (random.random(SHAPE) * (random.random(SHAPE) < 0.8)).astype(np.float32)

    detached = np.zeros(SHAPE, np.bool_)
    detached[:, -1] = True
    return UpdateInputs(
        advantage_PGT=random.normal(size=SHAPE).astype(np.float32),
        old_logp_PGT=(-3 * random.random(SHAPE)).astype(np.float32),
        ref_logp_PGT=(-3 * random.random(SHAPE)).astype(np.float32),
        policy_weight_PGT=weights(),
        kl_weight_PGT=weights(),
        nll_weight_PGT=weights(),
        ratio=ratio,
        clip_low=0.2,
        clip_high=0.28,
        segment_PGT=np.broadcast_to(np.array([0, 0, 1, 1], np.int32), SHAPE).copy(),
        entropy_weight_PGT=weights(),
        detached_PGT=detached,
    )


def written_out(logp: list[float], full: list[float], entropy: list[float], inputs: UpdateInputs) -> dict[str, float]:
    """Loss and clip counts by a loop over tokens."""
    flat = {
        field.name: value.reshape(-1).tolist()
        for field in dataclasses.fields(inputs)
        if isinstance(value := getattr(inputs, field.name), np.ndarray)
    }
    weight, old, advantage = flat["policy_weight_PGT"], flat["old_logp_PGT"], flat["advantage_PGT"]
    gap = [0.0 if flat["detached_PGT"][k] else logp[k] - old[k] for k in range(len(logp))]
    unit = {
        Ratio.TOKEN: list(range(len(logp))),
        Ratio.ITEM: [(k // TOKENS, flat["segment_PGT"][k]) for k in range(len(logp))],
        Ratio.SEQUENCE: [k // TOKENS for k in range(len(logp))],
    }[inputs.ratio]
    found = {"loss": 0.0, "clip_high": 0.0, "clip_low": 0.0, "ratio": 0.0}
    for k in range(len(logp)):
        if weight[k]:
            fellows = [gap[j] for j in range(len(logp)) if weight[j] and unit[j] == unit[k]]
            rho = math.exp(sum(fellows) / len(fellows))
            clipped = min(max(rho, 1 - inputs.clip_low), 1 + inputs.clip_high)
            found["loss"] -= weight[k] * min(rho * advantage[k], clipped * advantage[k])
            found["ratio"] += rho
            found["clip_high"] += rho > 1 + inputs.clip_high and advantage[k] > 0
            found["clip_low"] += rho < 1 - inputs.clip_low and advantage[k] < 0
        difference = flat["ref_logp_PGT"][k] - logp[k]
        found["loss"] += flat["kl_weight_PGT"][k] * (math.exp(difference) - difference - 1)
        found["loss"] -= flat["nll_weight_PGT"][k] * full[k] + flat["entropy_weight_PGT"][k] * entropy[k]
    return found


def random_tokens(seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    logp_K, full_K, entropy_K = (-3 * torch.rand(len(SLOT_K), generator=generator) for _ in range(3))
    return logp_K.requires_grad_(), full_K.requires_grad_(), (-entropy_K).requires_grad_()


@given(seed=st.integers(0, 10**6), ratio=st.sampled_from(Ratio))
@settings(max_examples=60, deadline=None)
def test_the_loss_equals_the_formulas(seed: int, ratio: Ratio) -> None:
    inputs = random_inputs(seed, ratio)
    tokens = random_tokens(seed)
    loss, statistics = token_loss(*tokens[:2], token_inputs(inputs, SLOT_K, UNIT_K), tokens[2])
    logp, full, entropy = (value.tolist() for value in tokens)
    expected = written_out(logp, full, entropy, inputs)
    assert loss.item() == pytest.approx(expected["loss"], rel=1e-5, abs=1e-5)
    for name in ("clip_high", "clip_low"):
        assert statistics[name] == expected[name]
    assert statistics["ratio"] == pytest.approx(expected["ratio"], rel=1e-5)
    assert statistics["loss"] == pytest.approx(loss.item())
    assert statistics["policy_tokens"] == np.count_nonzero(inputs.policy_weight_PGT)
    assert statistics["nll_tokens"] == np.count_nonzero(inputs.nll_weight_PGT)
    assert statistics["kl_tokens"] == np.count_nonzero(inputs.kl_weight_PGT)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=40, deadline=None)
def test_gradients_equal_their_closed_forms(seed: int) -> None:
    inputs = random_inputs(seed, Ratio.TOKEN)
    logp_K, full_K, entropy_K = random_tokens(seed)
    picked = token_inputs(inputs, SLOT_K, UNIT_K)
    loss, _ = token_loss(logp_K, full_K, picked, entropy_K)
    torch.autograd.backward(loss)
    assert picked.detached_K is not None
    assert picked.ref_logp_K is not None
    old_K = torch.where(picked.detached_K, logp_K, picked.old_logp_K)
    rho_K = (logp_K - old_K).exp().detach()
    advantage_K = picked.advantage_K
    clipped_K = ((rho_K > 1.28) & (advantage_K > 0)) | ((rho_K < 0.8) & (advantage_K < 0))
    policy_K = torch.where(clipped_K, 0.0, -picked.policy_weight_K * rho_K * advantage_K)
    kl_K = picked.kl_weight_K * (1 - (picked.ref_logp_K - logp_K).exp())
    assert logp_K.grad is not None
    torch.testing.assert_close(logp_K.grad, (policy_K + kl_K).detach(), rtol=1e-5, atol=1e-6)
    assert full_K.grad is not None
    assert torch.equal(full_K.grad, -picked.nll_weight_K)
    assert entropy_K.grad is not None
    assert picked.entropy_weight_K is not None
    assert torch.equal(entropy_K.grad, -picked.entropy_weight_K)


@given(seed=st.integers(0, 10**6), ratio=st.sampled_from(Ratio))
@settings(max_examples=30, deadline=None)
def test_tokens_without_weight_take_no_part(seed: int, ratio: Ratio) -> None:
    inputs = random_inputs(seed, ratio)
    off = inputs.policy_weight_PGT == 0
    without = dataclasses.replace(inputs, kl_weight_PGT=inputs.kl_weight_PGT * ~off)
    spoiled = dataclasses.replace(
        without,
        advantage_PGT=np.where(off, np.nan, inputs.advantage_PGT),
        old_logp_PGT=np.where(off, -np.inf, inputs.old_logp_PGT),
        ref_logp_PGT=np.where(off, np.inf, inputs.ref_logp_PGT),
    )
    found = []
    for given_inputs in (without, spoiled):
        logp_K, full_K, entropy_K = random_tokens(seed)
        loss, _ = token_loss(logp_K, full_K, token_inputs(given_inputs, SLOT_K, UNIT_K), entropy_K)
        torch.autograd.backward(loss)
        found.append((loss.detach(), logp_K.grad))
    assert torch.equal(found[0][0], found[1][0])
    assert found[0][1] is not None
    assert found[1][1] is not None
    assert torch.equal(found[0][1], found[1][1])


def everyone(group: int) -> Members:
    return Members(
        valid_PG=torch.ones(1, group, dtype=torch.bool),
        kind_PG=torch.zeros(1, group, dtype=torch.int64),
        segment_PGT=torch.zeros(1, group, TOKENS, dtype=torch.int64),
    )


def grpo_gradient(logits: Tensor, chosen: Tensor, hits: list[bool], mode: StdMode, eps: float, drift: Tensor) -> Tensor:
    """Gradient of the learner's loss for one group of a tabular policy `[G, T, V]` with sequence means."""
    group = len(hits)
    advantage_PG, _ = group_advantages(everyone(group), torch.tensor([hits], dtype=torch.float64), mode, eps)
    leaf = logits.clone().requires_grad_(True)
    logp = torch.log_softmax(leaf, -1).gather(-1, chosen.unsqueeze(-1))[..., 0]
    zeros = torch.zeros(1, group, TOKENS)
    inputs = UpdateInputs(
        advantage_PGT=(advantage_PG.unsqueeze(-1) + zeros).float().numpy(),
        old_logp_PGT=(logp.detach() - drift)[None].float().numpy(),
        ref_logp_PGT=None,
        policy_weight_PGT=(zeros + 1 / (group * TOKENS)).numpy(),
        kl_weight_PGT=zeros.numpy(),
        nll_weight_PGT=zeros.numpy(),
    )
    slot_K = torch.arange(group * TOKENS)
    loss, _ = token_loss(logp.reshape(-1), logp.reshape(-1), token_inputs(inputs, slot_K, slot_K // TOKENS))
    torch.autograd.backward(loss)
    assert leaf.grad is not None
    return leaf.grad


@given(
    hits=st.lists(st.booleans(), min_size=2, max_size=8),
    seed=st.integers(0, 10**6),
    mode=st.sampled_from(StdMode),
    eps=st.sampled_from([0.0, 0.3]),
    drifting=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_the_gradient_is_that_of_the_linear_auc(
    hits: list[bool], seed: int, mode: StdMode, eps: float, drifting: bool
) -> None:
    """With a tabular softmax policy; with drift, in the clipped scores of methods.md section 4."""
    group = len(hits)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(5, generator=generator, dtype=torch.float64)  # one table for all members and positions
    chosen = torch.randint(0, 5, (group, TOKENS), generator=generator)
    drift = torch.randn(group, TOKENS, generator=generator, dtype=torch.float64) * (0.4 if drifting else 0.0)
    table = logits.expand(group, TOKENS, 5)
    found = grpo_gradient(table, chosen, hits, mode, eps, drift).sum((0, 1))
    share = sum(hits) / group
    if share in (0.0, 1.0):
        assert not found.any()
        return
    leaf = logits.clone().requires_grad_(True)
    logp = torch.log_softmax(leaf, -1)[chosen]
    rho = (logp - (logp.detach() - drift)).exp()
    positive = torch.tensor(hits)
    score = torch.where(positive[:, None], rho.clamp_max(1.2), rho.clamp_min(0.8)).mean(1)
    auc = (score[positive][:, None] - score[~positive][None]).mean()
    deviation = math.sqrt(share * (1 - share)) * (math.sqrt(group / (group - 1)) if mode is StdMode.SAMPLE else 1.0)
    factor = share * (1 - share) / (1.0 if mode is StdMode.NONE else deviation + eps)
    torch.autograd.backward(-factor * auc)
    assert leaf.grad is not None
    torch.testing.assert_close(found, leaf.grad, rtol=1e-4, atol=1e-6)


def test_statistics_join_by_sum_and_maximum_and_become_means() -> None:
    parts = [
        {"policy_tokens": 3.0, "clip_high": 1.0, "gap": 0.5, "gap_max": 0.4, "loss": 1.0, "kl_tokens": 2.0, "kl": 3.0},
        {"policy_tokens": 1.0, "clip_high": 0.0, "gap": 0.1, "gap_max": 0.1, "loss": -3.0, "nll_tokens": 4.0, "nll": 2},
    ]
    joined = join_statistics(parts)
    assert joined["gap_max"] == 0.4
    metrics = update_metrics(joined)
    assert metrics["loss"] == -2
    assert metrics["ratio/clip_high_share"] == 0.25
    assert metrics["ratio/gap_mean"] == pytest.approx(0.15)
    assert metrics["ratio/gap_max"] == 0.4
    assert metrics["kl"] == 1.5
    assert metrics["nll"] == 0.5
    assert not any(value for name, value in update_metrics({}).items() if name != "loss")


def test_mistakes_of_the_caller_are_told_and_prompts_are_taken() -> None:
    inputs = random_inputs(0, Ratio.TOKEN)
    with pytest.raises(ValueError, match="no reference log-probabilities"):
        dataclasses.replace(inputs, ref_logp_PGT=None)
    logp_K, full_K, _ = random_tokens(0)
    with pytest.raises(ValueError, match="no entropy with gradient"):
        token_loss(logp_K, full_K, token_inputs(inputs, SLOT_K, UNIT_K))
    second = inputs.take(np.array([1]))
    assert second.advantage_PGT.shape == (1, GROUP, TOKENS)
    assert np.array_equal(second.policy_weight_PGT[0], inputs.policy_weight_PGT[1])
    assert second.clip_high == inputs.clip_high
