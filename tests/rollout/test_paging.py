"""Waves, chunks and slots: every limit is kept, no prompt is lost, and no two tokens share a slot.

The cache is simulated: a prompt's tokens are written into their slots, and what is read through its block table must
be the prompt.
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.errors import RequestError
from rollout.paging import Placement, WaveLimits, plan_chunks, plan_waves


@settings(max_examples=80, deadline=None)
@given(lengths=st.lists(st.integers(1, 13), min_size=1, max_size=6), size=st.sampled_from([1, 2, 4]))
def test_every_prompt_reads_its_own_tokens(lengths: list[int], size: int) -> None:
    placed = Placement.of(lengths, size)
    cache: list[object] = [None] * (placed.blocks * size)
    tokens = [(prompt, position) for prompt, length in enumerate(lengths) for position in range(length)]
    assert placed.position_X.tolist() == [position for _, position in tokens]
    assert len(set(placed.slot_X.tolist())) == len(tokens)
    for slot, token in zip(placed.slot_X.tolist(), tokens, strict=True):
        assert slot >= size, "the null block is never written"
        cache[slot] = token
    for prompt, length in enumerate(lengths):
        table = placed.block_table_PB[prompt].tolist()
        read = [cache[table[position // size] * size + position % size] for position in range(length)]
        assert read == [(prompt, position) for position in range(length)]
    assert placed.length_P.tolist() == lengths


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=0, max_size=20),
    rows=st.integers(1, 5),
    new_tokens=st.integers(0, 5),
    tokens=st.integers(1, 120),
    most_rows=st.integers(1, 12),
)
def test_waves_fit(lengths: list[int], rows: int, new_tokens: int, tokens: int, most_rows: int) -> None:
    def needed(some: list[int]) -> int:
        return sum(some) + len(some) * rows * new_tokens

    def plan() -> list[slice]:
        limits = WaveLimits(tokens=tokens, rows=most_rows)
        return plan_waves(lengths, rows=rows, new_tokens=new_tokens, limits=limits)

    if any(needed([length]) > tokens for length in lengths):
        with pytest.raises(RequestError, match=r"rollout\.kv_cache_gib.*at least \d+ tokens"):
            plan()
        return
    waves = plan()
    assert [row for wave in waves for row in range(len(lengths))[wave]] == list(range(len(lengths)))
    for wave, following in zip(waves, [*waves[1:], None], strict=False):
        some = lengths[wave]
        assert needed(some) <= tokens
        assert len(some) == 1 or len(some) * rows <= most_rows
        if following is not None:
            more = [*some, lengths[following.start]]
            assert needed(more) > tokens or len(more) * rows > most_rows


@settings(max_examples=80, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 40), min_size=0, max_size=20), prompts=st.integers(1, 6), tokens=st.integers(1, 80)
)
def test_chunks_keep_the_limits_of_a_forward_pass(lengths: list[int], prompts: int, tokens: int) -> None:
    chunks = plan_chunks(lengths, prompts_per_forward=prompts, tokens_per_forward=tokens)
    assert [row for chunk in chunks for row in range(len(lengths))[chunk]] == list(range(len(lengths)))
    for chunk in chunks:
        some = lengths[chunk]
        assert 1 <= len(some) <= prompts
        assert len(some) == 1 or sum(some) <= tokens
