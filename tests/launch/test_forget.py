"""Contract: `windlass data forget` leaves no row of a user in a dataset, a log (exposures and responses) and the rows
that wait in a registry, and every other row as it was; the dataset opens, the log reads, the service takes nothing of
it for late or rewritten and trains on the rest; later lineages tell of it. A wrong user, or an update under way, is
refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jsonschema
import pyarrow.parquet as pq
import pytest

from data.dataset import Dataset
from data.feedback_reading import read_feedback
from data.inspection import inspect_dataset
from data.responses import read_responses, responses_table, write_responses
from launch import cli
from launch.continual.files import Files
from launch.continual.journal import Journal
from launch.continual.reasons import Decision
from launch.continual.registry import Registry
from launch.provenance import ROOT
from tests.data.tiny import import_events
from tests.launch.continual import world
from tests.launch.continual.dying_files import DyingFiles, Killed
from tests.launch.continual.world import CHECKS, SETTINGS, days, rows

ONE, TWO = days(2)


def test_a_dataset_forgets(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    events = [(user, f"i{(user + step) % 5}", 100 * step + user) for user in (7, 8, 9) for step in range(6)]
    dataset = import_events(tmp_path, events)
    before = dataset.events
    key = dataset.users()["user_key"].to_pylist()[1]
    target = tmp_path / "answer.json"
    assert cli.run(["data", "forget", key, "--dataset", str(dataset.path), "--json", str(target)]) == 0
    answer = json.loads(target.read_text())
    jsonschema.validate(answer, json.loads((ROOT / "docs" / "schemas" / "data-forget.schema.json").read_text()))
    assert answer == {"user_id": 1, "rows": {"interactions": 6}}
    after = Dataset.open(dataset.path)
    kept = before.user_E != 1
    assert after.events.user_E.tolist() == before.user_E[kept].tolist()
    assert after.events.item_E.tolist() == before.item_E[kept].tolist()
    assert after.users()["user_key"].to_pylist()[1] is None
    assert after.fingerprint != dataset.fingerprint
    assert 1 not in after.samples("train").user_id_N
    # The last events were this user's: an empty split is told, not a failure.
    assert inspect_dataset(dataset.path)["splits"]["test"] == {"rows": 0}
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []
    assert cli.run(["data", "forget", key, "--dataset", str(dataset.path)]) == 2
    assert "user_key" in capsys.readouterr().err


class Place:
    """A log of two users on two days, of which the first was trained on."""

    def __init__(self, folder: Path) -> None:
        self.log, self.root = folder / "log", folder / "registry"
        self.policy = world.first_name(folder / "first")
        self.model = folder / "first" / "model"
        self.day(ONE)

    def day(self, day: str) -> None:
        mixed = [row | {"user_id": 1 + number % 4} for number, row in enumerate(rows(day, range(40), self.policy))]
        world.write_file(self.log, day, "a.parquet", mixed)
        world.finish_day(self.log, day, {"a.parquet": 40})
        told = [(f"{day}-{number}", 2, 1.0, 0) for number in (0, 1, 2)]
        write_responses(self.log / f"day={day}", "part-0", responses_table(told))

    def run(self, files: Files | None = None) -> list[Any]:
        settings = SETTINGS.model_copy(update={"late_responses_every_s": 0.0})
        return world.cycle(self.log, self.root, self.model, files=files, settings=settings).run()

    def forget(self, *arguments: str) -> int:
        return cli.run(["data", "forget", "3", "--log", str(self.log), "--registry", str(self.root), *arguments])


def users(paths: list[Path]) -> set[int]:
    return {user for path in paths for user in pq.read_table(path)["user_id"].to_pylist()}


def test_a_log_and_its_registry_forget(tmp_path: Path) -> None:
    place = Place(tmp_path)
    place.run()
    place.day(TWO)
    assert place.forget("--json", str(tmp_path / "answer.json")) == 0
    answer = json.loads((tmp_path / "answer.json").read_text())
    assert answer["user_id"] == 3
    assert answer["rows"] == {"exposures": 20, "responses": 2, "waiting": 1}
    kept = sorted(place.root.glob("continual/rows/*/*/*.parquet"))
    assert kept
    assert users([*sorted(place.log.glob("day=*/*.parquet")), *kept]) == {1, 2, 4}
    _, counts = read_responses(place.log / f"day={ONE}")
    assert not counts
    assert len(read_feedback(place.log, CHECKS)) == 60
    (result,) = place.run()
    assert (result.day, result.decision) == (TWO, Decision.PROMOTED)
    lineage = Registry(place.root).version(3).lineage
    assert [(entry["user_id"], entry["versions"]) for entry in lineage["forgotten"]] == [(3, [1, 2])]
    trained = (place.root / "current" / world.WEIGHTS).read_text().splitlines()[2]
    assert f"{TWO}-2" not in trained.split()
    assert place.run() == []
    assert place.forget() == 0
    assert len(Journal(place.root / "continual" / "journal", Files()).passes()) == 2


def test_wrong_requests_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    place = Place(tmp_path)
    with pytest.raises(Killed):
        place.run(DyingFiles(30))
    assert place.forget() == 2
    assert "is under way" in capsys.readouterr().err
    for arguments in (["3"], ["somebody", "--log", str(place.log)], ["3", "--log", str(tmp_path / "none")]):
        assert cli.run(["data", "forget", *arguments]) == 2
