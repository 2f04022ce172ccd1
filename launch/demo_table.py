"""What the demo shows: its stages in one table, paired differences, and whether the training reward rose."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from data.dataset import Dataset
from data.records import BoolArray
from launch.compare import compare
from reward.bootstrap import bootstrap_mean
from reward.ranker import Ranker
from reward.ranking import evaluate_ranker
from trainer.evaluation import sample_rows
from trainer.jobs import PolicyJobSettings
from trainer.row_metrics import RowMetrics, read_row_metrics, write_row_metrics

NAMES = {
    "popularity": "popularity",
    "cooccurrence": "co-occurrence",
    "sasrec": "SASRec",
    "sft": "SFT",
    "sft_continued": "SFT continued",
    "rl": "SFT+GRPO",
}
"""Stages in the order of the table, and how it calls them."""
COMPARISONS = (("rl", "sft"), ("rl", "sft_continued"))
WITH_INTERVALS = ("hr@10", "ndcg@10")


def ranker_stage(
    name: str, ranker: Ranker, dataset: Dataset, job: PolicyJobSettings, active_I: BoolArray, folder: Path
) -> dict[str, Any]:
    """A ranker on the rows, with the history, exclusions and permitted items that the policies of the table have.

    Its values per row are kept as `FOLDER/rows/NAME.parquet`.
    """
    settings = job.evaluation
    samples = dataset.samples("test")
    rows = sample_rows(len(samples), settings.test_rows, job.seed)
    report = evaluate_ranker(
        ranker,
        dataset,
        samples.take(rows),
        settings.k,
        history=job.data.history,
        exclude_seen=job.data.exclude_seen,
        permitted_I=active_I,
    )
    kept = RowMetrics(
        name=name,
        split="test",
        dataset=dataset.fingerprint,
        sample_id_N=rows,
        user_id_N=samples.user_id_N[rows],
        value_N={metric: values.astype(np.float32) for metric, values in report.rows.items()},
    )
    write_row_metrics(folder, kept)
    values = {metric: value for metric, value in report.values.items() if not metric.startswith("invalid@")}
    invalid = report.values[f"invalid@{max(settings.k)}"]
    return {**values, "n": report.n, "invalid": {"constrained": invalid, "unconstrained": None}}


def with_intervals(stage: Mapping[str, Any], rows: RowMetrics) -> dict[str, Any]:
    """The stage with 95 % intervals of its leading metrics, users resampled whole."""
    found = {}
    for metric in WITH_INTERVALS:
        if metric in rows.value_N:
            interval = bootstrap_mean(rows.value_N[metric], cluster_N=rows.user_id_N)
            found[metric] = [interval.low, interval.high]
    return {**stage, "ci95": found}


def comparisons(files: Mapping[str, Path], ks: Sequence[int]) -> dict[str, dict[str, Any]]:
    """Paired differences on the same rows, by `OTHER - BASE` and metric.

    Args:
        files: rows/*.parquet by stage; a pair with an absent stage is left out.
        ks: cut-offs.

    Raises:
        RequestError: two stages were evaluated on other rows.
    """
    metrics = tuple(f"{metric}@{k}" for metric in ("hr", "ndcg") for k in ks)
    found = {}
    for other, base in COMPARISONS:
        if other in files and base in files:
            answer = compare(read_row_metrics(files[base]), read_row_metrics(files[other]), metrics)
            found[f"{other} - {base}"] = answer["differences"]
    return found


def reward_course(steps: Sequence[Mapping[str, Any]], *, tenth: int = 10) -> dict[str, float]:
    """How the training reward went: means of the first and the last `tenth` steps, and the slope of a line through all.

    Fewer steps than twice `tenth` are cut in halves.
    """
    reward_S = np.array([step["reward/mean"] for step in steps if step.get("reward/mean") is not None], np.float64)
    if len(reward_S) < 2:
        return {"steps": float(len(reward_S))}
    part = min(tenth, len(reward_S) // 2)
    slope = float(np.polyfit(np.arange(len(reward_S)), reward_S, 1)[0])
    epochs = [step["epoch"] for step in steps if "epoch" in step]
    return {
        "steps": float(len(reward_S)),
        "first": float(reward_S[:part].mean()),
        "last": float(reward_S[-part:].mean()),
        "averaged_over": float(part),
        "slope_per_step": slope,
        "passes": float(max(epochs, default=0.0)),
    }


def reward_words(course: Mapping[str, float], rows: int | None) -> str:
    """The course as a sentence that says what the rise is worth."""
    if "first" not in course:
        return "GRPO took too few steps to say how its reward went."
    verb = "rose" if course["last"] > course["first"] and course["slope_per_step"] > 0 else "did not rise"
    part, passes = int(course["averaged_over"]), course["passes"]
    text = (
        f"GRPO's training reward {verb}: {course['first']:.5f} per completion in the first {part} steps, "
        f"{course['last']:.5f} in the last {part} ({int(course['steps'])} steps)."
    )
    if passes > 1:
        among = "the training rows" if rows is None else f"the latest {rows:,} training rows"
        text += f" The prompts are {passes:.1f} passes over {among}, so that part of a rise is memory of these prompts."
    return text


def table(stages: Mapping[str, Mapping[str, Any]], ks: Sequence[int]) -> str:
    """The stages as one table of text."""
    columns = [f"{metric}@{k}" for metric in ("hr", "ndcg") for k in ks]
    heads = [f"{metric.upper()}@{k}" for metric in ("hr", "ndcg") for k in ks]
    width = 2 + max(len(NAMES.get(name, name)) for name in stages)
    cover = "coverage@10" if any("coverage@10" in stage for stage in stages.values()) else f"coverage@{max(ks)}"
    lines = [
        f"{'':<{width}}" + "".join(f"{head:>9}" for head in heads) + f"{'invalid':>10}{'(free)':>9}{'coverage':>10}"
    ]
    for name, stage in stages.items():
        invalid = stage["invalid"]
        cells = "".join(f"{stage[column]:>9.4f}" for column in columns)
        free = "-" if invalid["unconstrained"] is None else f"{invalid['unconstrained']:.4f}"
        lines.append(
            f"{NAMES.get(name, name):<{width}}{cells}{invalid['constrained']:>10.4f}{free:>9}{stage[cover]:>10.4f}"
        )
    n = next(iter(stages.values()))["n"]
    lines.append(
        f"{n} rows of the test split, the same for all. invalid: share of outputs that are no item, with the "
        f"constraint and (free) without it. coverage: share of the items among all first {cover.partition('@')[2]}."
    )
    return "\n".join(lines)


def comparison_lines(found: Mapping[str, Mapping[str, Any]], metrics: Sequence[str] = WITH_INTERVALS) -> list[str]:
    """The leading differences, one line each."""
    lines = []
    for name, differences in found.items():
        for metric in metrics:
            if metric in differences:
                d = differences[metric]
                verdict = "the interval holds 0" if d["low"] <= 0 <= d["high"] else "the interval does not hold 0"
                lines.append(f"{name}, {metric}: {d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}], {verdict}")
    return lines
