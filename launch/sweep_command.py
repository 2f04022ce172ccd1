"""`windlass sweep`: a recipe for several values of a key and several seeds, and the means of what its runs measured.

    RUN/laac.alpha-3/seed-1/     a run of the recipe, as `windlass train` leaves it
    RUN/summary.json             means and deviations over the seeds, value by value, for the report

A run that is finished is not run again, so an interrupted sweep continues, and further values join the same folder;
one that was made with other settings is refused. Critics that diverge are a finding of the sweep and not its end: such
a run is counted, has no part in the means, and is not begun again.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from data.errors import RequestError, RunError
from launch.cli import run as run_windlass
from launch.config import load_job, to_mapping
from launch.run_directory import SUMMARY, read_json, refuse_other_experiment
from trainer.durable import write_text
from trainer.jobs import Job, LaacJob, RlJob, SftJob
from trainer.laac_job import DIVERGED

FORMAT = 1
ONLY = "all"
"""Name of the one point of a sweep over seeds alone."""
Runner = Callable[[list[str]], int]


def sweep_command(
    recipe: Annotated[str, tyro.conf.Positional],
    /,
    run_dir: Path,
    over: str = "",
    values: tuple[str, ...] = (),
    seeds: tuple[int, ...] = (1, 2, 3),
    set: tuple[str, ...] = (),
) -> dict[str, Any]:
    """Train a recipe for several values of a key and several seeds.

    Args:
        recipe: name or path.
        run_dir: folder of the sweep; finished runs in it are kept.
        over: key whose values are swept (laac.alpha, for example); none sweeps the seeds alone.
        values: its values.
        seeds: a run of each value for each.
        set: further overrides, as KEY=VALUE.
    """
    return sweep(recipe, run_dir, over=over, values=values, seeds=seeds, overrides=set)


def sweep(
    recipe: str,
    run_dir: Path,
    *,
    over: str = "",
    values: Sequence[str] = (),
    seeds: Sequence[int] = (1, 2, 3),
    overrides: Sequence[str] = (),
    runner: Runner = run_windlass,
) -> dict[str, Any]:
    """See `sweep_command`; the answer holds the points that were asked, and the means of the last one by themselves.

    Raises:
        RequestError: a key without values, a value or seed twice, a run that the recipe does not allow, that measures
            nothing, or that is there with other settings; before any is begun.
        RunError: a run failed or was interrupted.
    """
    if bool(over) != bool(values):
        raise RequestError("--values", " ".join(values) or "none", "values, and --over with the key that takes them")
    if not seeds or len({*seeds}) != len(seeds):
        raise RequestError("--seeds", list(seeds), "one or more different seeds")
    fixed = [part for one in overrides for part in _override(one)]
    points = {point_name(over, value): [*fixed, *([f"--{over}", value] if over else [])] for value in values or [""]}
    if len(points) < max(1, len(values)):
        raise RequestError("--values", " ".join(values), "values that differ in letters and digits: each has a folder")
    for name, arguments in points.items():
        for seed in seeds:
            job = load_job(recipe, [*arguments, "--seed", str(seed)])
            _check_measures(job)
            config = run_dir / name / f"seed-{seed}" / "config.yaml"
            if config.is_file():
                refuse_other_experiment(config, to_mapping(job), known=True)
    for name, arguments in points.items():
        for seed in seeds:
            folder = run_dir / name / f"seed-{seed}"
            if not is_finished(folder) and not has_diverged(folder):
                code = runner(["train", recipe, "--run-dir", str(folder), *arguments, "--seed", str(seed)])
                if not has_diverged(folder) and (code != 0 or not is_finished(folder)):
                    raise RunError(f"{folder}: the run ended with exit code {code} and is not finished")
    folders = sorted((folder for folder in run_dir.iterdir() if any(folder.glob("seed-*"))), key=_place)
    write_summary(run_dir, over, {folder.name: point(folder) for folder in folders})
    asked = {name: point(run_dir / name, seeds) for name in points}
    return {"recipe": recipe, "over": over, "points": asked, **asked[list(points)[-1]]}


def _check_measures(job: Job) -> None:
    """Refuse a job that ends without metrics of test rows.

    Raises:
        RequestError: names the key.
    """
    if isinstance(job, LaacJob):
        return
    if not isinstance(job, SftJob | RlJob):
        raise RequestError("job", job.job, "laac, sft or rl: jobs that measure the test rows at their end")
    if not job.evaluation.test_rows:
        raise RequestError("evaluation.test_rows", 0, "above 0: a sweep compares what its runs measured there")
    if isinstance(job, RlJob) and (job.rollout_only or job.train_only):
        name = "rollout_only" if job.rollout_only else "train_only"
        raise RequestError(name, job.rollout_only or job.train_only, "none: such a run measures no test rows")


def _override(text: str) -> list[str]:
    key, equals, value = text.partition("=")
    if not equals or not key:
        raise RequestError("--set", text, "KEY=VALUE, for example laac.method=bc")
    return [f"--{key}", value]


def point_name(over: str, value: str) -> str:
    """Name of a point's folder."""
    return re.sub(r"[^\w.=-]", "_", f"{over}={value}") if over else ONLY


def _place(folder: Path) -> tuple[float, str]:
    """Where a point's folder stands among the others: numbers by their size, then words."""
    value = folder.name.rpartition("=")[2]
    try:
        return float(value), folder.name
    except ValueError:
        return math.inf, folder.name


def is_finished(folder: Path) -> bool:
    """Whether a run has come to its end."""
    return (folder / SUMMARY).is_file() and not read_json(folder / SUMMARY).get("interrupted")


def has_diverged(folder: Path) -> bool:
    """Whether a run ended because its critics diverged."""
    return (folder / DIVERGED).is_file()


def point(folder: Path, seeds: Sequence[int] | None = None) -> dict[str, Any]:
    """Means and deviations of the metrics of a point's runs, of these seeds or of all; how many ended and diverged.

    Raises:
        RequestError: a run whose summary has neither exactly one stage nor a test.
    """
    names = sorted(folder.glob("seed-*")) if seeds is None else [folder / f"seed-{seed}" for seed in seeds]
    stages = [_stage(run) for run in names if is_finished(run)]
    shared = [name for name in stages[0] if all(_is_number(stage.get(name)) for stage in stages)] if stages else []
    columns = {name: [float(stage[name]) for stage in stages] for name in shared}
    return {
        "runs": len(stages),
        "diverged": sum(map(has_diverged, names)),
        "mean": {name: statistics.fmean(column) for name, column in columns.items()},
        "std": {name: statistics.stdev(column) for name, column in columns.items() if len(column) > 1},
    }


def _stage(run: Path) -> Mapping[str, Any]:
    summary = read_json(run / SUMMARY)
    stages = summary.get("stages", {"test": summary["test"]} if "test" in summary else None)
    if not isinstance(stages, Mapping) or len(stages) != 1:
        raise RequestError(
            f"{run / SUMMARY}: stages", f"{stages!r:.60}", "one stage, as jobs have that end with a test"
        )
    stage: Mapping[str, Any] = next(iter(stages.values()))
    return stage


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def write_summary(run_dir: Path, over: str, points: Mapping[str, Mapping[str, Any]]) -> None:
    """Write what `windlass report` shows of a sweep."""
    content = {
        "format": FORMAT,
        "job": "sweep",
        "over": over,
        "interrupted": False,
        "stages": {
            name: {**one["mean"], "n": int(one["mean"].get("n", 0)), "runs": one["runs"], "diverged": one["diverged"]}
            for name, one in points.items()
        },
        "sweep": points,
    }
    write_text(run_dir / SUMMARY, json.dumps(content, indent=2) + "\n")
