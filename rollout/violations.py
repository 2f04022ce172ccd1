"""Checks that returned completions are what the constraint promises, by code that shares nothing with the decoding.

No trie and no tensors: paths are looked up in a dictionary made from the catalogue. Every count must be 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum

import numpy as np

from data.catalogue import Catalogue
from data.records import NO_ITEM, Decode, Groups, IntArray, LongArray, Prompt
from rollout.list_violations import ListViolation, ListViolationCounter


class Violation(StrEnum):
    """What is wrong with a completion."""

    UNKNOWN_PATH = "unknown_path"
    """The tokens are no item's path."""
    WRONG_ITEM = "wrong_item"
    """The item is not one of the path."""
    RETIRED = "retired"
    """The item is retired."""
    EXCLUDED = "excluded"
    """The prompt may not get the item."""
    DUPLICATE = "duplicate"
    """A beam is a copy of another one."""
    LOG_PROBABILITY = "log_probability"
    """The log-probabilities are not finite, or above 0."""
    ORDER = "order"
    """An empty slot comes before a completion, or the group belongs to another prompt."""


class ViolationCounter:
    """Counts violations of constrained groups over a catalogue, those of lists with `ListViolationCounter`."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._lists = ListViolationCounter(catalogue)
        self._active = catalogue.active
        self._items_of_path: dict[bytes, list[int]] = {}
        for item in range(catalogue.n_items):
            self._items_of_path.setdefault(catalogue.tokens(item).astype(np.int32).tobytes(), []).append(item)

    def count(self, prompts: Sequence[Prompt], groups: Groups) -> Mapping[Violation | ListViolation, int]:
        """Violations by reason, 0 included; groups that were decoded without a constraint have none."""
        if groups.spec.lists is not None:
            # A mapping is invariant in its keys, so this one is written anew.
            return {reason: number for reason, number in self._lists.count(prompts, groups).items()}
        counts: Counter[Violation | ListViolation] = Counter({reason: 0 for reason in Violation})
        if not groups.spec.constrained:
            return counts
        valid_PG, tokens = groups.valid_PG, groups.shape[2]
        asked_P = np.array([prompt.prompt_id for prompt in prompts], np.int64)
        gaps_P = (valid_PG[:, 1:] & ~valid_PG[:, :-1]).any(1)
        counts[Violation.ORDER] += int((gaps_P | (groups.prompt_id_P != asked_P)).sum())
        row_M, member_M = np.nonzero(valid_PG)
        length_M, item_M = groups.length_PG[row_M, member_M], groups.item_PG[row_M, member_M]
        on_MT = np.arange(tokens) < length_M[:, None]
        path_MT = np.where(on_MT, groups.token_PGT[row_M, member_M], -1).astype(np.int32)
        # Every distinct pair of a path and an item is looked up once.
        distinct, count = np.unique(np.column_stack([path_MT, length_M, item_M]), axis=0, return_counts=True)
        for pair, times in zip(distinct, count.tolist(), strict=True):
            path = pair[: pair[-2]].astype(np.int32).tobytes()
            for reason in self._reasons(path, int(pair[-1])):
                counts[reason] += times
        counts[Violation.EXCLUDED] += self._excluded(prompts, row_M, path_MT, length_M, item_M)
        if groups.spec.decode is not Decode.SAMPLE:
            apart = np.unique(np.column_stack([row_M, length_M, path_MT]), axis=0)
            counts[Violation.DUPLICATE] += len(row_M) - len(apart)
        logp_MT = groups.logp_PGT[row_M, member_M]
        wrong_MT = on_MT & ~(np.isfinite(logp_MT) & (logp_MT <= 1e-6))
        counts[Violation.LOG_PROBABILITY] += int(wrong_MT.any(1).sum())
        return counts

    def _excluded(
        self,
        prompts: Sequence[Prompt],
        row_M: LongArray,
        path_MT: IntArray,
        length_M: IntArray,
        item_M: IntArray,
    ) -> int:
        """Completions that are the item they say, which the prompt may not get."""
        found = 0
        for row, prompt in enumerate(prompts):
            if not len(prompt.exclusions):
                continue
            mine = np.flatnonzero(row_M == row)
            for index in mine[np.isin(item_M[mine], prompt.exclusions)]:
                path = path_MT[index, : length_M[index]].tobytes()
                found += int(item_M[index]) in self._items_of_path.get(path, ())
        return found

    def _reasons(self, path: bytes, item: int) -> list[Violation]:
        items = self._items_of_path.get(path)
        if items is None:
            return [Violation.UNKNOWN_PATH]
        if item == NO_ITEM or item not in items:
            return [Violation.WRONG_ITEM]
        return [] if self._active[item] else [Violation.RETIRED]
