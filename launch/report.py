"""`windlass report`: one HTML file with a run's tables and curves, readable without a server or a network."""

from __future__ import annotations

import errno
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from data.errors import RequestError
from launch.run_directory import read_json
from trainer.durable import write_text
from trainer.run_log import METRICS, read_metrics

STRATA = "strata.json"
CALIBRATION = "calibration"
"""Part of a critic's summary."""
CURVES = ("bins", "levels")
"""Parts of a calibration that are drawn, not told."""
NOT_FACTS = ("stages", "comparisons", "format", "sweep")
"""Parts of the summary that stand in tables of their own."""
TEMPLATES = Path(__file__).parent / "templates"
COUNTS = ("n", "runs", "diverged")
"""Columns of which none is the best."""
SHOWN_COLUMNS = rf"(hr|ndcg|recall|mrr|coverage|novelty|ild|repetition|reward|invalid)(@\d+)?(/.*)?|{'|'.join(COUNTS)}"
SMALLER_IS_BETTER = r"(invalid|repetition).*"
FAMILIES = ("hr", "ndcg", "recall", "mrr", "coverage", "novelty", "ild", "repetition", "reward", "invalid", *COUNTS)


def report_command(
    run: Annotated[Path, tyro.conf.Positional], /, output: Path | None = None, version: int | None = None
) -> None:
    """Write the HTML report of a run, of a registry or of a replay.

    Args:
        run: folder of a run, of a registry of `windlass continual`, or of a replay.
        output: file to write; none means report.html in the folder, in a registry reports/ for all its versions.
        version: page of this version of a registry; none means the page over all of them.
    """
    is_registry = (run / "registry.json").is_file()
    if version is not None and not is_registry:
        raise RequestError("--version", version, "with the folder of a registry")
    if is_registry:
        print(registry_report(run, output, version))
        return
    target = output or run / "report.html"
    if (run / "replay.json").is_file():
        from launch.continual.replay_report import replay_page

        replay_page(run).write(target)
    else:
        write_report(run, target)
    print(target)


def registry_report(root: Path, output: Path | None, version: int | None) -> Path:
    """Write the page of a version, or of every version and the one over all; returns the page that was asked for."""
    from launch.continual.registry import Registry
    from launch.continual.registry_report import registry_page, version_page, write_version_page

    registry = Registry(root)
    if output is not None:
        page = registry_page(registry) if version is None else version_page(registry, version)
        page.write(output)
        return output
    written = [write_version_page(registry, one) for one in (registry.numbers() if version is None else [version])]
    return written[-1] if version is not None else root / "reports" / "index.html"


HEADLINE = frozenset(
    {
        "job",
        "dataset",
        "steps",
        "ended by",
        "interrupted",
        "wall seconds",
        "peak pss gib",
        "engine/name",
        "engine/version",
        "engine/count",
        "learner/backend",
        "learner/zero stage",
        "learner/ranks",
        "reward/backend",
        "reward/requests",
        "policy gap/mean",
        "policy gap/max",
        "weight versions",
        "selection/metric",
        "selection/best step",
        "selection/best score",
        "calibration/expected calibration error",
        "calibration/normalised calibration error",
    }
)
"""Facts of the summary that stand at the top; the others follow at the end, folded."""


def write_report(run: Path, target: Path) -> None:
    """Write the report of a run folder.

    Raises:
        RequestError: the folder has neither metrics.jsonl nor summary.json, or one is damaged.
    """
    text = render(run)
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        write_text(target, text)
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise
        raise RequestError("--output", f"{target}: {error.strerror}", "a file that can be written") from error


def render(run: Path) -> str:
    """The report as HTML text."""
    import jinja2

    has_metrics, has_summary = (run / METRICS).is_file(), (run / "summary.json").is_file()
    if not has_metrics and not has_summary:
        raise RequestError("run", f"{run} has neither {METRICS} nor summary.json", "a run directory")
    steps = read_metrics(run / METRICS) if has_metrics else []
    summary = read_json(run / "summary.json") if has_summary else {}
    stages = _mappings(run, summary, "stages")
    comparisons = _mappings(run, summary, "comparisons")
    loader = jinja2.FileSystemLoader(TEMPLATES)
    template = jinja2.Environment(loader=loader, autoescape=True, undefined=jinja2.StrictUndefined).get_template(
        "report.html.j2"
    )
    config = run / "config.yaml"
    known = facts(summary)
    return template.render(
        title=f"windlass: {run.resolve().name}",
        subtitle=_subtitle(run, steps),
        facts=[fact for fact in known if fact["name"] in HEADLINE or fact["warn"]],
        remarks=[fact["value"] for fact in known if fact["name"].endswith("words")],
        details=[fact for fact in known if fact["name"] not in HEADLINE and not fact["name"].endswith("words")],
        stages=stage_tables(stages),
        comparisons=comparison_rows(comparisons),
        plots=plots(steps, stages)
        + part_plots(run)
        + strata_plots(run)
        + calibration_plots(run, summary)
        + frontier_plots(run, summary),
        last=sorted((name, _text(value)) for name, value in steps[-1].items()) if steps else [],
        config=config.read_text(encoding="utf-8", errors="replace") if config.is_file() else "",
    )


def _mappings(run: Path, summary: Mapping[str, Any], name: str) -> dict[str, Mapping[str, Any]]:
    """A part of the summary that maps names to mappings; absent means none."""
    part = summary.get(name) or {}
    if not isinstance(part, dict) or not all(isinstance(value, Mapping) for value in part.values()):
        raise RequestError(f"{run / 'summary.json'}: {name}", f"{part!r:.60}", "an object of objects")
    return part


def _subtitle(run: Path, steps: Sequence[Mapping[str, Any]]) -> str:
    words = [f"{len(steps)} steps"] if steps else []
    environment = run / "environment.json"
    if environment.is_file():
        try:
            entries = json.loads(environment.read_text(encoding="utf-8"))
        except ValueError as error:
            raise RequestError(str(environment), f"is not JSON ({error})", "the file as the run wrote it") from error
        entry = entries[-1] if isinstance(entries, list) and entries else entries or {}
        if not isinstance(entry, Mapping):
            raise RequestError(str(environment), f"{entry!r:.60}", "a list of objects, as the run wrote it")
        commit = entry.get("commit")
        words += [f"commit {str(commit)[:10]}{' with changes' if entry.get('dirty') else ''}"] if commit else []
        machine = entry.get("hardware") or {}
        words += [f"{machine['cores']} cores, {machine['processor']}"] if machine.get("processor") else []
        words += list(machine.get("cards") or [])
    return " · ".join(words)


def facts(summary: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The summary's values outside the stages, flat, with a warning on the ones a reader must not miss."""
    shown: list[dict[str, Any]] = []
    for name, value in flat({k: without_curves(v) for k, v in summary.items() if k not in NOT_FACTS}):
        warn = (name == "interrupted" and value is True) or (name.endswith("violations") and bool(value))
        shown.append({"name": name.replace("_", " "), "value": _text(value), "warn": warn})
    return shown


def without_curves(value: object) -> object:
    """A part of the summary without the values that are drawn (`CURVES`)."""
    if not isinstance(value, Mapping):
        return value
    return {name: without_curves(below) for name, below in value.items() if name not in CURVES}


def flat(content: Mapping[str, Any], prefix: str = "") -> list[tuple[str, Any]]:
    """(name, value) pairs of a nested mapping, names joined by a slash."""
    pairs: list[tuple[str, Any]] = []
    for name, value in content.items():
        if isinstance(value, Mapping):
            pairs += flat(value, f"{prefix}{name}/")
        else:
            pairs.append((prefix + name, value))
    return pairs


def _text(value: object) -> str:
    if isinstance(value, bool) or value is None:
        return str(value).lower() if value is not None else "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        numbers = [v for v in value if isinstance(v, int)]
        if len(numbers) == len(value) > 6:
            return f"{value[0]} … {value[-1]} ({len(value)})"
        return ", ".join(map(_text, value))
    return str(value)


def stage_tables(stages: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """A table per family of metrics (the rare ones together), the best value of each column marked."""
    values = {name: dict(flat({k: v for k, v in s.items() if k != "ci95"})) for name, s in stages.items()}
    columns = [c for c in dict.fromkeys(c for row in values.values() for c in row) if re.fullmatch(SHOWN_COLUMNS, c)]
    columns.sort(key=_column_order)
    best: dict[str, float] = {}
    for column in columns:
        numbers = [float(row[column]) for row in values.values() if isinstance(row.get(column), int | float)]
        if numbers and column not in COUNTS and len(set(numbers)) > 1:
            best[column] = min(numbers) if re.fullmatch(SMALLER_IS_BETTER, column) else max(numbers)
    tables = []
    for families in (*((name,) for name in FAMILIES[:4]), FAMILIES[4:]):
        chosen = [c for c in columns if re.split(r"[@/]", c)[0] in families]
        if chosen:
            rows = [
                {"name": name, "cells": [_cell(row, stages[name].get("ci95") or {}, c, best) for c in chosen]}
                for name, row in values.items()
            ]
            tables.append({"columns": chosen, "rows": rows})
    return tables


def _cell(
    row: Mapping[str, Any], intervals: Mapping[str, Any], column: str, best: Mapping[str, float]
) -> dict[str, Any]:
    value, span = row.get(column), intervals.get(column)
    return {
        "text": f"{value:.4f}" if isinstance(value, float) else _text(value),
        "interval": f"{span[0]:.4f} – {span[1]:.4f}" if span else "",
        "best": value is not None and column in best and value == best[column],
    }


def _column_order(column: str) -> tuple[int, int, str]:
    family = re.split(r"[@/]", column)[0]
    cutoff = re.search(r"@(\d+)", column)
    return FAMILIES.index(family), int(cutoff[1]) if cutoff else 0, column


def comparison_rows(comparisons: Mapping[str, Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Rows of `{"rl - sft": {"ndcg@10": {"mean", "low", "high"}}}`."""
    rows = []
    for name, metrics in comparisons.items():
        for metric, d in metrics.items():
            if isinstance(d, Mapping) and all(isinstance(d.get(n), int | float) for n in ("mean", "low", "high")):
                rows.append(
                    {
                        "name": name,
                        "metric": metric,
                        "mean": f"{d['mean']:+.4f}",
                        "interval": f"[{d['low']:+.4f}, {d['high']:+.4f}]",
                        "apart": not d["low"] <= 0 <= d["high"],
                    }
                )
    return rows


def calibration_plots(run: Path, summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """How the variances of a critic fit its errors, over all gains and for each need."""
    told = summary.get(CALIBRATION)
    if told is None:
        return []
    from launch import report_plots as draw

    try:
        each = {"all needs": told, **told["needs"]} if len(told["needs"]) > 1 else dict(told["needs"])
        quantiles = {name: (one["levels"]["level"], one["levels"]["share_below"]) for name, one in each.items()}
        errors = {
            name: (one["bins"]["predicted_deviation"], one["bins"]["observed_error"]) for name, one in each.items()
        }
    except (KeyError, TypeError) as error:
        found = f"{told!r:.60} ({error!r})"
        raise RequestError(f"{run / 'summary.json'}: {CALIBRATION}", found, "what a critic job wrote") from error
    named = [
        (
            "Calibration: share of gains below their predicted quantile",
            draw.against_diagonal(quantiles, xlabel="level of the quantile", ylabel="share of gains below it"),
        ),
        (
            "Reliability: predicted deviation against error",
            draw.against_diagonal(errors, xlabel="predicted deviation", ylabel="root mean squared error", log=True),
        ),
    ]
    return [{"title": title, "svg": svg} for title, svg in named]


FRONTIERS = (("novelty@10", "recall@10"), ("novelty@10", "reward@10"), ("ild@10", "recall@10"))
"""Measures that a sweep trades against each other: what lies to the right, and what lies above."""


def frontier_plots(run: Path, summary: Mapping[str, Any]) -> list[dict[str, str]]:
    """Accuracy against novelty and diversity over the points of a sweep."""
    points = _mappings(run, summary, "sweep")
    if not points:
        return []
    from launch import report_plots as draw

    found = []
    for x, y in FRONTIERS:
        drawn = draw.frontier(points, x, y)
        if drawn is not None:
            found.append({"title": f"Frontier: {y} against {x}", "svg": drawn})
    return found


def part_plots(run: Path) -> list[dict[str, str]]:
    """The plots of runs that lie inside this one, as those of the demo's stages do, with their names in the titles."""
    found = []
    for path in sorted(run.glob(f"*/{METRICS}"), key=lambda path: path.stat().st_mtime, reverse=True):
        found += [{**plot, "title": f"{path.parent.name}: {plot['title']}"} for plot in plots(read_metrics(path), {})]
    return found


def strata_plots(run: Path) -> list[dict[str, str]]:
    """Where the reward helps, if `windlass strata` was asked about the run."""
    if not (run / STRATA).is_file():
        return []
    from launch import report_plots as draw

    content = read_json(run / STRATA)
    strata = content.get("strata")
    keys = {"difficulty", "discriminable", "policy_rank_low", "policy_rank_high"}
    if not isinstance(strata, list) or not all(isinstance(s, Mapping) and keys <= set(s) for s in strata):
        raise RequestError(f"{run / STRATA}: strata", f"{strata!r:.60}", "what `windlass strata` wrote")
    ranks = draw.by_stratum(strata, "correction", ylabel="policy rank − ranker rank", beside="oracle_correction")
    metric = str(content.get("metric")).upper()
    gain = draw.by_stratum(strata, "gain", ylabel=f"{metric} after − before", interval="gain_ci95")
    named = [("Rank correction of the reward by difficulty", ranks), (f"{metric} gained by difficulty", gain)]
    return [{"title": title, "svg": svg} for title, svg in named if svg is not None]


def plots(steps: Sequence[Mapping[str, Any]], stages: Mapping[str, Mapping[str, Any]]) -> list[dict[str, str]]:
    """The plots that the run has data for."""
    from launch import report_plots as draw

    evaluated = draw.names(steps, r"(?:.*/)?(?:hr|ndcg)@\d+")
    candidates = [
        ("HR by K", draw.by_cutoff(stages, "hr")),
        ("NDCG by K", draw.by_cutoff(stages, "ndcg")),
        ("Reward", draw.lines(steps, draw.names(steps, r"reward/mean"), ylabel="mean reward")),
        ("Reward within groups", draw.lines(steps, draw.names(steps, r"reward/(std|hit)"), ylabel="share, reward")),
        ("Loss", draw.lines(steps, draw.names(steps, r"(?!tokens/)(?:.*/)?(?:loss|nll)"), ylabel="loss")),
        ("Terms of the critics", draw.lines(steps, draw.names(steps, r"td|gap|grounding"), ylabel="mean over rows")),
        ("Values of the first critic", draw.lines(steps, draw.names(steps, r"(data|policy)_value"), ylabel="value")),
        ("NDCG while training", draw.lines(steps, [n for n in evaluated if "ndcg" in n], ylabel="NDCG@K")),
        ("AUC and its windows", draw.lines(steps, draw.names(steps, r"auc|wpauc@\d+"), ylabel="share of pairs")),
        ("HR while training", draw.lines(steps, [n for n in evaluated if "hr@" in n], ylabel="HR@K")),
        (
            "Policy gap: engine against learner",
            draw.lines(steps, draw.names(steps, r"policy_gap/.+|policy_gap"), ylabel="|Δ log p| per token", log=True),
        ),
        ("Legal mass", draw.lines(steps, draw.names(steps, r"(?:.*/)?legal_mass(?:/.*)?"), ylabel="probability")),
        ("KL and entropy", draw.lines(steps, draw.names(steps, r"(?:.*/)?(?:kl|entropy)(?:/.*)?"), ylabel="nats")),
        ("Time per phase", draw.stacked_time(steps)),
    ]
    return [{"title": title, "svg": svg} for title, svg in candidates if svg is not None]
