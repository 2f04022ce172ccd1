"""The policy: a Hugging Face causal language model behind tree batches.

Hidden states are gathered at the positions that predict something before the head is applied, so logits of prompt
positions never exist. What comes out are log-probabilities of two kinds: renormalised over the legal sets at the
rollout temperature (the policy), and over the full vocabulary at temperature 1 (likelihood, legal mass).

Suffixes: `_U` head positions, `_V` vocabulary, `_K` target tokens, `_C` padded legal set.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel

from data.constraint import LegalSets, legal_log_softmax
from data.errors import RequestError
from trainer.tempering import token_certainty
from trainer.tree_attention import ATTENTION
from trainer.trees import TreeBatch, lay_out, sequence_pieces

_HEAD_TOLERANCE = 1e-3


class Policy(nn.Module):
    """Logits of a tree batch at its head positions. `lm` keeps the names of its parameters under `lm.`"""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, batch: TreeBatch) -> Tensor:
        """Logits `[U, V]` in the data type of the model."""
        hidden_1NH = self.lm.base_model(**_inputs(batch)).last_hidden_state
        logits_UV: Tensor = self.lm.get_output_embeddings()(hidden_1NH[0, batch.head_U])
        return logits_UV


def _inputs(batch: TreeBatch) -> dict[str, Any]:
    return {
        "input_ids": batch.token_N[None],
        "position_ids": batch.position_N[None],
        "use_cache": False,
        "tree_layout": batch.blocks,
    }


class Float32Twin:
    """A policy of the same shape that computes in float32 with weights it is given, and holds none itself."""

    def __init__(self, lm: PreTrainedModel) -> None:
        weightless: dict[int, Any] = {
            id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
            for parameter in lm.parameters()
        }
        self._policy = Policy(copy.deepcopy(lm, weightless)).eval()

    def holding(self, weights: Iterable[tuple[str, Tensor]], device: torch.device) -> Callable[[TreeBatch], Tensor]:
        """The policy with copies of the named weights of `lm`, tied ones once; shares what is float32 already."""
        tensors = {f"lm.{name}": value.float() for name, value in weights}
        tensors |= {name: buffer.to(device) for name, buffer in self._policy.named_buffers()}

        def forward(batch: TreeBatch) -> Tensor:
            logits_UV: Tensor = functional_call(self._policy, tensors, (batch,))
            return logits_UV

        return forward


class TokenScores(NamedTuple):
    """Scores of the target tokens of a micro-batch, float32."""

    logp_K: Tensor
    """Renormalised log-probability at the rollout temperature; 0 where the token is not legal."""
    full_logp_K: Tensor
    legal_mass_K: Tensor
    """Probability of the legal set under the full vocabulary at temperature 1, without gradient."""
    entropy_K: Tensor
    """Entropy of the renormalised policy in nats; with gradient where it was asked for."""
    certainty_K: Tensor
    """KL(uniform || renormalised policy) in nats, without gradient (`trainer.tempering.token_certainty`)."""
    choices_K: Tensor
    """Number of legal continuations."""
    legal_K: Tensor
    """bool, whether the token is in its legal set."""


def full_log_probabilities(logits_UV: Tensor, batch: TreeBatch) -> Tensor:
    """Full-vocabulary log-probabilities `[K]` of the targets at temperature 1, float32."""
    wide_UV = logits_UV.float()
    log_total_U = wide_UV.logsumexp(1)
    return wide_UV[batch.source_K, batch.target_K] - log_total_U[batch.source_K]


def token_scores(
    logits_UV: Tensor,
    batch: TreeBatch,
    legal: tuple[LegalSets, Tensor, Tensor],
    temperature: float,
    *,
    entropy_gradient: bool = False,
) -> TokenScores:
    """Scores of the targets.

    Args:
        logits_UV: from `Policy`.
        legal: from `trainer.legal.LegalTable.sets`, for the same batch: sets `[U, C]`, place and legality `[K]`.
        temperature: the rollout temperature.
        entropy_gradient: for an entropy bonus.
    """
    sets, place_K, legal_K = legal
    wide_UV = logits_UV.float()
    log_total_U = wide_UV.logsumexp(1)
    full_logp_K = wide_UV[batch.source_K, batch.target_K] - log_total_U[batch.source_K]
    logp_UC = legal_log_softmax(wide_UV, sets, temperature)
    logp_K = torch.where(legal_K, logp_UC[batch.source_K, place_K], 0.0)
    with torch.no_grad():
        legal_UC = wide_UV.gather(1, sets.token_NC).masked_fill(~sets.legal_NC, -torch.inf)
        mass_U = (legal_UC.logsumexp(1) - log_total_U).exp()
        certainty_U = token_certainty(logp_UC, sets.legal_NC)
        choices_U = sets.legal_NC.sum(1).float()
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy_U = -(logp_UC.exp() * logp_UC.masked_fill(~sets.legal_NC, 0.0)).sum(1)
    return TokenScores(
        logp_K=logp_K,
        full_logp_K=full_logp_K,
        legal_mass_K=mass_U[batch.source_K],
        entropy_K=entropy_U[batch.source_K],
        certainty_K=certainty_U[batch.source_K],
        choices_K=choices_U[batch.source_K],
        legal_K=legal_K,
    )


def load_language_model(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    """Load a causal language model for training: attention of `trainer.tree_attention`, no dropout.

    Dropout is off because the ratio between two passes over the same tokens must be the policy's alone.

    Raises:
        RequestError: the folder holds no model, its attention cannot be replaced, or its logits are more than a head
            on the last hidden state.
    """
    if not (folder / "config.json").is_file():
        raise RequestError("model", f"{folder} without config.json", "a folder that transformers can load")
    transformers.utils.logging.disable_progress_bar()
    lm: PreTrainedModel = AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=dtype, attn_implementation=ATTENTION, local_files_only=True
    )
    if not lm.is_backend_compatible():
        raise RequestError(
            "model",
            f"{type(lm).__name__}, whose attention transformers cannot replace",
            "a model that supports attention backends, such as Llama, Mistral, Qwen2 or Qwen3",
        )
    for module in lm.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    for name in ("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "dropout", "hidden_dropout"):
        if getattr(lm.config, name, None):
            setattr(lm.config, name, 0.0)
    _disable_attention_dropout(lm)
    _check_head(lm)
    return lm


def _disable_attention_dropout(lm: PreTrainedModel) -> None:
    for module in lm.modules():
        if isinstance(getattr(module, "attention_dropout", None), float):
            module.attention_dropout = 0.0  # read by the attention function at every call


def _check_head(lm: PreTrainedModel) -> None:
    """Refuse models that scale or cap their logits behind the head: the gathered head would not be their policy."""
    tokens = np.array([0, min(1, lm.config.get_text_config().vocab_size - 1), 0], dtype=np.int32)
    batch = lay_out(sequence_pieces([(tokens, np.array([False, True, True]))], len(tokens)))
    with torch.no_grad():
        whole = lm(**_inputs(batch)).logits[0, batch.head_U].float()
        gathered = Policy(lm)(batch).float()
    gap = float((whole - gathered).abs().max())
    if gap > _HEAD_TOLERANCE * max(1.0, float(whole.abs().max())):
        raise RequestError(
            "model",
            f"{type(lm).__name__}, whose logits differ from its head on the hidden states by {gap:.3g}",
            "a model without logit scaling or soft-capping",
        )
