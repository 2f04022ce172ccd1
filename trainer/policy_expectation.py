"""Expectations under a softmax policy over a catalogue, without ever holding a batch times the catalogue.

An actor scores items by `query . key_i`; a critic whose value of an item is linear in the item's row needs nothing of
the policy but the mean of those rows: `sum_a p(a) value_a`. That is attention of one query over the catalogue, in
chunks of items with a running maximum; the backward pass computes each chunk's probabilities again.
Memory grows with the batch times the chunk, so that a million items fit.

Where several players look at one policy, `FixedPolicy` holds its probabilities for all of them: products of the batch
with the catalogue are what a step of LAAC costs.

Suffixes: `_B` row, `_D` width of query and key, `_N` item, `_C` item of a chunk, `_V` width of a value.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor

from trainer.products import product, transposed_product


class _Expectation(torch.autograd.Function):
    """Forward and backward; the public face is `expectation`."""

    @staticmethod
    def forward(ctx: Any, chunk: int, query_BD: Tensor, key_ND: Tensor, *values_NV: Tensor) -> tuple[Tensor, ...]:
        lse_B, means = query_BD.new_full((len(query_BD),), -torch.inf), _zeros(query_BD, values_NV)
        n_items = len(key_ND)
        whole_BN: Tensor | None = None
        for first in range(0, n_items, chunk):
            part = slice(first, min(first + chunk, n_items))
            logit_BC = product(query_BD, key_ND[part].T)
            if n_items <= chunk:
                # One piece: its probabilities are kept, and made in place.
                largest_B1 = logit_BC.amax(1, keepdim=True)
                whole_BN = logit_BC.sub_(largest_B1).exp_()
                total_B1 = whole_BN.sum(1, keepdim=True)
                whole_BN.div_(total_B1)
                lse_B = (largest_B1 + total_B1.log())[:, 0]
                means = [product(whole_BN, value_NV) for value_NV in values_NV]
                break
            joined_B = torch.logaddexp(lse_B, torch.logsumexp(logit_BC, 1))
            kept_B1 = (lse_B - joined_B).exp()[:, None]
            weight_BC = logit_BC.sub_(joined_B[:, None]).exp_()
            means = [
                kept_B1 * mean_BV + product(weight_BC, value_NV[part])
                for mean_BV, value_NV in zip(means, values_NV, strict=True)
            ]
            lse_B = joined_B
        ctx.chunk = chunk
        ctx.whole_BN = whole_BN
        ctx.save_for_backward(query_BD, key_ND, lse_B, *values_NV, *means)
        return (lse_B, *means)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        query_BD, key_ND, lse_B, *rest = ctx.saved_tensors
        values_NV, means_BV = rest[: len(rest) // 2], rest[len(rest) // 2 :]
        d_lse_B, *d_means_BV = gradients
        wants_policy = ctx.needs_input_grad[1] or ctx.needs_input_grad[2]
        wanted = ctx.needs_input_grad[3:]
        d_query_BD = torch.zeros_like(query_BD) if ctx.needs_input_grad[1] else None
        d_key_ND = torch.empty_like(key_ND) if ctx.needs_input_grad[2] else None
        d_values_NV = [torch.empty_like(v) if w else None for v, w in zip(values_NV, wanted, strict=True)]
        # d logit_c = p_c * (d_lse + d_mean . (value_c - mean))
        base_B = d_lse_B.clone()
        for d_mean_BV, mean_BV in zip(d_means_BV, means_BV, strict=True):
            base_B -= (d_mean_BV * mean_BV).sum(1)
        for first in range(0, len(key_ND), ctx.chunk):
            part = slice(first, min(first + ctx.chunk, len(key_ND)))
            weight_BC = ctx.whole_BN
            if weight_BC is None:
                weight_BC = product(query_BD, key_ND[part].T).sub_(lse_B[:, None]).exp_()
            for d_value_NV, d_mean_BV in zip(d_values_NV, d_means_BV, strict=True):
                if d_value_NV is not None:
                    d_value_NV[part] = transposed_product(weight_BC, d_mean_BV)
            if wants_policy:
                d_logit_BC = base_B[:, None]
                for d_mean_BV, value_NV in zip(d_means_BV, values_NV, strict=True):
                    d_logit_BC = product(d_mean_BV, value_NV[part].T).add_(d_logit_BC)
                d_logit_BC = d_logit_BC * weight_BC
                if d_query_BD is not None:
                    d_query_BD += product(d_logit_BC, key_ND[part])
                if d_key_ND is not None:
                    d_key_ND[part] = transposed_product(d_logit_BC, query_BD)
        return (None, d_query_BD, d_key_ND, *d_values_NV)


def expectation(
    query_BD: Tensor, key_ND: Tensor, values_NV: tuple[Tensor, ...] = (), *, chunk: int = 16_384
) -> tuple[Tensor, list[Tensor]]:
    """Log of the partition function and the mean of values under `softmax(query . key)`.

    Args:
        query_BD: of the policy's states.
        key_ND: of the items.
        values_NV: rows whose mean is wanted, each `[N, its own width]`.
        chunk: items at once; a catalogue of fewer is computed in one piece, whose probabilities are kept for the
            backward pass.

    Returns:
        `lse_B` = log sum_i exp(query . key_i), and one `[B, width]` per value: sum_i p_i value_i. Both carry gradients
        to every argument that wants them.
    """
    lse_B, *means_BV = _Expectation.apply(chunk, query_BD, key_ND, *values_NV)  # type: ignore[no-untyped-call]
    return lse_B, means_BV


class FixedPolicy:
    """`softmax(query . key)` as others see it, without gradient; computed when the first of them asks."""

    def __init__(self, query_BD: Tensor, key_ND: Tensor, *, chunk: int = 16_384) -> None:
        """
        Args:
            query_BD: of the policy's states.
            key_ND: of the items.
            chunk: items at once. The probabilities of a catalogue of no more are kept; of a larger one the log
                partitions are, and each who asks computes the probabilities from them.
        """
        self._query_BD, self._key_ND, self.chunk = query_BD.detach(), key_ND.detach(), chunk
        self._whole_BN: Tensor | None = None
        self._lse_B: Tensor | None = None

    @torch.no_grad()
    def _known(self) -> tuple[Tensor | None, Tensor | None]:
        if len(self._key_ND) <= self.chunk:
            if self._whole_BN is None:
                self._whole_BN = product(self._query_BD, self._key_ND.T).softmax(1)
        elif self._lse_B is None:
            self._lse_B, _ = expectation(self._query_BD, self._key_ND, chunk=self.chunk)
        return self._whole_BN, self._lse_B

    def chunks(self) -> Iterator[tuple[slice, Tensor]]:
        """Items, and their probabilities `[B, C]`."""
        whole_BN, lse_B = self._known()
        if whole_BN is not None:
            yield slice(None), whole_BN
            return
        assert lse_B is not None
        for first in range(0, len(self._key_ND), self.chunk):
            part = slice(first, first + self.chunk)
            yield part, product(self._query_BD, self._key_ND[part].T).sub_(lse_B[:, None]).exp_()

    def means(self, *values_NV: Tensor) -> list[Tensor]:
        """`[B, width]` of each value: sum_i p_i value_i, with gradients to the values."""
        return list(_Means.apply(self, *values_NV))  # type: ignore[no-untyped-call]

    def value(self, query_BD: Tensor, key_ND: Tensor, state_BD: Tensor, value_ND: Tensor) -> Tensor:
        """`[B]`: sum_i p_i (state . value_i), with gradients to the query and the keys that the policy is made of.

        Args:
            query_BD: as the policy was made, with its gradient.
            key_ND: as the policy was made, with its gradient.
            state_BD: of the critic; no gradient.
            value_ND: of the critic; no gradient.
        """
        arguments = query_BD, key_ND, state_BD.detach(), value_ND.detach()
        return cast(Tensor, _Value.apply(self, *arguments))  # type: ignore[no-untyped-call]


class _Means(torch.autograd.Function):
    """Forward and backward of `FixedPolicy.means`."""

    @staticmethod
    def forward(ctx: Any, policy: FixedPolicy, *values_NV: Tensor) -> tuple[Tensor, ...]:
        ctx.policy, ctx.shapes = policy, [value_NV.shape for value_NV in values_NV]
        means: list[Tensor] = []
        for part, weight_BC in policy.chunks():
            found = [product(weight_BC, value_NV[part]) for value_NV in values_NV]
            means = [mean.add_(more) for mean, more in zip(means, found, strict=True)] if means else found
        return tuple(means)

    @staticmethod
    def backward(ctx: Any, *d_means_BV: Tensor) -> tuple[Tensor | None, ...]:
        d_values_NV = [
            d_mean_BV.new_empty(shape) if wanted else None
            for d_mean_BV, shape, wanted in zip(d_means_BV, ctx.shapes, ctx.needs_input_grad[1:], strict=True)
        ]
        for part, weight_BC in ctx.policy.chunks():
            for d_value_NV, d_mean_BV in zip(d_values_NV, d_means_BV, strict=True):
                if d_value_NV is not None:
                    d_value_NV[part] = transposed_product(weight_BC, d_mean_BV)
        return (None, *d_values_NV)


class _Value(torch.autograd.Function):
    """Forward and backward of `FixedPolicy.value`."""

    @staticmethod
    def forward(
        ctx: Any, policy: FixedPolicy, query_BD: Tensor, key_ND: Tensor, state_BD: Tensor, value_ND: Tensor
    ) -> Tensor:
        value_B = state_BD.new_zeros(len(state_BD))
        worth_BC = None
        for part, weight_BC in policy.chunks():
            worth_BC = product(state_BD, value_ND[part].T)
            value_B += torch.linalg.vecdot(weight_BC, worth_BC)
        # What one piece is worth is kept like its probabilities.
        ctx.worth_BN = worth_BC if len(value_ND) <= policy.chunk else None
        ctx.policy = policy
        ctx.save_for_backward(query_BD, key_ND, state_BD, value_ND, value_B)
        return value_B

    @staticmethod
    def backward(ctx: Any, d_value_B: Tensor) -> tuple[Tensor | None, ...]:
        query_BD, key_ND, state_BD, value_ND, value_B = ctx.saved_tensors
        d_query_BD = torch.zeros_like(query_BD) if ctx.needs_input_grad[1] else None
        d_key_ND = torch.empty_like(key_ND)
        scaled_BD = d_value_B[:, None] * query_BD
        for part, weight_BC in ctx.policy.chunks():
            worth_BC = ctx.worth_BN if ctx.worth_BN is not None else product(state_BD, value_ND[part].T)
            # d value / d logit_c = p_c * (worth_c - value)
            slope_BC = (worth_BC - value_B[:, None]).mul_(weight_BC)
            if d_query_BD is not None:
                d_query_BD += product(slope_BC, key_ND[part])
            d_key_ND[part] = transposed_product(slope_BC, scaled_BD)
        if d_query_BD is not None:
            d_query_BD *= d_value_B[:, None]
        return None, d_query_BD, d_key_ND, None, None


def entropy(query_BD: Tensor, lse_B: Tensor, mean_key_BD: Tensor) -> Tensor:
    """H(pi) of each row, nats: the log partition less the mean logit, which is `query . (mean of the keys)`."""
    entropy_B: Tensor = lse_B - (query_BD * mean_key_BD).sum(1)
    return entropy_B


@torch.no_grad()
def best_items(query_BD: Tensor, key_ND: Tensor, *, chunk: int = 16_384) -> Tensor:
    """int64 [B], the item with the largest `query . key` of each row, the first among equals."""
    best_B = query_BD.new_full((len(query_BD),), -torch.inf)
    item_B = torch.zeros(len(query_BD), dtype=torch.int64, device=query_BD.device)
    for first in range(0, len(key_ND), chunk):
        top_B, at_B = product(query_BD, key_ND[first : first + chunk].T).max(1)
        better_B = top_B > best_B
        item_B = torch.where(better_B, at_B + first, item_B)
        best_B = torch.where(better_B, top_B, best_B)
    return item_B


def _zeros(query_BD: Tensor, values_NV: tuple[Tensor, ...]) -> list[Tensor]:
    return [query_BD.new_zeros(len(query_BD), value_NV.shape[1]) for value_NV in values_NV]
