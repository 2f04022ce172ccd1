"""Tree batches: a prompt once, its completions as branches, trees packed one behind the other.

A branch continues its prompt: its positions restart behind the prompt, and its tokens see the prompt and their own
branch only. Position t of a branch predicts token t+1 of the completion and the last prompt position predicts every
first token, so the last token of a completion is never an input, and the hidden states that the head needs are one
contiguous stretch of each tree. Sequences for supervised training are trees without branches.

`trainer.tree_blocks` turns trees into an attention pattern.

Suffixes: `_N` flat positions, `_U` positions whose hidden state goes through the head, `_K` target tokens, `_P`, `_G`,
`_T` as in `data.records`.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from data.errors import RequestError
from data.records import BoolArray, Groups, IntArray, LongArray, Prompt
from trainer.tree_blocks import TreeBlock, tree_blocks

HEAD_MULTIPLE = 64
"""Head positions are padded to a multiple of this: rows of a small float32 product differ with its height."""
TOKEN_MULTIPLE = 16
"""So are the tokens of a micro-batch."""


@dataclass(frozen=True, kw_only=True)
class Completions:
    """What trees are built from: P prompts with G completions of at most T tokens each."""

    prompt_tokens: list[IntArray]
    token_PGT: IntArray
    length_PG: IntArray
    valid_PG: BoolArray
    """False slots are absent and cost nothing."""
    exclusions: list[IntArray]
    """Items that the constraint is replayed with: those each prompt may not get, or the candidates of its list."""
    open_PG: BoolArray | None = None
    """Members that may leave the constraint, each for itself (`trainer.legal`); None where none may."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(P, G, T)."""
        prompts, members, tokens = self.token_PGT.shape
        return prompts, members, tokens

    @property
    def may_leave_PG(self) -> BoolArray:
        """`open_PG`, also where it is None."""
        return np.zeros(self.length_PG.shape, np.bool_) if self.open_PG is None else self.open_PG

    @property
    def token_mask_PGT(self) -> BoolArray:
        """True on the tokens of valid completions."""
        steps = np.arange(self.token_PGT.shape[2])
        mask: BoolArray = (steps < self.length_PG[..., None]) & self.valid_PG[..., None]
        return mask

    def take(self, rows: np.ndarray) -> Self:
        """The given prompts."""
        return dataclasses.replace(
            self,
            prompt_tokens=[self.prompt_tokens[i] for i in rows],
            exclusions=[self.exclusions[i] for i in rows],
            token_PGT=self.token_PGT[rows],
            length_PG=self.length_PG[rows],
            valid_PG=self.valid_PG[rows],
            open_PG=None if self.open_PG is None else self.open_PG[rows],
        )

    @staticmethod
    def of_groups(prompts: Sequence[Prompt], groups: Groups) -> Completions:
        """The rollouts of a batch."""
        return Completions(
            prompt_tokens=[prompt.token_ids for prompt in prompts],
            token_PGT=groups.token_PGT,
            length_PG=groups.length_PG,
            valid_PG=groups.valid_PG,
            exclusions=[prompt.constraint_items for prompt in prompts],
        )

    @staticmethod
    def of_sequences(prompts: Sequence[IntArray], completions: Sequence[IntArray]) -> Completions:
        """Pairs of a prompt and a completion; neighbours with equal prompts are a group."""
        pairs = zip(prompts, completions, strict=True)
        runs = [
            (np.array(prompt), [c for _, c in run]) for prompt, run in groupby(pairs, lambda pair: pair[0].tolist())
        ]
        members, width = max(len(run) for _, run in runs), max(map(len, completions))
        token_PGT = np.full((len(runs), members, width), -1, dtype=np.int32)
        length_PG = np.zeros((len(runs), members), dtype=np.int32)
        for row, (_, run) in enumerate(runs):
            for member, completion in enumerate(run):
                token_PGT[row, member, : len(completion)] = completion
                length_PG[row, member] = len(completion)
        return Completions(
            prompt_tokens=[prompt.astype(np.int32) for prompt, _ in runs],
            token_PGT=token_PGT,
            length_PG=length_PG,
            valid_PG=length_PG > 0,
            exclusions=[np.zeros(0, dtype=np.int32)] * len(runs),
        )

    def with_members(self, token_PGT: IntArray, length_PG: IntArray, open_PG: BoolArray | None = None) -> Completions:
        """Further members behind the others (a ground truth, an anchor, negatives); length 0 leaves one absent."""
        prompts, members, width = self.shape
        further = length_PG.shape[1]
        joined_PGT = np.full((prompts, members + further, max(width, token_PGT.shape[2])), -1, dtype=np.int32)
        joined_PGT[:, :members, :width] = self.token_PGT
        joined_PGT[:, members:, : token_PGT.shape[2]] = token_PGT
        further_PG = np.zeros(length_PG.shape, np.bool_) if open_PG is None else open_PG
        return dataclasses.replace(
            self,
            token_PGT=joined_PGT,
            length_PG=np.concatenate([self.length_PG, length_PG], 1).astype(np.int32),
            valid_PG=np.concatenate([self.valid_PG, length_PG > 0], 1),
            open_PG=np.concatenate([self.may_leave_PG, further_PG], 1),
        )


@dataclass(frozen=True)
class Piece:
    """One tree before it is laid into a micro-batch."""

    token_N: IntArray
    position_N: IntArray
    branch_N: IntArray
    """0 on the trunk, 1.. on the branches."""
    head_U: LongArray
    """Positions within the piece whose hidden state goes through the head."""
    source_K: LongArray
    """Index into `head_U` of the position that predicts each target."""
    target_K: LongArray
    slot_K: LongArray
    """Where the target's results belong: flat index into `[P, G, T]`, or into the concatenated sequences."""
    unit_K: LongArray
    """Flat index of the completion (`p * G + g`), which groups targets into sequences."""

    @property
    def cost(self) -> int:
        """Positions taken."""
        return len(self.token_N)

    @property
    def trunk(self) -> int:
        """Positions of the prompt, or of the whole sequence."""
        return int(np.count_nonzero(self.branch_N == 0))


_NOTHING: LongArray = np.zeros(0, dtype=np.int64)
FILLER = Piece(
    token_N=np.zeros(1, dtype=np.int32),
    position_N=np.zeros(1, dtype=np.int32),
    branch_N=np.zeros(1, dtype=np.int32),
    head_U=_NOTHING,
    source_K=_NOTHING,
    target_K=_NOTHING,
    slot_K=_NOTHING,
    unit_K=_NOTHING,
)
"""A tree that learns nothing; every parameter has a gradient, of zero."""


@dataclass(frozen=True)
class TreeBatch:
    """A micro-batch of packed trees, as tensors."""

    token_N: Tensor
    position_N: Tensor
    blocks: tuple[TreeBlock, ...]
    """Which positions see which; positions behind the last block are padding."""
    head_U: Tensor
    """Flat positions, padded with 0."""
    heads: int
    """How many of `head_U` are real."""
    source_K: Tensor
    target_K: Tensor
    slot_K: Tensor
    unit_K: Tensor

    def to(self, device: torch.device) -> TreeBatch:
        """A copy on `device`."""
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved, blocks=tuple(block.to(device) for block in self.blocks))

    @property
    def tokens(self) -> int:
        """Positions that are not padding."""
        return self.blocks[-1].stop


def completion_pieces(completions: Completions, row_tokens: int, tree_tokens: int | None = None) -> list[Piece]:
    """One tree per prompt, or several where a group is too large for one.

    Args:
        completions: the groups.
        row_tokens: longest prompt with one completion that is accepted.
        tree_tokens: longest tree, `row_tokens` or more; larger groups are split and pay for their prompt again. None
            splits nothing.

    Raises:
        RequestError: a prompt with one completion is longer than `row_tokens`, or a prompt has no tokens.
    """
    _, members, width = completions.shape
    pieces = []
    for row, prompt_N in enumerate(completions.prompt_tokens):
        present = np.flatnonzero(completions.valid_PG[row] & (completions.length_PG[row] > 0))
        if len(present) == 0:
            continue
        if len(prompt_N) == 0:
            raise RequestError(f"prompt {row} of the batch", "no tokens", "at least one token")
        inputs = completions.length_PG[row, present].astype(np.int64) - 1
        if len(prompt_N) + inputs.max() > row_tokens:
            raise RequestError(
                "learner.row_tokens",
                f"{row_tokens}, but a prompt of {len(prompt_N)} tokens with a completion of {inputs.max() + 1} came",
                f"{-(-(len(prompt_N) + int(inputs.max())) // 16) * 16} or more, or shorter prompts",
            )
        first = 0
        while first < len(present):
            fit = len(present)
            if tree_tokens is not None:
                fit = int(np.searchsorted(np.cumsum(inputs[first:]), tree_tokens - len(prompt_N), side="right"))
            chosen = present[first : first + fit]
            pieces.append(
                _tree(prompt_N, completions.token_PGT[row], completions.length_PG[row], chosen, row * members, width)
            )
            first += len(chosen)
    return pieces


def _tree(
    prompt_N: IntArray, token_GT: IntArray, length_G: IntArray, member_M: LongArray, base: int, width: int
) -> Piece:
    length_M = length_G[member_M].astype(np.int64)
    step_T = np.arange(width)
    input_MT = step_T < (length_M - 1)[:, None]
    target_MT = step_T < length_M[:, None]
    start_M = np.cumsum(length_M - 1) - (length_M - 1)
    source_MT = np.where(step_T == 0, 0, start_M[:, None] + step_T)
    steps_MT = np.broadcast_to(step_T, input_MT.shape)
    branch_MT = np.broadcast_to(np.arange(1, len(member_M) + 1)[:, None], input_MT.shape)
    token_MT = token_GT[member_M]
    unit_MT = np.broadcast_to((base + member_M)[:, None], input_MT.shape)
    trunk = len(prompt_N)
    return Piece(
        token_N=np.concatenate([prompt_N, token_MT[input_MT]]).astype(np.int32),
        position_N=np.concatenate([np.arange(trunk), trunk + steps_MT[input_MT]]).astype(np.int32),
        branch_N=np.concatenate([np.zeros(trunk), branch_MT[input_MT]]).astype(np.int32),
        head_U=np.arange(trunk - 1, trunk + int((length_M - 1).sum()), dtype=np.int64),
        source_K=source_MT[target_MT],
        target_K=token_MT[target_MT].astype(np.int64),
        slot_K=(unit_MT * width + step_T)[target_MT],
        unit_K=unit_MT[target_MT],
    )


def sequence_pieces(rows: Sequence[tuple[IntArray, BoolArray]], row_tokens: int) -> list[Piece]:
    """Trees without branches: token sequences, with the tokens to be learned marked.

    A mark on the first token of a sequence counts for nothing, because nothing predicts it. Sequences without a
    target take no space.

    Raises:
        RequestError: a sequence is longer than a row, or its mask has another length.
    """
    pieces = []
    offset = 0
    for number, (token_N, mask_N) in enumerate(rows):
        if len(token_N) != len(mask_N):
            raise RequestError(f"sequence {number}", f"{len(token_N)} tokens, {len(mask_N)} marks", "equal lengths")
        target = np.flatnonzero(mask_N[1:]) + 1
        if len(target):
            used = int(target[-1])
            if used > row_tokens:
                raise RequestError(
                    "learner.row_tokens", f"{row_tokens}, but a sequence of {used + 1} tokens came", f"{used} or more"
                )
            pieces.append(
                Piece(
                    token_N=token_N[:used].astype(np.int32),
                    position_N=np.arange(used, dtype=np.int32),
                    branch_N=np.zeros(used, dtype=np.int32),
                    head_U=target - 1,
                    source_K=np.arange(len(target)),
                    target_K=token_N[target].astype(np.int64),
                    slot_K=offset + target,
                    unit_K=np.full(len(target), number),
                )
            )
        offset += len(token_N)
    return pieces


def pack(costs: Sequence[int], budget: int) -> list[list[int]]:
    """Indices of the pieces per micro-batch: best fit, longest first, ties in the given order; deterministic."""
    bins: list[list[int]] = []
    free: list[tuple[int, int]] = []
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        place = bisect.bisect_left(free, (costs[index], -1))
        if place == len(free):
            bins.append([index])
            bisect.insort(free, (budget - costs[index], len(bins) - 1))
        else:
            space, chosen = free.pop(place)
            bins[chosen].append(index)
            bisect.insort(free, (space - costs[index], chosen))
    return bins


def deal(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices of the pieces per rank: the rank with the least cost takes the next dearest piece.

    No two ranks differ by more than the dearest piece.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(ranks), key=lambda r: (loads[r], r))
        shares[rank].append(index)
        loads[rank] += costs[index]
    return shares


def lay_out(pieces: Sequence[Piece]) -> TreeBatch:
    """A micro-batch of the trees, at least one, longest trunk first."""
    ordered = sorted(pieces, key=lambda piece: -piece.trunk)
    start_S = np.cumsum([0, *(piece.cost for piece in ordered)])
    count_S = np.cumsum([0, *(len(piece.head_U) for piece in ordered)])
    tokens, heads = int(start_S[-1]), int(count_S[-1])
    filler = np.zeros(-tokens % TOKEN_MULTIPLE, dtype=np.int64)
    padding = np.zeros(max(-heads % HEAD_MULTIPLE, HEAD_MULTIPLE - heads), dtype=np.int64)
    return TreeBatch(
        token_N=_joined([*(piece.token_N for piece in ordered), filler]),
        position_N=_joined([*(piece.position_N for piece in ordered), filler]),
        blocks=tree_blocks([(piece.position_N, piece.branch_N) for piece in ordered]),
        head_U=_joined([*(start + piece.head_U for start, piece in zip(start_S, ordered, strict=False)), padding]),
        heads=heads,
        source_K=_joined([count + piece.source_K for count, piece in zip(count_S, ordered, strict=False)]),
        target_K=_joined([piece.target_K for piece in ordered]),
        slot_K=_joined([piece.slot_K for piece in ordered]),
        unit_K=_joined([piece.unit_K for piece in ordered]),
    )


def _joined(parts: Sequence[np.ndarray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64))
