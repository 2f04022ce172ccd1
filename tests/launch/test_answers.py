"""Contract: what the commands print with `--json -` is JSON alone and matches docs/schemas.

Not checked here: `eval`, which needs a model (its own tests do it), and that the values are right.
"""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from launch import cli
from launch.provenance import ROOT
from tests.requirements import SHARED_DATA, require


def answer(capsys: pytest.CaptureFixture[str], schema: str, *arguments: str) -> None:
    """Run a command and check its answer."""
    code = cli.run([*arguments, "--json", "-"])
    printed = json.loads(capsys.readouterr().out)
    content = json.loads((ROOT / "docs" / "schemas" / f"{schema}.schema.json").read_text())
    jsonschema.Draft202012Validator(content).validate(printed)
    assert code == printed.get("exit_code", 0)


def test_doctor(capsys: pytest.CaptureFixture[str]) -> None:
    answer(capsys, "doctor", "doctor")


def test_data_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require("movielens")
    folder = str(tmp_path / "ml")
    answer(capsys, "data-import", "data", "import", "--out", folder)
    answer(capsys, "data-inspect", "data", "inspect", "--dataset", folder)
    sizes = ["--level-sizes", "32", "32", "32", "--dims", "16"]
    answer(capsys, "data-ids", "data", "ids", "--dataset", folder, "--source", "cooccurrence", *sizes)


def test_bandit(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    require("shared-data")
    sample = str(SHARED_DATA / "open_bandit_sample")
    answer(capsys, "data-bandit", "data", "bandit", "--path", sample, "--policy", "bts", "--out", str(tmp_path / "log"))
