"""`windlass results`: regenerate a table of docs/results.md.

`docs/results/NAME.json` says which commands measure the table and holds what they measured:

    {"format": 1, "title": "...", "columns": {"NDCG@10": "metrics.ndcg@10"}, "note": "...",
     "rows": [{"name": "SFT", "command": ["eval", "runs/x", "--data", "datasets/y"],
               "result": null | {...}, "seconds": null | 12.3, "commit": null | "..."}]}

A row without a result is measured by running `windlass COMMAND --json FILE`, after the commands of `before` (training,
which continues by itself); rows with the same command share one run, and `part` says which part of the answer a row
keeps. What several rows begin with (a model, a ranker, a log) is a step of the table's `shared`:

    "shared": [{"command": ["train", "z"], "makes": "runs/z/summary.json", "seconds": null, "commit": null}]

Its command runs once, before the first row that is measured, unless the file that it `makes` is there already.

The file is saved after each row and shared step, so an interrupted run continues with the next one, and
`--max-minutes` ends it between two of them. The table then replaces what stands between the two markers of NAME in
docs/results.md; what was not measured says so. Rows may hold a `result` and no command: published numbers. With
`"commands": true` a second table below tells each row's commands, with its `seed`, its commit and its seconds.

`"page": "benchmarks.md"` puts a table on another page of docs than results.md, and `plots` draws its rows into files
beside it (`launch.result_plots`).
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import tyro

from data.errors import RequestError, RunError
from launch.cli import split_command
from launch.commands import COMMANDS
from launch.provenance import ROOT, commit
from launch.run_directory import SUMMARY, read_json
from trainer.durable import write_text

FORMAT = 1
PAGE = "results.md"
TABLES = ("docs/results", "docs/results.md", "docs/benchmarks.md", "docs/images")
"""What this command writes in the checkout; earlier rows change nothing that later ones run."""
Runner = Callable[[Sequence[str]], Mapping[str, Any]]


def results_command(
    names: Annotated[tuple[str, ...], tyro.conf.Positional] = (),
    /,
    max_minutes: float = 60.0,
    again: bool = False,
    only_render: bool = False,
    docs: Path = ROOT / "docs",
) -> dict[str, Any]:
    """Measure what is missing of a table of the docs and write the table.

    Args:
        names: tables, docs/results/NAME.json; none means all.
        max_minutes: no new row is begun after this time.
        again: measure every row that has a command again.
        only_render: measure nothing, write the tables from what is there.
        docs: folder of the documentation.
    """
    there = sorted(path.stem for path in (docs / "results").glob("*.json"))
    for name in names:
        if name not in there:
            raise RequestError("results", name, ", ".join(there) or f"none: {docs / 'results'} holds no table")
    if not there:
        raise RequestError("--docs", f"{docs / 'results'} holds no table", "a folder with results/NAME.json")
    deadline = time.monotonic() + 60 * max_minutes
    answer: dict[str, Any] = {"tables": {}}
    for name in names or there:
        path = docs / "results" / f"{name}.json"
        if not only_render:
            measure(path, run_windlass, deadline=deadline, again=again)
        missing = missing_rows(read_table(path))
        answer["tables"][name] = {"missing": missing}
        print(f"{name}: {'complete' if not missing else 'still to measure: ' + ', '.join(missing)}")
    render(docs, list(names or there))
    return answer


def read_table(path: Path) -> dict[str, Any]:
    """A table file.

    Raises:
        RequestError: unknown format, or a part is missing.
    """
    content = read_json(path)
    if content.get("format") != FORMAT:
        raise RequestError(str(path), f"format {content.get('format')!r}", f"format {FORMAT}")
    if not isinstance(content.get("rows"), list) or not isinstance(content.get("columns"), dict):
        raise RequestError(str(path), "no rows or no columns", "rows and columns as in launch/results.py")
    for title, place in content["columns"].items():
        if not isinstance(place, str):
            raise RequestError(f"{path}: column {title}", repr(place), "the dotted place of a value, as text")
    for step in content.get("shared", ()):
        if not isinstance(step, dict) or not step.get("command") or not isinstance(step.get("makes"), str):
            raise RequestError(str(path), f"shared step {step!r:.60}", "a command and the file that it makes")
    for row in content["rows"]:
        if not isinstance(row, dict) or "name" not in row or not ("command" in row or row.get("result") is not None):
            raise RequestError(str(path), f"row {row!r:.60}", "a name, and a command or a result")
    return content


def missing_rows(table: Mapping[str, Any]) -> list[str]:
    """Names of the rows without a result."""
    return [row["name"] for row in table["rows"] if row.get("result") is None]


def measure(
    path: Path, runner: Runner, *, deadline: float, again: bool = False, now: Callable[[], float] = time.monotonic
) -> None:
    """Run the commands of the rows that miss a result, saving after each, until `deadline`."""
    table = read_table(path)
    state = commit(besides=TABLES)
    source = f"{state['commit']} with changes" if state["dirty"] else state["commit"]
    answers: dict[tuple[str, ...], tuple[Mapping[str, Any], float]] = {}
    wanted = [row for row in table["rows"] if "command" in row and (again or row.get("result") is None)]
    if wanted and not make_shared(path, table, runner, deadline=deadline, source=source, now=now):
        return
    for row in wanted:
        command = tuple(row["command"])
        if command not in answers:
            if now() >= deadline:
                return
            started = now()
            for earlier in row.get("before", ()):
                runner(earlier)
            answers[command] = runner(row["command"]), round(now() - started, 1)
        answer, row["seconds"] = answers[command]
        row["result"] = kept_part(path, row, answer)
        row["commit"] = source
        write_text(path, json.dumps(table, indent=1) + "\n")


def make_shared(
    path: Path,
    table: Mapping[str, Any],
    runner: Runner,
    *,
    deadline: float,
    source: str | None,
    now: Callable[[], float],
) -> bool:
    """Run the shared steps that are not done, saving after each; returns whether all are done before `deadline`.

    Raises:
        RunError: a step ended without the file that it makes.
    """
    for step in table.get("shared", ()):
        made = Path(step["makes"])
        if is_made(made):
            continue
        if now() >= deadline:
            return False
        started = now()
        runner(step["command"])
        if not is_made(made):
            raise RunError(f"windlass {' '.join(step['command'])} ended without {made}")
        step["seconds"], step["commit"] = round(now() - started, 1), source
        write_text(path, json.dumps(table, indent=1) + "\n")
    return True


def is_made(path: Path) -> bool:
    """Whether a shared step has come to its end: its file is there, and is no summary of an interrupted run."""
    if not path.is_file():
        return False
    return path.name != SUMMARY or not read_json(path).get("interrupted")


def kept_part(path: Path, row: Mapping[str, Any], answer: Mapping[str, Any]) -> dict[str, Any]:
    """What a row keeps of the answer of its command.

    Raises:
        RequestError: the answer has no such part.
    """
    part = lookup(answer, row["part"]) if "part" in row else answer
    if not isinstance(part, Mapping):
        raise RequestError(f"{path}: part of {row['name']}", row.get("part"), f"one of {', '.join(answer)}")
    return dict(part)


def run_windlass(command: Sequence[str]) -> Mapping[str, Any]:
    """Run a windlass command in a process of its own and return its JSON answer (empty where it gives none).

    Raises:
        RunError: it did not end with exit code 0.
    """
    answers = COMMANDS[split_command(list(command))[0]].answers
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / "answer.json"
        wanted = ["--json", str(target)] if answers else []
        done = subprocess.run([sys.executable, "-m", "launch.cli", *command, *wanted], check=False)
        if done.returncode != 0:
            raise RunError(f"windlass {' '.join(command)} ended with exit code {done.returncode}")
        return read_json(target) if answers else {}


def render(docs: Path, names: Sequence[str]) -> None:
    """Write the tables between their markers on their pages, and draw their plots.

    Raises:
        RequestError: a page has not exactly one pair of markers for a table.
    """
    pages: dict[Path, str] = {}
    for name in names:
        table = read_table(docs / "results" / f"{name}.json")
        page = docs / table.get("page", PAGE)
        text = pages.get(page) or (page.read_text(encoding="utf-8") if page.is_file() else "")
        begin, end = f"<!-- results:{name} -->", f"<!-- /results:{name} -->"
        if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
            raise RequestError(str(page), f"no place for the table {name}", f"one pair of lines {begin} and {end}")
        before, after = text.index(begin) + len(begin), text.index(end)
        pages[page] = f"{text[:before]}\n{markdown(table)}\n{text[after:]}"
        draw_plots(docs, table)
    for page, text in pages.items():
        write_text(page, text)


def draw_plots(docs: Path, table: Mapping[str, Any]) -> None:
    """Draw the plots of a table that have something to show."""
    if "plots" not in table:
        return
    from launch.result_plots import FrontierPlot, ResultPlot

    for plot in table["plots"]:
        kind = FrontierPlot if "frontier" in plot else ResultPlot
        drawn = kind.model_validate(plot).svg(table["rows"])
        if drawn is not None:
            write_text(docs / plot["file"], drawn + "\n")


def markdown(table: Mapping[str, Any]) -> str:
    """The table as Markdown; a missing value is a dash, never a zero."""
    columns: Mapping[str, str] = table["columns"]
    lines = [f"**{table['title']}**", ""] if table.get("title") else []
    lines += ["| | " + " | ".join(columns) + " |", "|---|" + "---:|" * len(columns)]
    for row in table["rows"]:
        cells = [_cell(lookup(row.get("result"), path)) for path in columns.values()]
        if row.get("result") is None:
            cells[0] = "not run"
        lines.append(f"| {row['name']} | " + " | ".join(cells) + " |")
    if table.get("note"):
        lines += ["", str(table["note"])]
    if table.get("commands"):
        lines += ["", *commands(table)]
    return "\n".join(lines)


def commands(table: Mapping[str, Any]) -> list[str]:
    """Lines that say how each row was measured: commands, seed, commit and seconds, folded away on the page."""
    lines = ["<details><summary>Commands, seeds and commits</summary>", "", *_COMMANDS_HEAD]
    steps = [{"name": "for all", **step} for step in table.get("shared", ())]
    for row in [*steps, *table["rows"]]:
        if "command" not in row:
            continue
        told = "<br>".join(f"`windlass {' '.join(command)}`" for command in [*row.get("before", ()), row["command"]])
        source = (row.get("commit") or "–")[:9] + (" with changes" if " " in (row.get("commit") or "") else "")
        seed = row.get("seed", lookup(row.get("result"), "settings.seed"))
        lines.append(f"| {row['name']} | {told} | {_cell(seed)} | {source} | {_cell(row.get('seconds'))} |")
    return [*lines, "", "</details>"]


_COMMANDS_HEAD = ("| | commands | seed | commit | seconds |", "|---|---|---:|---|---:|")


def lookup(result: object, path: str) -> object:
    """The value at `a.b.0.c`; names may hold an @ but no dot. None when it leads nowhere."""
    for part in path.split("."):
        if isinstance(result, list) and part.isdecimal() and int(part) < len(result):
            result = result[int(part)]
            continue
        if not isinstance(result, Mapping) or part not in result:
            return None
        result = result[part]
    return result


def _cell(value: object) -> str:
    if isinstance(value, Mapping) and {"mean", "low", "high"} <= set(value):
        return f"{value['mean']:+.4f} [{value['low']:+.4f}, {value['high']:+.4f}]"
    if value is None or (isinstance(value, float) and not math.isfinite(value)):
        return "–"
    if isinstance(value, float):
        if abs(value) >= 10_000:
            return f"{value:,.0f}"
        return f"{value:.4f}" if abs(value) < 1 else f"{value:.4g}"
    if isinstance(value, bool):
        return "yes" if value else "no"
    return str(value)
