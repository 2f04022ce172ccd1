"""The item trie as a `Constraint`, with or without items that a prompt may not get.

An exclusion kills the item; a leaf is dead when all its items are excluded, and a node when all below it is dead. The
dead nodes of all prompts are one sorted array of keys `prompt * nodes + node`. Children of a node are neighbours in
the numbering, so the dead children of a beam are one range of that array: two binary searches per beam find it, and
one scatter clears them from the mask. Because a node with anything left below it stays alive, only the root can be a
dead end.

Suffixes: `_P` prompt, `_N` state row, `_M` row of the next state, `_C` padded legal continuation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from data.constraint import LegalSets
from data.errors import RunError
from data.records import NO_ITEM, IntArray
from data.trie import ItemTrie


@dataclass(frozen=True, kw_only=True, eq=False)
class TrieState:
    """Beams of several prompts, all after the same number of tokens."""

    node_N: Tensor
    """int64 [N] trie node of each beam."""
    prompt_N: Tensor
    """int64 [N] row of each beam's prompt in the `exclusions` given to `start`."""
    depth: int
    """Number of tokens so far."""
    dead_K: Tensor
    """int64, sorted keys `prompt * nodes + node` of the dead nodes."""
    excluded_K: Tensor
    """int64, sorted keys `prompt * n_items + item` of the exclusions."""


class TrieConstraint:
    """Completions are paths of the item trie; the `Constraint` of everything that generates single items."""

    def __init__(self, trie: ItemTrie, exclude: bool) -> None:
        """`exclude` says whether prompts bring exclusions; it is part of the specification stored with a group."""
        self.trie = trie
        self.exclude = exclude

    @property
    def spec(self) -> str:
        """`item_trie`, or `item_trie-exclusions`."""
        return "item_trie-exclusions" if self.exclude else "item_trie"

    @property
    def max_tokens(self) -> int:
        """Tokens of the longest path."""
        return self.trie.depth

    def to(self, device: torch.device | str) -> TrieConstraint:
        """The same constraint on another device."""
        return TrieConstraint(self.trie.to(device), self.exclude)

    def start(self, exclusions: Sequence[IntArray]) -> TrieState:
        """One row per prompt at the root.

        Args:
            exclusions: item ids each prompt may not get, in any order; items that are not in the trie change nothing.

        Raises:
            ValueError: exclusions for a constraint without them, or an id that is no item of the catalogue.
        """
        trie = self.trie
        prompts = len(exclusions)
        counts = [len(items) for items in exclusions]
        none = torch.zeros(0, dtype=torch.int64, device=trie.device)
        dead_K = excluded_K = none
        if sum(counts):
            if not self.exclude:
                raise ValueError("exclusions were given to a constraint without exclusions")
            excluded_K = self._excluded(np.concatenate(exclusions), np.repeat(np.arange(prompts), counts))
            dead_K = self._dead(excluded_K)
        return TrieState(
            node_N=torch.zeros(prompts, dtype=torch.int64, device=trie.device),
            prompt_N=torch.arange(prompts, device=trie.device),
            depth=0,
            dead_K=dead_K,
            excluded_K=excluded_K,
        )

    def _excluded(self, item_X: IntArray, prompt_X: np.ndarray) -> Tensor:
        n_items = self.trie.item_leaf_I.numel()
        outside = (item_X < 0) | (item_X >= n_items)
        if outside.any():
            raise ValueError(f"excluded item {int(item_X[outside][0])} is not in the catalogue of {n_items} items")
        keys = prompt_X.astype(np.int64) * n_items + item_X
        unique_K: Tensor = torch.from_numpy(np.unique(keys)).to(self.trie.device)
        return unique_K

    def _dead(self, excluded_K: Tensor) -> Tensor:
        """Keys of the nodes below which every item is excluded."""
        trie = self.trie
        n_items = trie.item_leaf_I.numel()
        leaf_K = trie.item_leaf_I[excluded_K % n_items]
        node_KD = trie.ancestors(leaf_K)
        key_KD = (excluded_K // n_items)[:, None] * trie.n_nodes + node_KD
        key_U, count_U = torch.unique_consecutive(key_KD[node_KD >= 0].sort().values, return_counts=True)
        dead_K: Tensor = key_U[count_U == trie.subtree_items_V[key_U % trie.n_nodes]]
        return dead_K

    def legal(self, state: TrieState) -> LegalSets:
        """Legal continuations, `C` being the widest fan-out of the state's depth whatever the rows are.

        Raises:
            RunError: everything is excluded for a prompt.
        """
        token_NC, legal_NC = self.trie.children(state.node_N, state.depth)
        if state.dead_K.numel():
            self._clear_dead(state, legal_NC)
        return LegalSets(token_NC=token_NC, legal_NC=legal_NC)

    def _clear_dead(self, state: TrieState, legal_NC: Tensor) -> None:
        trie = self.trie
        first_N = trie.first_child_V[state.node_N]
        key_N = state.prompt_N * trie.n_nodes + first_N + 1  # edge e leads to node e + 1
        fanout_N = trie.fanout_V[state.node_N]
        from_N = torch.searchsorted(state.dead_K, key_N)
        count_N = torch.searchsorted(state.dead_K, key_N + fanout_N) - from_N
        if state.depth == 0:
            ends_N = (count_N == fanout_N) & (fanout_N > 0)
            if bool(ends_N.any()):
                prompt = int(state.prompt_N[ends_N][0])
                raise RunError(f"prompt {prompt} of the batch: every item of the catalogue is excluded")
        row_X = torch.repeat_interleave(count_N)
        skipped_N = count_N.cumsum(0) - count_N
        entry_X = torch.arange(row_X.numel(), device=trie.device) + (from_N - skipped_N)[row_X]
        legal_NC[row_X, state.dead_K[entry_X] - key_N[row_X]] = False

    def advance(self, state: TrieState, parent_M: Tensor, token_M: Tensor) -> TrieState:
        """The rows reached from rows `parent_M` by `token_M`.

        Raises:
            ValueError: a token is not a legal continuation of its row.
        """
        trie = self.trie
        prompt_M = state.prompt_N[parent_M]
        node_M = trie.step(state.node_N[parent_M], token_M.long())
        illegal_M = node_M < 0
        if state.dead_K.numel():
            illegal_M |= _contains(state.dead_K, prompt_M * trie.n_nodes + node_M)
        if bool(illegal_M.any()):
            row = int(illegal_M.nonzero()[0, 0])
            raise ValueError(f"token {int(token_M[row])} at position {state.depth} is not legal (row {row})")
        return TrieState(
            node_N=node_M,
            prompt_N=prompt_M,
            depth=state.depth + 1,
            dead_K=state.dead_K,
            excluded_K=state.excluded_K,
        )

    def done(self, state: TrieState) -> Tensor:
        """bool [N], true at the leaves."""
        return self.trie.fanout_V[state.node_N] == 0

    def items(self, state: TrieState) -> Tensor:
        """int64 [N], the first item of the leaf that the prompt may get; `NO_ITEM` before the leaf."""
        trie = self.trie
        if trie.max_leaf_items == 1 or not state.excluded_K.numel():
            return trie.first_item(state.node_N)
        n_items = trie.item_leaf_I.numel()
        start_N = trie.item_start_V[state.node_N]
        column_S = torch.arange(trie.max_leaf_items, device=trie.device)
        inside_NS = column_S < (trie.item_start_V[state.node_N + 1] - start_N)[:, None]
        item_NS = trie.item_values_I[(start_N[:, None] + column_S).clamp(max=trie.item_values_I.numel() - 1)]
        allowed_NS = inside_NS & ~_contains(state.excluded_K, state.prompt_N[:, None] * n_items + item_NS)
        first_N = allowed_NS.int().argmax(1, keepdim=True)
        return torch.where(allowed_NS.any(1), item_NS.gather(1, first_N)[:, 0], NO_ITEM)


def _contains(sorted_K: Tensor, key: Tensor) -> Tensor:
    """Which keys occur in a sorted tensor that is not empty."""
    position = torch.searchsorted(sorted_K, key.contiguous()).clamp_(max=sorted_K.numel() - 1)
    return sorted_K[position] == key
