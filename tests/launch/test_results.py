"""Contract: what the rows of a table share is done once and before them, a table that was cut off goes on where it
stopped, the page tells each row's commands, and the commands of the tables in docs/results are ones that a user can
type: their recipes resolve, with the seed that the row says, and what is evaluated is what was trained.

Rows, parts, times and markers are checked in tests/launch/test_report.py. The commands are not run here.
"""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from data.errors import RequestError, RunError
from launch import cli
from launch.commands import COMMANDS
from launch.config import RECIPES
from launch.continual.replay_command import read_replay
from launch.provenance import ROOT, commit
from launch.result_plots import FrontierPlot, ResultPlot
from launch.results import commands, is_made, lookup, markdown, measure, read_table, render
from launch.train_arguments import resolve, split_arguments

TABLES = sorted((ROOT / "docs" / "results").glob("*.json"))


class Runner:
    """Answers commands, and makes the files that they would make."""

    def __init__(self, makes: dict[str, Path]) -> None:
        self.makes = makes
        self.ran: list[str] = []

    def __call__(self, command: Sequence[str]) -> dict[str, Any]:
        self.ran.append(" ".join(command))
        if command[-1] in self.makes:
            self.makes[command[-1]].write_text("{}")
        return {"n": len(self.ran)}


def write_table(folder: Path) -> Path:
    content = {
        "format": 1,
        "columns": {"rows": "n"},
        "commands": True,
        "shared": [{"command": ["train", name], "makes": str(folder / name)} for name in ("ranker", "sft")],
        "rows": [
            {"name": "start", "seed": 1, "command": ["eval", "sft"]},
            {"name": "grpo", "seed": 1, "before": [["train", "grpo"]], "command": ["eval", "grpo"]},
        ],
    }
    path = folder / "t.json"
    path.write_text(json.dumps(content))
    return path


def test_shared_steps_run_once_and_first(tmp_path: Path) -> None:
    path = write_table(tmp_path)
    runner = Runner({"ranker": tmp_path / "ranker", "sft": tmp_path / "sft"})
    clock = iter(range(100))
    measure(path, runner, deadline=2, now=lambda: next(clock))
    assert runner.ran == ["train ranker"]
    assert read_table(path)["shared"][0]["seconds"] == 1
    measure(path, runner, deadline=math.inf)
    assert runner.ran == ["train ranker", "train sft", "eval sft", "train grpo", "eval grpo"]
    assert [row["result"]["n"] for row in read_table(path)["rows"]] == [3, 5]
    (tmp_path / "sft").unlink()
    measure(path, runner, deadline=math.inf)
    assert len(runner.ran) == 5, "nothing is missing, so nothing that rows begin with is made"


def test_the_seed_of_a_row_is_that_of_its_answer_where_none_is_given() -> None:
    row = {"name": "a", "command": ["bench", "x"], "result": {"settings": {"seed": 7}}}
    assert commands({"rows": [row]})[-3].split("|")[3] == " 7 "
    assert commands({"rows": [{**row, "seed": 3}]})[-3].split("|")[3] == " 3 "


def test_a_shared_step_without_its_file_is_an_error(tmp_path: Path) -> None:
    runner = Runner({"ranker": tmp_path / "ranker"})
    with pytest.raises(RunError, match="train sft ended without"):
        measure(write_table(tmp_path), runner, deadline=math.inf)


def test_the_summary_of_an_interrupted_run_is_nothing_made(tmp_path: Path) -> None:
    summary = tmp_path / "summary.json"
    assert not is_made(summary)
    summary.write_text('{"interrupted": true}')
    assert not is_made(summary)
    summary.write_text('{"interrupted": false}')
    assert is_made(summary)


def test_a_shared_step_that_names_no_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "t.json"
    path.write_text(json.dumps({"format": 1, "columns": {}, "rows": [], "shared": [{"command": ["train", "x"]}]}))
    with pytest.raises(RequestError, match="the file that it makes"):
        read_table(path)


def test_the_page_tells_how_rows_were_measured(tmp_path: Path) -> None:
    path = write_table(tmp_path)
    measure(path, Runner({"ranker": tmp_path / "ranker", "sft": tmp_path / "sft"}), deadline=math.inf)
    lines = markdown(read_table(path)).splitlines()
    told = next(line for line in lines if line.startswith("| grpo | `"))
    assert told.startswith("| grpo | `windlass train grpo`<br>`windlass eval grpo` | 1 | ")
    assert str(commit()["commit"])[:9] in told
    assert sum(line.startswith("| for all | `windlass train ") for line in lines) == 2


def test_a_difference_shows_its_interval() -> None:
    row = {"name": "grpo", "result": {"d": {"mean": 0.002, "low": -0.0026, "high": 0.0071, "base": 0.1}}}
    assert markdown({"columns": {"to SFT": "d"}, "rows": [row]}).splitlines()[-1] == (
        "| grpo | +0.0020 [-0.0026, +0.0071] |"
    )


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_no_column_is_empty(path: Path) -> None:
    table = read_table(path)
    results = [row["result"] for row in table["rows"] if row.get("result")]
    for name, at in table["columns"].items():
        assert not results or any(lookup(result, at) is not None for result in results), f"{name}: {at}"


def test_a_path_leads_into_lists() -> None:
    assert lookup({"runs": [{"x": 1}, {"x": 2}]}, "runs.1.x") == 2
    assert lookup({"runs": [{"x": 1}]}, "runs.1.x") is None
    assert lookup({"runs": [{"x": 1}]}, "runs.x") is None


def test_changes_of_named_paths_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[str, ...]] = []

    def git(*arguments: str) -> str:
        asked.append(arguments)
        return ""

    monkeypatch.setattr("launch.provenance._git", git)
    assert not commit(besides=("docs/results",))["dirty"]
    assert asked[-1] == ("status", "--porcelain", "--", ".", ":(exclude)docs/results")


@pytest.mark.parametrize("path", TABLES, ids=lambda path: path.stem)
def test_the_commands_of_the_tables_can_be_typed(path: Path) -> None:
    table = read_table(path)
    for step in table.get("shared", ()):
        check_command(step["command"], step.get("seed"))
    for row in table["rows"]:
        trained = [check_command(command, row.get("seed")) for command in row.get("before", ())]
        if "command" not in row:
            continue
        check_command(row["command"], row.get("seed"))
        if trained and row["command"][0] == "eval":
            assert (ROOT / row["command"][1]).is_relative_to(ROOT / trained[-1]), row["name"]


def check_command(command: list[str], seed: int | None) -> Path:
    """The command is understood and has the seed; returns the run directory of a training."""
    name, rest = cli.split_command(list(command))
    if name == "train":
        recipe, run_dir, _, overrides = split_arguments(rest)
        job, folder = resolve(recipe, run_dir, overrides)
        assert seed in (None, job.seed)
        return folder
    if name == "replay":
        known, _ = read_replay(rest)
        assert seed in (None, known.seed)
        return Path()
    body = cli.load(name, COMMANDS[name])

    @functools.wraps(body)
    def nothing(*positional: Any, **named: Any) -> None:
        return None

    cli.parse_and_call(name, COMMANDS[name], nothing, rest)
    if seed is not None:
        assert rest[rest.index("--seed") + 1] == str(seed)
    return Path()


def test_the_objectives_table_has_every_recipe_of_the_methods() -> None:
    rows = read_table(ROOT / "docs" / "results" / "objectives.json")["rows"]
    there = {command[1] for row in rows for command in row.get("before", ())}
    methods = {path.stem for path in RECIPES.glob("*.yaml") if "Run `windlass demo`" in path.read_text()}
    assert methods
    assert methods <= there


def test_plots_show_the_rows_that_have_values(tmp_path: Path) -> None:
    def row(length: int, width: int, seconds: float | None) -> dict[str, Any]:
        return {"name": f"{length}", "result": {"at": {"length": length, "width": width}, "s": seconds, "none": None}}

    rows = [row(500, 16, 3.0), row(100, 16, 1.0), row(100, 4, 9.0), {"name": "not run", "result": None}]
    plot = ResultPlot(
        file="images/x.svg",
        x="at.length",
        xlabel="tokens",
        ylabel="seconds",
        lines={"ours": "s", "absent": "none"},
        where={"at.width": 16},
    )
    assert plot.points(rows, "s") == [(100.0, 1.0), (500.0, 3.0)]
    drawn = plot.svg(rows)
    assert drawn is not None
    assert drawn.startswith("<svg")
    assert ">ours<" in drawn
    assert ">absent<" not in drawn
    assert plot.svg(rows[:1]) is None
    assert plot.svg(rows) == drawn


def test_a_frontier_joins_the_points_of_sweeps() -> None:
    def row(alpha: int, right: float) -> dict[str, Any]:
        mean = {"novelty@10": right, "recall@10": 0.1}
        return {"name": f"{alpha}", "result": {"over": "a", "points": {f"a={alpha}": {"mean": mean, "std": {}}}}}

    diverged = {"name": "0", "result": {"over": "a", "points": {"a=0": {"mean": {}, "std": {}}}}}
    rows = [row(10, 0.3), row(3, 0.2), diverged, {"name": "not run", "result": None}]
    plot = FrontierPlot(file="images/x.svg", frontier=("novelty@10", "recall@10"), where={"over": "a"})
    drawn = plot.svg(rows)
    assert drawn is not None
    for shown in (">10<", ">3<"):
        assert shown in drawn
    assert plot.svg(rows[1:]) is None
    assert plot.svg([row(1, 0.1), {**rows[0], "result": {**rows[0]["result"], "over": "b"}}]) is None


def test_a_table_may_stand_on_another_page(tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "images").mkdir()
    for name, page in (("t", "other.md"), ("u", "other.md")):
        content = {
            "format": 1,
            "page": page,
            "columns": {"rows": "n"},
            "plots": [{"file": f"images/{name}.svg", "x": "n", "xlabel": "n", "ylabel": "n", "lines": {"n": "n"}}],
            "rows": [{"name": f"{name} {n}", "result": {"n": n}} for n in (1, 2)],
        }
        (tmp_path / "results" / f"{name}.json").write_text(json.dumps(content))
    (tmp_path / "other.md").write_text(
        "".join(f"<!-- results:{name} -->\n<!-- /results:{name} -->\n" for name in ("t", "u"))
    )
    render(tmp_path, ["t", "u"])
    text = (tmp_path / "other.md").read_text()
    assert "| t 2 | 2 |" in text
    assert "| u 1 | 1 |" in text
    assert (tmp_path / "images" / "u.svg").read_text().startswith("<svg")
