"""Contract: a ratio that fell by more than the tolerance is told and ends with exit code 1; what was accepted is read
back; a benchmark whose check failed is never accepted; kinds of machines do not mix.

Not checked here: that the benchmarks run (their own tests), and their figures.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from launch import cli, commands
from launch.bench import suite
from launch.bench.machine import describe_machine
from launch.provenance import ROOT


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> dict[str, dict[str, Any]]:
    """Answers that stand in for the benchmarks."""
    given = {name: {"checked": True, **dict.fromkeys(part.ratios, 1.0)} for name, part in suite.SUITE.items()}

    def run(command: list[str]) -> dict[str, Any]:
        assert command[0] == "bench"
        body, arguments = commands.COMMANDS[f"bench {command[1]}"], command[2:]
        cli.parse_and_call("bench", body, _nothing_like(cli.load(command[1], body)), arguments)
        return given[command[1]]

    monkeypatch.setattr(suite, "run_windlass", run)
    return given


def _nothing_like(body: Any) -> Any:
    import functools

    @functools.wraps(body)
    def nothing(*positional: Any, **named: Any) -> None:
        return None

    return nothing


def test_what_was_accepted_is_compared(
    answers: dict[str, dict[str, Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = ["--accepted", str(tmp_path)]
    assert cli.run(["bench", "suite", "--json", str(tmp_path / "answer"), *folder]) == 0
    schema = json.loads((ROOT / "docs" / "schemas" / "bench-suite.schema.json").read_text())
    jsonschema.Draft202012Validator(schema).validate(json.loads((tmp_path / "answer").read_text()))
    (tmp_path / "answer").unlink()
    assert "nothing is accepted yet" in capsys.readouterr().out
    assert cli.run(["bench", "suite", "--accept", *folder]) == 0
    kind = describe_machine()["kind"]["cpu"]
    content = json.loads((tmp_path / f"{kind}.json").read_text())
    assert content["ratios"]["sync.link_fraction"] == 1.0
    answers["sync"]["link_fraction"] = 1 - suite.TOLERANCE + 0.01
    assert cli.run(["bench", "suite", *folder]) == 0
    answers["sync"]["link_fraction"] = 1 - suite.TOLERANCE - 0.01
    capsys.readouterr()
    assert cli.run(["bench", "suite", *folder]) == 1
    told = [line for line in capsys.readouterr().out.splitlines() if "SLOWER" in line]
    assert len(told) == 1
    assert "sync.link_fraction 0.74, accepted 1 (-26 %)" in told[0]
    assert cli.run(["bench", "suite", "--only", "reward", *folder]) == 0


def test_wrong_results_are_never_accepted(answers: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    answers["reward"]["checked"] = False
    assert cli.run(["bench", "suite", "--accept", "--accepted", str(tmp_path)]) == 1
    assert not list(tmp_path.iterdir())


def test_accepting_a_part_keeps_the_rest(answers: dict[str, dict[str, Any]], tmp_path: Path) -> None:
    folder = ["--accepted", str(tmp_path)]
    assert cli.run(["bench", "suite", "--accept", *folder]) == 0
    answers["reward"]["speedup_vs_loop"] = 7.0
    assert cli.run(["bench", "suite", "--accept", "--only", "reward", *folder]) == 0
    ratios = json.loads(next(tmp_path.iterdir()).read_text())["ratios"]
    assert ratios["reward.speedup_vs_loop"] == 7.0
    assert ratios["sync.link_fraction"] == 1.0


def test_strange_requests_are_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(["bench", "suite", "--only", "speed"]) == 2
    assert "--only: speed; legal: rollout" in capsys.readouterr().err
    kind = describe_machine()["kind"]["cpu"]
    (tmp_path / f"{kind}.json").write_text('{"format": 2}')
    assert cli.run(["bench", "suite", "--accepted", str(tmp_path)]) == 2
    assert "format 2" in capsys.readouterr().err


def test_the_accepted_files_of_the_tree_are_read() -> None:
    for path in suite.ACCEPTED.glob("*.json"):
        content = suite.read_accepted(path)
        assert content["kind"] == path.stem
        known = {f"{name}.{field}" for name, part in suite.SUITE.items() for field in part.ratios}
        assert set(content["ratios"]) <= known
