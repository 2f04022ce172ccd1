"""Prompts: what the model reads about a user. `<bos>`, then the token paths of the history, oldest item first."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

import numpy as np
import numpy.typing as npt

from data.catalogue import Catalogue
from data.dataset import Samples
from data.errors import RequestError
from data.records import NO_ITEM, IntArray, Prompt


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
        chosen = range(len(samples)) if rows is None else rows.tolist()
        prompts = [self._prompt(samples, row, counts) for row in chosen]
        return PromptBatch(prompts=prompts, counts=counts)

    def prompt(self, history: IntArray, prompt_id: int = 0) -> tuple[Prompt, dict[str, int]]:
        """One prompt of a bare history, for requests that come without a user or a target."""
        counts = dict.fromkeys((count.value for count in PromptCount), 0)
        whole = np.asarray(history, dtype=np.int32)
        prompt = self._assemble(whole, prompt_id, user_id=-1, target=NO_ITEM, timestamp=0, counts=counts)
        return prompt, counts

    def _prompt(self, samples: Samples, row: int, counts: dict[str, int]) -> Prompt:
        return self._assemble(
            samples.values[int(samples.start_N[row]) : int(samples.end_N[row])],
            int(samples.sample_id_N[row]),
            user_id=int(samples.user_id_N[row]),
            target=int(samples.target_N[row]),
            timestamp=int(samples.timestamp_N[row]),
            counts=counts,
        )

    def _assemble(
        self, whole: IntArray, prompt_id: int, *, user_id: int, target: int, timestamp: int, counts: dict[str, int]
    ) -> Prompt:
        catalogue = self.catalogue
        known = (whole >= 0) & (whole < catalogue.n_items)
        if not known.all():
            counts[PromptCount.UNKNOWN_ITEMS] += int((~known).sum())
            whole = whole[known]
        latest = whole[max(0, len(whole) - self.history) :]
        shown, tokens = self.written(latest)
        if len(shown) < len(latest):
            counts[PromptCount.SHORTENED] += 1
        if not len(shown):
            counts[PromptCount.EMPTY_HISTORY] += 1
        exclusions = np.unique(whole) if self.exclude_seen else np.zeros(0, dtype=np.int32)
        if target != NO_ITEM and not self._reachable(target, exclusions):
            counts[PromptCount.TARGET_UNREACHABLE] += 1
        return Prompt(
            prompt_id=prompt_id,
            token_ids=tokens,
            user_id=user_id,
            history=np.ascontiguousarray(shown, dtype=np.int32),
            exclusions=exclusions.astype(np.int32),
            target=target,
            timestamp=timestamp,
        )

    def written(self, items: IntArray) -> tuple[IntArray, IntArray]:
        """The latest of the items that a prompt has room for, and its tokens."""
        tokens, length = self.catalogue.tokens_of(items)
        if 1 + len(tokens) > self.max_prompt_tokens:
            from_here = np.cumsum(length[::-1])[::-1]
            items = items[from_here < self.max_prompt_tokens]
            tokens, _ = self.catalogue.tokens_of(items)
        return items, np.concatenate([[self.catalogue.vocabulary.bos], tokens]).astype(np.int32)

    def _reachable(self, target: int, exclusions: IntArray) -> bool:
        if not 0 <= target < self.catalogue.n_items or not self.catalogue.active[target]:
            return False
        at = int(np.searchsorted(exclusions, target))
        return at == len(exclusions) or int(exclusions[at]) != target
