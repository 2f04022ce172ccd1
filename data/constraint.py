"""The constraint interface: which tokens may follow, for a batch of decoding states.

A constraint is more than one trie node per token (lists, exclusions, closed sets, free text), so a state is a struct
of tensors that only its constraint understands; every call is vectorised over the N rows of the state. The engine,
the reference engine and the learner (which replays completions) use the same object and the same
`legal_log_softmax`, so that both sides speak of one policy.

Suffixes: `_N` state rows (beams), `_C` padded legal continuations, `_V` vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol, TypeVar

import torch
from torch import Tensor

from data.records import IntArray

StateT = TypeVar("StateT")


class LegalSets(NamedTuple):
    """Legal next tokens of N states, padded to the widest."""

    token_NC: Tensor
    """int64 [N, C] token ids in increasing order, padded with 0."""
    legal_NC: Tensor
    """bool [N, C], true on the legal ones; a prefix of each row unless a list is ranked or items are excluded."""


class Constraint(Protocol[StateT]):
    """What may be generated. Implementations: `data.trie_constraint`, `data.list_constraint`."""

    @property
    def spec(self) -> str:
        """Specification that is stored with every group."""
        ...

    @property
    def max_tokens(self) -> int:
        """Length of the longest completion."""
        ...

    def start(self, items: Sequence[IntArray], /) -> StateT:
        """One state per prompt, before the first token.

        `items` are the item ids that each prompt brings: those it may not get, or the candidates of its list.
        """
        ...

    def legal(self, state: StateT) -> LegalSets:
        """Legal continuations; a state that is done has none.

        Raises:
            RunError: a state that is not done has no legal continuation (a dead end).
        """
        ...

    def advance(self, state: StateT, parent_M: Tensor, token_M: Tensor) -> StateT:
        """The M states reached from rows `parent_M` by `token_M`; an illegal token raises ValueError."""
        ...

    def done(self, state: StateT) -> Tensor:
        """bool [N], true where the completion is complete."""
        ...

    def items(self, state: StateT) -> Tensor:
        """int64 [N], the (first permitted) item of each completed state, `NO_ITEM` elsewhere."""
        ...


def legal_log_softmax(logits_NV: Tensor, legal: LegalSets, temperature: float) -> Tensor:
    """Log-probabilities of the policy: softmax over the legal continuations at `temperature`.

    Returns float32 (float64 for float64 logits) `[N, C]`, minus infinity where not legal. Rows without any legal
    token come back as minus infinity throughout.

    Source: ../shared/DESIGN.md section 1, principle 2.
    """
    gathered_NC = logits_NV.gather(1, legal.token_NC)
    wide = torch.float64 if gathered_NC.dtype == torch.float64 else torch.float32
    scaled_NC = (gathered_NC.to(wide) / temperature).masked_fill(~legal.legal_NC, -torch.inf)
    logp_NC = scaled_NC - scaled_NC.logsumexp(1, keepdim=True)
    return logp_NC.masked_fill(~legal.legal_NC, -torch.inf)
