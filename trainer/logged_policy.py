"""How probable a model finds what a log has shown: the policy's own log-probabilities, for off-policy estimates.

The model is asked in the driver, by plain transformers, and the softmax is over the legal continuations at the
temperature of the log: the support that the logged propensities have. The same pass gives the full-vocabulary
log-probabilities that an engine's `score` must equal, which is the policy gap of a served model.

Suffixes: `_N` row, `_A` row that is legal so far, `_L` level of a path, `_V` vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
import numpy.typing as npt
import torch

from data.catalogue import Catalogue
from data.constraint import legal_log_softmax
from data.records import FloatArray, IntArray, Prompt
from data.trie_constraint import TrieConstraint

LOGITS: Final = 2**27
"""Most logits of a forward pass, half a GiB."""


@dataclass(frozen=True, kw_only=True)
class LoggedScores:
    """Scores of the shown items under one model."""

    logp_N: npt.NDArray[np.float64]
    """Of the policy over the legal continuations at the log's temperature; -inf for an item that it never shows."""
    token_logp: list[FloatArray]
    """`[L]` per row: full-vocabulary log-probabilities at temperature 1, as engines score them."""


@torch.inference_mode()
def logged_scores(
    hf_dir: Path,
    catalogue: Catalogue,
    prompts: Sequence[Prompt],
    item_N: IntArray,
    temperature_N: npt.NDArray[np.floating],
    *,
    batch: int,
) -> LoggedScores:
    """Score one shown item per prompt.

    Args:
        hf_dir: the model, in float32.
        catalogue: its catalogue.
        prompts: contexts, as the model was trained on them.
        item_N: the shown items.
        temperature_N: of the log.
        batch: most rows per forward pass.
    """
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(hf_dir, dtype=torch.float32, attn_implementation="sdpa").eval()
    constraint = TrieConstraint(catalogue.trie(), exclude=True)
    paths = [catalogue.tokens(int(item)) for item in item_N]
    logp_N = np.zeros(len(prompts), np.float64)
    token_logp: list[FloatArray] = [np.zeros(0, np.float32)] * len(prompts)
    # Rows of equal length need no padding.
    alike: dict[tuple[int, int], list[int]] = defaultdict(list)
    for row, (prompt, path) in enumerate(zip(prompts, paths, strict=True)):
        alike[len(prompt.token_ids), len(path)].append(row)
    for (_, length), rows in sorted(alike.items()):
        # The logits of a language model are large: so few rows at once that they stay within the limit.
        at_once = max(1, min(batch, LOGITS // ((length + 1) * catalogue.vocabulary.size)))
        for first in range(0, len(rows), at_once):
            part = rows[first : first + at_once]
            tokens = np.stack([np.concatenate([prompts[row].token_ids, paths[row]]) for row in part])
            ids = torch.from_numpy(tokens.astype(np.int64))
            logits_NLV = model(input_ids=ids, use_cache=False, logits_to_keep=length + 1).logits[:, :-1].float()
            path_NL = ids[:, -length:]
            full_NL = logits_NLV.log_softmax(-1).gather(2, path_NL[:, :, None])[:, :, 0].numpy()
            temperature = torch.from_numpy(np.asarray(temperature_N, np.float32)[part])
            logp_N[part] = _legal_logp(
                constraint, [prompts[row].exclusions for row in part], logits_NLV / temperature[:, None, None], path_NL
            )
            for row, values_L in zip(part, full_NL, strict=True):
                token_logp[row] = values_L
    return LoggedScores(logp_N=logp_N, token_logp=token_logp)


def _legal_logp(
    constraint: TrieConstraint, exclusions: Sequence[IntArray], logits_NLV: torch.Tensor, path_NL: torch.Tensor
) -> npt.NDArray[np.float64]:
    """[N] log-probability of each path over the legal continuations; -inf behind an illegal token."""
    state = constraint.start(exclusions)
    total_N = torch.zeros(len(path_NL), dtype=torch.float64)
    row_A = torch.arange(len(path_NL))
    for level in range(path_NL.shape[1]):
        legal = constraint.legal(state)
        logp_AC = legal_log_softmax(logits_NLV[row_A, level], legal, 1.0).double()
        token_A = path_NL[row_A, level]
        at_AC = (legal.token_NC == token_A[:, None]) & legal.legal_NC
        found_A = at_AC.any(1)
        total_N[row_A] += torch.where(found_A, logp_AC.gather(1, at_AC.long().argmax(1)[:, None])[:, 0], -torch.inf)
        kept = torch.nonzero(found_A)[:, 0]
        if not len(kept):
            break
        state, row_A = constraint.advance(state, kept, token_A[kept]), row_A[kept]
    return total_N.numpy()
