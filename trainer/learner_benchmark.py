"""Trees against rows: `python -m trainer.learner_benchmark` prints JSON.

Forward and backward over groups of completions: packed trees as the learner computes them, and the usual way, every
completion in a row of its own behind a copy of its prompt (plain transformers, head on the completion positions only).
Wall and processor seconds are the medians of alternating repetitions; on a busy machine compare their ratios.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn
from transformers import Qwen3Config, Qwen3ForCausalLM

from trainer.micro_batches import micro_batches
from trainer.policy import Policy, full_log_probabilities
from trainer.trees import Completions, completion_pieces

GOAL_SPEEDUP = 8.0


def learner_benchmark(
    *,
    prompts: int = 2,
    prompt_tokens: int = 250,
    members: int = 16,
    completion_tokens: int = 4,
    width: int = 384,
    layers: int = 6,
    vocabulary: int = 1031,
    dtype: torch.dtype = torch.bfloat16,
    repetitions: int = 5,
    threads: int = 1,
    device: str = "cpu",
) -> dict[str, float]:
    """Seconds of trees and of rows, their ratio, the arithmetic limit of the ratio, and the gap between the two.

    The limit is the ratio of the tokens that are computed: `G (P + T - 1) / (P + G (T - 1))`. `gap_mean` and
    `gap_max` are of the log-probabilities per token; in bfloat16 they are of the size of its rounding. One thread is
    the default because the barriers of several threads on a busy machine measure the neighbours.
    """
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=vocabulary,
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=width // 64,
        head_dim=64,
        max_position_embeddings=max(512, prompt_tokens + completion_tokens),
        tie_word_embeddings=True,
        attn_implementation="sdpa",
    )
    lm = Qwen3ForCausalLM(config).to(device=device, dtype=dtype)
    rng = np.random.default_rng(0)
    token_PGT = rng.integers(4, vocabulary, (prompts, members, completion_tokens)).astype(np.int32)
    completions = Completions(
        prompt_tokens=[rng.integers(4, vocabulary, prompt_tokens).astype(np.int32) for _ in range(prompts)],
        token_PGT=token_PGT,
        length_PG=np.full((prompts, members), completion_tokens, dtype=np.int32),
        valid_PG=np.ones((prompts, members), dtype=np.bool_),
        exclusions=[np.zeros(0, dtype=np.int32)] * prompts,
    )
    trees = _trees(Policy(lm), completions, torch.device(device))
    rows = _rows(lm, completions, torch.device(device))
    with torch.no_grad():
        gap = (trees(False) - rows(False)).abs()
    spent: dict[str, list[tuple[float, float]]] = {"trees": [], "rows": []}
    for repetition in range(repetitions + 1):
        for name, work in (("trees", trees), ("rows", rows)):
            seconds = _timed(lm, work)
            if repetition:  # the first one warms up
                spent[name].append(seconds)
    wall, processor = (
        {name: statistics.median(pair[kind] for pair in pairs) for name, pairs in spent.items()} for kind in (0, 1)
    )
    branch = completion_tokens - 1
    return {
        "trees_seconds": wall["trees"],
        "rows_seconds": wall["rows"],
        "speedup": wall["rows"] / wall["trees"],
        "trees_processor_seconds": processor["trees"],
        "rows_processor_seconds": processor["rows"],
        "processor_speedup": processor["rows"] / max(processor["trees"], 1e-9),
        "limit": members * (prompt_tokens + branch) / (prompt_tokens + members * branch),
        "goal": GOAL_SPEEDUP,
        "gap_mean": float(gap.mean()),
        "gap_max": float(gap.max()),
    }


def _timed(lm: nn.Module, work: Callable[[bool], Tensor]) -> tuple[float, float]:
    lm.zero_grad()
    wall, processor = time.perf_counter(), time.process_time()
    work(True)
    return time.perf_counter() - wall, time.process_time() - processor


def _trees(policy: Policy, completions: Completions, device: torch.device) -> Callable[[bool], Tensor]:
    """Scores `[P * G * T]` by packed trees; with `True` also the gradient of their mean."""
    pieces = completion_pieces(completions, 1 << 20)
    row_tokens = -(-max(piece.cost for piece in pieces) // 16) * 16

    def work(backward: bool) -> Tensor:
        scores = torch.zeros(completions.token_PGT.size, device=device)
        for batch in micro_batches(pieces, row_tokens=row_tokens, rows=len(pieces), rank=0, ranks=1):
            moved = batch.to(device)
            logp_K = full_log_probabilities(policy(moved), moved)
            if backward:
                torch.autograd.backward(-logp_K.sum() / scores.numel())
            scores[moved.slot_K] = logp_K.detach()
        return scores.cpu()

    return work


def _rows(lm: Qwen3ForCausalLM, completions: Completions, device: torch.device) -> Callable[[bool], Tensor]:
    """The same by one row per completion, a prompt's group at a time."""
    _, members, width = completions.shape

    def work(backward: bool) -> Tensor:
        scores = []
        for prompt, token_GT in zip(completions.prompt_tokens, completions.token_PGT, strict=True):
            target_GT = torch.from_numpy(token_GT).long().to(device)
            prompt_GN = torch.from_numpy(prompt).long().to(device).expand(members, -1)
            row_GN = torch.cat([prompt_GN, target_GT], 1)
            logits_GTV = lm(input_ids=row_GN, use_cache=False, logits_to_keep=width + 1).logits[:, :-1].float()
            logp_GT = logits_GTV.log_softmax(-1).gather(2, target_GT[..., None])[..., 0]
            if backward:
                torch.autograd.backward(-logp_GT.sum() / completions.token_PGT.size)
            scores.append(logp_GT.detach().reshape(-1))
        return torch.cat(scores).cpu()

    return work


if __name__ == "__main__":
    sys.stdout.write(json.dumps(learner_benchmark(), indent=1) + "\n")
