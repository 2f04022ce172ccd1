"""Which prompts are computed together, and where they lie in a paged key-value cache while they are.

A wave is the prompts whose keys and values are kept at the same time, so that all their branches grow in one forward
pass per level; a chunk is the part of a wave that one forward pass computes. Block 0 is vLLM's null block and is never
used. Pure: no vLLM in here.

Suffixes: `_P` prompt, `_B` block of a block table, `_X` token of all prompts in sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.errors import RequestError


@dataclass(frozen=True, kw_only=True)
class WaveLimits:
    """What bounds a wave."""

    tokens: int
    """Tokens, of prompts and branches, whose keys and values may be kept."""
    rows: int
    """Rows whose logits may be computed at once."""


def plan_waves(lengths: Sequence[int], *, rows: int, new_tokens: int, limits: WaveLimits) -> list[slice]:
    """Cut the prompts, in order, into waves.

    Args:
        rows: most rows per prompt.
        new_tokens: tokens after the prompt whose keys and values are kept, of each row.

    Raises:
        RequestError: one prompt alone does not fit with its rows.
    """
    waves: list[slice] = []
    start, tokens = 0, 0
    for prompt, length in enumerate(lengths):
        needed = length + rows * new_tokens
        if needed > limits.tokens:
            raise RequestError(
                "rollout.kv_cache_gib",
                f"room for {limits.tokens} tokens",
                f"at least {needed} tokens, for one prompt of {length} tokens with {rows} rows",
            )
        if prompt > start and (tokens + needed > limits.tokens or (prompt + 1 - start) * rows > limits.rows):
            waves.append(slice(start, prompt))
            start, tokens = prompt, 0
        tokens += needed
    return [*waves, slice(start, len(lengths))] if len(lengths) else []


def plan_chunks(lengths: Sequence[int], *, prompts_per_forward: int, tokens_per_forward: int) -> list[slice]:
    """Cut the prompts, in order, into the forward passes that compute them; a longer prompt goes alone."""
    chunks: list[slice] = []
    start, tokens = 0, 0
    for prompt, length in enumerate(lengths):
        if prompt > start and (tokens + length > tokens_per_forward or prompt - start == prompts_per_forward):
            chunks.append(slice(start, prompt))
            start, tokens = prompt, 0
        tokens += length
    return [*chunks, slice(start, len(lengths))] if len(lengths) else []


@dataclass(frozen=True)
class Placement:
    """Where the prompts of one forward pass lie in the cache."""

    block_table_PB: Tensor
    """int32, padded with block 0."""
    slot_X: Tensor
    """int64 cache slot of each token."""
    position_X: Tensor
    """int64 position of each token in its prompt."""
    length_P: Tensor
    """int32 tokens of each prompt."""
    blocks: int
    """Blocks in use, with the null block."""

    @staticmethod
    def of(lengths: Sequence[int], block_size: int) -> Placement:
        """Prompts one after the other, each from a block of its own. All tensors are on the CPU."""
        length_P = torch.tensor(lengths, dtype=torch.long)
        blocks_P = -(-length_P // block_size)
        first_P = 1 + blocks_P.cumsum(0) - blocks_P
        block_B = torch.arange(int(blocks_P.max()))
        table_PB = (first_P[:, None] + block_B).masked_fill(block_B >= blocks_P[:, None], 0)
        prompt_X = torch.repeat_interleave(length_P)
        position_X = torch.arange(len(prompt_X)) - (length_P.cumsum(0) - length_P)[prompt_X]
        slot_X = table_PB[prompt_X, position_X // block_size] * block_size + position_X % block_size
        return Placement(
            block_table_PB=table_PB.int(),
            slot_X=slot_X,
            position_X=position_X,
            length_P=length_P.int(),
            blocks=1 + int(blocks_P.sum()),
        )
