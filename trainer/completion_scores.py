"""Scores of completions by a policy: the tree batches of a rank in, one number for each slot of the whole batch out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from data.records import BoolArray, FloatArray
from rollout.probe import Probe
from trainer.legal import LegalTable
from trainer.policy import full_log_probabilities, token_scores
from trainer.trees import Completions, TreeBatch, completion_pieces, lay_out

PolicyCall = Callable[[TreeBatch], Tensor]
"""Logits `[U, V]` of a batch's scored units."""


@dataclass(frozen=True, kw_only=True)
class ScoreOutputs:
    """Scores of completions, float32 `[P, G, T]`, 0 where there is no token."""

    logp_PGT: FloatArray
    """Renormalised log-probability at the rollout temperature; 0 where the token is not legal."""
    full_logp_PGT: FloatArray
    """Full-vocabulary log-probability at temperature 1."""
    legal_mass_PGT: FloatArray
    entropy_PGT: FloatArray
    """Entropy of the renormalised policy, nats."""
    certainty_PGT: FloatArray
    """KL(uniform || renormalised policy), nats."""
    choices_PGT: FloatArray
    """Number of legal continuations."""
    legal_PGT: BoolArray
    """True on tokens that the constraint permits."""
    ref_logp_PGT: FloatArray | None = None
    """Renormalised log-probability under the reference; None where no reference was loaded."""


_FLOATS = ("logp_PGT", "full_logp_PGT", "legal_mass_PGT", "entropy_PGT", "certainty_PGT", "choices_PGT")


@torch.no_grad()
def score_batches(
    policy: PolicyCall,
    batches: Sequence[TreeBatch],
    table: LegalTable,
    shape: tuple[int, int, int],
    temperature: float,
    device: torch.device,
) -> dict[str, Any]:
    """Fields of `ScoreOutputs` but for the reference, arrays of `shape` `[P, G, T]`; 0 in slots of other ranks."""
    outputs: dict[str, Any] = {name: np.zeros(shape, dtype=np.float32) for name in _FLOATS}
    outputs["legal_PGT"] = np.zeros(shape, dtype=np.bool_)
    for batch in batches:
        moved = batch.to(device)
        scores = token_scores(policy(moved), moved, table.sets(batch).to(device), temperature)
        slots = batch.slot_K.numpy()
        for name, array in outputs.items():
            array.reshape(-1)[slots] = getattr(scores, name.replace("_PGT", "_K")).cpu().numpy()
    return outputs


@torch.no_grad()
def score_probe(policy: PolicyCall, probe: Probe, device: torch.device) -> list[FloatArray]:
    """Full-vocabulary log-probabilities of the tokens of each of the probe's completions."""
    completions = Completions.of_sequences(probe.prompts, probe.completions)
    longest = max(len(prompt) for prompt in probe.prompts) + completions.shape[2]
    batch = lay_out(completion_pieces(completions, longest)).to(device)
    logp_PGT = np.zeros(completions.shape, dtype=np.float32)
    logp_PGT.reshape(-1)[batch.slot_K.cpu().numpy()] = full_log_probabilities(policy(batch), batch).cpu().numpy()
    lengths = completions.length_PG[completions.valid_PG]
    return [logp_T[:length] for logp_T, length in zip(logp_PGT[completions.valid_PG], lengths, strict=True)]
