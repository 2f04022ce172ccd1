"""Reading the rows of items: by their ids, and by attention of a few queries over the items of a history.

Both are functions of their own for the sake of their backward passes, which on CPU take fewer and quicker operations
than torch's: a step of LAAC is hundreds of operations of a few microseconds.

Suffixes: `_B` row, `_K` query of a row, `_H` place in its history, `_D` width, `_N` item.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional


class _Rows(torch.autograd.Function):
    """Rows of items, whose gradient on CPU is added up place by place."""

    @staticmethod
    def forward(ctx: Any, item_ND: Tensor, place: Tensor) -> Tensor:
        ctx.n_items = len(item_ND)
        ctx.save_for_backward(place)
        return functional.embedding(place, item_ND)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (place,) = ctx.saved_tensors
        if gradient.is_cuda:
            # There torch's is the one that adds in a fixed order.
            dense: Tensor = torch.ops.aten.embedding_dense_backward(gradient, place, ctx.n_items, -1, False)
            return dense, None
        d_item_ND = gradient.new_zeros(ctx.n_items, gradient.shape[-1])
        return d_item_ND.index_add_(0, place.flatten(), gradient.reshape(-1, gradient.shape[-1])), None


def item_rows(item_ND: Tensor, place: Tensor) -> Tensor:
    """`item_ND[place]`: the rows `[..., D]` of items by their ids `[...]`."""
    rows: Tensor = _Rows.apply(item_ND, place)  # type: ignore[no-untyped-call]
    return rows


class _Attention(torch.autograd.Function):
    """`attended`; as one function, its backward pass is four products."""

    @staticmethod
    def forward(ctx: Any, query_BKD: Tensor, read_BHD: Tensor, absent_BH: Tensor) -> Tensor:
        scale = query_BKD.shape[-1] ** -0.5
        logit_BKH = torch.bmm(query_BKD, read_BHD.transpose(1, 2)).mul_(scale)
        # Not minus infinity: an empty history hides every place, and what it attends to must be a number.
        logit_BKH.masked_fill_(absent_BH[:, None], torch.finfo(logit_BKH.dtype).min)
        weight_BKH = logit_BKH.sub_(logit_BKH.amax(-1, keepdim=True)).exp_()
        weight_BKH /= weight_BKH.sum(-1, keepdim=True)
        ctx.scale = scale
        ctx.save_for_backward(query_BKD, read_BHD, weight_BKH, absent_BH)
        return torch.bmm(weight_BKH, read_BHD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_mean_BKD: Tensor) -> tuple[Tensor, Tensor, None]:
        query_BKD, read_BHD, weight_BKH, absent_BH = ctx.saved_tensors
        slope_BKH = torch.bmm(d_mean_BKD, read_BHD.transpose(1, 2)).mul_(weight_BKH)
        d_logit_BKH = slope_BKH.addcmul_(weight_BKH, slope_BKH.sum(-1, keepdim=True), value=-1).mul_(ctx.scale)
        d_logit_BKH.masked_fill_(absent_BH[:, None], 0.0)
        d_query_BKD = torch.bmm(d_logit_BKH, read_BHD)
        # The items are read twice: as what is weighted, and as what the query is held against.
        by_place_BHK = torch.cat([weight_BKH, d_logit_BKH], 1).transpose(1, 2)
        d_read_BHD = torch.bmm(by_place_BHK, torch.cat([d_mean_BKD, query_BKD], 1))
        return d_query_BKD, d_read_BHD, None


def attended(query_BKD: Tensor, read_BHD: Tensor, absent_BH: Tensor) -> Tensor:
    """`[B, K, D]` softmax(query . read / sqrt(D)) over the places that are not absent, times what is read there.

    A row without any place is worth the mean of what is hidden.
    """
    mean_BKD: Tensor = _Attention.apply(query_BKD, read_BHD, absent_BH)  # type: ignore[no-untyped-call]
    return mean_BKD
