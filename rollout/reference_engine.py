"""The reference engine: the decoding loop on plain transformers, without vLLM, Ray or DeepSpeed.

Prompts are computed one at a time, so that a completion cannot depend on its batch. The completions of a prompt share
its key-value cache as branches of one tree: each level appends its rows to the cache, and a mask lets a row see the
prompt and its own ancestors only, so nothing is copied or reordered.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.errors import RequestError
from data.records import DecodeSpec, FloatArray, Groups, IntArray, Prompt
from rollout.adapter_check import check_adapter
from rollout.engine import adapter_rank, longest_sequence
from rollout.group_decoder import GroupDecoder
from rollout.receiving import ModuleInbox, PushMessage, Receipt, ReceivingEngine
from rollout.settings import EngineKind, RolloutSettings


@dataclass
class _Tree:
    """One prompt and the tokens generated after it."""

    cache: Any
    prompt_length: int
    level_X: Tensor
    """Level of each of the X generated tokens."""
    ancestor_NX: Tensor
    """bool `[N, X]`: which of them is an ancestor of each row of the last level, or the row itself."""


class ReferenceBackend:
    """`rollout.decoding.Backend` on a transformers causal language model."""

    def __init__(self, model: torch.nn.Module) -> None:
        self._model = model
        self._device = next(model.parameters()).device
        self._dtype = next(model.parameters()).dtype
        self._trees: list[_Tree] = []
        self._tree_N = torch.empty(0, dtype=torch.long)
        config: Any = model.config
        self._window: int | None = getattr(config, "sliding_window", None)
        uniform = ["full_attention" if self._window is None else "sliding_attention"]
        self._kinds = sorted(set(getattr(config, "layer_types", None) or uniform))
        if set(self._kinds) - {"full_attention", "sliding_attention"}:
            raise RequestError("model", f"layers of {', '.join(self._kinds)}", "full_attention, sliding_attention")

    @torch.inference_mode()
    def prefill(
        self, prompts: Sequence[IntArray], rows: int, new_tokens: int, vocabulary_V: Tensor | None = None
    ) -> Tensor:
        """Logits `[P, V]` after each prompt; the limits do not matter here, memory grows as needed."""
        from transformers import DynamicCache

        logits = []
        for prompt in prompts:
            # Without the configuration, which would drop what a window has left behind: positions here are not
            # those of a row of tokens.
            cache = DynamicCache()
            ids = torch.as_tensor(prompt, dtype=torch.long, device=self._device)[None]
            logits.append(self._model(input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[0])
            self._trees.append(
                _Tree(
                    cache=cache,
                    prompt_length=len(prompt),
                    level_X=torch.zeros(0, dtype=torch.long, device=self._device),
                    ancestor_NX=torch.zeros((1, 0), dtype=torch.bool, device=self._device),
                )
            )
        self._tree_N = torch.arange(len(prompts), device=self._device)
        return _columns(torch.cat(logits), vocabulary_V)

    @torch.inference_mode()
    def extend(self, parent_N: Tensor, token_N: Tensor, vocabulary_V: Tensor | None = None) -> Tensor:
        """Logits `[N, V]` of the rows continued by one token each."""
        tree_N = self._tree_N[parent_N]
        first_row_P = torch.searchsorted(self._tree_N, torch.arange(len(self._trees), device=self._device))
        logits_NV: Tensor | None = None
        for index, tree in enumerate(self._trees):
            mine_M = (tree_N == index).nonzero()[:, 0]
            if not len(mine_M):
                continue
            logits_MV = self._extend_tree(tree, parent_N[mine_M] - first_row_P[index], token_N[mine_M])
            if logits_NV is None:
                logits_NV = logits_MV.new_empty((len(parent_N), logits_MV.shape[1]))
            logits_NV[mine_M] = logits_MV
        if logits_NV is None:
            raise ValueError("no rows to extend")
        # A tree without rows keeps none; the row numbers of the others stay those of the caller.
        if bool((tree_N[1:] < tree_N[:-1]).any()):
            raise ValueError("rows must stay grouped by prompt")
        self._tree_N = tree_N
        return _columns(logits_NV, vocabulary_V)

    def _extend_tree(self, tree: _Tree, parent_M: Tensor, token_M: Tensor) -> Tensor:
        rows = len(token_M)
        itself_MM = torch.eye(rows, dtype=torch.bool, device=self._device)
        tree.ancestor_NX = torch.cat([tree.ancestor_NX[parent_M], itself_MM], 1)
        depth = int(tree.level_X[-1]) + 1 if len(tree.level_X) else 0
        position = tree.prompt_length + depth
        tree.level_X = torch.cat([tree.level_X, torch.full((rows,), depth, device=self._device)])
        sees_MX = torch.cat(
            [torch.ones((rows, tree.prompt_length), dtype=torch.bool, device=self._device), tree.ancestor_NX], 1
        )
        position_X = torch.cat(
            [torch.arange(tree.prompt_length, device=self._device), tree.prompt_length + tree.level_X]
        )
        masks = {
            "full_attention": sees_MX,
            "sliding_attention": sees_MX & (position - position_X < (self._window or 0)),
        }
        hidden = torch.finfo(self._dtype).min
        additive = {
            kind: torch.zeros(sees_MX.shape, dtype=self._dtype, device=self._device).masked_fill(~masks[kind], hidden)[
                None, None
            ]
            for kind in self._kinds
        }
        out = self._model(
            input_ids=token_M[None],
            position_ids=torch.full((1, rows), position, device=self._device),
            attention_mask=additive if len(additive) > 1 else additive[self._kinds[0]],
            past_key_values=tree.cache,
            use_cache=True,
        )
        logits: Tensor = out.logits[0]
        return logits

    def restart(self) -> None:
        """The rows are the prompts again."""
        for tree in self._trees:
            tree.cache.crop(tree.prompt_length)
            tree.level_X = tree.level_X[:0]
            tree.ancestor_NX = torch.zeros((1, 0), dtype=torch.bool, device=self._device)
        self._tree_N = torch.arange(len(self._trees), device=self._device)

    def release(self) -> None:
        """Drop the caches."""
        self._trees = []
        self._tree_N = torch.empty(0, dtype=torch.long, device=self._device)


def _columns(logits_NV: Tensor, vocabulary_V: Tensor | None) -> Tensor:
    return logits_NV if vocabulary_V is None else logits_NV[:, vocabulary_V]


class ReferenceEngine(ReceivingEngine):
    """`rollout.engine.Engine` on plain transformers."""

    def __init__(
        self, settings: RolloutSettings, hf_dir: Path, *, engine_id: str = "reference-0", device: str = "cpu"
    ) -> None:
        from transformers import AutoModelForCausalLM

        longest = longest_sequence(settings, Path(hf_dir))
        if settings.adapter is not None:
            check_adapter(settings.adapter, Path(hf_dir))
        model = AutoModelForCausalLM.from_pretrained(
            hf_dir, dtype=getattr(torch, settings.dtype.value), attn_implementation="sdpa"
        )
        if settings.adapter is not None:
            from peft import PeftModel

            adapter_rank(settings.adapter)
            model = PeftModel.from_pretrained(model, settings.adapter).merge_and_unload()
        self.model: torch.nn.Module = model.eval().to(device)
        self.engine_id = engine_id
        self.weight_version = 0
        self._device = torch.device(device)
        self._backend = ReferenceBackend(self.model)
        self._inbox = ModuleInbox(self.model)
        self._decoder = GroupDecoder.load(
            hf_dir, self._device, vocabulary_size=self.model.config.vocab_size, max_model_len=longest
        )

    def generate(self, prompts: Sequence[Prompt], spec: DecodeSpec, *, exclude: bool | None = None) -> Groups:
        """Completions of the prompts; see `rollout.engine.Engine.generate`."""
        self.require_visible()
        self._decoder.check(prompts, spec)
        return self._decoder.generate(
            self._backend,
            [slice(row, row + 1) for row in range(len(prompts))],
            prompts,
            spec,
            exclude=exclude,
            weight_version=self.weight_version,
            engine_id=self.engine_id,
        )

    @torch.inference_mode()
    def score(self, prompts: Sequence[IntArray], completions: Sequence[IntArray]) -> list[FloatArray]:
        """Full-vocabulary log-probabilities of each completion token at temperature 1, float32."""
        self.require_awake()
        self._decoder.check_sequences(prompts, completions)
        scores = []
        for prompt, completion in zip(prompts, completions, strict=True):
            tokens = torch.from_numpy(np.concatenate([prompt, completion]).astype(np.int64)).to(self._device)
            logits_TV = self._model_logits(tokens, len(completion))
            logp_TV = logits_TV.float().log_softmax(-1)
            scores.append(logp_TV.gather(1, tokens[len(prompt) :, None])[:, 0].cpu().numpy())
        return scores

    def _model_logits(self, tokens: Tensor, last: int) -> Tensor:
        """Logits that predict the `last` last tokens, `[last, V]`."""
        logits: Tensor = self.model(input_ids=tokens[None], use_cache=False, logits_to_keep=last + 1).logits[0, :-1]
        return logits

    def _take_push(self, message: PushMessage, rank: int) -> Receipt:
        return self._inbox.receive(message, rank=rank)

    def _give_memory(self) -> None:
        """The caches; the weights of a plain model stay where they are."""
        self._backend.release()

    def describe(self) -> dict[str, str]:
        """See `rollout.engine.Engine.describe`."""
        import transformers

        return {"name": EngineKind.REFERENCE.value, "version": transformers.__version__}

    def close(self) -> None:
        """Drop the connection of the weight channel."""
        self._inbox.close()
