"""The arithmetic limit: floating-point operations of a model, and the matrix-product speed of this machine."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from launch.bench.settings import Device

SQUARE = {Device.CPU: (1024, 2048), Device.CUDA: (4096, 8192, 16384)}
"""Edges of the square products that are tried; the fastest is the ceiling."""
_TIMES = 4


def matmul_ceiling_tflops(
    dtype: torch.dtype, *, threads: int, device: Device, edges: Sequence[int] | None = None
) -> float:
    """TFLOP/s of the fastest matrix product of `edges`, measured now with the given type and threads.

    Sets torch's number of threads.
    """
    torch.set_num_threads(threads)
    return max(_product_tflops(edge, dtype, device) for edge in edges or SQUARE[device])


def _product_tflops(edge: int, dtype: torch.dtype, device: Device) -> float:
    left = torch.randn(edge, edge, device=device.value).to(dtype)
    right = torch.randn(edge, edge, device=device.value).to(dtype)
    out = left @ right
    best = float("inf")
    for _ in range(_TIMES):
        synchronize(device)
        begin = time.perf_counter()
        torch.mm(left, right, out=out)
        synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * edge**3 / best / 1e12


def synchronize(device: Device) -> None:
    """Wait for the card, where there is one."""
    if device is Device.CUDA:
        torch.cuda.synchronize()


@dataclass(frozen=True, kw_only=True)
class Arithmetic:
    """What a decoder costs per token."""

    parameters: int
    """All of them, tied ones once."""
    products: int
    """Weights of the matrix products of all layers, without the head: 2 operations per token each."""
    attention: int
    """Layers x heads x head size: 4 operations per pair of a query and a key it sees."""
    head: int
    """Weights of the head: 2 operations per row of logits each."""

    @staticmethod
    def of(config: Any) -> Arithmetic:
        """From a transformers configuration; no weights are made."""
        from torch import nn
        from transformers import AutoModelForCausalLM

        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
        head = model.get_output_embeddings()  # type: ignore[operator]
        linears = [m for m in model.modules() if isinstance(m, nn.Linear) and m is not head]
        head_size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return Arithmetic(
            parameters=sum(p.numel() for p in model.parameters()),
            products=sum(m.weight.numel() for m in linears),
            attention=config.num_hidden_layers * config.num_attention_heads * head_size,
            head=head.weight.numel(),
        )

    def forward_flops(self, *, tokens: int, pairs: int, head_rows: int) -> float:
        """Operations of a forward pass over `tokens` tokens that see `pairs` keys in all.

        A backward pass takes twice as many.
        """
        return 2.0 * self.products * tokens + 4.0 * self.attention * pairs + 2.0 * self.head * head_rows


def causal_pairs(tokens: int, before: int = 0) -> int:
    """Pairs of a row of tokens that see each other causally and all of `before` tokens."""
    return tokens * before + tokens * (tokens + 1) // 2
