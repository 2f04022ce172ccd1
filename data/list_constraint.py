"""Ranked lists as a `Constraint`: at every position the paths of the candidates that are not placed yet.

A list is the paths of its items, one after the other, so every completion is a permutation of the candidates, or its
first K. Candidates of a prompt are kept in the order of their paths: those that go on with the tokens of an item under
way have their next tokens in increasing order, and a running maximum finds the different ones, without a trie of every
prompt. Where free text comes first, the whole vocabulary is legal until the token that begins the list; at the limit
it is the only legal one.

Suffixes: `_P` prompt, `_N` state row, `_M` row of the next state, `_C` candidate, `_L` token of a path, `_K` rank in
the list, `_X` candidate of any prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.constraint import LegalSets
from data.records import NO_ITEM, IntArray, ListSpec
from data.trie import ItemTrie


@dataclass(frozen=True, kw_only=True, eq=False)
class ListState:
    """Lists under way of several prompts, all after the same number of tokens."""

    item_PC: Tensor
    """int64 candidates of each prompt in the order of their paths, `NO_ITEM` behind the last."""
    path_PCL: Tensor
    """int64 tokens of their paths, -1 behind the last."""
    size_PC: Tensor
    """int64 length of each path, 0 behind the last candidate."""
    length_P: Tensor
    """int64 items of each prompt's list."""
    tokens: int
    """Number of tokens so far."""
    prompt_N: Tensor
    """int64 row of each list's prompt."""
    free_NC: Tensor
    """bool, candidates that are not placed yet."""
    match_NC: Tensor
    """bool, free candidates whose path begins with the tokens of the item under way; none once the list is done."""
    depth_N: Tensor
    """int64 tokens of the item under way."""
    placed_N: Tensor
    """int64 number of placed candidates: the rank of the item under way."""
    order_NK: Tensor
    """int64 column of each placed candidate, -1 for ranks to come."""
    in_text_N: Tensor
    """bool, true before the list has begun."""

    def take(self, row_M: Tensor) -> ListState:
        """The given rows."""
        return dataclasses.replace(self, **{name: getattr(self, name)[row_M] for name in _ROW_FIELDS})


_ROW_FIELDS = tuple(field.name for field in dataclasses.fields(ListState) if field.name.split("_")[-1].startswith("N"))


class ListConstraint:
    """Completions are lists of a prompt's candidates."""

    def __init__(self, trie: ItemTrie, lists: ListSpec, *, begin_token: int, vocabulary_size: int) -> None:
        """
        Args:
            trie: gives the paths of the items.
            lists: which lists.
            begin_token: ends the free text; not used without text.
            vocabulary_size: tokens of the free text.

        Raises:
            ValueError: bounds that allow no list.
        """
        if lists.candidates < 1 or not 0 <= lists.length <= lists.candidates or lists.text_tokens < 0:
            raise ValueError(f"{lists} allows no list")
        self.trie = trie
        self.lists = lists
        self.begin_token = begin_token
        self.vocabulary_size = vocabulary_size

    @property
    def spec(self) -> str:
        """Such as `list-10-of-30`, `list-all-of-30` or `list-all-of-30-text-64`."""
        text = f"-text-{self.lists.text_tokens}" if self.lists.text_tokens else ""
        return f"list-{self.lists.length or 'all'}-of-{self.lists.candidates}{text}"

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest text, the begin of the list and the longest paths."""
        text = self.lists.text_tokens + 1 if self.lists.text_tokens else 0
        return text + self.lists.width * self.trie.depth

    def start(self, candidates: Sequence[IntArray], /) -> ListState:
        """One row per prompt, before the first token.

        Args:
            candidates: item ids of each prompt in any order.

        Raises:
            ValueError: a set that is empty, smaller than the list or larger than `lists.candidates`, or an item that is
                not in the trie, or has the path of another one (`data.candidates.check_candidates` says it better).
        """
        prompts, width = len(candidates), self.lists.candidates
        count_P = torch.tensor([len(items) for items in candidates])
        least = max(1, self.lists.length)
        if prompts and not least <= int(count_P.min()) <= int(count_P.max()) <= width:
            raise ValueError(f"{int(count_P.min())} to {int(count_P.max())} candidates, not {least} to {width}")
        given_PC = torch.arange(width) < count_P[:, None]
        item_PC = torch.full((prompts, width), NO_ITEM)
        if prompts:
            item_PC[given_PC] = torch.from_numpy(np.concatenate(list(candidates)).astype(np.int64))
        device = self.trie.device
        item_PC, path_PCL, size_PC = self._sorted_paths(item_PC.to(device), given_PC.to(device))
        count_P = count_P.to(device)
        rows = torch.arange(prompts, device=device)
        in_text_N = torch.full((prompts,), self.lists.text_tokens > 0, device=device)
        return ListState(
            item_PC=item_PC,
            path_PCL=path_PCL,
            size_PC=size_PC,
            length_P=count_P.clamp(max=self.lists.width) if not self.lists.length else count_P * 0 + self.lists.length,
            tokens=0,
            prompt_N=rows,
            free_NC=size_PC > 0,
            match_NC=size_PC > 0,
            depth_N=torch.zeros_like(rows),
            placed_N=torch.zeros_like(rows),
            order_NK=torch.full((prompts, self.lists.width), -1, device=device),
            in_text_N=in_text_N,
        )

    def _sorted_paths(self, item_PC: Tensor, given_PC: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Items, paths and their lengths, in the order of the paths, what is not given last."""
        trie = self.trie
        item_X = item_PC[given_PC]
        known_X = (item_X >= 0) & (item_X < trie.item_leaf_I.numel())
        leaf_X = trie.item_leaf_I[item_X.clamp(0, trie.item_leaf_I.numel() - 1)]
        if not bool((known_X & (leaf_X >= 0)).all()):
            raise ValueError(f"candidate {int(item_X[~known_X | (leaf_X < 0)][0])} is not in the trie")
        node_XD = trie.ancestors(leaf_X)
        size_X = (node_XD > 0).sum(1)
        upwards_XL = size_X[:, None] - 1 - torch.arange(trie.depth, device=trie.device)
        token_XL = trie.token_E[(node_XD.gather(1, upwards_XL.clamp(min=0)) - 1).clamp(min=0)]
        path_PCL = torch.full((*item_PC.shape, trie.depth), -1, device=trie.device)
        path_PCL[given_PC] = torch.where(upwards_XL >= 0, token_XL, -1)
        size_PC = torch.zeros_like(item_PC)
        size_PC[given_PC] = size_X

        order_PC = torch.arange(item_PC.shape[1], device=trie.device).expand(item_PC.shape)
        for key_PC in (*path_PCL.flip(2).unbind(2), (~given_PC).long()):
            order_PC = order_PC.gather(1, key_PC.gather(1, order_PC).argsort(dim=1, stable=True))
        path_PCL = path_PCL.gather(1, order_PC[..., None].expand(path_PCL.shape))
        item_PC, size_PC = item_PC.gather(1, order_PC), size_PC.gather(1, order_PC)
        twice_PC = (path_PCL[:, 1:] == path_PCL[:, :-1]).all(2) & (size_PC[:, 1:] > 0)
        if bool(twice_PC.any()):
            row, column = twice_PC.nonzero()[0].tolist()
            raise ValueError(f"prompt {row} of the batch: candidate {int(item_PC[row, column])} or its path twice")
        return item_PC, path_PCL, size_PC

    def legal(self, state: ListState) -> LegalSets:
        """Legal continuations; `C` is the number of candidates, or the vocabulary while a row is in its text."""
        following_NC = torch.where(state.match_NC, self._following(state), -1)
        # Sorted paths: what is not above every earlier one is a token that is there already.
        before_NC = torch.nn.functional.pad(following_NC.cummax(1).values[:, :-1], (1, 0), value=-1)
        legal_NC = following_NC > before_NC
        token_NC = following_NC.masked_fill(~legal_NC, 0)
        if self.lists.text_tokens and bool(state.in_text_N.any()):
            return self._with_text(state, token_NC, legal_NC)
        return LegalSets(token_NC, legal_NC)

    def _following(self, state: ListState) -> Tensor:
        """int64 [N, C], token of each candidate's path after those of the item under way."""
        column_NC1 = state.depth_N.clamp(max=state.path_PCL.shape[2] - 1)[:, None, None].expand(
            -1, self.lists.candidates, 1
        )
        return state.path_PCL[state.prompt_N].gather(2, column_NC1)[..., 0]

    def _with_text(self, state: ListState, token_NC: Tensor, legal_NC: Tensor) -> LegalSets:
        """The whole vocabulary where a row is in its text, the begin of the list alone at the limit of the text."""
        width = max(self.vocabulary_size, token_NC.shape[1])
        surplus = (0, width - token_NC.shape[1])
        token_NC, legal_NC = (torch.nn.functional.pad(wide_NC, surplus) for wide_NC in (token_NC, legal_NC))
        vocabulary_C = torch.arange(width, device=token_NC.device)
        free_C = vocabulary_C < self.vocabulary_size
        if state.tokens >= self.lists.text_tokens:
            free_C = vocabulary_C == self.begin_token
        text_N1 = state.in_text_N[:, None]
        legal_NC = torch.where(text_N1, free_C, legal_NC)
        return LegalSets(torch.where(text_N1, vocabulary_C * free_C, token_NC), legal_NC)

    def advance(self, state: ListState, parent_M: Tensor, token_M: Tensor) -> ListState:
        """The rows reached from rows `parent_M` by `token_M`.

        Raises:
            ValueError: a token is not a legal continuation of its row.
        """
        rows, token_M = state.take(parent_M), token_M.long()
        hit_MC = rows.match_NC & (self._following(rows) == token_M[:, None])
        ends_M = token_M == self.begin_token
        goes_on_M = (token_M >= 0) & (token_M < self.vocabulary_size) & (state.tokens < self.lists.text_tokens)
        illegal_M = ~torch.where(rows.in_text_N, ends_M | goes_on_M, hit_MC.any(1))
        if bool(illegal_M.any()):
            row = int(illegal_M.nonzero()[0, 0])
            raise ValueError(f"token {int(token_M[row])} at position {state.tokens} is not legal (row {row})")

        depth_M = rows.depth_N + 1
        closed_MC = hit_MC & (rows.size_PC[rows.prompt_N] == depth_M[:, None]) & ~rows.in_text_N[:, None]
        closes_M = closed_MC.any(1)
        free_MC = rows.free_NC & ~closed_MC
        order_MK = rows.order_NK.clone()
        order_MK[closes_M, rows.placed_N[closes_M]] = closed_MC[closes_M].int().argmax(1)
        placed_M = rows.placed_N + closes_M
        match_MC = torch.where(closes_M[:, None], free_MC, hit_MC)
        match_MC = torch.where(rows.in_text_N[:, None], rows.match_NC, match_MC)
        return dataclasses.replace(
            rows,
            tokens=state.tokens + 1,
            free_NC=free_MC,
            match_NC=match_MC & (placed_M < rows.length_P[rows.prompt_N])[:, None],
            depth_N=torch.where(closes_M | rows.in_text_N, 0, depth_M),
            placed_N=placed_M,
            order_NK=order_MK,
            in_text_N=rows.in_text_N & ~ends_M,
        )

    def done(self, state: ListState) -> Tensor:
        """bool [N], true where every item of the list is placed."""
        return state.placed_N == state.length_P[state.prompt_N]

    def items(self, state: ListState) -> Tensor:
        """int64 [N], the first item of each list that is done; `NO_ITEM` elsewhere."""
        return torch.where(self.done(state), self.ranked(state)[:, 0], NO_ITEM)

    def ranked(self, state: ListState) -> Tensor:
        """int64 [N, K], the items that are placed, in their order, `NO_ITEM` behind the last."""
        item_NC = state.item_PC[state.prompt_N]
        return torch.where(state.order_NK >= 0, item_NC.gather(1, state.order_NK.clamp(min=0)), NO_ITEM)
