"""The prompts of ranked lists that jobs read: training sets with the feedback that is seen, evaluation sets with all.

A training set is made once, before the run: which prompts have no gain at all is known only when the gains are, and
they are left out and counted. It takes about 2 KiB a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import numpy.typing as npt

from data.candidates import Retriever
from data.catalogue import Catalogue
from data.dataset import Dataset
from data.errors import RequestError
from data.list_feedback import with_feedback
from data.list_samples import ListSamples, list_samples
from data.ranking_prompts import RankingPromptBatch, RankingPromptBuilder
from data.records import NO_ITEM, IntArray, Prompt
from data.settings_data import PromptSettings
from data.text_prompts import TextPromptBuilder
from reward.ranker import CatalogueRanker, load_ranker
from trainer.critic_training import critic_users
from trainer.evaluation import sample_rows
from trainer.list_settings import ListSettings

RETRIEVED_AT_ONCE = 256
"""Histories per call of a retriever."""


@dataclass(frozen=True, kw_only=True, eq=False)
class ListData:
    """Ranking prompts of a dataset, as a job's sections `lists` and `data` want them."""

    dataset: Dataset
    settings: ListSettings
    builder: RankingPromptBuilder

    @classmethod
    def open(
        cls,
        dataset: Dataset,
        catalogue: Catalogue,
        settings: ListSettings,
        data: PromptSettings,
        text: TextPromptBuilder | None = None,
    ) -> Self:
        """Check that the dataset has what the lists want.

        Args:
            dataset: where the samples come from.
            catalogue: with the words of the lists (`ListSettings.words`).
            settings: needs and candidates.
            data: how prompts are cut.
            text: writes the prompts of a language model.

        Raises:
            RequestError: no needs, prompts that do not fit, more candidates than items, or a retriever that is none.
        """
        different = len(np.unique(catalogue.active_path_id[catalogue.active]))
        if settings.candidates > different:
            raise RequestError("lists.candidates", settings.candidates, f"at most {different}, the different items")
        builder = RankingPromptBuilder(
            catalogue,
            dataset,
            settings,
            settings.loaded_needs(),
            history=data.history,
            exclude_seen=data.exclude_seen,
            max_prompt_tokens=data.max_prompt_tokens,
            free_text=settings.text_tokens > 0,
            seed=settings.seed,
            retriever=None if settings.retriever is None else ranker_retriever(settings.retriever),
            text=text,
        )
        return cls(dataset=dataset, settings=settings, builder=builder)

    def need_code(self, name: str) -> int:
        """Number of a need."""
        return [need.name for need in self.builder.needs].index(name)

    def training(self, *, critic: bool = False, latest_rows: int | None = None) -> RankingPromptBatch:
        """The training prompts, each sample once per need that training takes; gains as far as they are seen.

        Args:
            critic: those of the critic's users, in place of the policy's.
            latest_rows: only so many latest samples, before the users are told apart; none takes all.

        Raises:
            RequestError: users of neither kind, or a need without any gain.
        """
        samples = list_samples(self.dataset, "train", self.settings.positives)
        of_critic_N = critic_users(samples.user_id_N, self.settings.critic_users, self.settings.seed)
        row_N = np.arange(len(samples))
        chosen = row_N[(of_critic_N == critic) & (row_N >= len(samples) - (latest_rows or len(samples)))]
        if not len(chosen):
            who = "users of a critic" if critic else "training rows of users that are not the critic's"
            raise RequestError("lists.critic_users", self.settings.critic_users, f"a share that leaves {who}")
        batch = self._prompts(samples.take(chosen), [self.need_code(name) for name in self.settings.trained()])
        seen = with_feedback(batch.prompts, self.settings.feedback, self.settings.seed, len(self.builder.needs))
        return RankingPromptBatch(prompts=seen, counts=batch.counts)

    def evaluation(self, split: str, need: str, rows: int, seed: int) -> RankingPromptBatch:
        """Prompts of a seeded sample of a split's samples for one need, with all gains; 0 rows takes all.

        Raises:
            RequestError: a split without samples, or without a gain for the need.
        """
        samples = list_samples(self.dataset, split, self.settings.positives)
        if not len(samples):
            raise RequestError(
                f"split {split}", "no sample to rank lists for", "a split with events that follow others"
            )
        drawn = sample_rows(len(samples), rows or len(samples), seed)
        return self._prompts(samples.take(drawn), [self.need_code(need)])

    def _prompts(self, samples: ListSamples, needs: Sequence[int]) -> RankingPromptBatch:
        """Every sample once per need.

        Raises:
            RequestError: nothing is left, or as the builder.
        """
        batch = self.builder.build(samples, needs, each=True)
        if not batch.prompts:
            reasons = ", ".join(f"{count} {why.replace('_', ' ')}" for why, count in batch.counts.items() if count)
            legal = "fewer lists.candidates, or data with more items that the users have not seen"
            raise RequestError("lists", f"no prompt is left ({reasons})", legal)
        return batch


@dataclass(frozen=True, kw_only=True)
class PreparedPrompts:
    """Prompts that are made already, as what a feed draws from and builds with."""

    prompts: Sequence[Prompt]

    def __len__(self) -> int:
        return len(self.prompts)

    def build(self, samples: PreparedPrompts, rows: npt.NDArray[np.integer]) -> RankingPromptBatch:
        """The prompts of the rows."""
        return RankingPromptBatch(prompts=[samples.prompts[row] for row in rows.tolist()], counts={})


def list_catalogue(catalogue: Catalogue, settings: ListSettings) -> Catalogue:
    """The catalogue of a job: with the words of its lists, or as it is."""
    return catalogue.with_words(settings.words()) if settings.on else catalogue


def ranker_retriever(artefact: Path) -> Retriever:
    """The best items of a ranker that scores whole catalogues.

    Raises:
        RequestError: no such ranker, or one that does not know its catalogue.
    """
    ranker = load_ranker(artefact)
    if not isinstance(ranker, CatalogueRanker):
        raise RequestError("lists.retriever", artefact, "a ranker that scores a whole catalogue")

    def best(histories: Sequence[IntArray], count: int) -> IntArray:
        item_NR = np.full((len(histories), count), NO_ITEM, dtype=np.int32)
        for first in range(0, len(histories), RETRIEVED_AT_ONCE):
            some = histories[first : first + RETRIEVED_AT_ONCE]
            order = np.argsort(-ranker.score_catalogue(some), axis=1, kind="stable")[:, :count]
            item_NR[first : first + len(some), : order.shape[1]] = order
        return item_NR

    return best
