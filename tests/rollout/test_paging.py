"""Blocks and slots: following the tables through a cache of plain integers gives every row its own tokens.

The cache is simulated: a forward writes (prefix) into its slot, and what a row would read through its block table must
be exactly its prompt and its ancestors. Chunks respect every limit and lose no prompt.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import RequestError
from rollout.paging import CacheShape, PagedRows, own_blocks, plan_chunks


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 13), min_size=1, max_size=5),
    rows=st.integers(1, 4),
    new_tokens=st.integers(1, 6),
    size=st.sampled_from([1, 2, 4]),
    data=st.data(),
)
def test_every_row_reads_its_own_tokens(
    lengths: list[int], rows: int, new_tokens: int, size: int, data: st.DataObject
) -> None:
    paged = PagedRows(lengths, rows=rows, new_tokens=new_tokens, block_size=size)
    cache: list[object] = [None] * (paged.blocks * size)
    placed = paged.prompts()
    prefixes = [[(prompt, position) for position in range(length)] for prompt, length in enumerate(lengths)]
    for slot, token in zip(placed.slot_X.tolist(), [token for prefix in prefixes for token in prefix], strict=True):
        assert slot >= size, "the null block is never written"
        cache[slot] = token

    def check(table: torch.Tensor) -> None:
        for row, prefix in enumerate(prefixes):
            slots = [int(table[row, p // size]) * size + p % size for p in range(len(prefix))]
            assert [cache[slot] for slot in slots] == prefix

    check(placed.block_table_NB)
    prompt_of = list(range(len(lengths)))
    for step in range(new_tokens):
        per_prompt: list[int] = []
        for prompt in range(len(lengths)):
            mine = [row for row, owner in enumerate(prompt_of) if owner == prompt]
            if mine:
                per_prompt += sorted(data.draw(st.lists(st.sampled_from(mine), min_size=1, max_size=rows)))
        copy, placed = paged.grow(torch.tensor(per_prompt))
        blocks = [cache[block * size : (block + 1) * size] for block in copy.source_X.tolist()]
        for block, content in zip(copy.destination_X.tolist(), blocks, strict=True):
            cache[block * size : (block + 1) * size] = content
        prefixes = [[*prefixes[parent], (step, row)] for row, parent in enumerate(per_prompt)]
        prompt_of = [prompt_of[parent] for parent in per_prompt]
        assert placed.position_X.tolist() == [len(prefix) - 1 for prefix in prefixes]
        assert placed.total_lengths.tolist() == [len(prefix) for prefix in prefixes]
        assert len(set(placed.slot_X.tolist())) == len(prefixes)
        for slot, prefix in zip(placed.slot_X.tolist(), prefixes, strict=True):
            cache[slot] = prefix[-1]
        check(placed.block_table_NB)
    with pytest.raises(ValueError, match="exceed the placement"):
        paged.grow(torch.zeros(rows * len(lengths) + 1, dtype=torch.long))


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=0, max_size=20),
    rows=st.integers(1, 5),
    new_tokens=st.integers(0, 5),
    blocks=st.integers(2, 60),
    prompts=st.integers(1, 6),
    tokens=st.integers(1, 80),
)
def test_chunks_fit(lengths: list[int], rows: int, new_tokens: int, blocks: int, prompts: int, tokens: int) -> None:
    cache = CacheShape(block_size=4, blocks=blocks)

    def needed(some: list[int]) -> int:
        return PagedRows(some, rows=rows, new_tokens=new_tokens, block_size=4).blocks

    def plan() -> list[slice]:
        return plan_chunks(
            lengths, rows=rows, new_tokens=new_tokens, cache=cache, prompts_per_forward=prompts,
            tokens_per_forward=tokens,
        )  # fmt: skip

    if any(needed([length]) > blocks for length in lengths):
        with pytest.raises(RequestError, match=r"rollout\.kv_cache_gib.*at least \d+ blocks"):
            plan()
        return
    chunks = plan()
    assert [row for chunk in chunks for row in range(len(lengths))[chunk]] == list(range(len(lengths)))
    for chunk in chunks:
        some = lengths[chunk]
        assert 1 <= len(some) <= prompts
        assert needed(some) <= blocks
        assert len(some) == 1 or sum(some) <= tokens


def test_own_blocks() -> None:
    assert [own_blocks(length, 2, 32) for length in (1, 30, 31, 32, 33)] == [1, 1, 2, 1, 1]
    assert own_blocks(31, 0, 32) == 0
