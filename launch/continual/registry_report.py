"""Pages of a registry: one for each version, with every number behind its decision, and one over all of them.

They lie in `REGISTRY/reports/`, beside the versions, whose files do not change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes

from launch.continual.reasons import Decision
from launch.continual.registry import DIGITS, Registry, Version
from launch.pages import Cell, Fact, Page, Plot, Section, Table, number, span
from launch.report_plots import PALETTE, svg

Checked = Mapping[str, Any]
"""A condition with its outcome and evidence, as the lineage keeps it (`launch.continual.guard.Checked.record`)."""


def version_page(registry: Registry, version: int) -> Page:
    """Why a version was promoted or rejected.

    Raises:
        RequestError: no such version.
    """
    one = registry.version(version)
    lineage = one.lineage
    guard = checked(one)
    promotions = registry.promotions()
    served = any(entry.version == version for entry in promotions)
    facts = [
        Fact(name="decision", value=decision(one), warn=decision(one) == Decision.REJECTED),
        Fact(name="served now", value="yes" if promotions and promotions[-1].version == version else "no"),
        Fact(name="ever served", value="yes" if served else "no"),
        Fact(name="day", value=str(lineage.get("day", "–"))),
        Fact(name="updated from", value=str(lineage.get("parent_name") or lineage.get("source", "–"))),
        Fact(name="name in the log", value=one.name),
    ]
    counts = lineage.get("counts", {})
    sections = [
        Section(title="Reasons", words=[reason(told) for told in lineage.get("reasons", [])] or ["the first version"]),
        Section(title="Guard", plots=plots(guard), tables=[guard_table(guard)] if guard else [], note=GUARD_NOTE),
        Section(
            title="Rows of the day",
            tables=[
                Table(
                    columns=("what became of them", "rows"),
                    rows=[(Cell(name.replace("_", " ")), Cell(f"{count:,}")) for name, count in counts.items()],
                )
            ],
        ),
    ]
    return Page(
        title=f"Version {version}: {decision(one)}",
        subtitle=f"{registry.root} · {when(lineage.get('decided_at'))} · digest {one.digest}",
        facts=facts,
        sections=[section for section in sections if section.words or section.tables or section.plots],
    )


GUARD_NOTE = (
    "A loss is how much worse the candidate is than the version before, or than the limit. Small print: intervals of "
    "the condition's confidence, users resampled whole; a value without one is of the whole sample."
)


def registry_page(registry: Registry) -> Page:
    """All versions in order: decisions, and what the guard measured."""
    versions = [registry.version(number) for number in registry.numbers()]
    current = registry.current()
    counted = {name: sum(decision(one) == name for one in versions) for name in (Decision.PROMOTED, Decision.REJECTED)}
    facts = [
        Fact(name="served now", value="none" if current is None else f"version {current.number}"),
        Fact(name="versions", value=str(len(versions))),
        *(
            Fact(name=name.value, value=str(count), warn=name is Decision.REJECTED and count > 0)
            for name, count in counted.items()
        ),
    ]
    metrics = list(dict.fromkeys(entry["condition"]["metric"] for one in versions for entry in checked(one)))
    drawn = [Plot(title=metric, svg=by_version(versions, metric)) for metric in metrics]
    rows = [
        (
            Cell(str(one.number)),
            Cell(str(one.lineage.get("day", "–"))),
            Cell(decision(one)),
            Cell(str(one.lineage.get("parent") or "–")),
            Cell("; ".join(reason(told) for told in one.lineage.get("reasons", [])) or "the first version"),
        )
        for one in versions
    ]
    return Page(
        title="Registry",
        subtitle=str(registry.root),
        facts=facts,
        sections=[
            Section(title="Guard's measurements, candidate and version before", plots=drawn)
            if drawn
            else Section(title="Guard", words=["nothing was measured yet"]),
            Section(
                title="Decisions", tables=[Table(columns=("version", "day", "decision", "from", "reasons"), rows=rows)]
            ),
        ],
    )


def write_version_page(registry: Registry, version: int) -> Path:
    """Write the page of a version, and the one over all; returns the first."""
    folder = registry.root / "reports"
    target = folder / f"{version:0{DIGITS}d}.html"
    version_page(registry, version).write(target)
    registry_page(registry).write(folder / "index.html")
    return target


def checked(version: Version) -> list[Checked]:
    """The guard's conditions of a version; none for the first."""
    return list(version.lineage.get("metrics", {}).get("guard", []))


def decision(version: Version) -> str:
    """Promoted, rejected, or served first."""
    return str(version.lineage.get("decision", "first"))


def reason(told: Mapping[str, str]) -> str:
    """A reason in words."""
    return told["reason"].replace("_", " ") + (f": {told['found']}" if told["found"] else "")


def when(seconds: float | None) -> str:
    """A time in words."""
    return "–" if seconds is None else datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M UTC")


def guard_table(guard: Sequence[Checked]) -> Table:
    """A row per condition."""
    columns = ("condition", "outcome", "candidate", "before", "difference", "loss", "tolerance", "rows", "measured as")
    return Table(columns=columns, rows=[guard_row(entry) for entry in guard])


def guard_row(entry: Checked) -> list[Cell]:
    """A condition, its outcome and its numbers."""
    condition, evidence = entry["condition"], entry["evidence"]
    limit = "" if condition["limit"] is None else f", limit {condition['limit']:g}"
    name = Cell(condition["metric"], f"{condition['direction']} is better{limit}, {condition['prove']}")
    values = [Cell("–")] * 3
    if evidence is not None:
        ranges = [evidence[part] for part in ("candidate", "parent", "difference")]
        values = [Cell(number(one["value"]), span(one["low"], one["high"])) for one in ranges]
    loss = entry["loss_low"], entry["loss_high"]
    told = Cell("–") if loss[0] is None else Cell(span(*loss) or number(loss[0]))
    rows = "–" if evidence is None else str(evidence["n"])
    measured = (evidence or {}).get("measured") or condition["metric"]
    outcome = Cell(entry["outcome"].replace("_", " "))
    return [name, outcome, *values, told, Cell(f"{condition['tolerance']:g}"), Cell(rows), Cell(measured)]


def plots(guard: Sequence[Checked]) -> list[Plot]:
    """Candidate and version before with their intervals, a plot per condition whose metric has one."""
    return [
        Plot(title=f"{entry['condition']['metric']}: {entry['outcome'].replace('_', ' ')}", svg=against_parent(entry))
        for entry in guard
        if entry["evidence"] is not None and has_interval(entry["evidence"]["candidate"])
    ]


def has_interval(values: Mapping[str, float | None]) -> bool:
    """Whether a value has an interval of some width."""
    return values["low"] is not None and values["high"] is not None and values["low"] < values["high"]


def against_parent(entry: Checked) -> str:
    """One condition."""
    evidence, condition = entry["evidence"], entry["condition"]

    def draw(axes: Axes) -> None:
        for place, (name, part) in enumerate((("version before", "parent"), ("candidate", "candidate"))):
            found = evidence[part]
            if found["value"] is None:
                continue
            below, above = found["value"] - found["low"], found["high"] - found["value"]
            axes.errorbar(
                [found["value"]],
                [place],
                xerr=[[max(0.0, below)], [max(0.0, above)]],
                fmt="o",
                capsize=4,
                color=PALETTE[place],
                label=name,
            )
        sign = -1 if condition["direction"] == "higher" else 1
        base = condition["limit"] if condition["limit"] is not None else evidence["parent"]["value"]
        if base is not None:
            worst = base + sign * condition["tolerance"]
            axes.axvline(worst, color="black", linestyle="--", linewidth=1, label="accepted at worst")
        axes.set_yticks([])
        axes.set_ylim(-0.7, 1.7)
        axes.set_xlabel(condition["metric"])

    return svg(draw)


def by_version(versions: Sequence[Version], metric: str) -> str:
    """The metric of every candidate and of the version it came from; rejected ones are crosses."""
    found = [
        (one.number, entry["evidence"], decision(one))
        for one in versions
        for entry in checked(one)
        if entry["condition"]["metric"] == metric and entry["evidence"] is not None
    ]

    def draw(axes: Axes) -> None:
        for side, colour, part, label in (
            (-0.08, PALETTE[0], "parent", "version before"),
            (0.08, PALETTE[1], "candidate", "candidate"),
        ):
            points = [(n + side, evidence[part]) for n, evidence, _ in found if evidence[part]["value"] is not None]
            bounds = [(max(0.0, one["value"] - one["low"]), max(0.0, one["high"] - one["value"])) for _, one in points]
            places, values = [n for n, _ in points], [one["value"] for _, one in points]
            axes.errorbar(places, values, yerr=list(zip(*bounds, strict=True)), fmt="o", color=colour, label=label)
        rejected = [
            (n + 0.08, evidence["candidate"]["value"]) for n, evidence, told in found if told == Decision.REJECTED
        ]
        if rejected:
            axes.plot(*zip(*rejected, strict=True), "kx", markersize=8, label="rejected")
        axes.set_xticks([n for n, _, _ in found])
        axes.set_xlabel("version")
        axes.set_ylabel(metric)

    return svg(draw)
