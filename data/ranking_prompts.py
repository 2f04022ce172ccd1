"""Prompts of ranked lists: which candidates a sample gets, and which gains they have (`data.ranking_writers` writes
them).

A sample gives the same candidates in the same order for every need, so that lists differ by the need alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import StrEnum
from typing import NamedTuple

import numpy as np
from pydantic import Field, model_validator

from data.candidates import CandidateFiller, Retriever, check_candidates
from data.catalogue import Catalogue
from data.dataset import Dataset
from data.errors import RequestError
from data.list_samples import ListSamples
from data.needs import GainArray, GainRows, ItemFacts, Need, NeedSettings
from data.ranking_writers import CodeWriter, RankingWriter, TextWriter
from data.records import NO_ITEM, IntArray, LongArray, Prompt
from data.settings import Settings
from data.text_prompts import TextPromptBuilder


class CandidateSource(StrEnum):
    """Where the candidates come from that the user did not turn to next."""

    SAMPLED = "sampled"
    """Drawn from the catalogue, every item alike."""
    RETRIEVED = "retrieved"
    """The best of a ranker."""


class ListDataSettings(Settings):
    """What lists are ranked for, and from which candidates."""

    needs: tuple[NeedSettings, ...] = (NeedSettings(name="interest"),)
    """What lists are for; training takes turns."""
    held_out: str = ""
    """Name of a need that training leaves out, to measure needs that were not trained."""
    candidates: int = Field(30, ge=2, le=1000)
    """Items of a candidate set."""
    positives: int = Field(10, ge=1)
    """Next events of the user that are among the candidates."""
    source: CandidateSource = CandidateSource.SAMPLED
    """Where the other candidates come from."""

    @model_validator(mode="after")
    def _fits(self) -> ListDataSettings:
        names = [need.name for need in self.needs]
        if self.positives >= self.candidates:
            raise ValueError(f"positives {self.positives} leave no room for others in {self.candidates} candidates")
        if self.held_out and (self.held_out not in names or len(names) < 2):
            raise ValueError(f"held_out {self.held_out} is not one of several needs: {', '.join(names)}")
        return self


class RankingCount(StrEnum):
    """What was not taken as it is. Keys of `RankingPromptBatch.counts`, and metrics."""

    SHORTENED = "shortened"
    """Prompts longer than the limit; the oldest items of their history were left out."""
    UNKNOWN_ITEMS = "unknown_items"
    """History items that the catalogue does not have; they were left out."""
    POSITIVE_REPEATED = "positive_repeated"
    """Next events with an item that an earlier one of them has, or that cannot be told from it; left out."""
    POSITIVE_SEEN = "positive_seen"
    """Next events with an item of the history, which may not be recommended; left out."""
    POSITIVE_RETIRED = "positive_retired"
    """Next events with an item that may not be generated; left out."""
    RETRIEVED_FEW = "retrieved_few"
    """Candidates that the ranker did not have; drawn instead."""
    NO_POSITIVES = "no_positives"
    """Prompts whose next events were all left out; dropped."""
    FEW_ITEMS = "few_items"
    """Prompts for which the catalogue has too few items; dropped."""
    NO_GAIN = "no_gain"
    """Prompts none of whose next events has a gain for the need; dropped."""
    EQUAL_GAINS = "equal_gains"
    """Prompts all of whose candidates have one gain, so that every order is as good; dropped."""


@dataclass(frozen=True, kw_only=True)
class RankingPromptBatch:
    """Prompts with their candidates and gains, and how many needed which mending."""

    prompts: list[Prompt]
    counts: dict[str, int]
    """A number for every `RankingCount`."""

    def __len__(self) -> int:
        return len(self.prompts)


class _Draft(NamedTuple):
    """A prompt before its gains."""

    row: int
    need: int
    prompt: Prompt
    candidates: IntArray
    positive: IntArray
    rating: GainArray


class RankingPromptBuilder:
    """Makes prompts from list samples; the same for training and evaluation."""

    def __init__(
        self,
        catalogue: Catalogue,
        dataset: Dataset,
        settings: ListDataSettings,
        needs: Sequence[Need],
        *,
        history: int,
        exclude_seen: bool,
        max_prompt_tokens: int,
        free_text: bool = False,
        seed: int = 0,
        retriever: Retriever | None = None,
        text: TextPromptBuilder | None = None,
    ) -> None:
        """
        Args:
            needs: those of `settings.needs`, loaded.
            history: most items a prompt shows, the latest ones.
            exclude_seen: no candidate is in the user's whole history.
            max_prompt_tokens: longest prompt.
            free_text: the model writes before the list.
            seed: keys the candidate sets, with the sample.
            retriever: ranks the catalogue, for `retrieved` candidates.
            text: writes the prompts of a language model, whose longest prompt it knows.

        Raises:
            RequestError: a prompt would not fit, the catalogue lacks words for lists, a template drops something, or a
                retriever is missing.
        """
        if text is None:
            self._writer: RankingWriter = CodeWriter(
                catalogue,
                needs,
                candidates=settings.candidates,
                max_prompt_tokens=max_prompt_tokens,
                free_text=free_text,
            )
        else:
            self._writer = TextWriter(text, needs, candidates=settings.candidates)
        if settings.source is CandidateSource.RETRIEVED and retriever is None:
            raise RequestError("candidates: source", settings.source.value, "a ranker to retrieve with, or sampled")
        self.catalogue = catalogue
        self.settings = settings
        self.needs = tuple(needs)
        self._history = history
        self._exclude_seen = exclude_seen
        self._seed = seed
        self._retriever = retriever if settings.source is CandidateSource.RETRIEVED else None
        self._facts = ItemFacts(dataset)
        self._filler = CandidateFiller(catalogue)
        self._path_id_I = catalogue.active_path_id

    @property
    def training_needs(self) -> list[int]:
        """Numbers of the needs that training takes."""
        return [number for number, need in enumerate(self.needs) if need.name != self.settings.held_out]

    def build(
        self, samples: ListSamples, needs: Sequence[int] | None = None, *, each: bool = False
    ) -> RankingPromptBatch:
        """Prompts of all samples in their order; a sample has the need of its turn, by its id.

        Args:
            needs: numbers of the needs that take turns; one need for evaluation, by default those of training.
            each: every sample has all of these needs, in their order, in place of one of them.

        Raises:
            RequestError: a need for which no sample has a gain, or gains that are not finite numbers from 0.
        """
        counts = dict.fromkeys((count.value for count in RankingCount), 0)
        turns = self.training_needs if needs is None else list(needs)
        ranked_NR = self._retrieved(samples)
        drafts = []
        for row in range(len(samples)):
            chosen = turns if each else [turns[int(samples.sample_id_N[row]) % len(turns)]]
            drafts += self._drafts(samples, row, chosen, None if ranked_NR is None else ranked_NR[row], counts)
        with_gains: dict[tuple[int, int], Prompt] = {}
        for need in turns:
            mine = [draft for draft in drafts if draft.need == need]
            kept = self._with_gains(mine, self.needs[need], counts)
            if mine and not kept:
                found = f"none of {len(mine)} prompts has a candidate with a gain above the others'"
                raise RequestError(f"need {self.needs[need].name}", found, "a need that next events have gains for")
            with_gains.update(kept)
        place = {need: number for number, need in enumerate(turns)}
        order = sorted(with_gains, key=lambda key: (key[0], place[key[1]]))
        return RankingPromptBatch(prompts=[with_gains[key] for key in order], counts=counts)

    def _retrieved(self, samples: ListSamples) -> IntArray | None:
        if self._retriever is None:
            return None
        spans = zip(samples.start_N.tolist(), samples.end_N.tolist(), strict=True)
        histories = [samples.item_E[max(start, end - self._history) : end] for start, end in spans]
        # Seen items and positives are passed over, so more are asked for than can be needed of unseen ones.
        seen = int((samples.end_N - samples.start_N).max(initial=0)) if self._exclude_seen else 0
        return self._retriever(histories, min(self.catalogue.n_items, self.settings.candidates + seen))

    def _drafts(
        self, samples: ListSamples, row: int, needs: Sequence[int], ranked: IntArray | None, counts: dict[str, int]
    ) -> list[_Draft]:
        """A draft per need, all with the same candidates; none where the sample gives no prompt."""
        end = int(samples.end_N[row])
        whole = samples.item_E[int(samples.start_N[row]) : end]
        known = (whole >= 0) & (whole < self.catalogue.n_items)
        counts[RankingCount.UNKNOWN_ITEMS] += int((~known).sum())
        whole = whole[known]
        positive, rating = self._positives(samples, row, whole, counts)
        if not len(positive):
            counts[RankingCount.NO_POSITIVES] += len(needs)
            return []
        sample_id = int(samples.sample_id_N[row])
        banned = np.unique(whole) if self._exclude_seen else whole[:0]
        size = self.settings.candidates
        candidates, short = self._filler.fill(positive, size, banned, ranked, (self._seed, sample_id))
        counts[RankingCount.RETRIEVED_FEW] += short
        if len(candidates) < size:
            counts[RankingCount.FEW_ITEMS] += len(needs)
            return []
        drafts = []
        for need in needs:
            prompt = self.prompt(
                whole,
                candidates,
                need,
                prompt_id=sample_id * len(self.needs) + need,
                user_id=int(samples.user_id_N[row]),
                timestamp=int(samples.timestamp_N[row]),
                counts=counts,
            )
            drafts.append(_Draft(row, need, prompt, candidates, positive, rating))
        return drafts

    def _positives(
        self, samples: ListSamples, row: int, whole: IntArray, counts: dict[str, int]
    ) -> tuple[IntArray, GainArray]:
        """The next events' items, of different paths, and their ratings."""
        span = slice(int(samples.end_N[row]), int(samples.stop_N[row]))
        item_X, rating_X = samples.item_E[span], samples.rating_E[span].astype(np.float64)
        path_X = self._path_id_I[item_X]
        retired_X = path_X == NO_ITEM
        seen_X = np.isin(path_X, self._path_id_I[whole]) & ~retired_X if self._exclude_seen else retired_X & False
        first_X = np.zeros(len(item_X), dtype=bool)
        first_X[np.unique(path_X, return_index=True)[1]] = True
        counts[RankingCount.POSITIVE_RETIRED] += int(retired_X.sum())
        counts[RankingCount.POSITIVE_SEEN] += int(seen_X.sum())
        counts[RankingCount.POSITIVE_REPEATED] += int((~first_X & ~retired_X & ~seen_X).sum())
        kept_X = first_X & ~retired_X & ~seen_X
        return item_X[kept_X], np.where(np.isnan(rating_X), 1.0, rating_X)[kept_X]

    def prompt(
        self,
        history: IntArray,
        candidates: IntArray,
        need: int,
        *,
        prompt_id: int = 0,
        user_id: int = -1,
        timestamp: int = 0,
        counts: dict[str, int] | None = None,
    ) -> Prompt:
        """One prompt without gains, for requests too.

        Args:
            history: items of the catalogue, oldest first; the prompt shows the latest.
            need: number of the need.

        Raises:
            RequestError: candidates that no list can be made of, or whose titles are too long for a prompt.
        """
        check_candidates(f"prompt {prompt_id}", candidates, self._path_id_I, most=self.settings.candidates)
        latest = history[max(0, len(history) - self._history) :]
        shown, tokens = self._writer.write(latest, candidates, need)
        if len(shown) < len(latest) and counts is not None:
            counts[RankingCount.SHORTENED] += 1
        return Prompt(
            prompt_id=prompt_id,
            token_ids=tokens,
            user_id=user_id,
            history=np.ascontiguousarray(shown, dtype=np.int32),
            exclusions=np.zeros(0, dtype=np.int32),
            timestamp=timestamp,
            need=self.needs[need].name,
            candidates=np.ascontiguousarray(candidates, dtype=np.int32),
        )

    def _with_gains(
        self, drafts: Sequence[_Draft], need: Need, counts: dict[str, int]
    ) -> dict[tuple[int, int], Prompt]:
        """Prompts by row and need, without those whose gains say nothing."""
        if not drafts:
            return {}
        size = [len(draft.positive) for draft in drafts]
        prompt_N = np.repeat(np.arange(len(drafts), dtype=np.int64), size)
        history_PT = np.full((len(drafts), max(len(draft.prompt.history) for draft in drafts)), NO_ITEM, np.int32)
        for row, draft in enumerate(drafts):
            history_PT[row, : len(draft.prompt.history)] = draft.prompt.history
        rows = GainRows(
            user_N=np.array([draft.prompt.user_id for draft in drafts], np.int32)[prompt_N],
            item_N=np.concatenate([draft.positive for draft in drafts]),
            time_N=np.array([draft.prompt.timestamp for draft in drafts], np.int64)[prompt_N],
            rating_N=np.concatenate([draft.rating for draft in drafts]),
            prompt_N=prompt_N,
            history_PT=history_PT,
            window_s=need.window_s,
        )
        gain_N = need.gains(rows, self._facts)
        prompts = {}
        for draft, gain in zip(drafts, np.split(gain_N, np.cumsum(size)[:-1]), strict=True):
            place = _places(draft.candidates, draft.positive)
            gain_C = np.zeros(len(draft.candidates), dtype=np.float32)
            observed_C = np.zeros(len(draft.candidates), dtype=bool)
            gain_C[place], observed_C[place] = gain, True
            if not gain_C.any():
                counts[RankingCount.NO_GAIN] += 1
            elif (gain_C == gain_C[0]).all():
                counts[RankingCount.EQUAL_GAINS] += 1
            else:
                prompts[draft.row, draft.need] = replace(draft.prompt, gain_C=gain_C, observed_C=observed_C)
        return prompts


def _places(candidates: IntArray, some: IntArray) -> LongArray:
    """Where some of the candidates are."""
    order = np.argsort(candidates)
    places: LongArray = order[np.searchsorted(candidates, some, sorter=order)]
    return places
