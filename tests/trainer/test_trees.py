"""Contract: packed trees give the scores, loss and gradients of one plain forward per completion.

The oracle runs the Hugging Face model on each prompt + completion alone and takes legal sets from the list of item
paths. Also: packing is a partition that respects the row length, dealing is even, a group that is longer than a row is
split, sequences are block-diagonal. Not here: DeepSpeed, ranks, bf16 (test_learner.py).
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

from data.errors import RequestError
from tests.trainer.learner_world import (
    make_completions,
    make_constraint,
    make_inputs,
    oracle_loss,
    oracle_scores,
    save_model,
)
from trainer.legal import replay
from trainer.losses import token_inputs, token_loss
from trainer.objective_settings import Ratio
from trainer.policy import Policy, load_language_model, token_scores
from trainer.trees import (
    Completions,
    TreeBatch,
    attention_mask,
    completion_pieces,
    deal_rows,
    lay_out,
    pack_rows,
    sequence_pieces,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def packed(completions: Completions, row_tokens: int) -> TreeBatch:
    pieces = completion_pieces(completions, row_tokens)
    rows = pack_rows([piece.cost for piece in pieces], row_tokens)
    return lay_out([[pieces[i] for i in row] for row in rows], row_tokens)


@pytest.mark.parametrize("row_tokens", [32, 48, 256])
def test_scores_equal_plain_forwards(model: Path, row_tokens: int) -> None:
    completions = make_completions()
    policy = Policy(load_language_model(model, torch.float32))
    batch = packed(completions, row_tokens)
    table = replay(make_constraint(), completions, range(completions.shape[0]))
    with torch.no_grad():
        scores = token_scores(policy(batch), batch, table.sets(batch), 0.7)
        oracle = oracle_scores(AutoModelForCausalLM.from_pretrained(model), completions, 0.7)
    assert scores.legal_K.all()
    assert sorted(batch.slot_K.tolist()) == np.flatnonzero(completions.token_mask_PGT).tolist()
    for index, slot in enumerate(batch.slot_K.tolist()):
        p, g, t = np.unravel_index(slot, completions.shape)
        expected = oracle[int(p), int(g), int(t)]
        found = (scores.logp_K, scores.full_logp_K, scores.legal_mass_K, scores.entropy_K)
        for value_K, exact in zip(found, expected, strict=True):
            assert value_K[index] == pytest.approx(float(exact), abs=2e-5)


def test_certainty_and_entropy_are_those_of_the_legal_set(model: Path) -> None:
    completions = make_completions()
    policy = Policy(load_language_model(model, torch.float32))
    batch = packed(completions, 64)
    table = replay(make_constraint(), completions, range(completions.shape[0]))
    logits_UV = policy(batch)
    scores = token_scores(logits_UV, batch, table.sets(batch), 0.7, entropy_gradient=True)
    sets, _, _ = table.sets(batch)
    for index, source in enumerate(batch.source_K.tolist()):
        legal = sets.token_NC[source][sets.legal_NC[source]]
        log_p = torch.log_softmax(logits_UV[source, legal].detach().double() / 0.7, 0)
        uniform = -torch.log(torch.tensor(float(len(legal)), dtype=torch.float64))
        assert scores.choices_K[index] == len(legal)
        assert float(scores.certainty_K[index]) == pytest.approx(float((uniform - log_p).mean()), abs=1e-5)
        assert float(scores.entropy_K[index].detach()) == pytest.approx(float(-(log_p.exp() * log_p).sum()), abs=1e-5)
    assert not scores.certainty_K.requires_grad
    torch.autograd.backward(scores.entropy_K.sum())
    assert all(torch.isfinite(p.grad).all() for p in policy.parameters() if p.grad is not None)
    assert any((p.grad != 0).any() for p in policy.parameters() if p.grad is not None)


@pytest.mark.parametrize("ratio", list(Ratio))
def test_gradient_of_trees_equals_that_of_rows(model: Path, ratio: Ratio) -> None:
    completions = make_completions()
    inputs = make_inputs(completions, ratio)
    policy = Policy(load_language_model(model, torch.float32))
    batch = packed(completions, 64)
    table = replay(make_constraint(), completions, range(completions.shape[0]))
    scores = token_scores(policy(batch), batch, table.sets(batch), inputs.temperature)
    loss, statistics = token_loss(scores.logp_K, scores.full_logp_K, token_inputs(inputs, batch.slot_K, batch.unit_K))
    torch.autograd.backward(loss)
    plain = AutoModelForCausalLM.from_pretrained(model)
    exact = oracle_loss(plain, completions, inputs)
    torch.autograd.backward(exact)
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)
    assert statistics["loss"] == pytest.approx(
        statistics["policy_loss"] + statistics["kl_loss"] + statistics["nll_loss"], rel=1e-5
    )
    gradients = {name.removeprefix("lm."): value.grad for name, value in policy.named_parameters()}
    for name, parameter in plain.named_parameters():
        assert relative_gap(gradients[name], parameter.grad) < 2e-5, name


def relative_gap(found: Tensor | None, exact: Tensor | None) -> float:
    assert found is not None
    assert exact is not None
    return float((found - exact).abs().max() / exact.abs().max())


def test_illegal_completion_is_marked_and_keeps_its_likelihood(model: Path) -> None:
    completions = make_completions()
    token_PGT = completions.token_PGT.copy()
    token_PGT[0, 0, 1] = 3  # <unk> continues nothing
    completions = Completions(
        prompt_tokens=completions.prompt_tokens,
        token_PGT=token_PGT,
        length_PG=completions.length_PG,
        valid_PG=completions.valid_PG,
        exclusions=completions.exclusions,
    )
    policy = Policy(load_language_model(model, torch.float32))
    batch = packed(completions, 64)
    table = replay(make_constraint(), completions, range(completions.shape[0]))
    scores = token_scores(policy(batch), batch, table.sets(batch), 1.0)
    width = completions.shape[2]
    wrong = {0 * width + t for t in range(1, int(completions.length_PG[0, 0]))}
    assert {slot for slot, legal in zip(batch.slot_K.tolist(), scores.legal_K.tolist(), strict=True) if not legal} == (
        wrong
    )
    torch.autograd.backward(scores.full_logp_K.sum())
    assert all(torch.isfinite(p.grad).all() for p in policy.parameters() if p.grad is not None)


def test_weightless_tokens_may_hold_anything() -> None:
    completions = make_completions(prompts=2)
    inputs = make_inputs(completions)
    inputs.old_logp_PGT[inputs.policy_weight_PGT == 0] = np.nan
    inputs.advantage_PGT[inputs.policy_weight_PGT == 0] = np.inf
    slot_K = torch.from_numpy(np.flatnonzero(completions.token_mask_PGT))
    logp_K = torch.full((len(slot_K),), -1.0, requires_grad=True)
    loss, _ = token_loss(logp_K, logp_K * 1.0, token_inputs(inputs, slot_K, slot_K // completions.shape[2]))
    torch.autograd.backward(loss)
    assert torch.isfinite(loss)
    assert logp_K.grad is not None
    assert torch.isfinite(logp_K.grad).all()


def test_group_longer_than_a_row_is_split() -> None:
    completions = make_completions(prompts=3, longest=20)
    longest = max(len(p) for p in completions.prompt_tokens)
    pieces = completion_pieces(completions, longest + 3)
    assert len(pieces) > 3
    assert max(piece.cost for piece in pieces) <= longest + 3
    slots = np.concatenate([piece.slot_K for piece in pieces])
    assert sorted(slots.tolist()) == np.flatnonzero(completions.token_mask_PGT).tolist()


def test_prompt_longer_than_a_row_is_refused() -> None:
    with pytest.raises(RequestError, match="row_tokens"):
        completion_pieces(make_completions(longest=40), 16)


@given(st.lists(st.integers(1, 64), max_size=40), st.integers(1, 5))
@settings(max_examples=50, deadline=None)
def test_packing_is_a_partition_and_dealing_is_even(costs: list[int], ranks: int) -> None:
    rows = pack_rows(costs, 64)
    assert sorted(i for row in rows for i in row) == list(range(len(costs)))
    assert all(sum(costs[i] for i in row) <= 64 for row in rows)
    shares = deal_rows([sum(costs[i] for i in row) for row in rows], ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(rows)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_mask_by_its_definition() -> None:
    batch = packed(make_completions(prompts=4), 64)
    mask = attention_mask(batch)[:, 0]
    rows, width = batch.token_RN.shape
    for r in range(rows):
        for i in range(width):
            for j in range(width):
                same = batch.tree_RN[r, i] == batch.tree_RN[r, j] and batch.tree_RN[r, i] >= 0
                ancestor = batch.branch_RN[r, j] == 0 or batch.branch_RN[r, j] == batch.branch_RN[r, i]
                assert bool(mask[r, i, j]) == (i == j or bool(same and ancestor and j <= i))


def test_sequences_are_learned_as_if_alone(model: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [(rng.integers(4, 44, n).astype(np.int32), rng.random(n) < 0.5) for n in (3, 20, 7, 31, 1)]
    pieces = sequence_pieces(rows, 32)
    packing = pack_rows([piece.cost for piece in pieces], 32)
    batch = lay_out([[pieces[i] for i in row] for row in packing], 32)
    policy = Policy(load_language_model(model, torch.float32))
    with torch.no_grad():
        logits_UV = policy(batch)
        found = logits_UV.log_softmax(-1)[batch.source_K, batch.target_K]
        plain = AutoModelForCausalLM.from_pretrained(model)
        exact: dict[int, float] = {}
        offset = 0
        for tokens, mask in rows:
            logp = plain(input_ids=torch.from_numpy(tokens)[None].long()).logits[0].log_softmax(-1)
            for i in range(1, len(tokens)):
                if mask[i]:
                    exact[offset + i] = float(logp[i - 1, int(tokens[i])])
            offset += len(tokens)
    assert sorted(batch.slot_K.tolist()) == sorted(exact)
    for slot, value in zip(batch.slot_K.tolist(), found.tolist(), strict=True):
        assert value == pytest.approx(exact[slot], abs=2e-5)
