"""Dropout of the supervised steps, put around a language model from outside.

Hooks on the embedding, attention and MLP outputs drop elements while `applied` is open and do nothing otherwise, so
that scores and RL updates are the policy's alone, and the exported model knows nothing of it. What is dropped is a
function of (seed, step, rank): a continued run drops the same elements.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel

from data.errors import RequestError

BLOCKS: Final = ("self_attn", "attn", "attention", "mlp")
"""Names that transformers gives to a layer's two residual branches."""
_STREAM: Final = 17


class BranchDropout:
    """Dropout hooks on a model; off until `applied`."""

    def __init__(self, lm: PreTrainedModel, rate: float) -> None:
        """Put the hooks in place.

        Raises:
            RequestError: the model's layers have other names than `BLOCKS`.
        """
        self._rate = rate
        self._on = False
        if rate == 0:
            return
        branches = [module for name, module in lm.named_modules() if name.rpartition(".")[2] in BLOCKS]
        if not branches:
            raise RequestError(
                "learner.dropout", f"{rate} on {type(lm).__name__}", f"0, or a model whose layers hold {BLOCKS}"
            )
        for module in (lm.get_input_embeddings(), *branches):
            module.register_forward_hook(self._drop)

    def _drop(self, module: nn.Module, inputs: Any, output: Any) -> Any:
        if not self._on:
            return output
        if isinstance(output, Tensor):
            return functional.dropout(output, self._rate)
        return functional.dropout(output[0], self._rate), *output[1:]

    @contextmanager
    def applied(self, seed: int, step: int, rank: int, devices: list[torch.device]) -> Iterator[None]:
        """Drop inside, with a generator that depends on the arguments alone; the process's own is left as it was.

        Forward and backward passes both belong inside: activation checkpointing runs the forward pass again.

        Args:
            seed: of the run.
            step: optimiser steps taken before.
            rank: of the learner, because every rank sees other rows.
            devices: the CUDA devices that compute.
        """
        if self._rate == 0:
            yield
            return
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(int(np.random.SeedSequence([seed, _STREAM, step, rank]).generate_state(1, np.uint64)[0]))
            self._on = True
            try:
                yield
            finally:
                self._on = False
