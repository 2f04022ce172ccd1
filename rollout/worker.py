"""The beam loop inside the vLLM worker: one prefill per prompt, then one forward pass per level.

vLLM mixes `RolloutWorker` into its worker (`worker_extension_cls`). The loop uses the worker's model directly, past the
scheduler, with keys and values in memory of its own: vLLM's cache, and what its requests left there, stay untouched.

Imported inside the worker only: the weight channel's mixin imports vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.errors import RequestError
from data.records import DecodeSpec, FloatArray, Groups, IntArray, Prompt
from rollout import vllm_forward
from rollout.branches import Branches, PromptStore
from rollout.group_decoder import GroupDecoder
from rollout.paging import WaveLimits, plan_chunks, plan_waves
from rollout.settings import HeadRows, RolloutSettings
from rollout.weight_transfer import WeightReceiver

LOGITS_BYTES = 2**30
"""Memory that the logits of one level may take."""


_ALL = 2**62


class BranchBackend:
    """`rollout.decoding.Backend` on the model of a vLLM worker, with keys and values in memory of its own."""

    def __init__(self, view: vllm_forward.RunnerView, settings: RolloutSettings, *, vocabulary_size: int) -> None:
        self._view = view
        self._settings = settings
        self._store = PromptStore(view.shapes, dtype=view.dtype, device=view.device)
        self._branches: Branches | None = None
        self._caches: list[Tensor] = []
        self._room = (0, 0)
        # vLLM has room for the adapters of as many tokens as it may compute at once.
        most_rows = settings.tokens_per_forward if view.adapter.enabled else _ALL
        self.limits = WaveLimits(
            tokens=int(settings.kv_cache_gib * 2**30) // self._store.bytes_per_token,
            rows=min(LOGITS_BYTES // (4 * vocabulary_size), most_rows),
        )

    def prefill(
        self, prompts: Sequence[IntArray], rows: int, new_tokens: int, vocabulary_V: Tensor | None = None
    ) -> Tensor:
        """Logits `[P, V]` after each prompt."""
        lengths = [len(prompt) for prompt in prompts]
        branches = Branches(self._store, lengths, rows=rows, device=self._view.device)
        keeps = new_tokens > 0
        if keeps:
            self._store.reserve(sum(lengths))
        logits = []
        start = 0
        for chunk in self._chunks([lengths[prompt] for prompt in branches.order]):
            some = [prompts[prompt] for prompt in branches.order[chunk]]
            last_P = torch.tensor([len(prompt) for prompt in some]).cumsum(0) - 1
            logits.append(self._compute(some, last_P, partial(self._keep, start) if keeps else _forget, vocabulary_V))
            start += int(last_P[-1]) + 1
        self._branches = branches
        ordered_PV = torch.cat(logits)
        logits_PV = torch.empty_like(ordered_PV)
        logits_PV[torch.tensor(branches.order, device=ordered_PV.device)] = ordered_PV
        return logits_PV

    def logits(self, sequences: Sequence[IntArray], wanted: Sequence[int]) -> Iterator[tuple[slice, Tensor]]:
        """Logits after the last `wanted` tokens of each sequence, chunk by chunk."""
        for chunk in self._chunks([len(sequence) for sequence in sequences]):
            stops = np.cumsum([len(sequence) for sequence in sequences[chunk]])
            tails = [np.arange(stop - n, stop) for stop, n in zip(stops, wanted[chunk], strict=True)]
            yield chunk, self._compute(sequences[chunk], torch.from_numpy(np.concatenate(tails)), _forget)

    def _chunks(self, lengths: Sequence[int]) -> list[slice]:
        return plan_chunks(
            lengths,
            prompts_per_forward=self._settings.prompts_per_forward,
            tokens_per_forward=self._settings.tokens_per_forward,
        )

    def _keep(self, start: int, layer: int, key_XKD: Tensor, value_XKD: Tensor) -> None:
        self._store.write(layer, start, key_XKD, value_XKD)

    def _compute(
        self,
        sequences: Sequence[IntArray],
        logit_M: Tensor,
        keep: Callable[[int, Tensor, Tensor], None],
        vocabulary_V: Tensor | None = None,
    ) -> Tensor:
        lengths = [len(sequence) for sequence in sequences]
        if sum(lengths) > self._room[0] or len(lengths) > self._room[1]:
            self._room = (max(sum(lengths), self._room[0]), max(len(lengths), self._room[1]))
            self._caches = []
            self._caches = vllm_forward.own_caches(self._view, *self._room)
        token_X = torch.from_numpy(np.concatenate(list(sequences)).astype(np.int64))
        return vllm_forward.prefill(self._view, token_X, lengths, self._caches, keep, logit_M, vocabulary_V)

    def extend(self, parent_N: Tensor, token_N: Tensor, vocabulary_V: Tensor | None = None) -> Tensor:
        """Logits `[N, V]` of the rows continued by one token each."""
        if self._branches is None:
            raise ValueError("extend before prefill")
        position_N = self._branches.grow(parent_N)
        return vllm_forward.branch(self._view, token_N, position_N, self._branches.attend, vocabulary_V)

    def restart(self) -> None:
        """The rows are the prompts again."""
        if self._branches is None:
            raise ValueError("restart before prefill")
        self._branches.restart()

    def release(self) -> None:
        """The memory is free for the next wave."""
        self._branches = None

    def give_memory(self) -> None:
        """Keep no memory for the next wave, which takes it anew."""
        self._branches = None
        self._store.clear()
        self._caches, self._room = [], (0, 0)


def _whole(head: HeadRows) -> HeadRows:
    """The whole head, for a model whose head has no rows to choose from."""
    if head is HeadRows.LEVEL:
        raise RequestError("rollout.head", head.value, "auto or all: the logits are more than products with a matrix")
    return HeadRows.ALL


def _forget(layer: int, key_XKD: Tensor, value_XKD: Tensor) -> None:
    """Keep nothing."""


class RolloutWorker(WeightReceiver):
    """Extension of the vLLM worker; every name starts with `windlass_`, to stay clear of the worker's own."""

    windlass_backend: BranchBackend
    windlass_decoder: GroupDecoder
    windlass_view: vllm_forward.RunnerView

    def windlass_open(self, hf_dir: str, settings: RolloutSettings) -> None:
        """Load the catalogue and look at the model runner; called once, after the engine is up."""
        worker: Any = self
        view = vllm_forward.view(worker.model_runner, settings.adapter, live_adapter=settings.live_adapter.on)
        if view.device.type == "cpu":
            vllm_forward.use_fused_norms()
        config = worker.model_runner.vllm_config.model_config
        self.windlass_view = view
        self.windlass_live_adapter = settings.live_adapter
        self.windlass_adapter_slot = view.adapter
        self.windlass_backend = BranchBackend(view, settings, vocabulary_size=config.get_vocab_size())
        self.windlass_decoder = GroupDecoder.load(
            Path(hf_dir),
            view.device,
            vocabulary_size=config.get_vocab_size(),
            max_model_len=config.max_model_len,
            head=settings.head if vllm_forward.head_has_rows(view) else _whole(settings.head),
        )

    def windlass_generate(
        self, prompts: Sequence[Prompt], spec: DecodeSpec, exclude: bool | None, weight_version: int, engine_id: str
    ) -> Groups:
        """See `rollout.engine.Engine.generate`."""
        self.windlass_decoder.check(prompts, spec)
        waves = plan_waves(
            [len(prompt.token_ids) for prompt in prompts],
            rows=spec.width,
            new_tokens=self.windlass_decoder.completion_tokens(spec) - 1,
            limits=self.windlass_backend.limits,
        )
        return self.windlass_decoder.generate(
            self.windlass_backend,
            waves,
            prompts,
            spec,
            exclude=exclude,
            weight_version=weight_version,
            engine_id=engine_id,
        )

    def windlass_give_memory(self) -> None:
        """Before sleep: what the beam loop keeps, which vLLM does not know of."""
        self.windlass_backend.give_memory()

    def windlass_score(self, prompts: Sequence[IntArray], completions: Sequence[IntArray]) -> list[FloatArray]:
        """See `rollout.engine.Engine.score`."""
        pairs = zip(prompts, completions, strict=True)
        sequences = [np.concatenate([prompt, completion])[:-1] for prompt, completion in pairs]
        self.windlass_decoder.check_sequences(prompts, completions)
        scores: list[FloatArray] = []
        wanted = [len(completion) for completion in completions]
        for chunk, logits_MV in self.windlass_backend.logits(sequences, wanted):
            token_M = torch.from_numpy(np.concatenate(list(completions[chunk])).astype(np.int64)).to(logits_MV.device)
            logp_M = logits_MV.float().log_softmax(-1).gather(1, token_M[:, None])[:, 0].cpu().numpy()
            scores += np.split(logp_M, np.cumsum(wanted[chunk])[:-1])
        return scores
