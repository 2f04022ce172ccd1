"""`windlass demo`: the main job on MovieLens-100K, from interactions to a table, in stages that resume by themselves.

    import → semantic IDs → SASRec → SFT → SFT continued → GRPO → table, summary.json, report.html

The stages are ordinary jobs (recipes `demo-*`) in folders of their own, run one after the other in one Ray cluster.
A stage that is finished is not run again, and one that was cut off continues from its last checkpoint. What is
selected, is selected on the validation split; the test rows are read once per stage, at its end.

RUN/sasrec, sft, sft_continued, rl    runs of the stages
RUN/checkpoints/{sft,sft_continued,rl}  links to their best checkpoints
RUN/rows/                             metrics per test row of the baselines
RUN/summary.json, report.html         what came out
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from data.catalogue import Catalogue
from data.code_building import IdSettings, Source, build_codes
from data.dataset import Dataset
from data.errors import RequestError
from data.importing import ImportRules
from launch.cluster import cluster
from launch.config import check_paths, load_job
from launch.data_commands import ImportCommand, import_data
from launch.demo_table import (
    NAMES,
    comparison_lines,
    comparisons,
    ranker_stage,
    reward_course,
    reward_words,
    table,
    with_intervals,
)
from launch.memory import MemorySampler
from launch.run_directory import FORMAT, SUMMARY, RunDirectory, read_json
from launch.train_command import train_policy_job, train_ranker_job
from trainer.durable import write_text
from trainer.interruption import Interruption
from trainer.jobs import Job, PolicyJobSettings, RankerJob, RlJob, SftJob
from trainer.row_metrics import read_row_metrics
from trainer.run_log import METRICS, read_metrics

PROGRESS = "progress.json"
"""Seconds per phase and peak memory over all starts of a demo, kept after every phase."""
CODES = "demo"
CODE_SETTINGS = IdSettings(source=Source.COOCCURRENCE, window=10, level_sizes=(64, 256), balance=1.5)
POLICIES = ("sft", "sft_continued", "rl")


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a demo runs."""

    run_dir: Path
    dataset: Path
    """Folder of MovieLens-100K; imported when it is absent."""
    stages: tuple[str, ...] = ("sasrec", *POLICIES)
    """Stages to run, in their order."""
    overrides: Mapping[str, Sequence[str]] = field(default_factory=dict)
    """Further `--a.b VALUE` by stage; `*` means all policy stages."""
    command: tuple[str, ...] = ("demo",)

    def job(self, stage: str) -> Job:
        """The job of a stage, with its place in this demo."""
        recipe = "demo-ranker" if stage == "sasrec" else "demo-" + stage.replace("_", "-")
        places = ["--data.dataset", str(self.dataset)]
        if stage in ("sft_continued", "rl"):
            places += ["--init", str(self.run_dir / "sft")]
        if stage == "rl":
            places += ["--reward.ranker", str(self.run_dir / "sasrec" / "ranker")]
        if stage == "sft_continued":
            # The control takes exactly the optimiser steps that reinforcement learning takes.
            places += ["--limits.max_steps", str(optimiser_steps(self.policy_job("rl")))]
        shared = [] if stage == "sasrec" else self.overrides.get("*", ())
        return load_job(recipe, [*places, *shared, *self.overrides.get(stage, ())])

    def policy_job(self, stage: str) -> PolicyJobSettings:
        """The job of a stage that trains the policy."""
        job = self.job(stage)
        assert isinstance(job, PolicyJobSettings)
        return job


def optimiser_steps(job: PolicyJobSettings) -> int:
    """Optimiser steps of an rl job that ends at limits.max_steps."""
    assert isinstance(job, RlJob)
    if job.limits.max_steps is None:
        raise RequestError("limits.max_steps", None, "a number of steps, which the continued SFT takes as well")
    return job.limits.max_steps * job.objective.updates * job.objective.minibatches


def demo_command(run_dir: Path = Path("runs/demo"), dataset: Path = Path("datasets/ml-100k")) -> dict[str, Any]:
    """Run the main job on MovieLens-100K and print its table; started again, it continues where it stopped.

    Args:
        run_dir: folder of the demo's runs and results.
        dataset: folder of the dataset; MovieLens-100K is imported into it when it is absent.
    """
    return run_demo(Plan(run_dir=run_dir, dataset=dataset))


def run_demo(plan: Plan) -> dict[str, Any]:
    """Run what is left of a plan, then write and print the results; returns the summary."""
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    plan = Plan(**{**plan.__dict__, "run_dir": plan.run_dir.resolve(), "dataset": plan.dataset.resolve()})
    _note_environment(plan)
    clock = Clock(plan.run_dir / PROGRESS, started=psutil.Process().create_time())
    with Interruption() as interruption, MemorySampler() as memory:
        with clock.phase("data", memory):
            dataset = open_dataset(plan.dataset)
            build_codes(dataset, CODES, CODE_SETTINGS)
        summaries = _run_stages(plan, clock, memory, interruption)
        with clock.phase("results", memory):
            summary = _results(plan, dataset, summaries, clock)
    return summary


def open_dataset(folder: Path) -> Dataset:
    """The demo's dataset, imported when it is absent.

    Raises:
        RequestError: the folder holds another dataset, or the same with other rules.
    """
    if not (folder / "dataset.json").is_file():
        _say(f"importing MovieLens-100K into {folder}")
        return import_data(ImportCommand(out=folder, name="ml-100k"))
    dataset = Dataset.open(folder)
    rules = ImportRules().model_dump(mode="json")
    if dataset.name != "ml-100k" or dataset.card["rules"] != rules:
        raise RequestError(
            str(folder), f"dataset {dataset.name!r} with other rules", "MovieLens-100K as imported by default, or none"
        )
    return dataset


def _run_stages(
    plan: Plan, clock: Clock, memory: MemorySampler, interruption: Interruption
) -> dict[str, dict[str, Any]]:
    """Summaries by stage, of all that are finished when this ends."""
    summaries: dict[str, dict[str, Any]] = {}
    policies = [stage for stage in plan.stages if stage != "sasrec"]
    with contextlib.ExitStack() as stack:
        for stage in plan.stages:
            if interruption.requested:
                break
            job = plan.job(stage)
            if stage in policies and finished(plan.run_dir / stage) is None and not clock.ray_is_up:
                with clock.phase("ray", memory):
                    stack.enter_context(cluster(plan.policy_job(stage).cluster))
                clock.ray_is_up = True
            with clock.phase(stage, memory):
                summary = run_stage(plan, stage, job, memory, interruption)
            if summary.get("interrupted"):
                break
            summaries[stage] = summary
    return summaries


def run_stage(plan: Plan, stage: str, job: Job, memory: MemorySampler, interruption: Interruption) -> dict[str, Any]:
    """Run a stage to its end, or read its summary when it came there before; Ray is connected for policies."""
    folder = plan.run_dir / stage
    check_paths(job)
    with RunDirectory.open(folder, job, command=plan.command) as run:
        before = finished(folder)
        if before is not None:
            _say(f"{stage}: finished before")
            return before
        _say(f"{stage}: {job.job} job in {folder}")
        if isinstance(job, RankerJob):
            summary = train_ranker_job(job, run, interruption)
        else:
            assert isinstance(job, SftJob | RlJob)
            summary = train_policy_job(job, run, interruption)
        summary["peak_pss_gib"] = memory.peak_pss_gib
        run.write_summary(summary)
    return summary


def finished(folder: Path) -> dict[str, Any] | None:
    """The summary of a stage that came to its end."""
    if not (folder / SUMMARY).is_file():
        return None
    summary = read_json(folder / SUMMARY)
    return None if summary.get("interrupted") else summary


def _results(plan: Plan, dataset: Dataset, summaries: Mapping[str, Mapping[str, Any]], clock: Clock) -> dict[str, Any]:
    """Write summary.json, report.html and the links to the checkpoints; print the table."""
    from launch.report import write_report

    complete = all(stage in summaries for stage in plan.stages)
    summary: dict[str, Any] = {"format": FORMAT, "job": "demo", "interrupted": not complete}
    if complete:
        policies = [stage for stage in POLICIES if stage in summaries]
        stages, files = _stages(plan, dataset, summaries)
        rl = summaries["rl"]
        job = plan.policy_job("rl")
        assert isinstance(job, RlJob)
        course = reward_course(read_metrics(plan.run_dir / "rl" / METRICS))
        summary |= {
            "dataset": dataset.name,
            "stages": stages,
            "comparisons": comparisons(files, job.evaluation.k),
            **{name: rl[name] for name in ("policy_gap", "weight_versions", "engine", "learner", "reward")},
            "training_reward": {**course, "words": reward_words(course, job.data.latest_rows)},
            "selection": {stage: summaries[stage]["selection"] for stage in policies},
            "checkpoints": link_checkpoints(plan.run_dir, {s: summaries[s]["best_checkpoint"] for s in policies}),
            "steps": {stage: summaries[stage]["steps"] for stage in policies},
        }
    summary |= clock.totals()
    write_text(plan.run_dir / SUMMARY, json.dumps(summary, indent=2, default=str) + "\n")
    if not complete:
        _say(f"interrupted; the same command continues in {plan.run_dir}")
        return summary
    write_report(plan.run_dir, plan.run_dir / "report.html")
    _print_results(plan, summary, job.evaluation.k)
    return summary


def _print_results(plan: Plan, summary: Mapping[str, Any], ks: Sequence[int]) -> None:
    print(table(summary["stages"], ks))
    chosen = summary["selection"]["rl"]
    print(
        f"SFT+GRPO is step {chosen['best_step']} of the candidates {chosen['candidates']}, chosen by "
        f"{chosen['metric']} on the validation split; step 0 is the SFT model itself."
    )
    print("\n".join([summary["training_reward"]["words"], *comparison_lines(summary["comparisons"])]))
    print(
        f"{summary['wall_seconds']:.0f} s, {summary['peak_pss_gib']:.1f} GiB at most; "
        f"{plan.run_dir / 'report.html'}, {plan.run_dir / SUMMARY}"
    )


def _stages(
    plan: Plan, dataset: Dataset, summaries: Mapping[str, Mapping[str, Any]]
) -> tuple[dict[str, dict[str, Any]], dict[str, Path]]:
    """The rows of the table in its order, and where their values per row lie."""
    from reward.ranker import load_ranker
    from trainer.ranker_training import train_ranker

    job = plan.policy_job("rl")
    active_I = Catalogue.build(dataset, job.data.codes).active
    stages: dict[str, dict[str, Any]] = {}
    files: dict[str, Path] = {}
    for name in NAMES:
        if name in POLICIES:
            if name not in summaries:
                continue
            stages[name] = dict(summaries[name]["test"])
            files[name] = plan.run_dir / name / "rows" / "test.parquet"
        else:
            if name == "sasrec":
                ranker = load_ranker(plan.run_dir / "sasrec" / "ranker")
            else:
                settings = ["--ranker.kind", name, "--data.dataset", str(plan.dataset)]
                counted = load_job("demo-ranker", settings)
                assert isinstance(counted, RankerJob)
                ranker = train_ranker(counted, dataset, plan.run_dir / "counted" / name).ranker
            stages[name] = ranker_stage(name, ranker, dataset, job, active_I, plan.run_dir)
            files[name] = plan.run_dir / "rows" / f"{name}.parquet"
        stages[name] = with_intervals(stages[name], read_row_metrics(files[name]))
    return stages, files


def link_checkpoints(run_dir: Path, best: Mapping[str, str]) -> dict[str, str]:
    """Make `RUN/checkpoints/STAGE` a relative link to the best checkpoint of the stage; returns the paths."""
    folder = run_dir / "checkpoints"
    folder.mkdir(exist_ok=True)
    for stage, checkpoint in best.items():
        # Relative to the folders as they are now, so that the demo may be moved as a whole.
        target = os.path.relpath(run_dir / stage / "checkpoints" / Path(checkpoint).name, folder)
        fresh = folder / f".{stage}.new"
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target)
        fresh.replace(folder / stage)
    return {stage: str(folder / stage) for stage in best}


class Clock:
    """Wall time per phase and peak memory, over all starts of a demo."""

    def __init__(self, path: Path, *, started: float | None = None) -> None:
        """`path` keeps the figures; `started` is when this process began (`time.time()`), for the phase `start`."""
        self._path = path
        kept = read_json(path) if path.is_file() else {}
        self._seconds: dict[str, float] = {n: float(s) for n, s in kept.get("phase_seconds", {}).items()}
        self._peak_gib = float(kept.get("peak_pss_gib", 0.0))
        self._now: tuple[str, float] | None = None
        self.ray_is_up = False
        if started is not None:
            self._seconds["start"] = self._seconds.get("start", 0.0) + max(0.0, time.time() - started)

    @contextlib.contextmanager
    def phase(self, name: str, memory: MemorySampler) -> Iterator[None]:
        """Time what happens inside, and keep it."""
        self._now = name, time.monotonic()
        try:
            yield
        finally:
            self._seconds, self._now = self._with_present(), None
            self._peak_gib = max(self._peak_gib, memory.peak_pss_gib)
            write_text(self._path, json.dumps(self.totals(), indent=2) + "\n")

    def _with_present(self) -> dict[str, float]:
        """Seconds by phase, the one that is going on included."""
        if self._now is None:
            return dict(self._seconds)
        name, begun = self._now
        return {**self._seconds, name: self._seconds.get(name, 0.0) + time.monotonic() - begun}

    def totals(self) -> dict[str, Any]:
        """Entries of the summary."""
        seconds = self._with_present()
        return {"wall_seconds": sum(seconds.values()), "phase_seconds": seconds, "peak_pss_gib": self._peak_gib}


def _note_environment(plan: Plan) -> None:
    from launch.provenance import environment

    path = plan.run_dir / "environment.json"
    entries = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    entries.append({"started": time.time(), "command": ["windlass", *plan.command], **environment()})
    write_text(path, json.dumps(entries, indent=2, default=str) + "\n")


def _say(text: str) -> None:
    print(f"demo: {text}", flush=True)
