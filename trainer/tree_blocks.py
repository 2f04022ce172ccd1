"""Which tokens of a micro-batch see which: trees of similar size side by side.

The tokens of a micro-batch lie flat, tree behind tree. Trees of similar size are attended to together as a block,
padded to `[T, P + B]`: the P places of the trunk see one another causally, the B places behind them see the trunk and
their own branch, and themselves.

Suffixes: `_N` flat positions, `_T` trees, `_M` places of a padded tree (trunk and branches), `_B` places of the
branches, `_H` heads, `_D` head size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.records import BoolArray, IntArray, LongArray

ALIKE = 0.7
"""Trees share a block when the shorter trunk is at least this share of the longer one: padding costs its square."""


@dataclass(frozen=True, kw_only=True)
class TreeBlock:
    """Trees that are attended to together, padded to equal sizes."""

    start: int
    """First flat position."""
    stop: int
    trees: int
    trunk: int
    """Places of the longest trunk."""
    branches: int
    """Places of the widest tree behind its trunk."""
    place_N: Tensor | None
    """int64, place of each flat position of the block in the padded `[T * M]`; None where it is its own number."""
    sees_TBM: Tensor
    """bool, what the branch places see; first axis 1 where all trees are alike. Padding sees itself alone."""
    position_TM: Tensor
    """int64, distance from the root, for sliding windows."""
    deepest: int
    """The largest of `position_TM`."""

    def to(self, device: torch.device) -> TreeBlock:
        """A copy on `device`."""
        moved: dict[str, Any] = {
            field.name: value.to(device)
            for field in dataclasses.fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return dataclasses.replace(self, **moved)

    def spread(self, flat_NHD: Tensor) -> Tensor:
        """The block's part of flat values as `[T, H, M, D]`, padding zero."""
        part_NHD = flat_NHD[self.start : self.stop]
        if self.place_N is not None:
            part_NHD = _spread(part_NHD, self.place_N, self.trees * (self.trunk + self.branches))
        return part_NHD.view(self.trees, -1, *part_NHD.shape[1:]).transpose(1, 2)

    def collect(self, padded_THMD: Tensor) -> Tensor:
        """The inverse of `spread`."""
        flat_NHD = padded_THMD.transpose(1, 2).flatten(0, 1)
        return flat_NHD if self.place_N is None else _collect(flat_NHD, self.place_N)

    def far_TMM(self, window: int) -> Tensor:
        """bool, pairs that a sliding window hides: the key is `window` or more positions before the query."""
        return self.position_TM[:, :, None] - self.position_TM[:, None] >= window


class _Spread(torch.autograd.Function):
    """Rows to their places among zeros. Places are distinct, so its gradient is a selection, not a sum."""

    @staticmethod
    def forward(ctx: Any, rows_N: Tensor, place_N: Tensor, places: int) -> Tensor:
        ctx.save_for_backward(place_N)
        return rows_N.new_zeros((places, *rows_N.shape[1:])).index_copy_(0, place_N, rows_N)

    @staticmethod
    def backward(ctx: Any, grad_M: Tensor) -> Any:
        return grad_M.index_select(0, *ctx.saved_tensors), None, None


class _Collect(torch.autograd.Function):
    """Rows from their places: the inverse of `_Spread`, with the same reason."""

    @staticmethod
    def forward(ctx: Any, rows_M: Tensor, place_N: Tensor) -> Tensor:
        ctx.save_for_backward(place_N)
        ctx.places = len(rows_M)
        return rows_M.index_select(0, place_N)

    @staticmethod
    def backward(ctx: Any, grad_N: Tensor) -> Any:
        (place_N,) = ctx.saved_tensors
        return grad_N.new_zeros((ctx.places, *grad_N.shape[1:])).index_copy_(0, place_N, grad_N), None


_spread: Callable[[Tensor, Tensor, int], Tensor] = _Spread.apply
_collect: Callable[[Tensor, Tensor], Tensor] = _Collect.apply


def tree_blocks(trees: Sequence[tuple[IntArray, IntArray]]) -> tuple[TreeBlock, ...]:
    """The blocks of trees that lie one behind the other, longest trunk first.

    Args:
        trees: (distance from the root, branch) of the positions of each tree; the trunk is branch 0 and comes first,
            the others are 1 and up, each in order.
    """
    trunk_T = [int(np.count_nonzero(branch_N == 0)) for _, branch_N in trees]
    blocks: list[TreeBlock] = []
    first = 0
    for tree, trunk in enumerate([*trunk_T, 0]):
        if first < tree and trunk < ALIKE * trunk_T[first]:
            blocks.append(_block(trees[first:tree], trunk_T[first:tree], blocks[-1].stop if blocks else 0))
            first = tree
    return tuple(blocks)


def _block(trees: Sequence[tuple[IntArray, IntArray]], trunk_T: Sequence[int], start: int) -> TreeBlock:
    trunk = trunk_T[0]
    branches = max(len(branch_N) - length for (_, branch_N), length in zip(trees, trunk_T, strict=True))
    shape = len(trees), trunk + branches
    position_TM = np.tile(np.arange(shape[1]), (len(trees), 1))
    branch_TM = np.full(shape, -1)
    places = []
    for tree, ((position_N, branch_N), length) in enumerate(zip(trees, trunk_T, strict=True)):
        place_N = np.concatenate([np.arange(length), np.arange(trunk, trunk + len(branch_N) - length)])
        position_TM[tree, place_N] = position_N
        branch_TM[tree, place_N] = branch_N
        places.append(tree * shape[1] + place_N)
    place_N = np.concatenate(places)
    return TreeBlock(
        start=start,
        stop=start + len(place_N),
        trees=len(trees),
        trunk=trunk,
        branches=branches,
        place_N=None if len(place_N) == branch_TM.size else torch.from_numpy(place_N),
        sees_TBM=torch.from_numpy(_sees(branch_TM, trunk)),
        position_TM=torch.from_numpy(position_TM),
        deepest=int(position_TM.max()),
    )


def _sees(branch_TM: LongArray, trunk: int) -> BoolArray:
    """`TreeBlock.sees_TBM` from the branch of each place, -1 on padding."""
    places = np.arange(branch_TM.shape[1])
    query_B1 = places[trunk:, None]
    key_T1M, own_TB1 = branch_TM[:, None], branch_TM[:, trunk:, None]
    sees_TBM: BoolArray = ((key_T1M == 0) | (key_T1M == own_TB1)) & (own_TB1 > 0) & (places <= query_B1)
    sees_TBM |= places == query_B1
    return sees_TBM[:1] if (sees_TBM == sees_TBM[:1]).all() else sees_TBM
