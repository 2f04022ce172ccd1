"""What a policy job reads: dataset, catalogue, prompts; opened and checked before any process starts."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from data.catalogue import Catalogue
from data.code_vectors import codebooks_path, load_codebooks
from data.codes import load_codes
from data.constraint import Constraint
from data.dataset import Dataset
from data.prompts import PromptBuilder
from data.records import FloatArray
from data.text_prompts import TextPromptBuilder
from data.trie_constraint import TrieConstraint
from reward.exposure import Exposures
from rollout.list_decoding import list_constraint
from trainer.checkpoint_evaluation import exposure_log
from trainer.checkpoints import Facts
from trainer.data_checks import check_catalogue
from trainer.evaluation import Evaluator
from trainer.initial_model import own_initial_model
from trainer.jobs import PRESETS, InitEmbeddings, RlJob, SftJob
from trainer.language_model import Language
from trainer.list_data import ListData, list_catalogue
from trainer.list_evaluation import ListEvaluator


@dataclass(frozen=True, kw_only=True)
class PolicyData:
    """A dataset with one catalogue and one way to write prompts."""

    dataset: Dataset
    catalogue: Catalogue
    builder: PromptBuilder
    lists: ListData | None = None
    """Ranking prompts; None where the job recommends single items."""
    exposures: Exposures | None = None
    """What exposure bias is measured against."""
    language: Language | None = None
    """The pretrained language model; none where the model knows nothing but codes."""

    @classmethod
    def open(cls, job: SftJob | RlJob) -> PolicyData:
        """Open what the job names.

        Raises:
            RequestError: the dataset, the codes or `evaluation.feedback` are absent or damaged, or do not fit the job.
        """
        dataset = Dataset.open(job.data.dataset)
        language = None
        if job.text.on:
            words = job.lists.words_of_language()
            language = Language.open(job.init, job.text, dataset, job.data.codes, words)
        if language is None:
            catalogue = list_catalogue(Catalogue.build(dataset, job.data.codes), job.lists)
        else:
            catalogue = language.catalogue
        check_catalogue(job, n_items=catalogue.n_items, depth=catalogue.trie().depth)
        shape = (catalogue, job.data.history, job.data.exclude_seen, job.data.max_prompt_tokens)
        text = None
        if language is not None:
            text = TextPromptBuilder(*shape, settings=job.text, tokenizer=language.tokenizer)
        folder = job.evaluation.feedback
        exposures = None if folder is None else Exposures.of(exposure_log(folder, catalogue.n_items))
        lists = ListData.open(dataset, catalogue, job.lists, job.data, text) if job.lists.on else None
        return cls(
            dataset=dataset,
            catalogue=catalogue,
            builder=text or PromptBuilder(*shape),
            lists=lists,
            exposures=exposures,
            language=language,
        )

    def constraint(self) -> Constraint[Any]:
        """What the legal sets of the job's completions are replayed from."""
        trie = self.catalogue.trie()
        if self.lists is None:
            return TrieConstraint(trie, exclude=True)
        return list_constraint(trie, self.lists.settings.spec, self.catalogue, self.catalogue.vocabulary.size)

    @property
    def facts(self) -> Facts:
        """What checkpoints of the job belong to."""
        return Facts(catalogue_digest=self.catalogue.digest, vocabulary_size=self.catalogue.vocabulary.size)

    def codebooks(self, job: SftJob | RlJob) -> tuple[FloatArray, ...] | None:
        """Where the code embeddings of the job's preset start; none means at random.

        Raises:
            RequestError: `init_embeddings` asks for codebooks that are absent or damaged.
        """
        if job.init not in PRESETS or job.init_embeddings is InitEmbeddings.RANDOM:
            return None
        path = codebooks_path(self.dataset.path, job.data.codes)
        if job.init_embeddings is InitEmbeddings.AUTO and not path.is_file():
            return None
        return load_codebooks(path, load_codes(self.dataset.path, job.data.codes, self.dataset.n_items))

    def initial_model(self, job: SftJob | RlJob, target: Path, *, dtype: torch.dtype, resumed: bool) -> Path:
        """The `hf` folder that the job begins with, kept in `target`; see `trainer.initial_model.own_initial_model`.

        Raises:
            RequestError: what `init` names does not fit the data.
        """
        return own_initial_model(
            job.init,
            self.catalogue,
            seed=job.seed,
            dtype=dtype,
            target=target,
            resumed=resumed,
            codebooks=self.codebooks(job),
            language=None if self.language is None else (self.language, job.text),
        )

    def evaluator(self, job: SftJob | RlJob, split: str = "valid") -> Evaluator | ListEvaluator:
        """The evaluator of the job's section `evaluation`: of the validation rows, or of the test rows at the end.

        Lists are measured for the needs that are trained, at the end for all.
        """
        settings = job.evaluation
        final = split == "test"
        if self.lists is not None:
            return ListEvaluator(
                self.lists,
                split=split,
                rows=settings.test_rows if final else settings.rows,
                ks=settings.k,
                batch=settings.batch,
                seed=job.seed,
                needs=[need.name for need in job.lists.needs] if final else None,
            )
        return Evaluator(
            self.dataset,
            self.catalogue,
            self.builder,
            split=split,
            rows=settings.test_rows if final else settings.rows,
            ks=settings.k,
            batch=settings.batch,
            seed=job.seed,
            unconstrained_rows=settings.test_unconstrained_rows if final else settings.unconstrained_rows,
            scores=settings.scores,
            exposures=self.exposures,
        )
