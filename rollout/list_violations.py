"""Checks that returned lists are what the constraint promises, by code that shares nothing with the decoding.

No trie and no tensors: the tokens of a list are cut into the paths of a dictionary. Every count must be 0.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from enum import StrEnum

import numpy as np

from data.catalogue import Catalogue
from data.records import FORMAT_SEGMENT, NO_ITEM, NO_SEGMENT, Decode, Groups, ListSpec, Prompt
from data.vocabulary import LIST_WORD


class ListViolation(StrEnum):
    """What is wrong with a list."""

    TEXT = "list_text"
    """The free text is longer than its limit, or no list begins after it."""
    UNKNOWN_PATH = "list_unknown_path"
    """The tokens are not paths of items, one after the other."""
    NOT_A_CANDIDATE = "list_not_a_candidate"
    """An item is not among the prompt's candidates, or retired."""
    REPEATED = "list_repeated"
    """An item is there twice."""
    LENGTH = "list_length"
    """The list has more or fewer items than it should."""
    WRONG_ITEMS = "list_wrong_items"
    """The items of the record are not those of the tokens."""
    WRONG_SPANS = "list_wrong_spans"
    """The spans of the record are not those of the tokens."""
    DUPLICATE = "list_duplicate"
    """A beam is a copy of another one."""
    LOG_PROBABILITY = "list_log_probability"
    """The log-probabilities are not finite, or above 0."""
    ORDER = "list_order"
    """An empty slot comes before a completion, or the group belongs to another prompt."""


class ListViolationCounter:
    """Counts violations of groups of lists over a catalogue."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._active = catalogue.active
        words = catalogue.vocabulary.further_words
        self._begin = catalogue.vocabulary.word_token(LIST_WORD) if LIST_WORD in words else None
        self._items_of_path: dict[tuple[int, ...], set[int]] = {}
        for item in range(catalogue.n_items):
            self._items_of_path.setdefault(tuple(catalogue.tokens(item).tolist()), set()).add(item)

    def count(self, prompts: Sequence[Prompt], groups: Groups) -> Mapping[ListViolation, int]:
        """Violations by reason, 0 included.

        Raises:
            ValueError: the groups are no lists.
        """
        lists, item_PGK, segment_PGT = groups.spec.lists, groups.item_PGK, groups.segment_PGT
        if lists is None or item_PGK is None or segment_PGT is None:
            raise ValueError("the groups are no lists")
        counts = Counter({reason: 0 for reason in ListViolation})
        for row, prompt in enumerate(prompts):
            members = np.flatnonzero(groups.valid_PG[row])
            if groups.prompt_id_P[row] != prompt.prompt_id or (members != np.arange(len(members))).any():
                counts[ListViolation.ORDER] += 1
            seen: set[tuple[int, ...]] = set()
            for member in members:
                length = int(groups.length_PG[row, member])
                tokens = tuple(groups.token_PGT[row, member, :length].tolist())
                ranked = [item for item in item_PGK[row, member].tolist() if item != NO_ITEM]
                segments = segment_PGT[row, member].tolist()
                padding = [NO_SEGMENT] * (len(segments) - length)
                counts.update(self._reasons(tokens, prompt, lists, ranked, segments, padding))
                if groups.spec.decode is not Decode.SAMPLE and tokens in seen:
                    counts[ListViolation.DUPLICATE] += 1
                seen.add(tokens)
                logp_T = groups.logp_PGT[row, member, :length]
                if not (np.isfinite(logp_T) & (logp_T <= 1e-6)).all():
                    counts[ListViolation.LOG_PROBABILITY] += 1
        return counts

    def _reasons(
        self,
        tokens: tuple[int, ...],
        prompt: Prompt,
        lists: ListSpec,
        ranked: list[int],
        segments: list[int],
        padding: list[int],
    ) -> list[ListViolation]:
        text = 0
        if lists.text_tokens:
            if self._begin not in tokens[: lists.text_tokens + 1]:
                return [ListViolation.TEXT]
            text = tokens.index(self._begin) + 1
        paths = self._paths(tokens[text:])
        if paths is None:
            return [ListViolation.UNKNOWN_PATH]
        reasons = []
        candidates = set([] if prompt.candidates is None else prompt.candidates.tolist())
        allowed = {item for item in candidates if self._active[item]}
        found = [self._items_of_path[path] & allowed for path in paths]
        if not all(found):
            reasons.append(ListViolation.NOT_A_CANDIDATE)
        if len(set(paths)) < len(paths):
            reasons.append(ListViolation.REPEATED)
        if len(paths) != (lists.length or len(candidates)):
            reasons.append(ListViolation.LENGTH)
        if len(ranked) != len(paths) or not all(item in some for item, some in zip(ranked, found, strict=True)):
            reasons.append(ListViolation.WRONG_ITEMS)
        spans = [FORMAT_SEGMENT] * text + [rank for rank, path in enumerate(paths) for _ in path]
        if segments != spans + padding:
            reasons.append(ListViolation.WRONG_SPANS)
        return reasons

    def _paths(self, tokens: tuple[int, ...]) -> list[tuple[int, ...]] | None:
        """The tokens cut into paths, of which none begins another; None where they are none."""
        paths, start = [], 0
        for stop in range(1, len(tokens) + 1):
            if tokens[start:stop] in self._items_of_path:
                paths.append(tokens[start:stop])
                start = stop
        return paths if start == len(tokens) else None
