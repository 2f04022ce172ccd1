"""Contract: packed trees give the scores, loss and gradients of one plain forward per completion.

The oracle runs the Hugging Face model on each prompt + completion alone and takes legal sets from the list of item
paths. Also: packing is a partition that respects the budget, dealing is even, a group that is longer than the budget
is split, sequences are learned as if alone, and seven families of models work. The attention of CUDA runs here on CPU.
Not here: the attention by itself (test_tree_attention.py), DeepSpeed, ranks, bf16 (test_learner.py).
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM

from data.errors import RequestError
from tests.trainer.learner_world import (
    make_completions,
    make_constraint,
    make_inputs,
    oracle_loss,
    oracle_scores,
    save_model,
)
from trainer import tree_attention
from trainer.legal import replay
from trainer.losses import token_inputs, token_loss
from trainer.micro_batches import micro_batches
from trainer.objective_settings import Ratio
from trainer.policy import Policy, full_log_probabilities, load_language_model, token_scores
from trainer.trees import (
    FILLER,
    Completions,
    TreeBatch,
    completion_pieces,
    deal,
    lay_out,
    pack,
    sequence_pieces,
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_model(tmp_path_factory.mktemp("model"))


def packed(completions: Completions, tree_tokens: int | None = None) -> TreeBatch:
    return lay_out(completion_pieces(completions, 64, tree_tokens))


@pytest.mark.parametrize("tree_tokens", [24, 32, None])
def test_scores_equal_plain_forwards(model: Path, tree_tokens: int | None) -> None:
    completions = make_completions()
    policy = Policy(load_language_model(model, torch.float32))
    batch = packed(completions, tree_tokens)
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
    batch = packed(completions)
    table = replay(make_constraint(), completions, range(completions.shape[0]))
    logits_UV = policy(batch)
    scores = token_scores(logits_UV, batch, table.sets(batch), 0.7, entropy_gradient=True)
    sets, open_K = table.sets(batch).sets, table.sets(batch).open_K
    assert open_K is not None
    for index, source in enumerate(batch.source_K.tolist()):
        legal = sets.token_NC[source][sets.legal_NC[source]]
        if open_K[index]:
            legal = torch.cat([legal, batch.target_K[index : index + 1]])
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
@pytest.mark.parametrize("path", ["_stretches", "_sdpa"])
def test_gradient_of_trees_equals_that_of_rows(
    model: Path, ratio: Ratio, path: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tree_attention, "_stretches", getattr(tree_attention, path))
    completions = make_completions()
    inputs = make_inputs(completions, ratio)
    policy = Policy(load_language_model(model, torch.float32))
    batch = packed(completions)
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
    completions = dataclasses.replace(completions, token_PGT=token_PGT)
    policy = Policy(load_language_model(model, torch.float32))
    batch = packed(completions)
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


def test_group_longer_than_the_budget_is_split() -> None:
    completions = make_completions(prompts=3, longest=20)
    longest = max(len(p) for p in completions.prompt_tokens)
    pieces = completion_pieces(completions, 64, longest + 3)
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
    packing = pack(costs, 64)
    assert sorted(i for chosen in packing for i in chosen) == list(range(len(costs)))
    assert all(sum(costs[i] for i in chosen) <= 64 for chosen in packing)
    shares = deal(costs, ranks)
    assert sorted(i for share in shares for i in share) == list(range(len(costs)))
    loads = [sum(costs[i] for i in share) for share in shares]
    assert max(loads) - min(loads) <= max(costs, default=0)


@given(st.lists(st.integers(1, 30), max_size=12), st.integers(1, 4))
@settings(max_examples=30, deadline=None)
def test_ranks_compute_everything_once_in_equal_numbers(lengths: list[int], ranks: int) -> None:
    pieces = sequence_pieces([(np.full(n + 1, 5, np.int32), np.ones(n + 1, np.bool_)) for n in lengths], 32)
    plans = [micro_batches(pieces, token_budget=48, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert len({len(plan) for plan in plans}) == 1
    assert all(batch.tokens <= 48 for plan in plans for batch in plan)
    slots = torch.cat([batch.slot_K for plan in plans for batch in plan])
    assert sorted(slots.tolist()) == sorted(slot for piece in pieces for slot in piece.slot_K.tolist())


def test_sequences_are_learned_as_if_alone(model: Path) -> None:
    rng = np.random.default_rng(0)
    rows = [(rng.integers(4, 44, n).astype(np.int32), rng.random(n) < 0.5) for n in (3, 20, 7, 31, 1)]
    batch = lay_out(sequence_pieces(rows, 32))
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


def test_pairs_with_equal_prompts_are_a_group() -> None:
    first, second = np.array([5, 6], dtype=np.int32), np.array([7], dtype=np.int32)
    completions = [np.array(tokens, dtype=np.int32) for tokens in ([8], [9, 4], [4], [5, 6])]
    found = Completions.of_sequences([first, first.copy(), second, first], completions)
    assert [prompt.tolist() for prompt in found.prompt_tokens] == [[5, 6], [7], [5, 6]]
    assert found.valid_PG.tolist() == [[True, True], [True, False], [True, False]]
    assert found.token_PGT[found.token_mask_PGT].tolist() == [8, 9, 4, 4, 5, 6]


def test_a_filler_reaches_every_parameter_with_nothing(model: Path) -> None:
    policy = Policy(load_language_model(model, torch.float32))
    batch = lay_out([FILLER])
    assert (batch.heads, len(batch.target_K), batch.tokens) == (0, 0, 1)
    torch.autograd.backward(policy(batch)[0, 0] * 0.0)
    for name, parameter in policy.named_parameters():
        assert parameter.grad is not None, name
        assert not parameter.grad.any(), name


SMALL = {
    "vocab_size": 48,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": SMALL,
    "mistral": SMALL | {"sliding_window": 5},
    "qwen2": SMALL | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "phi3": SMALL | {"pad_token_id": 0},
    "gemma": SMALL | {"head_dim": 8},
    "gpt_neox": {name: value for name, value in SMALL.items() if name != "num_key_value_heads"},
    "gpt2": {"vocab_size": 48, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64},
}


@pytest.mark.parametrize("family", FAMILIES)
def test_families_of_models_equal_their_plain_forward(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **FAMILIES[family])).eval()
    plain.save_pretrained(tmp_path)
    completions = make_completions()
    batch = packed(completions)
    with torch.no_grad():
        found_K = full_log_probabilities(Policy(load_language_model(tmp_path, torch.float32))(batch), batch)
        for index, slot in enumerate(batch.slot_K.tolist()):
            p, g, t = (int(place) for place in np.unravel_index(slot, completions.shape))
            before = np.concatenate([completions.prompt_tokens[p], completions.token_PGT[p, g, : t + 1]])
            logits = plain(input_ids=torch.from_numpy(before[None, :-1]).long()).logits[0, -1]
            assert float(found_K[index]) == pytest.approx(float(logits.log_softmax(-1)[before[-1]]), abs=2e-5)


def test_a_model_with_another_attention_is_refused(tmp_path: Path) -> None:
    config = AutoConfig.for_model("bloom", vocab_size=48, hidden_size=32, n_layer=1, n_head=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(RequestError, match="attention"):
        load_language_model(tmp_path, torch.float32)
