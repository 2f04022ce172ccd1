"""How many GPU hours a submitted command takes, from the last recorded benchmark, or why nobody can tell.

An estimate needs a record of `windlass bench step` (docs/results/bench_step.json) that fits: taken on GPUs, with the
job's type, group size and model size. Steps cost in proportion to their prompts; evaluations and start-up come on top.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from launch.provenance import ROOT
from trainer.jobs import PRESETS, Job, RlJob

RECORDS = ROOT / "docs" / "results" / "bench_step.json"


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """GPU hours, or none, and why."""

    gpu_hours: float | None
    reason: str


def estimate(job: Job | None, *, gpus: int, records: Path = RECORDS) -> Estimate:
    """GPU hours of a command that trains `job` (none: another command) on `gpus` GPUs."""
    if gpus == 0:
        return Estimate(gpu_hours=0.0, reason="asks for no GPU")
    if not isinstance(job, RlJob):
        return Estimate(gpu_hours=None, reason="only steps of rl jobs are benchmarked")
    if job.limits.max_steps is None:
        return Estimate(gpu_hours=None, reason="the job has no limits.max_steps")
    for record in reversed(list(_records(records))):
        if _fits(record, job):
            settings = record["settings"]
            per_prompt = record["seconds"]["median"] / settings["prompts"]
            seconds = per_prompt * job.batch_prompts * job.limits.max_steps
            return Estimate(
                gpu_hours=seconds / 3600,
                reason=f"bench step on {record['machine']['kind']['cuda']}: {per_prompt:.4g} s a prompt of "
                f"{settings['prompt_len']} tokens, one GPU; evaluations come on top",
            )
    return Estimate(
        gpu_hours=None,
        reason=f"no recorded `bench step` on a GPU with model {job.init}, {job.learner.dtype.value} and groups of "
        f"{job.rollout.width}",
    )


def _records(path: Path) -> Iterator[Mapping[str, Any]]:
    """Results in a table of recorded benchmarks, oldest first; an installation without them has none."""
    if not path.is_file():
        return
    for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
        if row.get("result"):
            yield row["result"]


def _fits(record: Mapping[str, Any], job: RlJob) -> bool:
    settings = record["settings"]
    return (
        settings["device"] == "cuda"
        and settings["dtype"] == job.learner.dtype.value
        and settings["group"] == job.rollout.width
        and _same_size(record, job.init)
    )


def _same_size(record: Mapping[str, Any], init: str) -> bool:
    """Whether a job's model has the layers and the width of the benchmark's."""
    if init in PRESETS:
        return bool(record["settings"]["model"] == init)
    found = sorted(Path(init).glob("**/config.json")) if Path(init).is_dir() else []
    for path in found:
        config = json.loads(path.read_text(encoding="utf-8"))
        shape = config.get("num_hidden_layers"), config.get("hidden_size")
        if shape == (record["model"]["layers"], record["model"]["width"]):
            return True
    return False
