"""Contract: `windlass bench partition` times a whole day with every row used, and answers as all benchmarks do.

Not checked: its figures.
"""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema

from launch import cli
from launch.provenance import ROOT


def test_a_small_day(tmp_path: Path) -> None:
    arguments = ["bench", "partition", "--rows", "3000", "--repeats", "1", "--json", str(tmp_path / "answer.json")]
    assert cli.run(arguments) == 0
    answer = json.loads((tmp_path / "answer.json").read_text())
    jsonschema.validate(answer, json.loads((ROOT / "docs" / "schemas" / "bench.schema.json").read_text()))
    assert answer["checked"]
    counts = answer["counts"]
    assert counts["train"] + counts["held_out"] == counts["rows"] == 3000
    assert counts["responses"] == 150
    assert answer["rows_per_s"] > 0
    assert answer["journal_and_registry_s"] > 0
