"""The section `lists` of a job: what lists are ranked for, from which candidates, and what training sees of them."""

from __future__ import annotations

from pathlib import Path
from typing import Self

from pydantic import Field, model_validator

from data.errors import RequestError
from data.needs import Need, NeedSettings, instruction_words, load_needs
from data.ranking_prompts import CandidateSource, ListDataSettings
from data.records import ListSpec
from data.vocabulary import LIST_WORD, list_words


class ListSettings(ListDataSettings):
    """Ranked lists in place of single items. With no needs the job recommends single items."""

    needs: tuple[NeedSettings, ...] = ()
    """What lists are for; none asks for single items. Jobs that share a model name the same needs, in one order."""
    train_needs: tuple[str, ...] = ()
    """Names of the needs that training takes; empty for all but `held_out`."""
    length: int = Field(0, ge=0)
    """Items of a list; 0 ranks all candidates."""
    text_tokens: int = Field(0, ge=0, le=4096)
    """Most tokens of free text before the list; 0 begins with the list."""
    retriever: Path | None = None
    """Ranker artefact whose best items are the other candidates, with source retrieved."""
    feedback: float = Field(1.0, gt=0, le=1)
    """Share of the outcomes (gain of a candidate, 0 for one the user did not turn to) that training sees; evaluation
    sees all."""
    critic_users: float = Field(0.0, ge=0, lt=1)
    """Share of the users whose training prompts are a critic's; a policy does not train on them."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Keys candidate sets, the feedback that is seen and the critic's users; the job's seed does not change them."""

    @model_validator(mode="after")
    def _trained(self) -> Self:
        names = [need.name for need in self.needs]
        for name in self.train_needs:
            if name not in names or name == self.held_out or self.train_needs.count(name) > 1:
                known = ", ".join(known for known in names if known != self.held_out) or "none: there are no needs"
                raise ValueError(f"train_needs has {name}; legal: different ones of {known}")
        if self.length > self.candidates:
            raise ValueError(f"length is {self.length}; legal: 0 (all) to candidates, {self.candidates}")
        if (self.source is CandidateSource.RETRIEVED) != (self.retriever is not None):
            legal = "a ranker artefact with source retrieved, none with sampled"
            raise ValueError(f"retriever is {self.retriever} with source {self.source.value}; legal: {legal}")
        return self

    @property
    def on(self) -> bool:
        """Whether the job ranks lists."""
        return bool(self.needs)

    @property
    def spec(self) -> ListSpec:
        """Which lists the engines are asked for."""
        return ListSpec(candidates=self.candidates, length=self.length, text_tokens=self.text_tokens)

    def loaded_needs(self) -> tuple[Need, ...]:
        """The needs with their gains, in order.

        Raises:
            RequestError: as `data.needs.load_needs`.
        """
        if not self.needs:
            raise RequestError("lists.needs", "none", "at least one need, for ranked lists")
        return load_needs(self.needs)

    def words(self) -> tuple[str, ...]:
        """The words that a vocabulary of codes needs for these lists."""
        return list_words(instruction_words(self.loaded_needs()))

    def words_of_language(self) -> tuple[str, ...]:
        """The words that a language model needs for these lists: all else is said in its own."""
        return (LIST_WORD,) if self.on and self.text_tokens else ()

    def trained(self) -> tuple[str, ...]:
        """Names of the needs that training takes, in order."""
        names = tuple(need.name for need in self.needs if need.name != self.held_out)
        return tuple(name for name in names if name in self.train_needs) if self.train_needs else names
