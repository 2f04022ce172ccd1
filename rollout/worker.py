"""The beam loop inside the vLLM worker: one prefill per prompt, then one forward pass per level.

vLLM mixes `RolloutWorker` into its worker (`worker_extension_cls`). The loop uses the worker's model and key-value
cache directly, past the scheduler, so the engine must not serve requests of its own at the same time.

Imported inside the worker only: the weight channel's mixin imports vLLM.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.records import DecodeSpec, FloatArray, Groups, IntArray, Prompt
from rollout import vllm_internals as internals
from rollout.group_decoder import GroupDecoder
from rollout.paging import PagedRows, plan_chunks
from rollout.settings import RolloutSettings
from rollout.weight_transfer import WeightReceiver


class PagedBackend:
    """`rollout.decoding.Backend` on the model and the paged cache of a vLLM worker."""

    def __init__(self, view: internals.RunnerView) -> None:
        self._view = view
        self._paged: PagedRows | None = None

    def prefill(self, prompts: Sequence[IntArray], rows: int, new_tokens: int) -> Tensor:
        """Logits `[P, V]` after each prompt."""
        lengths = [len(prompt) for prompt in prompts]
        last_P = torch.tensor(lengths).cumsum(0) - 1
        return self._compute(prompts, rows, new_tokens, last_P)

    def logits(self, sequences: Sequence[IntArray], logit_M: Tensor) -> Tensor:
        """Logits `[M, V]` after the given tokens of the sequences, counted over all of them; nothing is kept."""
        logits_MV = self._compute(sequences, 1, 0, logit_M)
        self.release()
        return logits_MV

    def _compute(self, sequences: Sequence[IntArray], rows: int, new_tokens: int, logit_M: Tensor) -> Tensor:
        shape = self._view.shape
        lengths = [len(sequence) for sequence in sequences]
        paged = PagedRows(lengths, rows=rows, new_tokens=new_tokens, block_size=shape.block_size)
        if paged.blocks > shape.blocks:
            raise ValueError(f"{paged.blocks} blocks placed in a cache of {shape.blocks}: chunks were not planned")
        token_X = torch.from_numpy(np.concatenate(list(sequences)).astype(np.int64))
        self._paged = paged
        return internals.forward(self._view, token_X, paged.prompts(), logit_M)

    def extend(self, parent_N: Tensor, token_N: Tensor) -> Tensor:
        """Logits `[N, V]` of the rows continued by one token each."""
        if self._paged is None:
            raise ValueError("extend before prefill")
        copy, placement = self._paged.grow(parent_N.cpu())
        internals.copy_blocks(self._view, copy.source_X, copy.destination_X)
        return internals.forward(self._view, token_N, placement, torch.arange(len(token_N)))

    def release(self) -> None:
        """The blocks are free for the next chunk."""
        self._paged = None


class RolloutWorker(WeightReceiver):
    """Extension of the vLLM worker; every name starts with `windlass_`, to stay clear of the worker's own."""

    windlass_settings: RolloutSettings
    windlass_backend: PagedBackend
    windlass_decoder: GroupDecoder
    windlass_view: internals.RunnerView

    def windlass_open(self, hf_dir: str, settings: RolloutSettings) -> None:
        """Load the catalogue and look at the model runner; called once, after the engine is up."""
        worker: Any = self
        view = internals.view(worker.model_runner)
        self.windlass_settings = settings
        self.windlass_view = view
        self.windlass_backend = PagedBackend(view)
        config = worker.model_runner.vllm_config.model_config
        self.windlass_decoder = GroupDecoder.load(
            Path(hf_dir),
            view.device,
            vocabulary_size=config.get_vocab_size(),
            max_model_len=config.max_model_len,
        )

    def windlass_generate(
        self, prompts: Sequence[Prompt], spec: DecodeSpec, exclude: bool | None, weight_version: int, engine_id: str
    ) -> Groups:
        """See `rollout.engine.Engine.generate`."""
        self.windlass_decoder.check(prompts, spec)
        chunks = self._windlass_chunks(
            [len(prompt.token_ids) for prompt in prompts],
            rows=spec.width,
            new_tokens=self.windlass_decoder.completion_tokens(spec) - 1,
        )
        return self.windlass_decoder.generate(
            self.windlass_backend,
            chunks,
            prompts,
            spec,
            exclude=exclude,
            weight_version=weight_version,
            engine_id=engine_id,
        )

    def windlass_score(self, prompts: Sequence[IntArray], completions: Sequence[IntArray]) -> list[FloatArray]:
        """See `rollout.engine.Engine.score`."""
        pairs = zip(prompts, completions, strict=True)
        sequences = [np.concatenate([prompt, completion])[:-1] for prompt, completion in pairs]
        self.windlass_decoder.check_sequences(prompts, completions)
        scores: list[FloatArray] = []
        for chunk in self._windlass_chunks([len(sequence) for sequence in sequences], rows=1, new_tokens=0):
            some = sequences[chunk]
            stops = np.cumsum([len(sequence) for sequence in some])
            wanted = [len(completion) for completion in completions[chunk]]
            logit_M = np.concatenate([np.arange(stop - n, stop) for stop, n in zip(stops, wanted, strict=True)])
            logits_MV = self.windlass_backend.logits(some, torch.from_numpy(logit_M))
            token_M = torch.from_numpy(np.concatenate(list(completions[chunk])).astype(np.int64)).to(logits_MV.device)
            logp_M = logits_MV.float().log_softmax(-1).gather(1, token_M[:, None])[:, 0].cpu().numpy()
            scores += np.split(logp_M, np.cumsum(wanted)[:-1])
        return scores

    def _windlass_chunks(self, lengths: list[int], *, rows: int, new_tokens: int) -> list[slice]:
        return plan_chunks(
            lengths,
            rows=rows,
            new_tokens=new_tokens,
            cache=self.windlass_view.shape,
            prompts_per_forward=self.windlass_settings.prompts_per_forward,
            tokens_per_forward=self.windlass_settings.tokens_per_forward,
        )
