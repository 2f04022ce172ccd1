"""The item trie: which token paths are items, as flat arrays that can be searched for thousands of beams at once.

Nodes are numbered breadth first and edges in the same order, so edge e leads to node e + 1, the children of a node are
neighbours, and the nodes of one depth form a range. Children are found through a CSR (`first_child`, `token`), and
read as rows of a dense table per depth wherever that table is small (always at the root); elsewhere as windows of the
edges, whose surplus is cleared, at two to three times the cost.

The padded width of a depth is the largest fan-out at that depth, never that of the batch at hand, so that what is
computed for a beam does not depend on which other beams are there.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Final

import numpy as np
import torch
from torch import Tensor

from data.errors import RequestError
from data.records import NO_ITEM, BoolArray, IntArray, LongArray

DENSE_ENTRIES: Final = 1 << 25
"""A depth whose padded table has more entries than this is not dense (268 MB)."""
DENSE_FACTOR: Final = 24
"""Nor is one that the padding makes more than this many times larger than its edges."""
MASK_WIDTH: Final = 1024
"""Up to this width the masks of all fan-outs are kept (1 MB per depth)."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ItemTrie:
    """Paths of the active items. Tensors are int64 and lie on one device.

    Suffixes: `_V` node, `_E` edge, `_I` item of the trie, `_N` query.
    """

    first_child_V: Tensor
    """[V+1] first edge of each node: its edges are `first_child[v]:first_child[v+1]`, in order of their tokens."""
    token_E: Tensor
    """[V-1] token of the edge into node e + 1."""
    parent_V: Tensor
    """[V] parent of each node, -1 for the root (node 0)."""
    item_start_V: Tensor
    """[V+1] the items of leaf v are `item_values[item_start[v]:item_start[v+1]]`; other nodes have none."""
    item_values_I: Tensor
    """Item ids, increasing within a leaf."""
    subtree_items_V: Tensor
    """[V] number of items at or below each node."""
    item_leaf_I: Tensor
    """[n_items] leaf of each item, -1 for items that are not in the trie (retired)."""
    level_start: tuple[int, ...]
    """First node of each depth 0..depth, and the number of nodes."""

    @staticmethod
    def build(
        path_values: IntArray,
        path_start: LongArray,
        active: BoolArray | None = None,
        end_token: int | None = None,
    ) -> ItemTrie:
        """Build the trie of the items 0..n_items-1.

        Args:
            path_values: tokens of all paths, one after the other.
            path_start: [n_items+1]; path of item i is `path_values[path_start[i]:path_start[i+1]]`.
            active: [n_items], false for items that must not be generated; all by default.
            end_token: appended to a path that is the beginning of another one.

        Raises:
            RequestError: no item is active, a path is empty or holds a negative token, or a path is the beginning of
                another one and there is no end token.
        """
        if end_token is not None:
            path_values, path_start = complete_paths(path_values, path_start, end_token)
        n_items = len(path_start) - 1
        item = np.arange(n_items) if active is None else np.flatnonzero(active)
        if item.size == 0:
            raise RequestError("catalogue", "no active item", "at least one")
        longest = int(np.diff(path_start)[item].max())
        matrix = padded_paths(path_values, path_start)[item, :longest]
        order = _sorted_rows(matrix)
        item, matrix = item[order], matrix[order]

        # A row opens a new node at every depth from the first column in which it differs from the row before.
        differs = np.ones(matrix.shape, dtype=bool)
        np.logical_or.accumulate(matrix[1:] != matrix[:-1], axis=1, out=differs[1:])
        opens = differs & (matrix >= 0)
        level_start = [0, 1]
        parents, tokens = [np.array([-1])], []
        above = np.zeros(len(item), dtype=np.int64)
        leaf = np.zeros(len(item), dtype=np.int64)
        for depth in range(matrix.shape[1]):
            new = opens[:, depth]
            node = level_start[-1] + np.cumsum(new) - 1
            parents.append(above[new])
            tokens.append(matrix[new, depth])
            leaf = np.where(matrix[:, depth] >= 0, node, leaf)
            above = node
            level_start.append(level_start[-1] + int(new.sum()))
        nodes = level_start[-1]
        parent = np.concatenate(parents)
        first_child = np.concatenate([[0], np.cumsum(np.bincount(parent[1:], minlength=nodes))])

        at_leaf = np.bincount(leaf, minlength=nodes)
        inner = np.flatnonzero((at_leaf > 0) & (np.diff(first_child) > 0))
        if inner.size:
            found = int(item[np.flatnonzero(leaf == inner[0])[0]])
            raise RequestError(
                f"codes of item {found}",
                "the path is the beginning of another item's path",
                "an end token, or prefix-free paths",
            )
        below = at_leaf.astype(np.float64)  # bincount adds weights in float64, exact far beyond any catalogue
        for start, stop in zip(level_start[-2:0:-1], level_start[:1:-1], strict=True):
            below += np.bincount(parent[start:stop], weights=below[start:stop], minlength=nodes)
        by_leaf = np.argsort(leaf, kind="stable")
        item_leaf = np.full(n_items, -1, dtype=np.int64)
        item_leaf[item] = leaf
        return ItemTrie(
            first_child_V=_tensor(first_child),
            token_E=_tensor(np.concatenate(tokens)),
            parent_V=_tensor(parent),
            item_start_V=_tensor(np.concatenate([[0], np.cumsum(at_leaf)])),
            item_values_I=_tensor(item[by_leaf]),
            subtree_items_V=_tensor(below),
            item_leaf_I=_tensor(item_leaf),
            level_start=tuple(level_start),
        )

    @property
    def n_nodes(self) -> int:
        """Number of nodes, with the root."""
        return self.level_start[-1]

    @property
    def depth(self) -> int:
        """Number of tokens of the longest path."""
        return len(self.level_start) - 2

    @property
    def device(self) -> torch.device:
        """Where the tensors lie."""
        return self.token_E.device

    @cached_property
    def fanout_V(self) -> Tensor:
        """int64 [V], number of children; 0 exactly at the leaves."""
        return self.first_child_V.diff()

    @cached_property
    def widths(self) -> tuple[int, ...]:
        """Largest fan-out of the nodes of each depth (at least 1, so that tensors have a column)."""
        bounds = zip(self.level_start[:-1], self.level_start[1:], strict=True)
        return tuple(max(1, int(self.fanout_V[start:stop].max())) for start, stop in bounds)

    @cached_property
    def max_leaf_items(self) -> int:
        """Number of items of the fullest leaf; 1 when no leaf is shared."""
        return int(self.item_start_V.diff().max())

    @cached_property
    def tables(self) -> tuple[Tensor | None, ...]:
        """Per depth the children's tokens [nodes, width], or None where the table would be too large.

        The deepest nodes have no children and no table.
        """
        return (*(self._table(depth) for depth in range(self.depth)), None)

    def _table(self, depth: int) -> Tensor | None:
        start, stop = self.level_start[depth], self.level_start[depth + 1]
        entries = (stop - start) * self.widths[depth]
        edges = int(self.first_child_V[stop] - self.first_child_V[start])
        if depth > 0 and entries > min(DENSE_ENTRIES, DENSE_FACTOR * edges):
            return None
        node_N = torch.arange(start, stop, device=self.device)
        return self._windows(node_N, self._legal(self.fanout_V[node_N], depth))

    def children(self, node_N: Tensor, depth: int) -> tuple[Tensor, Tensor]:
        """Children of nodes that all lie at `depth`: tokens int64 [N, C] padded with 0, and bool [N, C], both fresh."""
        legal_NC = self._legal(self.fanout_V[node_N], depth)
        table = self.tables[depth]
        if table is None:
            return self._windows(node_N, legal_NC), legal_NC
        return table.index_select(0, node_N - self.level_start[depth]), legal_NC

    def _windows(self, node_N: Tensor, legal_NC: Tensor) -> Tensor:
        """Tokens of the edges from each node's first one on, cleared where they belong to the next nodes."""
        window_EC = self._padded_token_E.as_strided((self.token_E.numel() + 1, legal_NC.shape[1]), (1, 1))
        return window_EC.index_select(0, self.first_child_V[node_N]).masked_fill_(~legal_NC, 0)

    @cached_property
    def _padded_token_E(self) -> Tensor:
        """The tokens and a row of zeros behind them, so that a window of any width can begin at every edge."""
        return torch.cat([self.token_E, self.token_E.new_zeros(max(self.widths))])

    def _legal(self, fanout_N: Tensor, depth: int) -> Tensor:
        """bool [N, C], true in the first `fanout` columns of each row."""
        mask = self._prefix_masks[depth]
        if mask is not None:
            return mask.index_select(0, fanout_N)
        return torch.arange(self.widths[depth], device=self.device) < fanout_N[:, None]

    @cached_property
    def _prefix_masks(self) -> tuple[Tensor | None, ...]:
        """Per depth bool [width+1, width] with k true entries in row k: copying rows is ten times a comparison."""
        column = [torch.arange(width + 1, device=self.device) for width in self.widths]
        return tuple(c[:-1] < c[:, None] if len(c) <= MASK_WIDTH else None for c in column)

    @cached_property
    def _edge_key_E(self) -> Tensor:
        """(parent, token) of every edge as one number; increasing, because the edges are in that order."""
        return self.parent_V[1:] * self._token_range + self.token_E

    @cached_property
    def _token_range(self) -> int:
        return int(self.token_E.max()) + 1

    def step(self, node_N: Tensor, token_N: Tensor) -> Tensor:
        """int64 [N], the child of each node by each token; -1 where there is none (or the node is -1 already)."""
        key_N = node_N * self._token_range + token_N
        edge_N = torch.searchsorted(self._edge_key_E, key_N).clamp_(max=self.token_E.numel() - 1)
        in_range_N = (token_N >= 0) & (token_N < self._token_range) & (node_N >= 0)
        return torch.where(in_range_N & (self._edge_key_E[edge_N] == key_N), edge_N + 1, -1)

    def first_item(self, node_N: Tensor) -> Tensor:
        """int64 [N], the first item of each leaf; `NO_ITEM` for inner nodes and for -1."""
        known_N = node_N.clamp(min=0)
        start_N = self.item_start_V[known_N]
        has_N = (self.item_start_V[known_N + 1] > start_N) & (node_N >= 0)
        item_N = self.item_values_I[start_N.clamp(max=self.item_values_I.numel() - 1)]
        return torch.where(has_N, item_N, NO_ITEM)

    def lookup(self, token_NT: Tensor) -> tuple[Tensor, Tensor]:
        """What free generation means: walk the tokens until a leaf.

        Returns (item int64 [N], length int64 [N]): the first item of the leaf and the number of tokens that lead to
        it, or `NO_ITEM` and T where the tokens leave the trie or never reach a leaf. Tokens after the leaf are ignored.
        """
        rows, tokens = token_NT.shape
        node_N = torch.zeros(rows, dtype=torch.int64, device=token_NT.device)
        item_N = torch.full_like(node_N, NO_ITEM)
        length_N = torch.full_like(node_N, tokens)
        for t in range(tokens):
            node_N = self.step(node_N, token_NT[:, t].long())
            reached_N = (item_N == NO_ITEM) & (self.first_item(node_N) != NO_ITEM)
            item_N = torch.where(reached_N, self.first_item(node_N), item_N)
            length_N = torch.where(reached_N, t + 1, length_N)
        return item_N, length_N

    def level_tokens(self, depth: int) -> Tensor:
        """int64, the tokens of all edges from the nodes of a depth, increasing."""
        # The edge into node v is v - 1, and the nodes of a depth are neighbours.
        start, stop = self.level_start[depth + 1 : depth + 3]
        tokens: Tensor = torch.unique(self.token_E[start - 1 : stop - 1])
        return tokens

    def ancestors(self, node_N: Tensor) -> Tensor:
        """int64 [N, depth+1]: the node itself, its parent, … the root, then -1."""
        columns = [node_N]
        for _ in range(self.depth):
            above_N = columns[-1]
            columns.append(torch.where(above_N >= 0, self.parent_V[above_N.clamp(min=0)], -1))
        return torch.stack(columns, 1)

    def __reduce__(self) -> tuple[object, ...]:
        # The dense tables are made anew where the trie is unpickled, on the CPU of that process.
        return ItemTrie.from_arrays, (self.arrays(),)

    def to(self, device: torch.device | str) -> ItemTrie:
        """The same trie on another device."""
        moved = {name: getattr(self, name).to(device) for name in _tensor_names()}
        return ItemTrie(**moved, level_start=self.level_start)

    def arrays(self) -> dict[str, LongArray]:
        """Everything as NumPy arrays, for files and for Ray's object store."""
        arrays = {name: getattr(self, name).cpu().numpy() for name in _tensor_names()}
        return {**arrays, "level_start": np.asarray(self.level_start, dtype=np.int64)}

    @staticmethod
    def from_arrays(arrays: Mapping[str, LongArray]) -> ItemTrie:
        """The trie of `arrays()`."""
        tensors = {name: _tensor(arrays[name]) for name in _tensor_names()}
        return ItemTrie(**tensors, level_start=tuple(arrays["level_start"].tolist()))

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the arrays; equal for equal paths and active items."""
        state = hashlib.sha256()
        for name, array in sorted(self.arrays().items()):
            state.update(name.encode())
            state.update(np.ascontiguousarray(array).tobytes())
        return state.hexdigest()


def complete_paths(path_values: IntArray, path_start: LongArray, end_token: int) -> tuple[IntArray, LongArray]:
    """Append the end token to every path that is the beginning of another item's path.

    Raises:
        RequestError: a path is empty, holds a negative token, or holds the end token where some path needs it.
    """
    matrix = padded_paths(path_values, path_start)
    lengths = np.diff(path_start)
    order = _sorted_rows(matrix)
    # Padding sorts first, so if any path continues this one, the next different path does.
    ordered = matrix[order]
    changed = (ordered[1:] != ordered[:-1]).any(1)
    group = np.concatenate([[0], np.cumsum(changed)])
    first = ordered[np.concatenate([[True], changed])]
    continues = ((first[:-1] == first[1:]) | (first[:-1] < 0)).all(1)
    needs = np.zeros(len(lengths), dtype=bool)
    needs[order] = np.append(continues, False)[group]
    if not needs.any():
        return path_values, path_start
    if (path_values == end_token).any():
        raise RequestError("codes", f"a path holds the end token {end_token}", "paths without the end token")
    start = np.concatenate([[0], np.cumsum(lengths + needs)])
    values = np.full(start[-1], end_token, dtype=np.int32)
    shift = np.repeat(start[:-1] - path_start[:-1], lengths)
    values[np.arange(len(path_values)) + shift] = path_values
    return values, start


def padded_paths(path_values: IntArray, path_start: LongArray) -> IntArray:
    """Paths as a matrix [n_items, longest], padded with -1.

    Raises:
        RequestError: there is no path, a path is empty or holds a negative token.
    """
    lengths = np.diff(path_start)
    if lengths.size == 0:
        raise RequestError("catalogue", "no item", "at least one")
    if lengths.min() < 1:
        raise RequestError(f"codes of item {int(np.argmin(lengths))}", "empty path", "at least one token")
    if path_values.size and path_values.min() < 0:
        raise RequestError("codes", f"negative token {int(path_values.min())}", "0 and above")
    matrix = np.full((len(lengths), int(lengths.max())), -1, dtype=np.int32)
    matrix[np.arange(matrix.shape[1]) < lengths[:, None]] = path_values
    return matrix


def _sorted_rows(matrix: IntArray) -> LongArray:
    """Stable order of the rows: by first column, then second, …"""
    order: LongArray = np.lexsort(matrix.T[::-1])
    return order


def _tensor(array: np.ndarray) -> Tensor:
    return torch.from_numpy(np.array(array, dtype=np.int64))


def _tensor_names() -> list[str]:
    return [field.name for field in dataclasses.fields(ItemTrie) if field.name != "level_start"]
