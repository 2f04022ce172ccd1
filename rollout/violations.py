"""Checks that returned completions are what the constraint promises, by code that shares nothing with the decoding.

No trie and no tensors: paths are looked up in a dictionary made from the catalogue. Every count must be 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum

import numpy as np

from data.catalogue import Catalogue
from data.records import NO_ITEM, Decode, Groups, Prompt
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
        for row, prompt in enumerate(prompts):
            valid_G = groups.valid_PG[row]
            members = np.flatnonzero(valid_G)
            if groups.prompt_id_P[row] != prompt.prompt_id or (members != np.arange(len(members))).any():
                counts[Violation.ORDER] += 1
            excluded = set(prompt.exclusions.tolist())
            seen: set[bytes] = set()
            for member in members:
                length = int(groups.length_PG[row, member])
                path = groups.token_PGT[row, member, :length].astype(np.int32).tobytes()
                item = int(groups.item_PG[row, member])
                counts.update(self._reasons(path, item, excluded))
                if groups.spec.decode is not Decode.SAMPLE and path in seen:
                    counts[Violation.DUPLICATE] += 1
                seen.add(path)
                logp_T = groups.logp_PGT[row, member, :length]
                if not (np.isfinite(logp_T) & (logp_T <= 1e-6)).all():
                    counts[Violation.LOG_PROBABILITY] += 1
        return counts

    def _reasons(self, path: bytes, item: int, excluded: set[int]) -> list[Violation]:
        items = self._items_of_path.get(path)
        if items is None:
            return [Violation.UNKNOWN_PATH]
        if item == NO_ITEM or item not in items:
            return [Violation.WRONG_ITEM]
        reasons = []
        if not self._active[item]:
            reasons.append(Violation.RETIRED)
        if item in excluded:
            reasons.append(Violation.EXCLUDED)
        return reasons
