"""The plots of a run's report, as SVG text. Each takes the steps of metrics.jsonl or the stages of summary.json."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import matplotlib

matplotlib.use("Agg")

from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000", "#999933")
"""Okabe and Ito's colours: told apart with every kind of colour vision."""
STYLE = {
    "svg.hashsalt": "windlass",
    "svg.fonttype": "none",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "legend.frameon": False,
    "legend.fontsize": 8,
}

Steps = Sequence[Mapping[str, Any]]


def series(steps: Steps, name: str) -> tuple[list[int], list[float]]:
    """(steps, values) of a metric where it is a number."""
    found = [(int(s["step"]), float(s[name])) for s in steps if _is_number(s.get(name))]
    return [step for step, _ in found], [value for _, value in found]


def names(steps: Steps, pattern: str) -> list[str]:
    """Metrics whose whole name matches, in order of appearance."""
    seen = dict.fromkeys(name for s in steps for name, value in s.items() if _is_number(value))
    return [name for name in seen if re.fullmatch(pattern, name)]


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def lines(steps: Steps, metric_names: Sequence[str], *, ylabel: str, log: bool = False) -> str | None:
    """A line per metric over the steps; none when there is nothing to draw."""
    drawn = [(name, *series(steps, name)) for name in metric_names]
    drawn = [d for d in drawn if d[1]]
    if not drawn:
        return None

    def draw(axes: Axes) -> None:
        for name, x, y in drawn:
            axes.plot(x, y, label=name, marker="o" if len(x) < 40 else None, markersize=2.5, linewidth=1.4)
        if log and all(value > 0 for _, _, y in drawn for value in y):
            axes.set_yscale("log")
        axes.set_xlabel("step")
        axes.set_ylabel(ylabel)

    return svg(draw)


def stacked_time(steps: Steps) -> str | None:
    """Seconds per phase, stacked over the steps; what contains others (`time/step`) or is part of one
    (`time/push/transfer`) stays out."""
    phases = [name for name in names(steps, r"time/[^/]+") if name not in ("time/step", "time/total", "time/elapsed")]
    rows = [s for s in steps if any(_is_number(s.get(name)) for name in phases)]
    if not rows:
        return None

    def draw(axes: Axes) -> None:
        x = [int(s["step"]) for s in rows]
        base = [0.0] * len(rows)
        for name in phases:
            y = [float(s[name]) if _is_number(s.get(name)) else 0.0 for s in rows]
            axes.bar(x, y, bottom=base, width=1.0, label=name.removeprefix("time/"))
            base = [b + v for b, v in zip(base, y, strict=True)]
        axes.set_xlabel("step")
        axes.set_ylabel("seconds")

    return svg(draw)


def by_cutoff(stages: Mapping[str, Mapping[str, Any]], metric: str) -> str | None:
    """A metric against K, one line per stage, with its intervals where the stage has them."""
    pattern = re.compile(rf"{re.escape(metric)}@(\d+)")
    drawn: list[tuple[str, list[int], list[float], list[tuple[float, float]]]] = []
    for stage, values in stages.items():
        found = sorted((int(m[1]), name) for name in values if (m := pattern.fullmatch(name)))
        if found:
            bounds = values.get("ci95") or {}
            y = [float(values[name]) for _, name in found]
            spans = [tuple(bounds.get(name, (v, v))) for (_, name), v in zip(found, y, strict=True)]
            drawn.append((stage, [k for k, _ in found], y, [(float(s[0]), float(s[1])) for s in spans]))
    if not drawn:
        return None

    def draw(axes: Axes) -> None:
        for stage, k, y, spans in drawn:
            (line,) = axes.plot(k, y, label=stage, marker="o", markersize=3, linewidth=1.4)
            if any(low < high for low, high in spans):
                axes.fill_between(k, [s[0] for s in spans], [s[1] for s in spans], color=line.get_color(), alpha=0.12)
        ticks = sorted({k for _, ks, _, _ in drawn for k in ks})
        axes.set_xscale("log")
        axes.set_xticks(ticks, [str(k) for k in ticks])
        axes.minorticks_off()
        axes.set_xlabel("K")
        axes.set_ylabel(f"{metric.upper()}@K")

    return svg(draw)


def frontier(points: Mapping[str, Mapping[str, Any]], x: str, y: str) -> str | None:
    """The points of a sweep by two of their means, joined in the order of their values, with deviations as crosses."""
    named = []
    for name, one in points.items():
        mean, std = one.get("mean") or {}, one.get("std") or {}
        if _is_number(mean.get(x)) and _is_number(mean.get(y)):
            value = name.rpartition("=")[2]
            named.append((value, mean[x], mean[y], std.get(x, 0.0), std.get(y, 0.0)))
    if len(named) < 2:
        return None
    named.sort(key=lambda one: (not _is_decimal(one[0]), float(one[0]) if _is_decimal(one[0]) else 0.0, one[0]))

    def draw(axes: Axes) -> None:
        values, right, up, right_std, up_std = zip(*named, strict=True)
        label = "mean and deviation over seeds"
        axes.errorbar(right, up, xerr=right_std, yerr=up_std, label=label, marker="o", markersize=3.5, elinewidth=0.7)
        for value, at_x, at_y in zip(values, right, up, strict=True):
            axes.annotate(value, (at_x, at_y), textcoords="offset points", xytext=(5, 4), fontsize=8)
        axes.set_xlabel(x)
        axes.set_ylabel(y)

    return svg(draw)


def _is_decimal(text: str) -> bool:
    return re.fullmatch(r"-?\d+(\.\d+)?(e-?\d+)?", text) is not None


def by_stratum(strata: Steps, name: str, *, ylabel: str, beside: str = "", interval: str = "") -> str | None:
    """Bars of a value by difficulty, one colour where the ranker discriminates and one where it does not.

    Args:
        strata: those of `strata.json`; ones without prompts have no bar.
        name: the value.
        ylabel: of the axis.
        beside: another value, drawn as a mark on the bar.
        interval: a pair of numbers, drawn as whiskers.
    """
    bins = sorted({int(s["difficulty"]) for s in strata})
    if not any(_is_number(s.get(name)) for s in strata):
        return None

    def draw(axes: Axes) -> None:
        labels = dict.fromkeys(bins, "")
        for side, discriminable in ((-0.2, False), (0.2, True)):
            mine = [s for s in strata if s["discriminable"] is discriminable and _is_number(s.get(name))]
            x = [bins.index(int(s["difficulty"])) + side for s in mine]
            told = "ranker discriminates" if discriminable else "ranker does not discriminate"
            axes.bar(x, [float(s[name]) for s in mine], width=0.38, label=told)
            marks = [(at, float(s[beside])) for at, s in zip(x, mine, strict=True) if _is_number(s.get(beside))]
            if marks:
                label = "oracle ranker" if discriminable else None
                axes.plot(*zip(*marks, strict=True), "k_", markersize=16, markeredgewidth=1.8, label=label)
            for at, s in zip(x, mine, strict=True):
                if s.get(interval):
                    axes.vlines(at, *map(float, s[interval]), color="black", linewidth=1)
        for s in strata:
            low, high = s["policy_rank_low"], s["policy_rank_high"]
            labels[int(s["difficulty"])] = f"{low}–{high}" if low < high else f"{low}"
        axes.axhline(0, color="black", linewidth=0.8)
        axes.set_xticks(range(len(bins)), [labels[number] for number in bins])
        axes.set_xlabel("rank of the ground truth by the policy before training")
        axes.set_ylabel(ylabel)

    return svg(draw)


def against_diagonal(
    drawn: Mapping[str, tuple[Sequence[float], Sequence[float]]], *, xlabel: str, ylabel: str, log: bool = False
) -> str:
    """(x, y) lines that would lie on the diagonal if both were equal.

    Args:
        log: logarithmic axes, where all values are above 0.
    """

    def draw(axes: Axes) -> None:
        values = [value for pair in drawn.values() for part in pair for value in part]
        low, high = min(values), max(values)
        if log and low > 0:
            axes.set_xscale("log")
            axes.set_yscale("log")
        else:
            low = min(low, 0.0)
        axes.plot([low, high], [low, high], color="black", linewidth=0.8, linestyle="--", label="equal")
        for name, (x, y) in drawn.items():
            axes.plot(x, y, label=name, marker="o", markersize=3, linewidth=1.4)
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)

    return svg(draw)


def svg(draw: Callable[[Axes], None]) -> str:
    """One plot in the style of all."""
    with plt.rc_context({**STYLE, "axes.prop_cycle": plt.cycler(color=PALETTE)}):
        figure, axes = plt.subplots(figsize=(5.6, 3.4), layout="constrained")
        try:
            draw(axes)
            add_legend(figure)
            buffer = io.StringIO()
            figure.savefig(buffer, format="svg", metadata={"Date": None})
        finally:
            plt.close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :]


def add_legend(figure: Figure) -> None:
    """Below the axes, where it covers no curve, in as many columns as the figure has room for."""
    for columns in range(4, 0, -1):
        legend = figure.legend(loc="outside lower center", ncols=columns)
        if columns == 1 or legend.get_window_extent().width <= figure.bbox.width:
            rows = -(-len(legend.get_texts()) // columns)
            figure.set_figheight(figure.get_figheight() + 0.17 * max(0, rows - 2))
            return
        legend.remove()
