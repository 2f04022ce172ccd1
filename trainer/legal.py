"""Legal sets of given completions, replayed from the constraint.

The learner computes the same renormalised policy as the engine, so it needs the legal continuations at every token
of a completion. They depend on the prompt's exclusions and on the prefix alone: each (prompt, prefix) is visited
once, however many members share it.

A member that is marked as open is scored as if its own item were in the constraint as well, for it alone: its legal
set is that of its prefix and its own token. So the first of its tokens that is not in the set is its open token, and
behind that, where nothing else shares its prefix, each token is the only legal one. Other members see nothing of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

import numpy as np
import torch
from torch import Tensor

from data.constraint import Constraint, LegalSets
from data.records import BoolArray, IntArray, LongArray
from trainer.trees import Completions, TreeBatch


class TargetSets(NamedTuple):
    """Legal sets of a micro-batch, and how its targets lie in them."""

    sets: LegalSets
    """Of the head positions, `[U, C]`."""
    place_K: Tensor
    """int64, place of each target in its set; 0 where it has none."""
    legal_K: Tensor
    """bool, whether the target is legal for its completion."""
    open_K: Tensor | None = None
    """bool, targets that are legal for their own completion and not in the set; None where there is none."""

    def to(self, device: torch.device) -> Self:
        """A copy on `device`."""
        sets = LegalSets(*(tensor.to(device) for tensor in self.sets))
        open_K = None if self.open_K is None else self.open_K.to(device)
        return self._replace(sets=sets, place_K=self.place_K.to(device), legal_K=self.legal_K.to(device), open_K=open_K)


@dataclass(frozen=True)
class LegalTable:
    """Legal sets in CSR form and which of them applies to each token."""

    token_values: LongArray
    start_S: LongArray
    """[S + 1]; set s holds `token_values[start_S[s]:start_S[s + 1]]`, increasing."""
    set_PGT: LongArray
    """Number of the set at each token, -1 where there is none (absent, or behind an illegal token)."""
    legal_PGT: BoolArray
    """True where the token is in its set, or is open."""
    open_PGT: BoolArray
    """True on the open token of a member, which is not in its set."""

    def sets(self, batch: TreeBatch) -> TargetSets:
        """The sets of a micro-batch.

        Head positions without a set (padding, behind an illegal token) get token 0 as their only member, so that no
        softmax is empty; their results are marked as not legal.
        """
        slot_K = batch.slot_K.numpy()
        source_K = batch.source_K.numpy()
        set_U = np.full(len(batch.head_U), -1, dtype=np.int64)
        set_K = self.set_PGT.reshape(-1)[slot_K]
        np.maximum.at(set_U, source_K, set_K)
        size_U = np.where(set_U >= 0, self.start_S[set_U + 1] - self.start_S[set_U], 1)
        width = int(size_U.max(initial=1))
        column_C = np.arange(width)
        legal_UC = column_C < size_U[:, None]
        index_UC = np.where(set_U >= 0, self.start_S[set_U], 0)[:, None] + column_C
        known_UC = legal_UC & (set_U >= 0)[:, None]
        values = self.token_values if len(self.token_values) else np.zeros(1, dtype=np.int64)
        token_UC = np.where(known_UC, values[np.where(known_UC, index_UC, 0)], 0)
        legal_K = self.legal_PGT.reshape(-1)[slot_K]
        match_KC = (token_UC[source_K] == batch.target_K.numpy()[:, None]) & known_UC[source_K]
        place_K = np.where(legal_K, match_KC.argmax(1), 0)
        open_K = self.open_PGT.reshape(-1)[slot_K]
        return TargetSets(
            sets=LegalSets(torch.from_numpy(token_UC), torch.from_numpy(legal_UC)),
            place_K=torch.from_numpy(place_K),
            legal_K=torch.from_numpy(legal_K),
            open_K=torch.from_numpy(open_K) if open_K.any() else None,
        )


def replay(constraint: Constraint[Any], completions: Completions, rows: Sequence[int]) -> LegalTable:
    """Walk the completions of the prompts `rows` through the constraint.

    An illegal token (a ground truth that is excluded or retired) ends the walk of its member without an error: the
    token is marked, because the full-vocabulary likelihood needs no legal set. An open member leaves the walk as well,
    but its tokens stay legal.
    """
    prompts, members, width = completions.shape
    set_PGT = np.full((prompts, members, width), -1, dtype=np.int64)
    legal_PGT = np.zeros((prompts, members, width), dtype=np.bool_)
    open_PGT = np.zeros((prompts, members, width), dtype=np.bool_)
    may_leave_PG = completions.may_leave_PG
    values: list[LongArray] = []
    sizes: list[LongArray] = [np.zeros(1, dtype=np.int64)]
    row_M, member_M = np.nonzero(completions.valid_PG[list(rows)] & (completions.length_PG[list(rows)] > 0))
    prompt_M = np.asarray(list(rows), dtype=np.int64)[row_M]
    state = constraint.start([completions.exclusions[row] for row in rows]) if len(rows) else None
    state_M = row_M
    count = 0
    for step in range(width):
        if len(state_M) == 0 or state is None:
            break
        sets = constraint.legal(state)
        token_NC, legal_NC = sets.token_NC.cpu().numpy(), sets.legal_NC.cpu().numpy()
        values.append(token_NC[legal_NC])
        sizes.append(legal_NC.sum(1))
        token_M: IntArray = completions.token_PGT[prompt_M, member_M, step]
        hit_M = ((token_NC[state_M] == token_M[:, None]) & legal_NC[state_M]).any(1)
        set_PGT[prompt_M, member_M, step] = count + state_M
        open_M = ~hit_M & may_leave_PG[prompt_M, member_M]
        legal_PGT[prompt_M, member_M, step] = hit_M | open_M
        open_PGT[prompt_M, member_M, step] = open_M
        count += len(token_NC)
        going = hit_M & (completions.length_PG[prompt_M, member_M] > step + 1)
        prompt_M, member_M = prompt_M[going], member_M[going]
        pair_M2 = np.stack([state_M[going], token_M[going].astype(np.int64)], 1)
        if len(pair_M2) == 0:
            break
        pair_S2, inverse = np.unique(pair_M2, axis=0, return_inverse=True)
        state_M = inverse.reshape(-1)
        state = constraint.advance(
            state, torch.from_numpy(pair_S2[:, 0].copy()), torch.from_numpy(pair_S2[:, 1].copy())
        )
    behind_PGT = (open_PGT.cumsum(2) > 0) & ~open_PGT & completions.token_mask_PGT
    alone_S = completions.token_PGT[behind_PGT]
    set_PGT[behind_PGT] = count + np.arange(len(alone_S))
    legal_PGT |= behind_PGT
    values.append(alone_S.astype(np.int64))
    sizes.append(np.ones(len(alone_S), dtype=np.int64))
    return LegalTable(
        token_values=np.concatenate([np.zeros(0, dtype=np.int64), *values]).astype(np.int64),
        start_S=np.cumsum(np.concatenate(sizes)),
        set_PGT=set_PGT,
        legal_PGT=legal_PGT,
        open_PGT=open_PGT,
    )
