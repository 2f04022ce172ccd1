"""Checks that returned completions are what the constraint promises, by code that shares nothing with the decoding.

No trie and no tensors: paths are looked up in a sorted table made from the catalogue. Every count must be 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from data.catalogue import Catalogue
from data.records import Decode, Groups, IntArray, LongArray, Prompt, excluded_pairs
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
        self._paths = PathTable(catalogue)

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
        path_MT = np.where(on_MT, groups.token_PGT[row_M, member_M], -1)
        number_M = self._paths.numbers(path_MT)
        known_M = number_M >= 0
        item_of_path_M = known_M & (self._paths.numbers_of(item_M) == number_M)
        counts[Violation.UNKNOWN_PATH] += int((~known_M).sum())
        counts[Violation.WRONG_ITEM] += int((known_M & ~item_of_path_M).sum())
        counts[Violation.RETIRED] += int((~self._active[item_M[item_of_path_M]]).sum())
        counts[Violation.EXCLUDED] += self._excluded(prompts, row_M[item_of_path_M], item_M[item_of_path_M])
        if groups.spec.decode is not Decode.SAMPLE:
            counts[Violation.DUPLICATE] += _copies(row_M, path_MT)
        logp_MT = groups.logp_PGT[row_M, member_M]
        wrong_MT = on_MT & ~(np.isfinite(logp_MT) & (logp_MT <= 1e-6))
        counts[Violation.LOG_PROBABILITY] += int(wrong_MT.any(1).sum())
        return counts

    def _excluded(self, prompts: Sequence[Prompt], row_M: LongArray, item_M: IntArray) -> int:
        """Completions that are an item which their prompt may not get."""
        row_E, item_E = excluded_pairs(prompts)
        items = len(self._active)
        return int(np.isin(row_M * items + item_M, row_E * items + item_E).sum())


class PathTable:
    """The distinct paths of a catalogue by number. A path is found by a sum, and compared token by token."""

    def __init__(self, catalogue: Catalogue) -> None:
        path_IT, _ = catalogue.padded_tokens(np.arange(catalogue.n_items, dtype=np.int32))
        self._path_VT, number_I = np.unique(path_IT, axis=0, return_inverse=True)
        self._number_I = number_I.reshape(-1)
        random = np.random.default_rng(0)
        # Two paths with equal sums would hide each other: such factors are drawn again.
        while True:
            self._factor_T = random.integers(1, 2**63, path_IT.shape[1], dtype=np.uint64) | np.uint64(1)
            sum_V = self._sums(self._path_VT)
            self._order = np.argsort(sum_V)
            self._sum_V = sum_V[self._order]
            if (self._sum_V[1:] != self._sum_V[:-1]).all():
                return

    def _sums(self, path_MT: npt.NDArray[np.integer]) -> npt.NDArray[np.uint64]:
        # Wraps around; the padding of -1 counts as 0.
        sum_M: npt.NDArray[np.uint64] = ((path_MT + 1).astype(np.uint64) * self._factor_T).sum(1, dtype=np.uint64)
        return sum_M

    def numbers(self, path_MT: npt.NDArray[np.integer]) -> LongArray:
        """[M] the number of each path, which is padded with -1; -1 where the catalogue does not have it."""
        longest = self._path_VT.shape[1]
        beyond_M = (path_MT[:, longest:] >= 0).any(1)
        path_MT = path_MT[:, :longest]
        path_MT = np.pad(path_MT, ((0, 0), (0, longest - path_MT.shape[1])), constant_values=-1)
        at_M = np.minimum(np.searchsorted(self._sum_V, self._sums(path_MT)), len(self._sum_V) - 1)
        number_M = self._order[at_M]
        same_M = (self._path_VT[number_M] == path_MT).all(1) & ~beyond_M
        return np.where(same_M, number_M, -1)

    def numbers_of(self, item_M: IntArray) -> LongArray:
        """[M] the number of each item's path; -1 where there is no such item."""
        there_M = (item_M >= 0) & (item_M < len(self._number_I))
        return np.where(there_M, self._number_I[np.where(there_M, item_M, 0)], -1)


def _copies(row_M: LongArray, path_MT: npt.NDArray[np.integer]) -> int:
    """Completions of a row whose path another one before it has."""
    if not len(row_M):
        return 0
    key_MT = np.column_stack([row_M, path_MT])
    key_MT = key_MT[np.lexsort(key_MT.T[::-1])]
    return int((key_MT[1:] == key_MT[:-1]).all(1).sum())
