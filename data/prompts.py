"""Prompts: what the model reads about a user. `<bos>`, then the token paths of the history, oldest item first."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from data import ragged
from data.catalogue import Catalogue
from data.dataset import Samples
from data.errors import RequestError
from data.records import NO_ITEM, BoolArray, IntArray, LongArray, Prompt

BLOCK = 4096
"""Rows whose prompts are made at once."""


class PromptCount(StrEnum):
    """What was not taken as it is. Keys of `PromptBatch.counts`, and metrics."""

    SHORTENED = "shortened"
    """Prompts longer than the limit; their oldest items were left out."""
    UNKNOWN_ITEMS = "unknown_items"
    """History items that the catalogue does not have; they were left out."""
    EMPTY_HISTORY = "empty_history"
    """Prompts that show no item."""
    TARGET_UNREACHABLE = "target_unreachable"
    """Prompts whose target may not be generated: seen before and excluded, retired, or unknown."""


@dataclass(frozen=True, kw_only=True)
class PromptBatch:
    """Prompts, and how many of them needed which mending."""

    prompts: list[Prompt]
    counts: dict[str, int]
    """A number for every `PromptCount`."""

    def __len__(self) -> int:
        return len(self.prompts)


class PromptBuilder:
    """Makes prompts from samples; the same for training, evaluation and serving."""

    def __init__(self, catalogue: Catalogue, history: int, exclude_seen: bool, max_prompt_tokens: int) -> None:
        """
        Args:
            history: most items a prompt shows, the latest ones.
            exclude_seen: exclude every item of the whole history, not only of what the prompt shows.
            max_prompt_tokens: longest prompt, `<bos>` included.

        Raises:
            RequestError: not even one item would fit.
        """
        self.catalogue = catalogue
        self.history = history
        self.exclude_seen = exclude_seen
        self.max_prompt_tokens = max_prompt_tokens
        self._check_room()

    def _check_room(self) -> None:
        longest = int(np.diff(self.catalogue.path_start).max())
        if self.max_prompt_tokens < 1 + longest:
            legal = f"at least {1 + longest} (<bos> and one item)"
            raise RequestError("max_prompt_tokens", self.max_prompt_tokens, legal)

    def build(self, samples: Samples, rows: npt.NDArray[np.integer] | None = None) -> PromptBatch:
        """Prompts of the given rows (all by default), in their order; `prompt_id` is the sample id."""
        counts = dict.fromkeys((count.value for count in PromptCount), 0)
        chosen = np.arange(len(samples)) if rows is None else rows
        prompts: list[Prompt] = []
        for first in range(0, len(chosen), BLOCK):
            part = samples.take(chosen[first : first + BLOCK])
            prompts += self._assembled(part, counts)
        return PromptBatch(prompts=prompts, counts=counts)

    def prompt(self, history: IntArray, prompt_id: int = 0) -> tuple[Prompt, dict[str, int]]:
        """One prompt of a bare history, for requests that come without a user or a target."""
        counts = dict.fromkeys((count.value for count in PromptCount), 0)
        alone = Samples(
            user_id_N=np.array([-1], np.int32),
            target_N=np.array([NO_ITEM], np.int32),
            timestamp_N=np.zeros(1, np.int64),
            sample_id_N=np.array([prompt_id], np.int64),
            values=np.asarray(history, dtype=np.int32),
            start_N=np.zeros(1, np.int64),
            end_N=np.array([len(history)], np.int64),
        )
        return self._assembled(alone, counts)[0], counts

    def _assembled(self, samples: Samples, counts: dict[str, int]) -> list[Prompt]:
        """Prompts of all rows; everything but the records themselves is made for all rows at once."""
        length_N = samples.end_N - samples.start_N
        whole_E = samples.values[ragged.positions(samples.start_N, length_N)]
        known_E = (whole_E >= 0) & (whole_E < self.catalogue.n_items)
        if not known_E.all():
            counts[PromptCount.UNKNOWN_ITEMS] += int((~known_E).sum())
            length_N = ragged.kept_lengths(length_N, known_E)
            whole_E = whole_E[known_E]
        latest_N = np.minimum(length_N, self.history)
        latest_E = whole_E[ragged.positions(ragged.bounds(length_N)[1:] - latest_N, latest_N)]
        written = self.written_all(latest_E.astype(np.int32, copy=False), latest_N)
        shown_N = np.array([len(shown) for shown, _ in written])
        counts[PromptCount.SHORTENED] += int((shown_N < latest_N).sum())
        counts[PromptCount.EMPTY_HISTORY] += int((shown_N == 0).sum())
        exclusion_E, excluded_N = self._exclusions(whole_E, length_N)
        reachable_N = self._reachable(samples.target_N, exclusion_E, excluded_N)
        counts[PromptCount.TARGET_UNREACHABLE] += int((~reachable_N & (samples.target_N != NO_ITEM)).sum())
        return [
            Prompt(
                prompt_id=prompt_id,
                token_ids=tokens,
                user_id=user_id,
                history=shown,
                exclusions=exclusions,
                target=target,
                timestamp=timestamp,
            )
            for prompt_id, user_id, target, timestamp, (shown, tokens), exclusions in zip(
                samples.sample_id_N.tolist(),
                samples.user_id_N.tolist(),
                samples.target_N.tolist(),
                samples.timestamp_N.tolist(),
                written,
                ragged.split(exclusion_E, excluded_N),
                strict=True,
            )
        ]

    def written(self, items: IntArray) -> tuple[IntArray, IntArray]:
        """The latest of the items that a prompt has room for, and its tokens."""
        return self.written_all(items, np.array([len(items)]))[0]

    def written_all(self, items_E: IntArray, length_N: LongArray) -> Sequence[tuple[IntArray, IntArray]]:
        """`written` for many histories that lie one after the other."""
        tokens_E, size_E = self.catalogue.tokens_of(items_E)
        # Tokens from an item to the end of its history, which must leave room for `<bos>`.
        token_bounds = ragged.bounds(size_E)
        end_E = np.repeat(token_bounds[ragged.bounds(length_N)[1:]], length_N)
        fits_E = end_E - token_bounds[:-1] < self.max_prompt_tokens
        if not fits_E.all():
            tokens_E = tokens_E[np.repeat(fits_E, size_E)]
            length_N = ragged.kept_lengths(length_N, fits_E)
            items_E, size_E = items_E[fits_E], size_E[fits_E]
        begin_N = ragged.bounds(size_E)[ragged.bounds(length_N)]
        led_E = np.insert(tokens_E, begin_N[:-1], self.catalogue.vocabulary.bos).astype(np.int32, copy=False)
        rows = ragged.split(items_E, length_N), ragged.split(led_E, np.diff(begin_N) + 1)
        return list(zip(*rows, strict=True))

    def _exclusions(self, whole_E: IntArray, length_N: LongArray) -> tuple[IntArray, LongArray]:
        """The distinct items of every row in increasing order, one row after the other, and how many each has."""
        if not self.exclude_seen:
            return np.zeros(0, np.int32), np.zeros_like(length_N)
        row_E = np.repeat(np.arange(len(length_N)), length_N)
        row_E, item_E = np.divmod(np.unique(row_E * self.catalogue.n_items + whole_E), self.catalogue.n_items)
        return item_E.astype(np.int32), np.bincount(row_E, minlength=len(length_N))

    def _reachable(self, target_N: IntArray, exclusion_E: IntArray, excluded_N: LongArray) -> BoolArray:
        """Whether the catalogue can generate each target for its prompt."""
        items = self.catalogue.n_items
        known_N = (target_N >= 0) & (target_N < items)
        active_N = known_N & self.catalogue.active[np.where(known_N, target_N, 0)]
        row_E = np.repeat(np.arange(len(excluded_N)), excluded_N)
        reachable_N: BoolArray = active_N & ~np.isin(
            np.arange(len(target_N)) * items + target_N, row_E * items + exclusion_E
        )
        return reachable_N
