"""Contract: the attention of packed trees equals a dense mask over all pairs, values and gradients, on both paths.

The oracle applies the definition pair by pair: a position sees the positions of its own tree that lie on its way to
the root, no further back than a sliding window. The innermost calls of CPU and of CUDA both run here, on CPU;
FlexAttention, with the same definition as its mask function, is a second oracle of the values. Not here: whole models
(test_trees.py).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from data.records import BoolArray, IntArray
from trainer import tree_attention as module
from trainer.tree_attention import tree_attention
from trainer.tree_blocks import TreeBlock, tree_blocks

Tree = tuple[IntArray, IntArray]
PATHS = ("_stretches", "_sdpa")
SHAPES = {
    "alike": [(9, (3, 2)), (9, (3, 2)), (9, (2, 3))],
    "unlike": [(40, (1, 4, 2)), (33, ()), (31, (2,)), (12, (3, 3, 3)), (2, (1,)), (1, ())],
    "several stretches": [(300, (2, 2)), (280, (1,) * 9)],
    "alone": [(7, ())],
}


def make_tree(trunk: int, branches: tuple[int, ...]) -> Tree:
    position = np.concatenate([np.arange(trunk), *(trunk + np.arange(n) for n in branches)])
    branch = np.concatenate([np.zeros(trunk), *(np.full(n, i + 1) for i, n in enumerate(branches))])
    return position.astype(np.int32), branch.astype(np.int32)


def definition(trees: list[Tree], window: int | None) -> BoolArray:
    """Who sees whom, over all positions of all trees."""
    total = sum(len(position) for position, _ in trees)
    sees_NN = np.zeros((total, total), dtype=np.bool_)
    start = 0
    for position, branch in trees:
        for i in range(len(position)):
            for j in range(i + 1):
                ancestor = branch[j] in (0, branch[i])
                near = window is None or position[i] - position[j] < window
                sees_NN[start + i, start + j] = ancestor and near
        start += len(position)
    return sees_NN


def dense(query: Tensor, key: Tensor, value: Tensor, sees_NN: BoolArray, scale: float) -> Tensor:
    shared = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(shared, 1) for x in (key, value))
    scores = torch.einsum("nhd,mhd->hnm", query, key) * scale
    weight = scores.masked_fill(~torch.from_numpy(sees_NN), -torch.inf).softmax(-1)
    return torch.einsum("hnm,mhd->nhd", weight, value)


def inputs(positions: int, heads: int = 4, key_heads: int = 2, size: int = 8, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    counts = (heads, key_heads, key_heads)
    return [torch.randn(positions, n, size, generator=generator, dtype=torch.float64) for n in counts]


def values_and_gradients(attend: Any, tensors: list[Tensor], weight: Tensor) -> list[Tensor]:
    leaves = [tensor.clone().requires_grad_() for tensor in tensors]
    out = attend(*leaves)
    torch.autograd.backward((out * weight).sum())
    return [out.detach(), *(leaf.grad for leaf in leaves if leaf.grad is not None)]


def compare(trees: list[Tree], window: int | None, key_heads: int, tolerance: float, dtype: torch.dtype) -> None:
    blocks = tree_blocks(trees)
    total = blocks[-1].stop
    assert total == sum(len(position) for position, _ in trees)
    tensors = [tensor.to(dtype) for tensor in inputs(total + 3, key_heads=key_heads)]
    weight = torch.randn(total + 3, 4, 8, dtype=dtype, generator=torch.Generator().manual_seed(1))
    weight[total:] = 0
    found = values_and_gradients(lambda q, k, v: tree_attention(q, k, v, blocks, 0.3, window), tensors, weight)
    sees_NN = np.eye(total + 3, dtype=np.bool_)
    sees_NN[:total, :total] = definition(trees, window)
    exact = values_and_gradients(
        lambda q, k, v: dense(q, k, v, sees_NN, 0.3), [t.double() for t in tensors], weight.double()
    )
    assert len(found) == len(exact) == 4
    assert not found[0][total:].any()
    for mine, theirs in zip(found, exact, strict=True):
        assert mine.dtype == dtype
        assert float((mine[:total] - theirs[:total]).abs().max()) <= tolerance * max(float(theirs.abs().max()), 1.0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("window", [None, 5])
@pytest.mark.parametrize("shape", SHAPES)
def test_equals_the_definition(shape: str, window: int | None, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_stretches", getattr(module, path))
    compare([make_tree(*tree) for tree in SHAPES[shape]], window, 2, 2e-6, torch.float32)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("key_heads", [1, 4])
def test_shared_key_heads(key_heads: int, path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_stretches", getattr(module, path))
    compare([make_tree(*tree) for tree in SHAPES["unlike"]], None, key_heads, 2e-6, torch.float32)


@pytest.mark.parametrize("path", PATHS)
def test_bfloat16_is_within_its_rounding(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_stretches", getattr(module, path))
    compare([make_tree(*tree) for tree in SHAPES["several stretches"]], None, 2, 2e-2, torch.bfloat16)


@given(
    st.lists(st.tuples(st.integers(1, 12), st.lists(st.integers(1, 4), max_size=4).map(tuple)), min_size=1, max_size=6)
)
@settings(max_examples=25, deadline=None)
def test_any_trees(shapes: list[tuple[int, tuple[int, ...]]]) -> None:
    ordered = sorted(shapes, key=lambda shape: -shape[0])
    compare([make_tree(*shape) for shape in ordered], None, 2, 2e-6, torch.float32)


def test_blocks_bound_the_padding() -> None:
    trees = [make_tree(trunk, (1,)) for trunk in (1000, *range(60, 1, -1))]
    blocks = tree_blocks(trees)
    work = sum(block.trees * block.trunk**2 for block in blocks)
    assert work < 2.1 * sum(int((branch == 0).sum()) ** 2 for _, branch in trees)
    assert [block.start for block in blocks] == [0, *(block.stop for block in blocks[:-1])]


def test_flex_attention_agrees() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    trees = [make_tree(*tree) for tree in SHAPES["unlike"]]
    position_N, branch_N = (torch.from_numpy(np.concatenate(parts)) for parts in zip(*trees, strict=True))
    tree_N = torch.repeat_interleave(torch.arange(len(trees)), torch.tensor([len(p) for p, _ in trees]))
    total = len(position_N)

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        ancestor = (branch_N[key] == 0) | (branch_N[key] == branch_N[query])
        return (tree_N[key] == tree_N[query]) & ancestor & (position_N[key] <= position_N[query])

    tensors = [tensor.float() for tensor in inputs(total)]
    mask = create_block_mask(sees, None, None, total, total, device="cpu")
    batched = [tensor.transpose(0, 1)[None] for tensor in tensors]
    with torch.no_grad():
        flex = flex_attention(*batched, block_mask=mask, scale=0.3, enable_gqa=True)
        found = tree_attention(*tensors, tree_blocks(trees), 0.3)  # type: ignore[misc]
    assert isinstance(flex, Tensor)
    assert torch.allclose(flex[0].transpose(0, 1), found, atol=2e-6)


def test_blocks_move_as_a_whole() -> None:
    (block,) = tree_blocks([make_tree(4, (2,)), make_tree(3, (1, 1))])
    moved = block.to(torch.device("meta"))
    assert isinstance(moved, TreeBlock)
    assert moved.place_N is not None
    assert {moved.place_N.device.type, moved.sees_TBM.device.type, moved.position_TM.device.type} == {"meta"}
