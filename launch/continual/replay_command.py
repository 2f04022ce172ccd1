"""`windlass replay`: serve, update and measure over the periods of a dataset, by several ways to update."""

from __future__ import annotations

import contextlib
import json
import sys
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.dataset import Dataset
from data.errors import RequestError
from data.feedback import day_of
from launch.cli import check_writable, write_answer
from launch.cluster import cluster
from launch.config import check_paths, recipe_path, to_mapping
from launch.continual.command import Arguments, ContinualSettings, first_model, read_continual
from launch.continual.cycle import begin_registry
from launch.continual.lock import writing
from launch.continual.replay import FORMAT, ArmReplay, RecordingUpdater, ReplayWorld
from launch.continual.replay_arms import ARMS
from launch.continual.replay_periods import replayed_samples
from launch.continual.updating import Interrupted
from launch.run_directory import read_json
from launch.simulation import ServingSettings
from reward.bootstrap import paired_bootstrap
from trainer.durable import write_text
from trainer.jobs import RlJob, SftJob
from trainer.row_metrics import read_row_metrics

KS = (1, 5, 10)
DESCRIPTION = "replay.json"


def replay_command(arguments: list[str]) -> int:
    """Replay the periods of a dataset; returns the exit code."""
    if any(argument in ("-h", "--help") for argument in arguments):
        print(parser().format_help())
        return 0
    known, overrides = read_replay(arguments)
    if known.json not in (None, "-"):
        check_writable(known.json)
    words = contextlib.redirect_stdout(sys.stderr) if known.json == "-" else contextlib.nullcontext()
    with words:
        answer = replay(known, overrides)
    if known.json is not None:
        write_answer(answer, known.json)
    return 0


def parser() -> Arguments:
    """The arguments beside the recipe's keys."""
    made = Arguments(
        prog="windlass replay",
        description="Cut the test split of a dataset into periods; in each, measure the current model, serve it by "
        "sampling to get a log, and update it from that log, guarded, as `windlass continual` does. Goes on by itself "
        "from its folder; see docs/replay.md. Keys of the recipe are given as --a.b VALUE.",
        allow_abbrev=False,
    )
    made.add_argument("recipe", help="an ABPO recipe of `windlass train`, by name or path")
    made.add_argument("--dataset", required=True, type=Path, help="folder that `windlass data import` wrote")
    made.add_argument("--periods", required=True, type=int, help="how many periods the test split is cut into")
    made.add_argument("--out", type=Path, help="folder of the replay (runs/replay-RECIPE)")
    made.add_argument("--arms", nargs="+", default=list(ARMS), help=f"what is compared: {', '.join(ARMS)} (all)")
    made.add_argument("--unit-days", type=int, default=1, help="periods are whole numbers of so many days; 7 for weeks")
    made.add_argument("--rows", type=int, default=2048, help="contexts of a period that are served (2048)")
    made.add_argument("--eval-rows", type=int, default=2000, help="rows of a period that are measured (2000)")
    made.add_argument(
        "--horizon", type=int, default=1, help="the response is 1 when the shown item is among the next so many"
    )
    made.add_argument("--seed", type=int, default=0, help="of the samples, the draws and the intervals")
    made.add_argument("--batch", type=int, default=128, help="prompts per request to the fleet")
    made.add_argument("--json", metavar="FILE", help="write the answer as JSON (- for standard output)")
    return made


def read_replay(arguments: list[str]) -> tuple[Namespace, list[str]]:
    """The arguments, and the recipe's keys among them; every arm's job is sound.

    Raises:
        RequestError: the first problem.
    """
    known, overrides = parser().parse_known_args(arguments)
    for name in ("periods", "unit_days", "rows", "eval_rows", "batch"):
        if getattr(known, name) < 1:
            raise RequestError(f"--{name.replace('_', '-')}", getattr(known, name), "1 or more")
    unknown = [name for name in known.arms if name not in ARMS]
    if unknown:
        raise RequestError("--arms", unknown[0], ", ".join(ARMS))
    known.out = (known.out or Path("runs") / f"replay-{recipe_path(known.recipe).stem}").expanduser().resolve()
    for name in known.arms:
        arm_job(known, overrides, name)
    return known, overrides


def arm_job(known: Namespace, overrides: Sequence[str], name: str) -> tuple[RlJob | SftJob, ContinualSettings]:
    """The job and the rules of an arm."""
    root = known.out / name
    given = [*overrides, f"--data.dataset={known.dataset}", *ARMS[name].overrides]
    return read_continual(known.recipe, given, log=str(root / "log"), registry=root / "registry")


def replay(known: Namespace, overrides: Sequence[str]) -> dict[str, Any]:
    """Replay every arm that is asked for; returns the answer.

    Raises:
        RequestError: a dataset that cannot be cut, or a folder that holds another replay.
    """
    dataset = Dataset.open(known.dataset)
    samples, periods = replayed_samples(dataset, known.periods, known.unit_days)
    out = known.out
    world = ReplayWorld(
        dataset=dataset,
        samples=samples,
        periods=periods,
        serving=ServingSettings(horizon=known.horizon, seed=known.seed),
        ks=KS,
        rows=known.rows,
        eval_rows=known.eval_rows,
        batch=known.batch,
    )
    answer: dict[str, Any] = {
        "out": str(out),
        "dataset": dataset.name,
        "dataset_fingerprint": dataset.fingerprint,
        "seed": known.seed,
        "horizon": known.horizon,
        "periods": [
            {"period": p.number, "first": day_of(p.first), "last": day_of(p.end - 1), "contexts": len(p.rows)}
            for p in periods
        ],
        "interrupted": False,
        "arms": {},
    }
    # One Ray for all sessions: they follow each other, and each would start its own.
    with writing(out), cluster(described(out, known, overrides, dataset).cluster):
        for name in known.arms:
            try:
                records = replay_arm(world, name, known, overrides, out)
            except Interrupted:
                answer["interrupted"] = True
                print(f"{name}: stopped; the same command goes on", flush=True)
                break
            answer["arms"][name] = {"told": ARMS[name].told, "periods": {str(r["period"]): r for r in records}}
        add_differences(out, answer["arms"], known.seed)
    return answer


def replay_arm(
    world: ReplayWorld, name: str, known: Namespace, overrides: Sequence[str], out: Path
) -> list[dict[str, Any]]:
    """The periods of one arm."""
    job, settings = arm_job(known, overrides, name)
    check_paths(job)
    replayed = ArmReplay(world, ARMS[name], job, settings, RecordingUpdater(job, settings.measure), out)
    # At the first second of the replayed clock, so that registries of two replays agree.
    begin_registry(replayed.registry, first_model(job), at=float(world.periods[0].first))
    return replayed.run()


def described(out: Path, known: Namespace, overrides: Sequence[str], dataset: Dataset) -> RlJob | SftJob:
    """Keep what the folder replays, or check that it is the same; returns the recipe's job.

    Raises:
        RequestError: the folder replays something else.
    """
    job, settings = arm_job(known, overrides, "none")
    own = ("periods", "unit_days", "rows", "eval_rows", "horizon", "seed", "batch")
    asked = {
        "format": FORMAT,
        "dataset_fingerprint": dataset.fingerprint,
        **{name: getattr(known, name) for name in own},
        "job": to_mapping(job),
        "continual": settings.model_dump(mode="json"),
    }
    path = out / DESCRIPTION
    if not path.is_file():
        check_paths(job)
        write_text(path, json.dumps(asked, indent=1) + "\n")
        return job
    there = read_json(path)
    for name, value in asked.items():
        if there.get(name) != value:
            found = f"{out} replays another {name}"
            raise RequestError("--out", found, "the same request, or another folder")
    return job


def add_differences(out: Path, arms: Mapping[str, Any], seed: int) -> None:
    """Paired differences of every arm to no update, period by period, where both were measured."""
    for name, arm in arms.items():
        for number, record in arm["periods"].items():
            base = out / "none" / "rows" / f"{int(number):02d}.parquet"
            if name == "none" or not base.is_file():
                continue
            before, after = read_row_metrics(base), read_row_metrics(out / name / "rows" / base.name)
            assert np.array_equal(before.sample_id_N, after.sample_id_N), "all arms measure the same rows"
            record["differences"] = {
                metric: paired_bootstrap(values, before.value_N[metric], seed=seed, cluster_N=after.user_id_N).record()
                for metric, values in after.value_N.items()
            }
