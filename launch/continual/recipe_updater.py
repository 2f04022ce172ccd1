"""The updater of the service: an `rl` or `sft` job of `windlass train` on the log's rows, beams on the held-out ones.

Ranking metrics are of positive exposures: the item that a user responded to is the target, so they are called
`exposed_hr@10` and so on. Other rows say nothing about what should have been shown instead.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from data.catalogue import Catalogue
from data.dataset import Dataset
from data.errors import RequestError
from data.faults import fault_point
from data.feedback import FeedbackLog
from data.feedback_reading import FeedbackChecks, read_feedback
from data.settings import Settings
from launch.cluster import cluster
from launch.config import job_from, to_mapping
from launch.continual.guard import Evidence, Range
from launch.continual.updating import Interrupted, Update
from launch.run_directory import SUMMARY, RunDirectory, read_json
from reward.bootstrap import Interval, bootstrap_mean, paired_bootstrap
from rollout.fleet import RolloutFleet
from trainer.checkpoints import latest_checkpoint, open_model
from trainer.evaluation import Evaluation, Evaluator
from trainer.initial_model import CATALOGUE, check_model
from trainer.jobs import RlJob, SftJob
from trainer.model_growth import catalogue_digest, grow_model, has_grown
from trainer.policy_jobs import feedback_checks
from trainer.prompt_card import PromptCard

PREFIX = "exposed_"


class MeasureSettings(Settings):
    """How the held-out rows are measured."""

    k: tuple[Annotated[int, Field(ge=1)], ...] = Field((1, 5, 10), min_length=1)
    """Cut-offs; the largest is the number of beams."""
    rows: int = Field(2000, ge=1)
    """Positive exposures that are decoded, drawn by the seed."""
    seed: int = Field(0, ge=0)
    """Of the sample and of the resamples."""
    resamples: int = Field(2000, ge=100)
    """Bootstrap resamples, of whole users."""
    batch: int = Field(128, ge=1)
    """Prompts per request to the fleet."""


class RecipeUpdater:
    """Trains by a recipe."""

    def __init__(self, job: RlJob | SftJob, measure: MeasureSettings) -> None:
        self._job = job
        self._measure = measure

    def lacks(self, rows: int, responses: int) -> str:
        """`rl` takes a whole rollout batch, `sft` a response."""
        if isinstance(self._job, SftJob):
            return "" if responses else f"no response in {rows} rows, an sft update takes 1"
        fewest = self._job.batch_prompts
        return "" if rows >= fewest else f"{rows} rows, an update takes {fewest}"

    def describe(self) -> dict[str, Any]:
        """The job, as the recipe and the command line gave it."""
        return {"job": to_mapping(self._job), "measure": self._measure.model_dump(mode="json")}

    def checks(self, model: Path, versions: Sequence[Path]) -> FeedbackChecks:
        """What rows must be for the model's catalogue, of which those of all versions are states."""
        checks = feedback_checks(self._job, Catalogue.load(model / CATALOGUE))
        assert checks.catalogues is not None
        return replace(checks, catalogues=checks.catalogues | set(map(catalogue_digest, versions)))

    def update(self, task: Update) -> Path:
        """Run the job in `task.work`; a run that was begun there goes on from its checkpoint."""
        from launch.train_command import train

        summary = task.work / SUMMARY
        if not summary.is_file() or read_json(summary)["interrupted"]:
            further = {*self._job.feedback_catalogues, *map(catalogue_digest, task.versions)}
            content = to_mapping(self._job) | {
                "init": str(self._initial(task)),
                "feedback": str(task.feedback),
                "feedback_catalogues": sorted(further),
            }
            job = job_from(content)
            with RunDirectory.open(task.work, job, command=["continual"]) as run:
                result = train(job, run)
            if result["interrupted"]:
                raise Interrupted
        newest = latest_checkpoint(task.work / "checkpoints")
        assert newest is not None, "a finished run has a checkpoint"
        # Not the best on the validation split: whether the update is any good is the guard's to say.
        return open_model(newest)

    def _initial(self, task: Update) -> Path:
        """The parent, or where the dataset has new items or retired ones, the parent with them."""
        catalogue = Catalogue.build(Dataset.open(self._job.data.dataset), self._job.data.codes)
        parent = task.parent.resolve()
        if not has_grown(parent, catalogue):
            return parent
        target = task.work.with_name("grown")
        # The same from the same parent, so that a run that goes on finds what it began with.
        return target if target.exists() else grow_model(parent, catalogue, target, seed=self._job.seed)

    def measure(
        self, candidate: Path, parent: Path, held_out: Path, wanted: Sequence[tuple[str, float]]
    ) -> Mapping[tuple[str, float], Evidence]:
        """Decode the contexts of positive exposures with both models; without any there is no evidence."""
        if not wanted:
            return {}
        # Whose catalogue the rows are of was checked when they were held out.
        log = positive(read_feedback(held_out, replace(self.checks(parent, []), catalogues=None)))
        if not len(log):
            return {}
        with cluster(self._job.cluster):
            ours = self._evaluate(candidate, log)
            fault_point("measure")
            theirs = self._evaluate(parent, log)
        found = {(metric, level): self._evidence(metric, level, ours, theirs) for metric, level in wanted}
        return {asked: evidence for asked, evidence in found.items() if evidence is not None}

    def _evaluate(self, model: Path, log: FeedbackLog) -> Evaluation:
        catalogue = Catalogue.load(model / CATALOGUE)
        check_model(model, catalogue.vocabulary.size)
        if max(self._measure.k) > catalogue.n_items:
            raise RequestError("continual.measure.k", list(self._measure.k), f"at most {catalogue.n_items}, the items")
        evaluator = Evaluator(
            Dataset.open(self._job.data.dataset),
            catalogue,
            PromptCard.read(model).builder(catalogue),
            split="train",
            rows=self._measure.rows,
            ks=self._measure.k,
            batch=self._measure.batch,
            seed=self._measure.seed,
            samples=log.samples(),
        )
        with closing(RolloutFleet.start(self._job.rollout, model, catalogue)) as fleet:
            return evaluator.run(fleet)

    def _evidence(self, metric: str, level: float, ours: Evaluation, theirs: Evaluation) -> Evidence | None:
        """One metric of both models; none where the evaluation has no such metric."""
        name = metric.removeprefix(PREFIX)
        n = len(ours.rows)
        if metric.startswith(PREFIX) and name in ours.items.rows:
            rows_N, before_N, user_N = ours.items.rows[name], theirs.items.rows[name], ours.user_id_N
            how: dict[str, Any] = {
                "seed": self._measure.seed,
                "resamples": self._measure.resamples,
                "level": level,
                "cluster_N": user_N,
            }
            return Evidence(
                candidate=_range(bootstrap_mean(rows_N, **how)),
                parent=_range(bootstrap_mean(before_N, **how)),
                difference=_range(paired_bootstrap(rows_N, before_N, **how)),
                confidence=level,
                n=n,
            )
        if metric not in ours.items.values or metric in ours.items.rows:
            return None
        # Of the whole sample and without an interval: invalid rate, coverage.
        value, before = ours.items.values[metric], theirs.items.values[metric]
        return Evidence(
            candidate=_exact(value), parent=_exact(before), difference=_exact(value - before), confidence=level, n=n
        )


def positive(log: FeedbackLog) -> FeedbackLog:
    """The rows with a response."""
    keep = np.flatnonzero(log.anchors().response_N > 0)
    return FeedbackLog(table=log.table.take(keep), counts=log.counts)


def _range(interval: Interval) -> Range:
    return Range(value=interval.mean, low=interval.low, high=interval.high)


def _exact(value: float) -> Range:
    return Range(value=float(value), low=float(value), high=float(value))
