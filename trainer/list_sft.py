"""Supervised training on ideal lists: the prompt, then the candidates with a gain in their order, which are learned.

A prompt that is taught with none of its gains seen has nothing to learn, and is left out and counted.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np

from data.catalogue import Catalogue
from data.errors import RequestError
from data.feed import generator
from data.ideal_lists import ideal_completion
from data.records import Prompt
from data.vocabulary import LIST_WORD
from trainer.list_settings import ListSettings
from trainer.sft import RowFeed, Rows

_LIST_STREAM = 33
NOT_SEEN = "no_gain_seen"
"""Count of the prompts that are left out because feedback hides all their gains."""


@dataclasses.dataclass
class IdealListFeed(RowFeed):
    """Batches of prompts with their ideal lists, in an order of its own in every epoch."""

    prompts: Sequence[Prompt]
    catalogue: Catalogue
    lists: ListSettings

    def rows_of(self, epoch: int) -> Rows:
        """See `trainer.sft.RowFeed`."""
        order = generator(self.seed, _LIST_STREAM, epoch).permutation(len(self.prompts))
        return [self._row(self.prompts[row]) for row in order]

    def _row(self, prompt: Prompt) -> tuple[np.ndarray, np.ndarray]:
        listed = ideal_completion(prompt, self.catalogue, self.lists.length)
        if self.lists.text_tokens:
            # The model begins the list itself; it is taught to do so at once.
            begin = self.catalogue.vocabulary.word_token(LIST_WORD)
            listed = np.concatenate([np.array([begin], dtype=np.int32), listed])
        tokens = np.concatenate([prompt.token_ids, listed])
        return tokens, np.arange(len(tokens)) >= len(prompt.token_ids)


def teachable(prompts: Sequence[Prompt]) -> tuple[list[Prompt], dict[str, int]]:
    """The prompts with a gain that is seen, and how many have none.

    Raises:
        RequestError: no prompt has one.
    """
    kept = [prompt for prompt in prompts if prompt.gain_C is not None and (prompt.gain_C > 0).any()]
    if not kept:
        found = f"none of {len(prompts)} training prompts has a gain that is seen"
        raise RequestError("lists.feedback", found, "a larger share, or more training rows")
    return kept, {NOT_SEEN: len(prompts) - len(kept)}
