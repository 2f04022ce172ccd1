"""The updater of the service: an `rl` or `sft` job of `windlass train` on the log's rows, measured on held-out ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from data.catalogue import Catalogue
from data.dataset import Dataset
from data.feedback_reading import FeedbackChecks
from launch.cluster import cluster
from launch.config import job_from, to_mapping
from launch.continual.guard import Evidence
from launch.continual.measuring import HeldOut, Measurer, MeasureSettings
from launch.continual.updating import Interrupted, Update
from launch.run_directory import SUMMARY, RunDirectory, read_json
from rollout.fleet import RolloutFleet
from trainer.checkpoints import latest_checkpoint, open_model
from trainer.initial_model import CATALOGUE
from trainer.jobs import RlJob, SftJob
from trainer.logged_rows import feedback_checks
from trainer.model_growth import catalogue_digest, grow_model, has_grown, later_catalogue


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
        parent = task.parent.resolve()
        catalogue = later_catalogue(parent, Dataset.open(self._job.data.dataset), self._job.data.codes)
        if not has_grown(parent, catalogue):
            return parent
        target = task.work.with_name("grown")
        # The same from the same parent, so that a run that goes on finds what it began with.
        return target if target.exists() else grow_model(parent, catalogue, target, seed=self._job.seed)

    def measure(
        self, candidate: Path, parent: Path, held_out: Path, trained: Path, wanted: Sequence[tuple[str, float]]
    ) -> Mapping[tuple[str, float], Evidence]:
        """Measure both models on the held-out rows; see `launch.continual.measuring`."""
        if not wanted:
            return {}
        # Whose catalogue the rows are of was checked when they were held out.
        checks = replace(self.checks(candidate, []), catalogues=None)
        rows = HeldOut.read(held_out, trained=trained, checks=checks, settings=self._measure)

        def start(model: Path, catalogue: Catalogue) -> RolloutFleet:
            return RolloutFleet.start(self._job.rollout, model, catalogue)

        with cluster(self._job.cluster):
            return Measurer(start, Dataset.open(self._job.data.dataset), rows).measure(candidate, parent, wanted)
