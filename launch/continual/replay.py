"""One arm of a replay: each period is measured and served by the current model, then its log updates that model.

    OUT/replay.json            what is replayed; another request for the same folder is refused
    OUT/start/                 the first period of the first model, which all arms share: log/ and periods/01.json
    OUT/ARM/log/               the feedback log, a day per period
    OUT/ARM/registry/          versions, decisions, journal, as `windlass continual` keeps them
    OUT/ARM/periods/NN.json    a period's metrics and what was served; written last, so that a replay goes on after it
    OUT/ARM/updates/NN.jsonl   the training steps of the update by period NN

The update is the service's own cycle, with its guard and registry, so it is exactly once over crashes too.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.compute as pc

from data.catalogue import Catalogue
from data.dataset import Dataset, Samples
from data.errors import RunError
from data.feedback import DAY_SECONDS, FeedbackLog, day_start, write_feedback
from launch.cluster import cluster
from launch.continual.cycle import Cycle
from launch.continual.files import Files
from launch.continual.journal import Journal, PassState
from launch.continual.log_folder import LogFolder
from launch.continual.reasons import Decision, Reason
from launch.continual.recipe_updater import RecipeUpdater
from launch.continual.registry import Registry, Version
from launch.continual.replay_arms import Arm
from launch.continual.replay_periods import Period
from launch.continual.results import Result
from launch.continual.settings import ServiceSettings
from launch.continual.updating import Interrupted, Update
from launch.run_directory import read_json
from launch.simulation import ServingSettings, simulate
from reward.exposure import Exposures
from rollout.fleet import RolloutFleet
from trainer.checkpoint_evaluation import exposure_log, intervals
from trainer.durable import write_text
from trainer.evaluation import Evaluation, Evaluator, sample_rows
from trainer.initial_model import CATALOGUE
from trainer.jobs import RlJob, SftJob
from trainer.prompt_card import PromptCard
from trainer.row_metrics import write_row_metrics
from trainer.run_log import METRICS

FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class ReplayWorld:
    """What all arms share."""

    dataset: Dataset
    samples: Samples
    """The test split on the replayed clock."""
    periods: Sequence[Period]
    serving: ServingSettings
    ks: tuple[int, ...]
    rows: int
    """Contexts of a period that are served, a seeded sample."""
    eval_rows: int
    """Rows of a period that are measured, a seeded sample."""
    batch: int


class RecordingUpdater(RecipeUpdater):
    """Keeps the training steps of its updates, whose folders the cycle removes."""

    record: Path
    """File for the steps of the next update."""

    def update(self, task: Update) -> Path:
        """As the recipe says; the steps are kept once the run is at its end."""
        model = super().update(task)
        self.record.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(task.work / METRICS, self.record)
        return model


class ArmReplay:
    """Replays the periods for one arm. The caller holds the lock of `root`."""

    def __init__(
        self,
        world: ReplayWorld,
        arm: Arm,
        job: RlJob | SftJob,
        settings: ServiceSettings,
        updater: RecordingUpdater,
        out: Path,
    ) -> None:
        """
        Args:
            world: what all arms share.
            arm: how the model is updated.
            job: the recipe with the arm's keys.
            settings: the rules of the service.
            updater: trains and measures by the job.
            out: folder of the replay; its registry serves a first version already.
        """
        self._world = world
        self._arm = arm
        self._job = job
        self._settings = settings
        self._updater = updater
        self._start = out / "start"
        self.root = out / arm.name
        self.registry = Registry(self.root / "registry", Files(), create=True)

    def run(self) -> list[dict[str, Any]]:
        """Every period in turn; what was done before is read.

        Returns:
            A record per period.

        Raises:
            Interrupted: asked to stop; the next call goes on.
            RunError: an update that waits, which a replayed log gives no reason for.
        """
        records: list[dict[str, Any]] = []
        update: dict[str, Any] | None = None
        for period in self._world.periods:
            records.append(self._period(period, update))
            print(f"{self._arm.name}: {told(records[-1])}", flush=True)
            if self._arm.updates and period is not self._world.periods[-1]:
                update = self._updated(period)
        return records

    def _period(self, period: Period, update: dict[str, Any] | None) -> dict[str, Any]:
        path = self.root / "periods" / f"{period.number:02d}.json"
        if not path.is_file():
            first = period.number == 1
            if first and (self._start / "periods" / path.name).is_file():
                copy_first(self._start, self.root, path.name)
            else:
                self._measure_and_serve(period, update, path)
                if first:
                    copy_first(self.root, self._start, path.name)
        return dict(read_json(path))

    def _measure_and_serve(self, period: Period, update: dict[str, Any] | None, path: Path) -> None:
        current = self.registry.current()
        assert current is not None, "the registry serves a version"
        catalogue = Catalogue.load(current.path / CATALOGUE)
        samples, world = self._world.samples, self._world
        log = self.root / "log"
        # A day that was written by a run that died before its record is made anew, to the same rows.
        shutil.rmtree(log / f"day={period.day}", ignore_errors=True)
        shown = exposure_log(log, catalogue.n_items) if log.is_dir() and any(log.iterdir()) else None
        evaluator = Evaluator(
            world.dataset,
            catalogue,
            PromptCard.read(current.path).builder(catalogue, current.path),
            split="test",
            rows=world.eval_rows,
            ks=world.ks,
            batch=world.batch,
            seed=world.serving.seed,
            exposures=None if shown is None else Exposures.of(shown),
            samples=samples.take(period.rows),
        )
        with (
            cluster(self._job.cluster),
            closing(RolloutFleet.start(self._job.rollout, current.path, catalogue)) as fleet,
        ):
            evaluation = evaluator.run(fleet)
            served = self._serve(fleet, period, current, catalogue)
        write_feedback(log, served.table)
        rows = evaluation.row_metrics(f"{period.number:02d}", split="test", dataset=world.dataset.fingerprint)
        write_row_metrics(self.root, rows)
        record = period_record(period, current, evaluation, served, update, seed=world.serving.seed)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_text(path, json.dumps(record, indent=1, allow_nan=False) + "\n")

    def _serve(self, fleet: RolloutFleet, period: Period, current: Version, catalogue: Catalogue) -> FeedbackLog:
        world = self._world
        chosen = period.rows[sample_rows(len(period.rows), world.rows, world.serving.seed)]
        simulated = simulate(
            fleet,
            world.samples,
            chosen,
            PromptCard.read(current.path).builder(catalogue, current.path),
            world.serving,
            name=f"{world.dataset.name}-test",
            policy_version=current.name,
            batch=world.batch,
        )
        return simulated.log

    def _updated(self, period: Period) -> dict[str, Any]:
        """What became of the update by a period; it is made unless an earlier run has made it."""
        files = Files()
        journal = Journal(self.registry.root / "continual" / "journal", files)
        passes = journal.day(period.day).passes
        if not passes or passes[-1].state is not PassState.DONE:
            self._updater.record = self.root / "updates" / f"{period.number:02d}.jsonl"
            # After the period's day and its response window, whenever the replay runs: journals of two replays agree.
            now = float(day_start(period.day) + DAY_SECONDS) + self._settings.complete.response_window_s
            log = LogFolder(str(self.root / "log"))
            results = Cycle(log, self.registry, self._updater, self._settings, clock=lambda: now, files=files).run()
            waits = [one for one in results if one.decision is Decision.WAITING]
            if any(told.reason is Reason.INTERRUPTED for one in waits for told in one.reasons):
                raise Interrupted
            if waits:
                raise RunError(f"{self.root}: the update by period {period.number} waits: {waits[0].reasons[0]}")
            passes = journal.day(period.day).passes
        return Result.of(passes[-1]).record()


def copy_first(source: Path, target: Path, name: str) -> None:
    """Copy the log and the record of the first period; the record last."""
    for folder in ("log", "rows"):
        shutil.copytree(source / folder, target / folder, dirs_exist_ok=True)
    (target / "periods").mkdir(parents=True, exist_ok=True)
    write_text(target / "periods" / name, (source / "periods" / name).read_text(encoding="utf-8"))


def period_record(
    period: Period,
    version: Version,
    evaluation: Evaluation,
    served: FeedbackLog,
    update: dict[str, Any] | None,
    *,
    seed: int,
) -> dict[str, Any]:
    """A period as JSON: what the current model finds of it, what it showed, and the update that came before."""
    anchors = served.anchors()
    return {
        "format": FORMAT,
        "period": period.number,
        "first": period.first,
        "end": period.end,
        "day": period.day,
        "contexts": len(period.rows),
        "version": version.number,
        "n": evaluation.items.n,
        "metrics": evaluation.items.values | evaluation.exposure,
        "ci95": intervals(evaluation, seed=seed),
        "served": {
            "rows": len(served),
            "responses": int(anchors.response_N.sum()),
            "response_rate": float(anchors.response_N.mean()),
            "items": len(pc.unique(served.table["exposed"].combine_chunks().flatten())),
        },
        "update": update,
    }


def told(record: dict[str, Any]) -> str:
    """A period in one line."""
    metrics = record["metrics"]
    decision = "" if record["update"] is None else f", update {record['update']['decision']}"
    shown = ", ".join(
        f"{name} {metrics[name]:.4f}" for name in ("hr@10", "ndcg@10", "repeat_exposure") if name in metrics
    )
    rate = record["served"]["response_rate"]
    return f"period {record['period']}: version {record['version']}{decision}; {shown}; responses {rate:.2%}"
