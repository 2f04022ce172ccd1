"""Attention inside trees: prompts among themselves, then branches to their prompt and to themselves.

The cost grows with the square of a prompt and never with that of the packed micro-batch (`trainer.tree_blocks`). The
function is registered with transformers under the name `ATTENTION`; the model hands `tree_layout` through to it.

Everything but the innermost call is the same on all devices. On CUDA it is SDPA twice, of which the first is causal
without a mask; on CPU matrix products over stretches of queries with the keys that they can see, two to three times as
fast there as SDPA.

Suffixes: as in `trainer.tree_blocks`, with `_H` heads, `_D` head size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface

from data.errors import RequestError
from trainer.tree_blocks import TreeBlock

ATTENTION = "windlass_trees"
"""Name of the attention for `attn_implementation`."""
STRETCH = 128
"""Queries of the trunk that the CPU attends with at a time."""
_UNKNOWN = ("softcap", "s_aux", "position_bias")
"""Terms that some models add to their scores, which this attention does not have."""


def tree_attention(
    query_NHD: Tensor,
    key_NHD: Tensor,
    value_NHD: Tensor,
    blocks: Sequence[TreeBlock],
    scale: float,
    window: int | None = None,
) -> Tensor:
    """Attention of all trees of a micro-batch.

    Args:
        query_NHD: `[N, H, D]`; positions behind the last block are padding and get zeros.
        key_NHD: `[N, heads of keys, D]`, as `value_NHD`; each serves `H / heads of keys` query heads.
        blocks: stretches of the flat positions, in their order, at least one.
        scale: of the scores.
        window: positions that a query can look back, itself included; None is all of them.

    Returns:
        `[N, H, D]`.
    """
    attend = _stretches if query_NHD.device.type == "cpu" else _sdpa
    parts = []
    for block in blocks:
        far_TMM = None if window is None or block.deepest < window else block.far_TMM(window)
        query, key, value = (block.spread(values_NHD) for values_NHD in (query_NHD, key_NHD, value_NHD))
        parts.append(block.collect(attend(query, key, value, block, scale, far_TMM)))
    padding = len(query_NHD) - blocks[-1].stop
    if padding:
        parts.append(query_NHD.new_zeros((padding, *query_NHD.shape[1:])))
    return torch.cat(parts) if len(parts) > 1 else parts[0]


def _sdpa(
    query_THMD: Tensor, key_THMD: Tensor, value_THMD: Tensor, block: TreeBlock, scale: float, far_TMM: Tensor | None
) -> Tensor:
    """Two calls of torch's attention: the trunk with itself, the branches with everything."""
    trunk = block.trunk
    hidden_TPP = None if far_TMM is None else far_TMM[:, :trunk, :trunk]
    sees_TPP = None if hidden_TPP is None else (~hidden_TPP & torch.ones_like(hidden_TPP).tril())[:, None]
    trunk_THPD = functional.scaled_dot_product_attention(
        query_THMD[:, :, :trunk],
        key_THMD[:, :, :trunk],
        value_THMD[:, :, :trunk],
        attn_mask=sees_TPP,
        is_causal=sees_TPP is None,
        scale=scale,
        enable_gqa=True,
    )
    if block.branches == 0:
        return trunk_THPD
    sees_TBM = block.sees_TBM if far_TMM is None else block.sees_TBM & ~far_TMM[:, trunk:]
    branch_THBD = functional.scaled_dot_product_attention(
        query_THMD[:, :, trunk:],
        key_THMD,
        value_THMD,
        attn_mask=sees_TBM[:, None].expand(block.trees, -1, -1, -1),
        scale=scale,
        enable_gqa=True,
    )
    return torch.cat([trunk_THPD, branch_THBD], 2)


def _stretches(
    query_THMD: Tensor, key_THMD: Tensor, value_THMD: Tensor, block: TreeBlock, scale: float, far_TMM: Tensor | None
) -> Tensor:
    """Matrix products over stretches of queries; see `_Stretches`."""
    trees, heads, places, size = query_THMD.shape
    query_TKRMD = query_THMD.reshape(trees, key_THMD.shape[1], -1, places, size)
    stretches = list(_cut(block, far_TMM))
    return _attend_stretches(query_TKRMD, key_THMD, value_THMD, stretches, scale).view(trees, heads, places, size)


class _Stretch(NamedTuple):
    """Queries that are attended with together; they see the keys up to their own last place."""

    queries: slice
    hidden: Tensor
    """bool `[T or 1, queries, keys]`, what they do not see of the last keys; they see all before."""


def _cut(block: TreeBlock, far_TMM: Tensor | None) -> Iterator[_Stretch]:
    """The trunk in stretches, then the branches."""
    for start in range(0, block.trunk, STRETCH):
        queries = slice(start, min(start + STRETCH, block.trunk))
        size = queries.stop - start
        hidden_TQK = torch.ones((1, size, size), dtype=torch.bool).triu(1)
        if far_TMM is not None:
            hidden_TQK = functional.pad(hidden_TQK, (start, 0)) | far_TMM[:, queries, : queries.stop]
        yield _Stretch(queries, hidden_TQK)
    if block.branches:
        hidden_TBM = ~block.sees_TBM
        if far_TMM is not None:
            hidden_TBM = hidden_TBM | far_TMM[:, block.trunk :]
        yield _Stretch(slice(block.trunk, block.trunk + block.branches), hidden_TBM)


class _Stretches(torch.autograd.Function):
    """softmax(scale Q K^T + mask) V, a stretch of queries at a time, with the keys of its prefix only.

    Scores and their softmax are float32 whatever the type of the inputs; the weights are kept for the backward pass.
    Shapes: query `[T, K, R, M, D]` with K heads of keys that R heads of queries share; key and value `[T, K, M, D]`.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, stretches: list[_Stretch], scale: float) -> Tensor:
        trees, heads, shared, places, size = query.shape
        wide_key = key.reshape(trees * heads, places, size).float()
        flat_value = value.reshape(trees * heads, places, size)
        out = query.new_empty((trees, heads, shared, places, size))
        weights = []
        for queries, hidden in stretches:
            keys = queries.stop
            rows = (query[:, :, :, queries].float() * scale).reshape(trees * heads, -1, size)
            scores = torch.bmm(rows, wide_key[:, :keys].transpose(1, 2)).view(trees, heads, shared, -1, keys)
            scores[..., keys - hidden.shape[-1] :].masked_fill_(hidden[:, None, None], -torch.inf)
            weight = scores.softmax(-1).to(query.dtype).view(trees * heads, -1, keys)
            out[:, :, :, queries] = torch.bmm(weight, flat_value[:, :keys]).view(trees, heads, shared, -1, size)
            weights.append(weight)
        ctx.save_for_backward(query, key, value, *weights)
        ctx.stretches = [queries for queries, _ in stretches]
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        query, key, value, *weights = ctx.saved_tensors
        trees, heads, shared, places, size = query.shape
        flat = (trees * heads, places, size)
        flat_key, flat_value = key.reshape(flat), value.reshape(flat)
        grad_query = torch.empty_like(query)
        grad_key, grad_value = (torch.zeros(flat, dtype=torch.float32) for _ in range(2))
        for queries, weight in zip(ctx.stretches, weights, strict=True):
            keys = weight.shape[-1]
            rows = query[:, :, :, queries].reshape(trees * heads, -1, size)
            grad_rows = grad_out[:, :, :, queries].reshape(trees * heads, -1, size)
            grad_weight = torch.bmm(grad_rows, flat_value[:, :keys].transpose(1, 2))
            grad_scores = torch.ops.aten._softmax_backward_data(grad_weight, weight, -1, weight.dtype)
            grad_scores = grad_scores.mul_(ctx.scale)
            grad_query[:, :, :, queries] = torch.bmm(grad_scores, flat_key[:, :keys]).view(
                trees, heads, shared, -1, size
            )
            grad_key[:, :keys] += torch.bmm(grad_scores.transpose(1, 2), rows)
            grad_value[:, :keys] += torch.bmm(weight.transpose(1, 2), grad_rows)
        kept = grad_key.to(key.dtype).view_as(key), grad_value.to(value.dtype).view_as(value)
        return grad_query, *kept, None, None


_attend_stretches: Callable[..., Tensor] = _Stretches.apply


def _attention(
    module: nn.Module,
    query_1HND: Tensor,
    key_1HND: Tensor,
    value_1HND: Tensor,
    attention_mask: Tensor | None,
    *,
    tree_layout: Sequence[TreeBlock],
    scaling: float | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """The function that transformers calls in every layer."""
    for name in _UNKNOWN:
        if others.get(name) is not None:
            raise RequestError("model", f"{type(module).__name__} with {name} in its attention", "a model without it")
    query_NHD, key_NHD, value_NHD = (values[0].transpose(0, 1) for values in (query_1HND, key_1HND, value_1HND))
    scale = query_NHD.shape[-1] ** -0.5 if scaling is None else scaling
    return tree_attention(query_NHD, key_NHD, value_NHD, tree_layout, scale, sliding_window)[None], None


AttentionInterface.register(ATTENTION, _attention)
