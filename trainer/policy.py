"""The policy: a Hugging Face causal language model behind tree batches.

Hidden states are gathered at the positions that predict something before the head is applied, so logits of prompt
positions never exist. What comes out are log-probabilities of two kinds: renormalised over the legal sets at the
rollout temperature (the policy), and over the full vocabulary at temperature 1 (likelihood, legal mass).

Suffixes: `_U` head positions, `_V` vocabulary, `_K` target tokens, `_C` padded legal set.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import softplus
from torch.utils.checkpoint import checkpoint
from transformers import AutoModelForCausalLM, PreTrainedModel

from data.constraint import LegalSets, legal_log_softmax
from data.errors import RequestError
from trainer.legal import TargetSets
from trainer.tempering import token_certainty
from trainer.tree_attention import ATTENTION
from trainer.trees import TreeBatch, lay_out, sequence_pieces

_HEAD_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 2e-2}
"""Of the largest logit; the two products of bfloat16 matrices may round differently, by 2**-7 of it."""


class Policy(nn.Module):
    """Logits of a tree batch at its head positions. `lm` keeps the names of its parameters under `lm.`"""

    def __init__(self, lm: PreTrainedModel) -> None:
        super().__init__()
        self.lm = lm

    def forward(self, batch: TreeBatch, reduction: HeadReduction | None = None) -> Any:
        """Logits `[U, V]` in the data type of the model, or what `reduction` makes of them in stretches."""
        hidden_UH = self.lm.base_model(**_inputs(batch)).last_hidden_state[0, batch.head_U]
        head = self.lm.get_output_embeddings()
        return head(hidden_UH) if reduction is None else reduction(head, hidden_UH, batch)


def _inputs(batch: TreeBatch) -> dict[str, Any]:
    return {
        "input_ids": batch.token_N[None],
        "position_ids": batch.position_N[None],
        "use_cache": False,
        "tree_layout": batch.blocks,
    }


class HeadReduction:
    """Scores of the targets without the logits of all head positions at once.

    Logits are computed for `positions` head positions at a time, reduced to a few numbers per target, and computed
    again in the backward pass: the memory of the vocabulary's size is that of one stretch.
    """

    def __init__(self, positions: int, score: Callable[[Tensor, TreeBatch, Stretch], tuple[Tensor, ...]]) -> None:
        """
        Args:
            positions: head positions of a stretch, at least 1.
            score: from the logits of a stretch and the batch with the stretch's targets, tensors `[K of the stretch]`.
        """
        self._positions = positions
        self._score = score

    def __call__(self, head: nn.Module, hidden_UH: Tensor, batch: TreeBatch) -> tuple[Tensor, ...]:
        """The scores `[K]` in the order of the batch's targets, and a number that hangs on everything (for fillers)."""
        parts: list[tuple[Tensor, ...]] = []
        order: list[Tensor] = []
        for start in range(0, len(hidden_UH), self._positions):
            stretch = Stretch.of(batch, start, min(start + self._positions, len(hidden_UH)))
            if not len(stretch.target_M) and parts:
                continue
            some_UH = hidden_UH[stretch.heads]
            parts.append(checkpoint(self._reduced, head, some_UH, batch, stretch, use_reentrant=False))
            order.append(stretch.target_M)
        back_K = torch.cat(order).argsort()
        anchor = head(hidden_UH[:1])[0, 0].float()
        return (*(torch.cat(values)[back_K] for values in zip(*parts, strict=True)), anchor)

    def _reduced(self, head: nn.Module, hidden_UH: Tensor, batch: TreeBatch, stretch: Stretch) -> tuple[Tensor, ...]:
        some = dataclasses.replace(
            batch,
            source_K=batch.source_K[stretch.target_M] - stretch.heads.start,
            target_K=batch.target_K[stretch.target_M],
        )
        return self._score(head(hidden_UH), some, stretch)


@dataclass(frozen=True)
class Stretch:
    """Neighbouring head positions and the targets that they predict."""

    heads: slice
    target_M: Tensor
    """Places of the targets in the batch."""

    @staticmethod
    def of(batch: TreeBatch, start: int, stop: int) -> Stretch:
        """The head positions from `start` to before `stop`."""
        inside_K = (batch.source_K >= start) & (batch.source_K < stop)
        return Stretch(slice(start, stop), inside_K.nonzero()[:, 0])


class WiderTwin:
    """A policy of the same shape that computes in a wider type with weights it is given, and holds none itself.

    In float32 for a policy in a shorter type; for one in float32 in float64, but for the softmax over places, which
    `trainer.tree_attention` and the scores have in float32 always.
    """

    def __init__(self, lm: PreTrainedModel, dtype: torch.dtype) -> None:
        """
        Args:
            lm: gives the shape.
            dtype: that the policy computes in.
        """
        self._dtype = torch.float64 if dtype == torch.float32 else torch.float32
        weightless: dict[int, Any] = {
            id(parameter): nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
            for parameter in lm.parameters()
        }
        self._policy = Policy(copy.deepcopy(lm, weightless)).eval()

    def holding(self, weights: Iterable[tuple[str, Tensor]], device: torch.device) -> Callable[[TreeBatch], Tensor]:
        """The policy with copies of the named weights of `lm`, tied ones once."""
        tensors = {f"lm.{name}": value.to(self._dtype) for name, value in weights}
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
    """bool, whether the token is legal."""


def full_log_probabilities(logits_UV: Tensor, batch: TreeBatch) -> Tensor:
    """Full-vocabulary log-probabilities `[K]` of the targets at temperature 1, float32."""
    wide_UV = logits_UV.float()
    log_total_U = wide_UV.logsumexp(1)
    return wide_UV[batch.source_K, batch.target_K] - log_total_U[batch.source_K]


def token_scores(
    logits_UV: Tensor,
    batch: TreeBatch,
    legal: TargetSets,
    temperature: float,
    *,
    entropy_gradient: bool = False,
) -> TokenScores:
    """Scores of the targets.

    Args:
        logits_UV: from `Policy`.
        legal: from `trainer.legal.LegalTable.sets`, for the same batch.
        temperature: the rollout temperature.
        entropy_gradient: for an entropy bonus.
    """
    sets, place_K, legal_K, open_K = legal
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
    scores = TokenScores(
        logp_K=logp_K,
        full_logp_K=full_logp_K,
        legal_mass_K=mass_U[batch.source_K],
        entropy_K=entropy_U[batch.source_K],
        certainty_K=certainty_U[batch.source_K],
        choices_K=choices_U[batch.source_K],
        legal_K=legal_K,
    )
    if open_K is None:
        return scores
    set_UC = wide_UV.gather(1, sets.token_NC) / temperature
    log_set_U = set_UC.masked_fill(~sets.legal_NC, -torch.inf).logsumexp(1)
    above_K = wide_UV[batch.source_K, batch.target_K] / temperature - log_set_U[batch.source_K]
    sum_U = logp_UC.detach().masked_fill(~sets.legal_NC, 0.0).sum(1)
    own = _with_own_token(scores, above_K, sum_U[batch.source_K], entropy_gradient=entropy_gradient)
    return TokenScores(*(torch.where(open_K, new, old) for new, old in zip(own, scores, strict=True)))


def _with_own_token(scores: TokenScores, above_K: Tensor, sum_K: Tensor, *, entropy_gradient: bool) -> TokenScores:
    """The scores over legal sets to which each target is added, in which it is not.

    Args:
        scores: over the sets as they are.
        above_K: the target's logit at the rollout temperature minus the logsumexp of its set, with gradient.
        sum_K: sum of the log-probabilities of its set, without.
    """
    logp_K, rest_K = -softplus(-above_K), -softplus(above_K)
    count_K = scores.choices_K + 1
    with torch.set_grad_enabled(entropy_gradient and torch.is_grad_enabled()):
        entropy_K = -logp_K.exp() * logp_K + rest_K.exp() * (scores.entropy_K - rest_K)
    # Relative to the logsumexp of the set: that of the larger one is -rest, the mean of its logits (sum + above) / n.
    certainty_K = (-rest_K - (sum_K + above_K) / count_K - count_K.log()).clamp_min(0).detach()
    return TokenScores(
        logp_K=logp_K,
        full_logp_K=scores.full_logp_K,
        legal_mass_K=scores.legal_mass_K + scores.full_logp_K.detach().exp(),
        entropy_K=entropy_K,
        certainty_K=certainty_K,
        choices_K=count_K,
        legal_K=scores.legal_K,
    )


def token_scores_in_stretches(
    policy: Callable[..., Any],
    batch: TreeBatch,
    legal: TargetSets,
    temperature: float,
    *,
    positions: int,
    entropy_gradient: bool = False,
) -> tuple[TokenScores, Tensor]:
    """`token_scores` of a policy, with logits of `positions` head positions at a time, and the number for fillers."""
    sets, place_K, legal_K, open_K = legal

    def score(logits_UV: Tensor, some: TreeBatch, stretch: Stretch) -> tuple[Tensor, ...]:
        here = TargetSets(
            sets=LegalSets(sets.token_NC[stretch.heads], sets.legal_NC[stretch.heads]),
            place_K=place_K[stretch.target_M],
            legal_K=legal_K[stretch.target_M],
            open_K=None if open_K is None else open_K[stretch.target_M],
        )
        return tuple(token_scores(logits_UV, some, here, temperature, entropy_gradient=entropy_gradient))

    *scores, anchor = policy(batch, HeadReduction(positions, score))
    return TokenScores(*scores), anchor


def log_probabilities_in_stretches(
    policy: Callable[..., Any], batch: TreeBatch, *, positions: int
) -> tuple[Tensor, Tensor]:
    """`full_log_probabilities` of a policy in the same way."""

    def score(logits_UV: Tensor, some: TreeBatch, stretch: Stretch) -> tuple[Tensor, ...]:
        return (full_log_probabilities(logits_UV, some),)

    logp_K, anchor = policy(batch, HeadReduction(positions, score))
    return logp_K, anchor


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
    if gap > _HEAD_TOLERANCE[lm.dtype] * max(1.0, float(whole.abs().max())):
        raise RequestError(
            "model",
            f"{type(lm).__name__}, whose logits differ from its head on the hidden states by {gap:.3g}",
            "a model without logit scaling or soft-capping",
        )
