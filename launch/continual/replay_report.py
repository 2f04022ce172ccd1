"""One page over the periods of a replay: metrics, exposure measures, responses, weights and decisions, by arm."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes

from data.errors import RequestError
from launch.continual.registry_report import reason
from launch.continual.replay_arms import ARMS
from launch.pages import Cell, Fact, Page, Plot, Section, Table, number, span
from launch.report_plots import svg
from launch.run_directory import read_json
from reward.names import ExposureMetric

RANKING = ("hr@1", "hr@5", "hr@10", "ndcg@5", "ndcg@10")
EXPOSURE = (f"{ExposureMetric.GAP}@10", f"{ExposureMetric.DIVERGENCE}@10", ExposureMetric.REPEAT.value)
WEIGHTS = ("anchor/weight_mean", "anchor/weight_max", "anchor/clipped_share", "anchor/effective_size")
Periods = Mapping[str, Sequence[Mapping[str, Any]]]
"""Records of the periods by arm."""


def replay_page(out: Path) -> Page:
    """The page of a replay, of whatever it has come to.

    Raises:
        RequestError: no period was replayed yet.
    """
    request = read_json(out / "replay.json")
    arms = {
        name: [read_json(path) for path in sorted((out / name / "periods").glob("*.json"))]
        for name in ARMS
        if any((out / name / "periods").glob("*.json"))
    }
    if not arms:
        raise RequestError(str(out), "holds no period", "a replay that has measured one")
    decisions = [record["update"] for records in arms.values() for record in records if record["update"]]
    rejected = sum(update["decision"] != "promoted" for update in decisions)
    facts = [
        Fact(name="periods", value=str(request["periods"])),
        Fact(name="arms", value=str(len(arms))),
        Fact(name="contexts served per period", value=str(request["rows"])),
        Fact(name="seed", value=str(request["seed"])),
        Fact(name="updates", value=str(len(decisions))),
        Fact(name="not promoted", value=str(rejected), warn=rejected > 0),
    ]
    return Page(
        title="Replayed periods",
        subtitle=f"{out} · dataset {request['dataset_fingerprint']}",
        facts=facts,
        sections=[
            Section(
                title="Ranking on the period's own next items",
                plots=plots(arms, RANKING),
                tables=[table(arms, RANKING)],
                note=NOTE,
            ),
            Section(title="Exposure", plots=plots(arms, EXPOSURE), tables=[table(arms, EXPOSURE)]),
            Section(
                title="What was served",
                plots=[by_period(arms, "share with a response", lambda record: record["served"]["response_rate"])],
                tables=[served_table(arms)],
            ),
            Section(
                title="Weights of the updates",
                tables=[weight_table(out, arms)],
                note="Means over the steps of an update.",
            ),
            Section(title="Decisions", tables=[decision_table(arms)]),
        ],
    )


NOTE = (
    "The model of a period was updated by the logs of the periods before it. Small print: 95 % bootstrap intervals, "
    "users resampled whole; the arms share their rows, so intervals of differences are narrower than these."
)


def plots(arms: Periods, metrics: Sequence[str]) -> list[Plot]:
    """A plot per metric that any period has."""
    there = [
        name for name in metrics if any(name in record["metrics"] for records in arms.values() for record in records)
    ]
    return [by_period(arms, name, lambda record, name=name: record["metrics"].get(name)) for name in there]  # type: ignore[misc]


def by_period(arms: Periods, name: str, value: Callable[[Mapping[str, Any]], float | None]) -> Plot:
    """A line per arm."""

    def draw(axes: Axes) -> None:
        for arm, records in arms.items():
            found = [(record["period"], value(record)) for record in records]
            points = [(period, known) for period, known in found if known is not None]
            axes.plot([p for p, _ in points], [v for _, v in points], label=ARMS[arm].told, marker="o", markersize=3)
        axes.set_xticks(sorted({record["period"] for records in arms.values() for record in records}))
        axes.set_xlabel("period")
        axes.set_ylabel(name)

    return Plot(title=name, svg=svg(draw))


def rows(arms: Periods, cells: Callable[[Mapping[str, Any]], list[Cell]]) -> list[list[Cell]]:
    """A row per arm and period."""
    return [
        [Cell(ARMS[arm].told), Cell(str(record["period"])), Cell(str(record["version"])), *cells(record)]
        for arm, records in arms.items()
        for record in records
    ]


def table(arms: Periods, metrics: Sequence[str]) -> Table:
    """Metrics with their intervals."""

    def cells(record: Mapping[str, Any]) -> list[Cell]:
        return [
            Cell(number(record["metrics"].get(name)), span(*record["ci95"].get(name, (None, None)))) for name in metrics
        ]

    return Table(columns=("arm", "period", "version", *metrics), rows=rows(arms, cells))


def served_table(arms: Periods) -> Table:
    """What the log of a period holds."""

    def cells(record: Mapping[str, Any]) -> list[Cell]:
        served = record["served"]
        rate = number(served["response_rate"])
        return [Cell(str(served["rows"])), Cell(str(served["responses"])), Cell(rate), Cell(str(served["items"]))]

    return Table(
        columns=("arm", "period", "version", "requests", "responses", "share", "items shown"), rows=rows(arms, cells)
    )


def weight_table(out: Path, arms: Periods) -> Table:
    """Importance weights by update; dashes for arms without an anchor."""
    found: list[list[Cell]] = []
    for arm in arms:
        for path in sorted((out / arm / "updates").glob("*.jsonl")):
            steps = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
            trained = [step for step in steps if "loss" in step]
            means = [np.mean([step[name] for step in trained if name in step] or [np.nan]) for name in WEIGHTS]
            cells = [Cell(number(float(mean))) for mean in means]
            found.append([Cell(ARMS[arm].told), Cell(path.stem.lstrip("0")), Cell(str(len(trained))), *cells])
    return Table(
        columns=("arm", "after period", "steps", *(name.removeprefix("anchor/") for name in WEIGHTS)), rows=found
    )


def decision_table(arms: Periods) -> Table:
    """What the guard said of each update."""
    found = [
        [
            Cell(ARMS[arm].told),
            Cell(str(record["period"] - 1)),
            Cell(record["update"]["decision"]),
            Cell("; ".join(reason(told) for told in record["update"]["reasons"])),
        ]
        for arm, records in arms.items()
        for record in records
        if record["update"]
    ]
    return Table(columns=("arm", "after period", "decision", "reasons"), rows=found)
