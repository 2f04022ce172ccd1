"""Plots of a results table: values of its rows against a setting, a line per value.

"plots": [{"file": "images/x.svg", "x": "settings.prompt_len", "xlabel": "prompt tokens", "ylabel": "seconds",
           "where": {"settings.width": 16}, "lines": {"this engine": "ways.ours.seconds.median"}},
          {"file": "images/y.svg", "frontier": ["novelty@10", "recall@10"], "where": {"over": "laac.alpha"}}]
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.ticker import LogLocator, NullFormatter
from pydantic import Field

from data.settings import Settings
from launch.report_plots import frontier, svg
from launch.results import lookup


class DocsPlot(Settings):
    """A plot of some rows."""

    file: str = Field(pattern=r"^images/[\w.-]+\.svg$")
    """Where it is written, below docs."""
    where: dict[str, int | float | str] = Field(default_factory=dict)
    """Places and the values that a row must have there to be drawn."""

    def kept(self, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Results of the rows that are drawn."""
        results = [row.get("result") for row in rows]
        return [one for one in results if all(lookup(one, name) == value for name, value in self.where.items())]


class FrontierPlot(DocsPlot):
    """Two means of sweeps against each other, over the points of all rows."""

    frontier: tuple[str, str]
    """What lies to the right, and what lies above."""

    def svg(self, rows: Sequence[Mapping[str, Any]]) -> str | None:
        """The plot; none where fewer than two points have both means."""
        points: dict[str, Any] = {}
        for one in self.kept(rows):
            points |= one["points"]
        return frontier(points, *self.frontier)


class ResultPlot(DocsPlot):
    """A line per value against a setting."""

    x: str
    """Place of the horizontal value in a row's result."""
    xlabel: str
    ylabel: str
    lines: dict[str, str]
    """Places of the values by the label of their line."""
    log: bool = True
    """A logarithmic vertical axis: ways that differ by orders of magnitude."""

    def points(self, rows: Sequence[Mapping[str, Any]], place: str) -> list[tuple[float, float]]:
        """(x, y) of the rows that have both, by x."""
        pairs = [(lookup(one, self.x), lookup(one, place)) for one in self.kept(rows)]
        return sorted(
            (float(x), float(y)) for x, y in pairs if isinstance(x, int | float) and isinstance(y, int | float)
        )

    def svg(self, rows: Sequence[Mapping[str, Any]]) -> str | None:
        """The plot of the rows; none where no line has two points (one alone is a mark beside the others)."""
        drawn = {label: self.points(rows, place) for label, place in self.lines.items()}
        if max(map(len, drawn.values())) < 2:
            return None
        drawn = {label: points for label, points in drawn.items() if points}

        def draw(axes: Axes) -> None:
            for label, points in drawn.items():
                axes.plot(*zip(*points, strict=True), label=label, marker="o", markersize=3.5, linewidth=1.4)
            ticks = sorted({x for points in drawn.values() for x, _ in points})
            axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
            if self.log:
                axes.set_yscale("log")
                axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
                axes.yaxis.set_major_formatter("{x:g}")
                axes.yaxis.set_minor_formatter(NullFormatter())
            else:
                axes.set_ylim(bottom=0)
            axes.set_xlabel(self.xlabel)
            axes.set_ylabel(self.ylabel)

        return svg(draw)
