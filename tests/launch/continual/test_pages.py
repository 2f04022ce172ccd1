"""Pages of a registry and of a replay: every decision, reason and number of the guard is there, a rejection says which
condition failed by how much, pages lie beside the versions and change none, and `windlass report` writes them.

The decisions come from the cycle's stub updater. How a page looks was looked at in a browser, not here.
"""

from __future__ import annotations

import json
from html import unescape
from pathlib import Path
from typing import Any

import pytest

from launch import cli
from launch.continual.registry import Registry
from launch.continual.registry_report import registry_page, version_page, write_version_page
from launch.continual.replay_report import replay_page
from tests.launch.continual.world import cycle, days, finish_day, first_model, first_name, rows, write_file


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    """A promoted day and a rejected one."""
    log, policy = tmp_path / "log", first_name(tmp_path / "first")
    one, two = days(2)
    write_file(log, one, "a.parquet", rows(one, range(40), policy))
    write_file(log, two, "a.parquet", rows(two, range(40), policy, response=[0.0]))
    for day in (one, two):
        finish_day(log, day)
    root = tmp_path / "registry"
    results = cycle(log, root, first_model(tmp_path / "first" / "model")).run()
    assert [result.decision.value for result in results] == ["promoted", "rejected"]
    return Registry(root)


def test_a_rejection_is_legible(registry: Registry) -> None:
    page = unescape(version_page(registry, 3).html())
    assert "Version 3: rejected" in page
    lineage = registry.version(3).lineage
    for told in lineage["reasons"]:
        assert told["found"] in page
    assert "response higher than 0.3, tolerance 0.1, harm: loss (loss 0.3 to 0.3 at 95%)" in page
    assert f">{lineage['counts']['held_out']:,}<" in page


def test_promotions_and_the_first_version_have_pages(registry: Registry) -> None:
    assert "Version 2: promoted" in version_page(registry, 2).html()
    assert "the first version" in version_page(registry, 1).html()
    overview = unescape(registry_page(registry).html())
    for number in (1, 2, 3):
        assert f"<td>{number}</td>" in overview
    assert "<svg" in overview


def test_pages_change_no_version(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert write_version_page(registry, 2) == registry.root / "reports" / "000002.html"
    assert cli.run(["report", str(registry.root)]) == 0
    assert capsys.readouterr().out.strip().endswith("reports/index.html")
    assert sorted(path.name for path in (registry.root / "reports").iterdir()) == [
        *(f"{number:06d}.html" for number in (1, 2, 3)),
        "index.html",
    ]
    for number in registry.numbers():
        registry.verify(number)
    assert cli.run(["report", str(registry.root), "--version", "9"]) == 2
    assert cli.run(["report", str(registry.root.parent), "--version", "1"]) == 2


def record(period: int, update: dict[str, Any] | None, hr: float) -> dict[str, Any]:
    return {
        "period": period,
        "version": period,
        "metrics": {"hr@10": hr, "repeat_exposure": 0.25},
        "ci95": {"hr@10": [hr - 0.01, hr + 0.01]},
        "served": {"rows": 10, "responses": 3, "response_rate": 0.3, "items": 7},
        "update": update,
    }


def test_a_replay_has_one_page_over_its_periods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "replay.json").write_text(
        json.dumps({"periods": 2, "rows": 10, "seed": 3, "dataset_fingerprint": "abc"})
    )
    assert cli.run(["report", str(tmp_path)]) == 2
    update = {"decision": "rejected", "reasons": [{"reason": "guard", "found": "hr@10 fell"}]}
    for arm, hr in (("none", 0.1234), ("abpo", 0.2345)):
        (tmp_path / arm / "periods").mkdir(parents=True)
        for period in (1, 2):
            told = update if arm == "abpo" and period == 2 else None
            (tmp_path / arm / "periods" / f"{period:02d}.json").write_text(json.dumps(record(period, told, hr)))
    (tmp_path / "abpo" / "updates").mkdir()
    steps = [{"step": 0, "ndcg@10": 0.1}, {"step": 1, "loss": 1.0, "anchor/weight_mean": 0.75}]
    (tmp_path / "abpo" / "updates" / "01.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
    page = unescape(replay_page(tmp_path).html())
    for expected in ("0.1234", "0.2345", "0.2245 to 0.2445", "guard: hr@10 fell", "0.7500", "SFT"):
        assert (expected in page) == (expected != "SFT")
    assert cli.run(["report", str(tmp_path)]) == 0
    assert (tmp_path / "report.html").is_file()
