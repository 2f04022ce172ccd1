"""A small world for the learner's tests: model, trie with unequal depths, prompts, completions, and a plain oracle."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from data.records import IntArray
from data.trie import ItemTrie
from data.trie_constraint import TrieConstraint
from trainer.losses import UpdateInputs
from trainer.objective_settings import Ratio
from trainer.trees import Completions

VOCABULARY = 48
ITEMS = 30
OUTSIDE = 45
"""A token that no path has."""


def save_model(folder: Path, seed: int = 0, scale: float = 4.0) -> Path:
    """A two-layer Qwen3 with a tied head; `scale` sharpens its distributions."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )
    lm = Qwen3ForCausalLM(config)
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.dim() == 2:
                parameter.mul_(scale)
    lm.save_pretrained(folder)
    return folder


def item_paths(seed: int = 0) -> list[IntArray]:
    """Distinct prefix-free paths of two to four tokens."""
    rng = np.random.default_rng(seed)
    paths: set[tuple[int, ...]] = set()
    while len(paths) < ITEMS:
        length = int(rng.integers(2, 5))
        path = (4 + 10 * (length - 2) + int(rng.integers(0, 4)), *(int(t) for t in rng.integers(4, 44, length - 1)))
        paths.add(path)
    return [np.array(path, dtype=np.int32) for path in sorted(paths)]


def make_constraint() -> TrieConstraint:
    """The trie of `item_paths`, with exclusions."""
    paths = item_paths()
    start = np.cumsum([0, *(len(path) for path in paths)])
    return TrieConstraint(ItemTrie.build(np.concatenate(paths), start), exclude=True)


def make_completions(prompts: int = 6, members: int = 5, seed: int = 0, longest: int = 20) -> Completions:
    """Items as completions, never an excluded one; some slots are absent.

    The second member of each group is the open one: an item outside the trie that has the first tokens of an item of
    it, none of them in one prompt and all but the last in another.
    """
    rng = np.random.default_rng(seed)
    paths = item_paths()
    token_PGT = np.full((prompts, members, 4), -1, dtype=np.int32)
    length_PG = np.zeros((prompts, members), dtype=np.int32)
    exclusions = []
    for row in range(prompts):
        order = rng.permutation(ITEMS)
        exclusions.append(np.sort(order[: row % 4]).astype(np.int32))
        for member in range(members):
            path = paths[order[4 + member]]
            if member == members - 1 and row % 2:
                continue
            token_PGT[row, member, : len(path)] = path
            length_PG[row, member] = len(path)
        left = row % int(length_PG[row, 1])
        token_PGT[row, 1, left] = OUTSIDE
    open_PG = np.zeros_like(length_PG, dtype=np.bool_)
    open_PG[:, 1] = True
    return Completions(
        prompt_tokens=[rng.integers(4, 44, int(rng.integers(1, longest + 1))).astype(np.int32) for _ in range(prompts)],
        token_PGT=token_PGT,
        length_PG=length_PG,
        valid_PG=length_PG > 0,
        exclusions=exclusions,
        open_PG=open_PG,
    )


def make_inputs(completions: Completions, ratio: Ratio = Ratio.TOKEN, seed: int = 0) -> UpdateInputs:
    """Random coefficients of every kind; the last member is learned by its likelihood alone."""
    rng = np.random.default_rng(seed)
    shape = completions.shape
    mask = completions.token_mask_PGT
    last = np.zeros(shape, dtype=bool)
    last[:, -1] = True
    tokens = float(mask.sum())
    logp = (-2 * rng.random(shape)).astype(np.float32)
    return UpdateInputs(
        advantage_PGT=rng.normal(size=shape).astype(np.float32),
        old_logp_PGT=logp,
        ref_logp_PGT=(logp + 0.3 * rng.normal(size=shape)).astype(np.float32),
        policy_weight_PGT=(mask & ~last).astype(np.float32) / tokens,
        kl_weight_PGT=0.1 * (mask & ~last).astype(np.float32) / tokens,
        nll_weight_PGT=0.5 * (mask & last).astype(np.float32) / tokens,
        ratio=ratio,
        clip_low=0.2,
        clip_high=0.3,
        temperature=0.7,
    )


def oracle_scores(
    lm: PreTrainedModel, completions: Completions, temperature: float
) -> dict[tuple[int, int, int], tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """One plain forward per completion: (renormalised, full, legal mass, entropy) per token, with gradient.

    Legal sets come from the list of paths, not from the trie; the path of an open member is on its own list.
    """
    paths = [tuple(int(t) for t in path) for path in item_paths()]
    scores = {}
    prompts, members, _ = completions.shape
    for p in range(prompts):
        banned = set(completions.exclusions[p].tolist())
        left = [path for item, path in enumerate(paths) if item not in banned]
        for g in range(members):
            if not completions.valid_PG[p, g]:
                continue
            length = int(completions.length_PG[p, g])
            completion = [int(t) for t in completions.token_PGT[p, g, :length]]
            own = [*left, tuple(completion)] if completions.may_leave_PG[p, g] else left
            row = torch.tensor([[*completions.prompt_tokens[p].tolist(), *completion]])
            logits_TV = lm(input_ids=row).logits[0, len(completions.prompt_tokens[p]) - 1 : -1]
            for t in range(length):
                legal = sorted({path[t] for path in own if path[:t] == tuple(completion[:t]) and len(path) > t})
                full_V = logits_TV[t].float().log_softmax(-1)
                set_C = (logits_TV[t].float()[legal] / temperature).log_softmax(-1)
                scores[p, g, t] = (
                    set_C[legal.index(completion[t])],
                    full_V[completion[t]],
                    full_V[legal].exp().sum(),
                    -(set_C.exp() * set_C).sum(),
                )
    return scores


def oracle_loss(lm: PreTrainedModel, completions: Completions, inputs: UpdateInputs) -> torch.Tensor:
    """The loss of `trainer.losses`, written out token by token over plain forwards."""
    scores = oracle_scores(lm, completions, inputs.temperature)
    loss = torch.zeros(())
    for (p, g, t), (logp, full, _, _) in scores.items():
        steps = range(int(completions.length_PG[p, g]))
        ratios = [scores[p, g, s][0] - float(inputs.old_logp_PGT[p, g, s]) for s in steps]
        log_ratio = ratios[t] if inputs.ratio is Ratio.TOKEN else torch.stack(ratios).mean()
        advantage = float(inputs.advantage_PGT[p, g, t])
        rho = log_ratio.exp()
        clipped = rho.clamp(1 - inputs.clip_low, 1 + inputs.clip_high)
        loss = loss - float(inputs.policy_weight_PGT[p, g, t]) * torch.minimum(rho * advantage, clipped * advantage)
        assert inputs.ref_logp_PGT is not None
        gap = float(inputs.ref_logp_PGT[p, g, t]) - logp
        loss = loss + float(inputs.kl_weight_PGT[p, g, t]) * (gap.exp() - gap - 1)
        loss = loss - float(inputs.nll_weight_PGT[p, g, t]) * full
    return loss
