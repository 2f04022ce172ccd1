"""Decoding over the whole vocabulary, as a `Constraint`: to measure how often the model alone leaves the catalogue."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from data.constraint import LegalSets
from data.records import NO_ITEM, IntArray
from data.trie import ItemTrie


class Unconstrained:
    """Every token is legal, for `max_tokens` tokens; the state is the prefix itself, int64 `[N, t]`.

    Exclusions are not applied. An item is what the tokens spell in the trie; tokens after its leaf are ignored.
    """

    def __init__(self, trie: ItemTrie, *, vocabulary_size: int, max_tokens: int) -> None:
        self._trie = trie
        self._vocabulary_size = vocabulary_size
        self._max_tokens = max_tokens

    @property
    def spec(self) -> str:
        """Specification that is stored with every group."""
        return "unconstrained"

    @property
    def max_tokens(self) -> int:
        """Length of every completion."""
        return self._max_tokens

    def start(self, exclusions: Sequence[IntArray]) -> Tensor:
        """One empty prefix per prompt."""
        return torch.empty((len(exclusions), 0), dtype=torch.long, device=self._trie.device)

    def legal(self, state: Tensor) -> LegalSets:
        """The whole vocabulary, for every prefix that is not done."""
        shape = (len(state), self._vocabulary_size)
        token_NC = torch.arange(self._vocabulary_size, device=state.device).expand(shape)
        legal_NC = torch.full((1, 1), state.shape[1] < self._max_tokens, device=state.device).expand(shape)
        return LegalSets(token_NC, legal_NC)

    def advance(self, state: Tensor, parent_M: Tensor, token_M: Tensor) -> Tensor:
        """Prefixes continued by one token each.

        Raises:
            ValueError: a token outside the vocabulary, or a prefix that was complete.
        """
        if state.shape[1] >= self._max_tokens or bool(((token_M < 0) | (token_M >= self._vocabulary_size)).any()):
            raise ValueError(f"illegal token, or more than {self._max_tokens} tokens")
        return torch.cat([state[parent_M], token_M[:, None]], 1)

    def done(self, state: Tensor) -> Tensor:
        """True once there are `max_tokens` tokens."""
        return torch.full((len(state),), state.shape[1] >= self._max_tokens, device=state.device)

    def items(self, state: Tensor) -> Tensor:
        """The (first) item that each completed prefix spells, `NO_ITEM` elsewhere."""
        if state.shape[1] < self._max_tokens:
            return torch.full((len(state),), NO_ITEM, device=state.device)
        return self._trie.lookup(state)[0]
