"""Tree batches: a prompt once, its completions as branches, several trees packed per row.

A branch continues its prompt: its positions restart behind the prompt, and its tokens see the prompt and their own
branch only. Position t of a branch predicts token t+1 of the completion and the last prompt position predicts every
first token, so the last token of a completion is never an input, and the hidden states that the head needs are one
contiguous stretch of each tree. Sequences for supervised training are trees without branches.

`attention_mask` is the only place that turns trees into an attention pattern.

Suffixes: `_R` rows, `_N` row positions, `_U` positions whose hidden state goes through the head, `_K` target tokens,
`_P`, `_G`, `_T` as in `data.records`.
"""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import torch
from torch import Tensor

from data.errors import RequestError
from data.records import BoolArray, Groups, IntArray, LongArray, Prompt

HEAD_MULTIPLE = 64
"""Head positions are padded to a multiple of this: rows of a small float32 product differ with its height."""


@dataclass(frozen=True, kw_only=True)
class Completions:
    """What trees are built from: P prompts with G completions of at most T tokens each."""

    prompt_tokens: list[IntArray]
    token_PGT: IntArray
    length_PG: IntArray
    valid_PG: BoolArray
    """False slots are absent and cost nothing."""
    exclusions: list[IntArray]
    """Items that each prompt may not get; the constraint is replayed with them."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """(P, G, T)."""
        prompts, members, tokens = self.token_PGT.shape
        return prompts, members, tokens

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
        )

    @staticmethod
    def of_groups(prompts: Sequence[Prompt], groups: Groups) -> Completions:
        """The rollouts of a batch."""
        return Completions(
            prompt_tokens=[prompt.token_ids for prompt in prompts],
            token_PGT=groups.token_PGT,
            length_PG=groups.length_PG,
            valid_PG=groups.valid_PG,
            exclusions=[prompt.exclusions for prompt in prompts],
        )

    def with_members(self, token_PGT: IntArray, length_PG: IntArray) -> Completions:
        """Further members behind the others (a ground truth, an anchor, negatives); length 0 leaves one absent."""
        prompts, members, width = self.shape
        further = length_PG.shape[1]
        joined_PGT = np.full((prompts, members + further, max(width, token_PGT.shape[2])), -1, dtype=np.int32)
        joined_PGT[:, :members, :width] = self.token_PGT
        joined_PGT[:, members:, : token_PGT.shape[2]] = token_PGT
        return dataclasses.replace(
            self,
            token_PGT=joined_PGT,
            length_PG=np.concatenate([self.length_PG, length_PG], 1).astype(np.int32),
            valid_PG=np.concatenate([self.valid_PG, length_PG > 0], 1),
        )


@dataclass(frozen=True)
class Piece:
    """One tree before it is laid into a row."""

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
        """Row positions taken."""
        return len(self.token_N)


@dataclass(frozen=True)
class TreeBatch:
    """A micro-batch of packed rows, as tensors."""

    token_RN: Tensor
    position_RN: Tensor
    tree_RN: Tensor
    """Number of the tree within its row, -1 on padding."""
    branch_RN: Tensor
    head_U: Tensor
    """Flat positions (`r * N + n`), padded with 0."""
    heads: int
    """How many of `head_U` are real."""
    source_K: Tensor
    target_K: Tensor
    slot_K: Tensor
    unit_K: Tensor

    def to(self, device: torch.device) -> TreeBatch:
        """A copy on `device`."""
        moved: dict[str, Any] = {
            field.name: value.to(device) if isinstance(value := getattr(self, field.name), Tensor) else value
            for field in dataclasses.fields(self)
        }
        return TreeBatch(**moved)

    @property
    def tokens(self) -> int:
        """Positions that are not padding."""
        return int((self.tree_RN >= 0).sum())


def completion_pieces(completions: Completions, row_tokens: int) -> list[Piece]:
    """One tree per prompt, or several where a group does not fit into one row.

    Raises:
        RequestError: a prompt with one completion is longer than a row, or a prompt has no tokens.
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
            fit = np.searchsorted(np.cumsum(inputs[first:]), row_tokens - len(prompt_N), side="right")
            chosen = present[first : first + int(fit)]
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


def pack_rows(costs: Sequence[int], row_tokens: int) -> list[list[int]]:
    """Indices of the pieces per row: best fit, longest first, ties in the given order; deterministic."""
    rows: list[list[int]] = []
    free: list[tuple[int, int]] = []
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        place = bisect.bisect_left(free, (costs[index], -1))
        if place == len(free):
            rows.append([index])
            bisect.insort(free, (row_tokens - costs[index], len(rows) - 1))
        else:
            space, row = free.pop(place)
            rows[row].append(index)
            bisect.insort(free, (space - costs[index], row))
    return rows


def deal_rows(costs: Sequence[int], ranks: int) -> list[list[int]]:
    """Indices of the rows per rank, so that the dearest share is cheap and the counts differ by at most one.

    Counts come first, because every rank computes whole rows; then the rank with the least cost takes the next
    dearest row.
    """
    shares: list[list[int]] = [[] for _ in range(ranks)]
    loads = [0] * ranks
    for index in sorted(range(len(costs)), key=lambda i: (-costs[i], i)):
        rank = min(range(ranks), key=lambda r: (len(shares[r]), loads[r], r))
        shares[rank].append(index)
        loads[rank] += costs[index]
    return shares


def lay_out(rows: Sequence[Sequence[Piece]], row_tokens: int) -> TreeBatch:
    """A micro-batch with one packed row per entry, padded to `row_tokens`; an entry may be empty."""
    token_RN = np.zeros((len(rows), row_tokens), dtype=np.int64)
    position_RN = np.zeros_like(token_RN)
    tree_RN = np.full_like(token_RN, -1)
    branch_RN = np.zeros_like(token_RN)
    heads: list[LongArray] = []
    sources: list[LongArray] = []
    count = 0
    for row, pieces in enumerate(rows):
        end = 0
        for tree, piece in enumerate(pieces):
            span = slice(end, end + piece.cost)
            token_RN[row, span] = piece.token_N
            position_RN[row, span] = piece.position_N
            tree_RN[row, span] = tree
            branch_RN[row, span] = piece.branch_N
            heads.append(row * row_tokens + end + piece.head_U)
            sources.append(count + piece.source_K)
            count += len(piece.head_U)
            end += piece.cost
    flat = [piece for pieces in rows for piece in pieces]
    padding = max(-count % HEAD_MULTIPLE, HEAD_MULTIPLE if count == 0 else 0)
    return TreeBatch(
        token_RN=torch.from_numpy(token_RN),
        position_RN=torch.from_numpy(position_RN),
        tree_RN=torch.from_numpy(tree_RN),
        branch_RN=torch.from_numpy(branch_RN),
        head_U=_joined([*heads, np.zeros(padding, dtype=np.int64)]),
        heads=count,
        source_K=_joined(sources),
        target_K=_joined([piece.target_K for piece in flat]),
        slot_K=_joined([piece.slot_K for piece in flat]),
        unit_K=_joined([piece.unit_K for piece in flat]),
    )


def _joined(parts: Sequence[LongArray]) -> Tensor:
    return torch.from_numpy(np.concatenate([np.zeros(0, dtype=np.int64), *parts]).astype(np.int64))


def attention_mask(batch: TreeBatch) -> Tensor:
    """Bool `[R, 1, N, N]`, true where a position (third axis) sees another (last axis).

    Padding sees itself, so that no softmax is empty. Dense, for the SDPA attention of torch.
    """
    positions = torch.arange(batch.token_RN.shape[1], device=batch.token_RN.device)
    tree_R1N, branch_R1N = batch.tree_RN[:, None], batch.branch_RN[:, None]
    tree_RN1, branch_RN1 = batch.tree_RN[..., None], batch.branch_RN[..., None]
    seen_RNN = (tree_RN1 == tree_R1N) & (tree_RN1 >= 0) & ((branch_R1N == 0) | (branch_R1N == branch_RN1))
    seen_RNN &= positions[:, None] >= positions
    seen_RNN |= positions[:, None] == positions
    return seen_RNN[:, None]
