"""Where prompts and beams lie in a paged key-value cache: block tables, slots and copies, as plain integers.

The full blocks of a prompt are shared by all its rows. The tail of a prompt that does not fill a block is copied into
the first own block of every row, because rows write their next tokens there. Block 0 is vLLM's null block and is
never used. Pure: no vLLM in here.

Suffixes: `_P` prompt, `_N` row, `_B` block of a block table, `_X` token of all prompts in sequence.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from data.errors import RequestError


def own_blocks(length: int, new_tokens: int, block_size: int) -> int:
    """Blocks of its own that a row needs for `new_tokens` tokens after a prompt of `length`."""
    return -(-(length % block_size + new_tokens) // block_size) if new_tokens else 0


@dataclass(frozen=True)
class CacheShape:
    """Size of the cache."""

    block_size: int
    blocks: int
    """With the null block."""


def plan_chunks(
    lengths: Sequence[int],
    *,
    rows: int,
    new_tokens: int,
    cache: CacheShape,
    prompts_per_forward: int,
    tokens_per_forward: int,
) -> list[slice]:
    """Cut the prompts, in order, into chunks that fit the cache and the limits of a forward pass.

    Args:
        rows: most rows per prompt.
        new_tokens: most tokens after the prompt that enter the cache.

    Raises:
        RequestError: one prompt alone does not fit the cache.
    """
    usable = cache.blocks - 1
    chunks: list[slice] = []
    start = 0
    while start < len(lengths):
        stop, tokens, shared, widest = start, 0, 0, 0
        while stop < len(lengths) and stop - start < prompts_per_forward:
            length = lengths[stop]
            tokens += length
            shared += -(-length // cache.block_size)
            widest = max(widest, own_blocks(length, new_tokens, cache.block_size))
            needed = shared + (stop + 1 - start) * rows * widest
            if needed > usable:
                if stop == start:
                    raise RequestError(
                        "rollout.kv_cache_gib",
                        f"{usable} blocks of {cache.block_size} tokens",
                        f"at least {needed} blocks, for one prompt of {length} tokens with {rows} beams",
                    )
                break
            if stop > start and tokens > tokens_per_forward:
                break
            stop += 1
        chunks.append(slice(start, stop))
        start = stop
    return chunks


@dataclass(frozen=True)
class BlockCopy:
    """Blocks to copy before the next forward, all at once: a destination may be the source of another copy."""

    source_X: Tensor
    destination_X: Tensor


@dataclass(frozen=True)
class Placement:
    """Inputs of one forward pass that depend on where things lie."""

    block_table_NB: Tensor
    """int32, padded with block 0."""
    slot_X: Tensor
    """int64 cache slot of each computed token."""
    position_X: Tensor
    """int64 position of each computed token."""
    query_lengths: Tensor
    """int32 `[N]` computed tokens of each row."""
    total_lengths: Tensor
    """int32 `[N]` tokens of each row, with the computed ones."""


class PagedRows:
    """Places a chunk of prompts, and then the rows that grow from them. All tensors are on the CPU."""

    def __init__(self, lengths: Sequence[int], *, rows: int, new_tokens: int, block_size: int) -> None:
        self._block_size = block_size
        self._length_P = torch.tensor(lengths, dtype=torch.long)
        blocks_P = -(-self._length_P // block_size)
        self._first_P = 1 + blocks_P.cumsum(0) - blocks_P
        self._first_own = 1 + int(blocks_P.sum())
        self._own = max(own_blocks(length, new_tokens, block_size) for length in lengths)
        self._most_rows = rows * len(lengths)
        self._prompt_N = torch.arange(len(lengths))
        self._grown = 0
        self._width = int(blocks_P.max()) + self._own

    @property
    def blocks(self) -> int:
        """Blocks in use, with the null block."""
        return self._first_own + self._most_rows * self._own

    def _prompt_table(self, width: int) -> Tensor:
        block_B = torch.arange(width)
        table_PB = self._first_P[:, None] + block_B
        return table_PB.masked_fill(block_B >= -(-self._length_P // self._block_size)[:, None], 0)

    def prompts(self) -> Placement:
        """Placement of the pass that computes the prompts, one row per prompt."""
        table_PB = self._prompt_table(max(1, self._width - self._own))
        row_X = torch.repeat_interleave(self._length_P)
        start_P = self._length_P.cumsum(0) - self._length_P
        position_X = torch.arange(len(row_X)) - start_P[row_X]
        return Placement(
            block_table_NB=table_PB.int(),
            slot_X=self._slots(table_PB, row_X, position_X),
            position_X=position_X,
            query_lengths=self._length_P.int(),
            total_lengths=self._length_P.int(),
        )

    def grow(self, parent_N: Tensor) -> tuple[BlockCopy, Placement]:
        """Rows `parent_N` of the last pass get one token each: what to copy first, and where the tokens go.

        Raises:
            ValueError: more rows or more tokens than the chunk was placed for.
        """
        size = self._block_size
        prompt_N = self._prompt_N[parent_N]
        length_N = self._length_P[prompt_N]
        rows = torch.arange(len(parent_N))
        position_N = length_N + self._grown
        if len(rows) > self._most_rows or int((position_N // size - length_N // size).max()) >= self._own:
            raise ValueError(f"{len(rows)} rows after {self._grown} tokens exceed the placement")
        if self._grown == 0:
            partial_N = length_N % size > 0
            source_X = (self._first_P[prompt_N] + length_N // size)[partial_N]
            destination_X = (self._first_own + rows * self._own)[partial_N]
        else:
            moved_N = parent_N != rows
            filled_N = -(-(length_N % size + self._grown) // size)
            used_NB = (torch.arange(self._own) < filled_N[:, None]) & moved_N[:, None]
            own_NB = self._first_own + rows[:, None] * self._own + torch.arange(self._own)
            parent_NB = self._first_own + parent_N[:, None] * self._own + torch.arange(self._own)
            source_X, destination_X = parent_NB[used_NB], own_NB[used_NB]

        block_B = torch.arange(self._width)
        full_N1 = (length_N // size)[:, None]
        own_NB = self._first_own + rows[:, None] * self._own + block_B - full_N1
        table_NB = torch.where(block_B < full_N1, self._first_P[prompt_N][:, None] + block_B, own_NB)
        table_NB = table_NB.masked_fill(block_B >= full_N1 + self._own, 0)
        self._prompt_N = prompt_N
        self._grown += 1
        return BlockCopy(source_X, destination_X), Placement(
            block_table_NB=table_NB.int(),
            slot_X=self._slots(table_NB, rows, position_N),
            position_X=position_N,
            query_lengths=torch.ones(len(rows), dtype=torch.int32),
            total_lengths=(position_N + 1).int(),
        )

    def _slots(self, table_NB: Tensor, row_X: Tensor, position_X: Tensor) -> Tensor:
        return table_NB[row_X, position_X // self._block_size] * self._block_size + position_X % self._block_size
