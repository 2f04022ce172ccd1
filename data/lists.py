"""Ranked lists read back from their tokens: which items a list has, and which rank each token belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from data.list_constraint import ListConstraint
from data.records import FORMAT_SEGMENT, NO_ITEM, NO_SEGMENT, IntArray


class Lists(NamedTuple):
    """Lists of P prompts with G slots each."""

    item_PGK: IntArray
    """Items in their order; `NO_ITEM` behind the last, and in empty slots."""
    segment_PGT: IntArray
    """Rank in the list of each token's item, `FORMAT_SEGMENT` for free text and the begin of the list, `NO_SEGMENT`
    where there is no token."""


def read_lists(
    constraint: ListConstraint, candidates: Sequence[IntArray], token_PGT: IntArray, length_PG: IntArray
) -> Lists:
    """What the completions say.

    Args:
        constraint: that they were decoded under.
        candidates: item ids of each prompt.
        token_PGT: tokens of the completions.
        length_PG: their lengths, 0 for empty slots.

    Raises:
        ValueError: a completion that the constraint does not allow, or whose list is not complete.
    """
    prompt_N, member_N = np.nonzero(length_PG)
    item_PGK = np.full((*length_PG.shape, constraint.lists.width), NO_ITEM, np.int32)
    segment_PGT = np.full(token_PGT.shape, NO_SEGMENT, np.int32)
    device = constraint.trie.device
    state = constraint.start(candidates).take(torch.from_numpy(prompt_N).to(device))
    for token in range(int(length_PG.max(initial=0))):
        rank_N = torch.where(state.in_text_N, FORMAT_SEGMENT, state.placed_N)
        segment_PGT[prompt_N, member_N, token] = rank_N.cpu().numpy()
        token_N = torch.from_numpy(token_PGT[prompt_N, member_N, token].astype(np.int64)).to(device)
        state = constraint.advance(state, torch.arange(len(token_N), device=device), token_N)
        ended_N = length_PG[prompt_N, member_N] == token + 1
        early_N = ended_N & ~constraint.done(state).cpu().numpy()
        if early_N.any():
            row = int(np.flatnonzero(early_N)[0])
            where = f"completion {member_N[row]} of prompt {prompt_N[row]}"
            raise ValueError(f"{where} ends after {token + 1} tokens, before its list")
        item_PGK[prompt_N[ended_N], member_N[ended_N]] = constraint.ranked(state).cpu().numpy()[ended_N]
        prompt_N, member_N = prompt_N[~ended_N], member_N[~ended_N]
        state = state.take(torch.from_numpy(~ended_N).to(device))
    return Lists(item_PGK, segment_PGT)
