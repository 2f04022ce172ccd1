"""What a policy job reads: dataset, catalogue, prompts; opened and checked before any process starts."""

from __future__ import annotations

from dataclasses import dataclass

from data.catalogue import Catalogue
from data.dataset import Dataset
from data.prompts import PromptBuilder
from trainer.checkpoints import Facts
from trainer.evaluation import Evaluator
from trainer.jobs import RlJob, SftJob, check_catalogue


@dataclass(frozen=True, kw_only=True)
class PolicyData:
    """A dataset with one catalogue and one way to write prompts."""

    dataset: Dataset
    catalogue: Catalogue
    builder: PromptBuilder

    @classmethod
    def open(cls, job: SftJob | RlJob) -> PolicyData:
        """Open what the job names.

        Raises:
            RequestError: the dataset or the codes are absent or damaged, or do not fit the job.
        """
        dataset = Dataset.open(job.data.dataset)
        catalogue = Catalogue.build(dataset, job.data.codes)
        check_catalogue(job, n_items=catalogue.n_items, depth=catalogue.trie().depth)
        builder = PromptBuilder(catalogue, job.data.history, job.data.exclude_seen, job.data.max_prompt_tokens)
        return cls(dataset=dataset, catalogue=catalogue, builder=builder)

    @property
    def facts(self) -> Facts:
        """What checkpoints of the job belong to."""
        return Facts(catalogue_digest=self.catalogue.digest, vocabulary_size=self.catalogue.vocabulary.size)

    def evaluator(self, job: SftJob | RlJob, split: str = "valid") -> Evaluator:
        """The evaluator of the job's section `evaluation`."""
        settings = job.evaluation
        return Evaluator(
            self.dataset,
            self.catalogue,
            self.builder,
            split=split,
            rows=settings.rows,
            ks=settings.k,
            batch=settings.batch,
            seed=job.seed,
            unconstrained_rows=settings.unconstrained_rows,
        )
